"""Candidates: ranges of a source are disjoint, and files that could run code or point elsewhere are refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsplatform.config import ConfigError
from rsplatform.sources.web import (
    CaptionedFolderCandidates,
    ParquetCandidates,
    PictureFolderCandidates,
    RowRange,
    count_candidates,
    read_candidates,
)


def test_ranges_split_a_source_without_overlap(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.jpg").write_bytes(b"x")
    first = PictureFolderCandidates(path=str(tmp_path), rows=RowRange(stop=8))
    rest = PictureFolderCandidates(path=str(tmp_path), rows=RowRange(start=8))
    ids = [[item.id for item in read_candidates(source, str, 0, 99)] for source in (first, rest)]
    assert len(ids[0]) == count_candidates(first, str) == 8
    assert len(set(ids[0]) | set(ids[1])) == 20


def test_parquet_with_an_extension_type_is_refused_before_reading(tmp_path: Path) -> None:
    class Trap(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.binary(), "trap")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> "Trap":
            raise AssertionError("code of the file ran")

    images = pa.ExtensionArray.from_storage(Trap(), pa.array([b"x"], pa.binary()))
    table = pa.table({"id": ["a"], "image": images, "alt_text": ["a field"]})
    pq.write_table(table, tmp_path / "trap.parquet")
    with pytest.raises(ConfigError, match="extension types"):
        count_candidates(ParquetCandidates(path=str(tmp_path / "trap.parquet")), str)


def test_missing_columns_and_files_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "picture": [b"x"], "alt_text": ["t"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="no column 'image'; it has id, picture, alt_text"):
        count_candidates(ParquetCandidates(path=str(tmp_path / "a.parquet")), str)
    with pytest.raises(ConfigError, match="does not exist"):
        count_candidates(ParquetCandidates(path=str(tmp_path / "b.parquet")), str)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="no readable Parquet"):
        count_candidates(ParquetCandidates(path=str(tmp_path / "c.parquet")), str)


def test_a_listing_may_not_point_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "../secret.jpg", "captions": []}))
    with pytest.raises(ConfigError, match="points out of"):
        count_candidates(CaptionedFolderCandidates(path=str(tmp_path)), str)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "absent.jpg", "captions": ["a lake"]}))
    (candidate,) = read_candidates(CaptionedFolderCandidates(path=str(tmp_path)), str, 0, 9)
    assert candidate.problem == "missing_file"
