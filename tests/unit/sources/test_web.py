"""Candidates: ranges are disjoint, texts are drawn by the id, files that run code or point elsewhere are refused."""

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
    RsicdCandidates,
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


@pytest.fixture
def captioned(tmp_path: Path) -> tuple[CaptionedFolderCandidates, RsicdCandidates]:
    """The same 40 pictures with five texts each, the second of which repeats the first, in both layouts."""
    texts = ["a lake", "a lake", "a pond", "a wood", "a road"]
    rows = [(f"{number:02d}.jpg", [f"{text} {number}" for text in texts]) for number in range(40)]
    lines = [json.dumps({"file": name, "captions": captions}) for name, captions in rows]
    (tmp_path / "captions.jsonl").write_text("\n\n".join(lines))
    images = [
        {"filename": name, "split": "train", "sentences": [{"raw": f"{caption} ."} for caption in captions]}
        for name, captions in rows
    ]
    (tmp_path / "rsicd.json").write_text(json.dumps({"images": images}))
    rsicd = RsicdCandidates(captions=str(tmp_path / "rsicd.json"), images=str(tmp_path))
    return CaptionedFolderCandidates(path=str(tmp_path)), rsicd


@pytest.mark.parametrize("layout", [0, 1])
def test_some_texts_of_a_picture_are_drawn_by_its_id(captioned: tuple[Any, Any], layout: int) -> None:
    source = captioned[layout]

    def texts(number: int | None, **rows: Any) -> dict[str, tuple[str, ...]]:
        drawn = source.model_copy(update={"texts_per_picture": number, "rows": RowRange(**rows)})
        return {item.id: item.texts for item in read_candidates(drawn, str, 0, 99)}

    every, one, three = texts(None), texts(1), texts(3)
    assert {len(found) for found in every.values()} == {4}, "a repeated text is one"
    assert {len(found) for found in one.values()} == {1} and {len(found) for found in three.values()} == {3}
    assert all(set(one[name]) <= set(three[name]) <= set(every[name]) for name in every)
    assert len({found[0].rsplit(" ", 1)[0].rstrip(".") for found in one.values()}) == 4, "not always the first one"
    assert {name: set(found) for name, found in texts(9).items()} == {name: set(every[name]) for name in every}
    assert texts(1, start=30, shuffled=False) == {name: one[name] for name in sorted(one)[30:]}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file": "b.jpg", "captions": ["a la', "line 3 is not valid JSON"),
        ('{"file": "b.jpg"}', "line 3: needs file and captions as text"),
        ('{"file": "b.jpg", "captions": [7]}', "line 3: needs file and captions as text"),
        ('["b.jpg"]', "line 3: needs file and captions as text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    good = json.dumps({"file": "a.jpg", "captions": ["a lake"]})
    (tmp_path / "captions.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ConfigError, match=rf"captions\.jsonl {problem}"):
        count_candidates(CaptionedFolderCandidates(path=str(tmp_path)), str)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"images": [{"split": "val"}, {"split": "train", "filename": "a.jpg"}]}, r"images\[1\]: needs filename"),
        ({"images": ["a.jpg"]}, r"images\[0\]: needs `split` as text"),
        ({"images": [{"split": "val"}, {"filename": "a.jpg"}]}, r"images\[1\]: needs `split` as text"),
        ({"images": [{"split": ["train"]}]}, r"images\[0\]: needs `split` as text"),
        ([1], "holds no list `images`"),
    ],
)
def test_a_broken_entry_of_rsicd_is_named(tmp_path: Path, document: Any, problem: str) -> None:
    (tmp_path / "rsicd.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=rf"rsicd\.json: {problem}"):
        count_candidates(RsicdCandidates(captions=str(tmp_path / "rsicd.json"), images=str(tmp_path)), str)
