"""Candidates, pictures with texts, from three layouts: rows of (id, image bytes, texts, label) out, a range at a time.

    parquet          columns for the id, the image bytes and the alt-text (and perhaps a label)
    rsicd            a JSON with images[].{filename, split, sentences[].raw} and a folder of pictures
    captioned_folder a captions.jsonl with {file, captions} beside the pictures

Everything here is untrusted. Pictures stay bytes; nothing is decoded or judged. Extension types in Parquet are refused
before a row is read, because reading them may run code.
"""

import base64
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.progress import Progress

from rsplatform import storage
from rsplatform.config import Config, ConfigError, InputPath
from rsplatform.sources.listings import (
    CAPTIONS_FILE,
    draw_texts,
    inside,
    only_pictures,
    read_captions_jsonl,
    read_rsicd,
)

MAX_FILE_BYTES = 64 * 2**20
CANDIDATES_PER_READ = 512


@dataclass(frozen=True)
class Candidate:
    """One web image-text pair before filtering; `image` is None if its file could not be read (`problem` says why)."""

    id: str
    image: bytes | None
    texts: tuple[str, ...]
    label: bool | None = None
    problem: str = ""


class RowRange(Config):
    """Rows [start, stop) of a source, after a shuffle with a fixed seed if `shuffled`: disjoint parts of one source."""

    start: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=0)
    shuffled: bool = True


class ParquetCandidates(Config):
    """A Parquet file of image bytes and alt-text."""

    type: Literal["parquet"] = "parquet"
    path: InputPath
    id_column: str = "id"
    image_column: str = "image"
    text_column: str = "alt_text"
    label_column: str | None = None
    rows: RowRange = RowRange(shuffled=False)


class RsicdCandidates(Config):
    """RSICD's layout: one JSON and one folder. `texts_per_picture`: so many texts, drawn by the id; null: all."""

    type: Literal["rsicd"] = "rsicd"
    captions: InputPath
    images: InputPath
    split: str = "train"
    texts_per_picture: int | None = Field(default=None, ge=1)
    rows: RowRange = RowRange()


class CaptionedFolderCandidates(Config):
    """A folder with captions.jsonl. `texts_per_picture`: so many texts, drawn by the id; null: all."""

    type: Literal["captioned_folder"] = "captioned_folder"
    path: InputPath
    texts_per_picture: int | None = Field(default=None, ge=1)
    rows: RowRange = RowRange()

    def select_files(self, names: Sequence[str]) -> list[str]:
        """The list and the pictures; ConfigError without the list."""
        if CAPTIONS_FILE not in names:
            raise ConfigError(f"no {CAPTIONS_FILE}; fix `path`, or `type` for pictures without texts")
        return [CAPTIONS_FILE, *only_pictures(names)]


class PictureFolderCandidates(Config):
    """A folder of pictures without texts (for training and testing the overhead filter)."""

    type: Literal["pictures"] = "pictures"
    path: InputPath
    rows: RowRange = RowRange()

    def select_files(self, names: Sequence[str]) -> list[str]:
        """The pictures; ConfigError if there is none."""
        pictures = only_pictures(names)
        if not pictures:
            raise ConfigError("no pictures; fix `path`")
        return pictures


CandidateSource = Annotated[
    ParquetCandidates | RsicdCandidates | CaptionedFolderCandidates | PictureFolderCandidates,
    Field(discriminator="type"),
]
Resolve = Callable[[str], str]


def count_candidates(source: CandidateSource, resolve: Resolve) -> int:
    """How many candidates a source has in its range.

    Raises:
        ConfigError: a missing or unsuitable file; the message names it.
    """
    return len(_row_numbers(source, _num_rows(source, resolve)))


def read_candidates(source: CandidateSource, resolve: Resolve, start: int, stop: int) -> list[Candidate]:
    """Candidates [start, stop) of a source's range, always in the same order.

    Raises:
        ConfigError: a missing or unsuitable file. A single unreadable picture is a candidate with a `problem`.
    """
    numbers = _row_numbers(source, _num_rows(source, resolve))[start:stop]
    if isinstance(source, ParquetCandidates):
        return _read_parquet(source, resolve(source.path), numbers)
    listing = _listing(source, resolve)
    return [_read_file(*listing[number]) for number in numbers]


def all_candidates(source: CandidateSource, resolve: Resolve, description: str) -> Iterator[Candidate]:
    """Every candidate of a source's range, a run at a time in memory, under a progress bar."""
    total = count_candidates(source, resolve)
    with Progress(transient=True) as bar:
        task = bar.add_task(description, total=total)
        for start in range(0, total, CANDIDATES_PER_READ):
            for candidate in read_candidates(source, resolve, start, min(start + CANDIDATES_PER_READ, total)):
                yield candidate
                bar.advance(task)


