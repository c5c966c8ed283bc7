"""What timm's and open_clip's EVA02-CLIP answer on tiny models with weights made by formula.

    cd tests && python -m golden.eva02_clip

writes eva02_clip.json beside this file: per model the names and shapes of open_clip's parameters, and both embeddings.
It needs timm and open_clip; the test that reads it needs neither.
"""

import json
import zlib
from pathlib import Path

import torch

FILE = Path(__file__).with_suffix(".json")
EMBED, VOCABULARY, CONTEXT = 32, 128, 20
TEXT = dict(width=48, heads=3, layers=2)
# Ours, and the same in timm's words. Both keep the rotary embedding of their family: reference grid 16.
MODELS = {
    "eva02_at_base_patch16_224": dict(
        ours=dict(image_size=64, vision_width=64, vision_layers=2, vision_heads=2, vision_mlp=170),
        timm=("eva02_base_patch16_clip_224", dict(img_size=64, embed_dim=64, depth=2, num_heads=2)),
    ),
    "eva02_at_large_patch14_224": dict(
        ours=dict(image_size=42, vision_width=96, vision_layers=1, vision_heads=3, vision_mlp=256),
        timm=("eva02_large_patch14_clip_224", dict(img_size=42, embed_dim=96, depth=1, num_heads=3)),
    ),
}


def wave(name, shape):
    """float64 in -0.5..0.5 that looks random and is the same everywhere."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    x = torch.sin(count * 12.9898 + zlib.crc32(name.encode()) % 1000) * 43758.5453
    return (x - x.floor() - 0.5).reshape(shape)


def weight(name, shape):
    """float32 of a sensible size: norms about 1, matrices by their fan-in, the rest small."""
    x = wave(name, shape)
    if len(shape) == 1 and name.endswith("weight"):
        return (1 + x).float()
    if name == "logit_scale":
        return (2 + x).float()
    return (x * (3 / x[0].numel()) ** 0.5 * 2 if len(shape) > 1 and shape[0] > 1 else x).float()


def image(name, size):
    """float32 [2, 3, size, size], as if normalised."""
    return (4 * wave(name, (2, 3, size, size))).float()


def tokens():
    """int64 [3, CONTEXT]: the highest id ends each text, at the end, in the middle and right after the start."""
    ids = ((wave("tokens", (3, CONTEXT)) + 0.5) * (VOCABULARY - 2)).long()
    for row, end in zip(ids, (CONTEXT - 1, 9, 1), strict=True):
        row[0], row[end], row[end + 1 :] = VOCABULARY - 2, VOCABULARY - 1, 0
    return ids


def main():
    from peers import peer

    timm, TextTransformer = peer("timm"), peer("open_clip.transformer").TextTransformer
    answers = {}
    for name, case in MODELS.items():
        timm_name, changes = case["timm"]
        visual = timm.create_model(timm_name, num_classes=EMBED, **changes).eval()
        text = TextTransformer(context_length=CONTEXT, vocab_size=VOCABULARY, output_dim=EMBED, **TEXT).eval()
        shapes = {}
        for prefix, tower in (("visual.trunk.", visual), ("text.", text)):
            state = {k: weight(prefix + k, v.shape) for k, v in tower.state_dict().items()}
            tower.load_state_dict(state)
            shapes.update({prefix + k: list(v.shape) for k, v in state.items()})
        with torch.no_grad():
            pictures = visual(image(name, case["ours"]["image_size"]))
            captions = text(tokens())
        answers[name] = dict(shapes={**shapes, "logit_scale": []}, image_embed=pictures.tolist(), text_embed=captions.tolist())
    FILE.write_text(json.dumps(dict(versions=dict(timm=timm.__version__, torch=torch.__version__), models=answers)))


if __name__ == "__main__":
    main()
