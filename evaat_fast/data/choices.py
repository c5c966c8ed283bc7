"""The words that options take, in one place. It imports nothing, for the configuration and the command line have the same."""

from typing import Literal, get_args

Corpus = Literal["ek100-mir", "ek100-clips", "egoclip", "egoclip-plus", "charades-ego", "clips", "csv"]
Split = Literal["train", "test"]
Frames = Literal["ordered", "shuffled", "reversed", "frozen"]
Sampler = Literal["avion", "lavila"]
Positive = Literal["own", "relevant"]
Similarity = Literal["labels", "text-tower"]
Decoder = Literal["auto", "av", "torchcodec", "decord"]

CORPORA: tuple[Corpus, ...] = get_args(Corpus)
LABELLED: tuple[Corpus, ...] = ("ek100-mir", "ek100-clips", "charades-ego", "csv")  # whose clips have what relevancy is made of
LABEL_COLUMNS = ("verb*", "noun*", "label*", "class*")  # of a file of captions, where nobody says which
SPLITS: tuple[Split, ...] = get_args(Split)
FRAMES: tuple[Frames, ...] = get_args(Frames)
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
POSITIVES: tuple[Positive, ...] = get_args(Positive)
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
DECODERS: tuple[Decoder, ...] = get_args(Decoder)


def check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")