def _row_numbers(source: CandidateSource, num_rows: int) -> list[int]:
    numbers = list(range(num_rows))
    if source.rows.shuffled:
        random.Random(0).shuffle(numbers)
    return numbers[source.rows.start : source.rows.stop]


def _num_rows(source: CandidateSource, resolve: Resolve) -> int:
    if isinstance(source, ParquetCandidates):
        with open_parquet(resolve(source.path), _columns(source)) as file:
            return file.metadata.num_rows
    return len(_listing(source, resolve))


def _columns(source: ParquetCandidates) -> list[str]:
    columns = [source.id_column, source.image_column, source.text_column]
    return [*columns, source.label_column] if source.label_column else columns


def open_parquet(place: str, columns: list[str]) -> pq.ParquetFile:
    """Open third-party Parquet after looking at its footer only.

    Raises:
        ConfigError: missing, no Parquet, a column that is absent, or an extension type (reading one may run code).
    """
    if not storage.exists(place):
        raise ConfigError(f"candidates: {place} does not exist; fix the path or metadata.rsplatform.data_root")
    system, path = storage.filesystem(place)
    try:
        stream = system.open_input_file(path)
        file = pq.ParquetFile(stream, arrow_extensions_enabled=False)
        # the Parquet schema is plain data; the Arrow schema in the metadata is what may name extension types
        metadata = file.metadata.metadata or {}
        schema = file.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"candidates: {place} is no readable Parquet file: {error}") from error
    if any(_has_extension(field) for field in schema) or b"ARROW:extension" in _arrow_schema(metadata):
        raise ConfigError(
            f"candidates: {place} holds extension types, which may run code when read; rewrite it without"
        )
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise ConfigError(f"candidates: {place} has no column {missing[0]!r}; it has {', '.join(schema.names)}")
    return file


def _has_extension(field: pa.Field) -> bool:
    kind = field.type
    names_one = bool(field.metadata) and any(key.startswith(b"ARROW:extension") for key in field.metadata)
    children = [kind.field(index) for index in range(kind.num_fields)] if kind.num_fields else []
    return isinstance(kind, pa.BaseExtensionType) or names_one or any(_has_extension(child) for child in children)


def _arrow_schema(metadata: dict[bytes, bytes]) -> bytes:
    return base64.b64decode(metadata.get(b"ARROW:schema", b""))


def _read_parquet(source: ParquetCandidates, place: str, numbers: list[int]) -> list[Candidate]:
    """Reads only the row groups that hold the wanted rows."""
    columns = _columns(source)
    rows: dict[int, dict[str, Any]] = {}
    wanted = set(numbers)
    with open_parquet(place, columns) as file:
        first = 0
        for group in range(file.num_row_groups):
            stop = first + file.metadata.row_group(group).num_rows
            if wanted & set(range(first, stop)):
                for offset, row in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                    rows[first + offset] = row
            first = stop
    return [_from_row(source, rows[number]) for number in numbers]


def _from_row(source: ParquetCandidates, row: dict[str, Any]) -> Candidate:
    image, text = row[source.image_column], row[source.text_column]
    label = bool(row[source.label_column]) if source.label_column else None
    problem = "" if isinstance(image, bytes) else "no_image"
    texts = (text,) if isinstance(text, str) else ()
    return Candidate(str(row[source.id_column]), image if isinstance(image, bytes) else None, texts, label, problem)


def _listing(source: CandidateSource, resolve: Resolve) -> list[tuple[str, str, tuple[str, ...]]]:
    """(id, place of the picture, texts) of every picture, sorted by id."""
    number = None
    if isinstance(source, RsicdCandidates):
        folder, prefix, number = resolve(source.images).rstrip("/"), "rsicd", source.texts_per_picture
        listed = read_rsicd(resolve(source.captions), source.split)
    elif isinstance(source, CaptionedFolderCandidates):
        folder, number = resolve(source.path).rstrip("/"), source.texts_per_picture
        prefix, listed = PurePosixPath(folder).name, read_captions_jsonl(f"{folder}/{CAPTIONS_FILE}")
    elif isinstance(source, PictureFolderCandidates):
        folder = resolve(source.path).rstrip("/")
        prefix, listed = PurePosixPath(folder).name, [(name, ()) for name in only_pictures(storage.list_files(folder))]
    else:
        raise TypeError(f"{type(source).__name__} has no listing")
    if not listed:
        raise ConfigError(f"candidates: {folder}: no pictures; fix the path, the split or the data root")
    return sorted(
        (f"{prefix}/{name}", inside(folder, name), draw_texts(f"{prefix}/{name}", texts, number))
        for name, texts in listed
    )


def _read_file(candidate_id: str, place: str, texts: tuple[str, ...]) -> Candidate:
    try:
        return Candidate(candidate_id, storage.read_bytes(place), texts)
    except OSError:
        return Candidate(candidate_id, None, texts, problem="missing_file")
