"""Lists of pictures with texts, as third parties write them: a place in; file names with their texts out.

    RSICD           a JSON with images[].{filename, split, sentences[].raw}
    captions.jsonl  a line of {file, captions} for each picture

Untrusted: a name that points out of its folder and a broken entry are errors that name the file and the entry. Each
text of a picture is given once. Opens no picture and judges no text.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from rsplatform import storage
from rsplatform.config import ConfigError

CAPTIONS_FILE = "captions.jsonl"
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
Listed = list[tuple[str, tuple[str, ...]]]  # (file name, texts)


def read_rsicd(place: str, split: str) -> Listed:
    """The pictures of one split of RSICD's JSON; spaces before full stops are joined away.

    Raises:
        ConfigError: missing, no JSON, or an entry that is not as the layout says.
    """
    document = _parse(_read(place), place)
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list):
        raise ConfigError(f"candidates: {place}: holds no list `images`; give RSICD's dataset_rsicd.json")
    listed = []
    for index, item in enumerate(images):
        where = f"{place}: images[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("split"), str):
            raise ConfigError(f"candidates: {where}: needs `split` as text; fix or delete this entry")
        if item["split"] == split:
            texts = [sentence.get("raw") for sentence in _dicts(item.get("sentences"))]
            name, texts = _checked(where, item.get("filename"), texts, "filename and sentences[].raw")
            listed.append((name, tuple(dict.fromkeys(" ".join(text.replace(" .", ".").split()) for text in texts))))
    return listed


def read_captions_jsonl(place: str) -> Listed:
    """The pictures of a captions.jsonl.

    Raises:
        ConfigError: missing, or a line that is not as the layout says.
    """
    return [
        _checked(where, item.get("file"), item.get("captions"), "file and captions")
        for where, item in _json_lines(place)
    ]


def only_pictures(names: Iterable[str]) -> list[str]:
    """Those of some files that are pictures, by their endings."""
    return [name for name in names if name.lower().endswith(PICTURE_ENDINGS)]


def inside(folder: str, name: str) -> str:
    """The place of a file that a third-party list names; ConfigError if it points out of its folder."""
    if name.startswith("/") or "://" in name or ".." in PurePosixPath(name).parts:
        raise ConfigError(f"candidates: {name!r} points out of {folder}")
    return f"{folder}/{name}"


def draw_texts(picture_id: str, texts: tuple[str, ...], number: int | None) -> tuple[str, ...]:
    """`number` of a picture's texts (None: all), always the same ones for an id; more hold those of fewer."""
    if number is None:
        return texts
    order = list(texts)
    random.Random(f"texts of {picture_id}").shuffle(order)
    return tuple(order[:number])


def _checked(where: str, name: Any, texts: Any, fields: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"candidates: {where}: needs {fields} as text; fix or delete this entry")
    return name, tuple(dict.fromkeys(texts))


def _dicts(items: Any) -> list[dict[str, Any]]:
    """The items; one that is no object counts as an empty one, which has nothing that is asked of it."""
    return [item if isinstance(item, dict) else {} for item in items] if isinstance(items, list) else [{}]


def _json_lines(place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every line that is not blank."""
    for number, line in enumerate(_read(place).splitlines(), 1):
        if line.strip():
            where = f"{place} line {number}"
            yield where, _dicts([_parse(line, where)])[0]


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # also bytes that are no UTF-8
        raise ConfigError(f"candidates: {where} is not valid JSON: {error}; fix or delete it") from error


def _read(place: str) -> bytes:
    try:
        return storage.read_bytes(place)
    except FileNotFoundError as error:
        raise ConfigError(
            f"candidates: {place} does not exist; fix the path or metadata.rsplatform.data_root"
        ) from error
