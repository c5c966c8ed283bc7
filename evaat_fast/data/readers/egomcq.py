"""EgoMCQ, EgoVLP's multiple-choice questions on Ego4D: egomcq.json.

    questions = egomcq.read("egomcq.json")
    questions.clips                 # the ClipTable of the distinct candidates
    questions.texts[0], questions.choices[0], questions.answers[0], questions.types[0]

The file maps "0" to "N-1" to {"answer", "query": {"clip_text", ...}, "choices": {"0" to "4": {"video_uid", "clip_start",
"clip_end", "clip_text"}}, "types"}. **types 1 is inter-video**, whose wrong candidates are of other videos (where models are 90
to 96 % right), **and 2 is intra-video**, whose five are of one video (57 to 66 %). EgoVLP, EgoVLPv2, LaViLa and HelpingHands
print the two names swapped; here they are as the paper has them, and `read` holds the file to it.

Source: Lin et al., "Egocentric Video-Language Pretraining", NeurIPS 2022 (arXiv 2206.01670).
"""

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaat_fast.data.readers.text import content, number, short
from evaat_fast.data.table import ClipTable

__all__ = ["INTER", "INTRA", "Questions", "read"]

_log = logging.getLogger("evaat_fast")
INTER, INTRA = 1, 2
_CHOICES = 5


@dataclass(frozen=True)
class Questions:
    """Q questions. texts: of each, the query. choices: int64 [Q, 5], rows of `clips`. answers: int64 [Q], 0 to 4. types:
    int64 [Q], INTER or INTRA. clips: a row for each distinct (video, start, stop), with the texts that it is given."""

    texts: list[str]
    choices: np.ndarray
    answers: np.ndarray
    types: np.ndarray
    clips: ClipTable

    def __len__(self) -> int:
        return len(self.texts)


def read(path: str | os.PathLike[str]) -> Questions:
    """The questions of egomcq.json, in the order of their numbers.

    Raises:
        FileNotFoundError: no such file. ValueError: no JSON, or a question that is not as above; the message names the file,
        the question and the key.
        ImportError: pyarrow is missing.
    """
    path, text = content(path)
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: expected JSON: {error.msg}; cut short?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: {error if isinstance(error, ValueError) else 'lists within lists, deeper than data is'}"
        ) from None
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path}: expected an object with the questions '0', '1', ..., got {short(data)}")
    absent = next((str(i) for i in range(len(data)) if str(i) not in data), None)
    if absent is not None:
        raise ValueError(f"{path}: expected the questions '0' to '{len(data) - 1}', of which {absent!r} is missing")
    rows: dict[tuple[str, float, float], int] = {}
    said: list[dict[str, None]] = []
    texts, choices, answers, types, strays = [], [], [], [], []
    for key in map(str, range(len(data))):
        fault = _Fault(path, f"question {key!r}")
        question = fault.object(data[key], "question")
        query = fault.object(fault.get(question, "query"), "query")
        texts.append(fault.text(query, "clip_text"))
        answers.append(fault.whole(question, "answer", range(_CHOICES)))
        types.append(fault.whole(question, "types", (INTER, INTRA)))
        given = fault.object(fault.get(question, "choices"), "choices")
        if sorted(given) != [str(i) for i in range(_CHOICES)]:
            raise fault.error("choices", f"the choices '0' to '{_CHOICES - 1}'", sorted(given))
        found, videos = [], set()
        for name in sorted(given):
            choice = _Fault(path, f"question {key!r}, choice {name!r}")
            clip = choice.object(given[name], "choice")
            video = choice.text(clip, "video_uid")
            start, stop = (max(0.0, choice.number(clip, column)) for column in ("clip_start", "clip_end"))
            if stop < start:
                raise choice.error("clip_end", f"a time from clip_start, {start:g}, on", stop)
            videos.add(video)
            row = rows.setdefault((video, start, stop), len(rows))
            if row == len(said):
                said.append({})
            said[row][choice.text(clip, "clip_text")] = None
            found.append(row)
        choices.append(found)
        if (types[-1] == INTRA) != (len(videos) == 1):
            strays.append(key)
    if 2 * len(strays) > len(data):
        raise ValueError(
            f"{path}: types: expected 1 for candidates of other videos and 2 for candidates of one; in {len(strays)} of "
            f"{len(data)} questions it is not so, first {strays[0]!r}"
        )
    if strays:
        _log.warning("%s: the candidates of %s of %s questions are not of their type's videos", path, len(strays), len(data))
    columns: dict[str, Any] = {
        "id": [f"{video}/{start!r}-{stop!r}" for video, start, stop in rows],
        "video": [video for video, _, _ in rows],
        "start": np.array([start for _, start, _ in rows]),
        "stop": np.array([stop for _, _, stop in rows]),
        "texts": [list(words) for words in said],
    }
    clips = ClipTable.of(columns, dataset="egomcq", split="test", source=[path.name], questions=len(data), strays=len(strays))
    return Questions(texts, np.array(choices), np.array(answers), np.array(types), clips)


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"expected each key once, got {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return found


class _Fault:
    """Reads values of one question, and names it in what it raises."""

    def __init__(self, path, where):
        self.path, self.where = path, where

    def error(self, key: str, expected: str, got: Any) -> ValueError:
        return ValueError(f"{self.path}: {self.where}: {key}: expected {expected}, got {short(got)}")

    def object(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return value

    def get(self, found: dict[str, Any], key: str) -> Any:
        if key not in found:
            raise ValueError(
                f"{self.path}: {self.where}: expected the key {key!r}, got {', '.join(map(repr, found)) or 'none'}"
            )
        return found[key]

    def text(self, found: dict[str, Any], key: str) -> str:
        value = self.get(found, key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "a text", value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(key, "a text in Unicode", value) from None
        return value.strip()

    def number(self, found: dict[str, Any], key: str) -> float:
        value = self.get(found, key)
        seconds = number(str(value)) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
        if seconds is None:
            raise self.error(key, "a finite number of seconds", value)
        return seconds

    def whole(self, found: dict[str, Any], key: str, allowed: Any) -> int:
        value = self.get(found, key)
        if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
            raise self.error(key, f"one of {', '.join(map(str, allowed))}", value)
        return value
