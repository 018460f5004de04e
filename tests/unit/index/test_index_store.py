"""The index against slow obvious versions: exact search, filters before the search, refusals, quoting."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from rsplatform.artifacts import ArtifactError
from rsplatform.config import ConfigError
from rsplatform.index.filters import SearchFilter, parse_interval
from rsplatform.index.store import TABLE_PATH, ChipIndex, finish_index, index_schema

ROWS, WIDTH = 2000, 16
HASH = "a" * 64
START = datetime(2020, 1, 1, tzinfo=UTC)
KINDS = ["stadium", "o'hara", "x') OR true OR array_has(kinds, 'y", 'quo"te', "back\\slash"]


def make_rows(num_rows: int) -> pa.Table:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(num_rows, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    west, south = rng.uniform(-179, 178, num_rows), rng.uniform(-80, 79, num_rows)
    rows = [
        {
            "id": f"chip-{n}",
            "vector": vectors[n].astype(np.float16),
            "row": n,
            "scene": "s",
            "split": "val",
            "caption": f"caption {n}",
            "kinds": [KINDS[n % len(KINDS)]] if n % 2 else [],
            "datetime": START + timedelta(days=n) if n % 3 else None,
            "ground_sample_distance_m": 0.5 + n % 10,
            "west": west[n],
            "south": south[n],
            "east": west[n] + 0.5,
            "north": south[n] + 0.5,
            "row_px": 0.0,
            "column_px": 0.0,
            "height_px": 64.0,
            "width_px": 64.0,
        }
        for n in range(num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=index_schema(WIDTH))


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return make_rows(ROWS)


@pytest.fixture(scope="module")
def index(rows: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> ChipIndex:
    uri = str(tmp_path_factory.mktemp("index"))
    lance.write_dataset(rows, f"{uri}/{TABLE_PATH}")
    meta = finish_index(uri, HASH)
    assert (meta.num_rows, meta.embedding_width, meta.search) == (ROWS, WIDTH, "exact")
    return ChipIndex(uri, HASH)


def query(seed: int = 0) -> np.ndarray:
    vector = np.random.default_rng(100 + seed).normal(size=WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def expected_ids(rows: pa.Table, vector_E: np.ndarray, k: int, keep: list[bool]) -> list[str]:
    matrix = np.array(rows["vector"].to_pylist(), dtype=np.float32)
    scores = matrix @ vector_E / np.linalg.norm(matrix, axis=1)
    order = [i for i in np.argsort(-scores) if keep[i]]
    return [rows["id"][int(i)].as_py() for i in order[:k]]


def test_search_equals_a_full_comparison(index: ChipIndex, rows: pa.Table) -> None:
    hits = index.search(query(), 10)
    assert [hit.id for hit in hits] == expected_ids(rows, query(), 10, [True] * ROWS)
    assert all(a.score >= b.score for a, b in pairwise(hits))
    matrix = np.asarray(rows["vector"][hits[0].row].as_py(), dtype=np.float32)
    assert hits[0].score == pytest.approx(float(matrix @ query()), abs=2e-3)


def test_a_box_with_one_percent_of_the_rows_still_returns_k(index: ChipIndex, rows: pa.Table) -> None:
    west, south = np.array(rows["west"].to_pylist()), np.array(rows["south"].to_pylist())
    order = np.argsort((west - 20) ** 2 + (south - 10) ** 2)[: ROWS // 100]
    box = (west[order].min(), south[order].min(), west[order].max() + 0.5, south[order].max() + 0.5)
    inside = (west >= box[0]) & (west + 0.5 <= box[2]) & (south >= box[1]) & (south + 0.5 <= box[3])
    assert inside.sum() <= 0.03 * ROWS
    hits = index.search(query(), 10, SearchFilter(bounds_lonlat=box, relation="within"))
    assert [hit.id for hit in hits] == expected_ids(rows, query(), 10, list(inside))
    assert len(hits) == 10


def test_intersects_takes_chips_that_touch_and_crosses_the_antimeridian(index: ChipIndex, rows: pa.Table) -> None:
    west = np.array(rows["west"].to_pylist())
    hits = index.search(query(), ROWS, SearchFilter(bounds_lonlat=(0, -90, 10, 90)))
    assert {hit.row for hit in hits} == set(np.flatnonzero((west + 0.5 >= 0) & (west <= 10)))
    hits = index.search(query(), ROWS, SearchFilter(bounds_lonlat=(170, -90, -170, 90), relation="within"))
    assert {hit.row for hit in hits} == set(np.flatnonzero((west >= 170) | (west + 0.5 <= -170)))


def test_dates_scales_and_kinds_narrow_the_search(index: ChipIndex, rows: pa.Table) -> None:
    interval = parse_interval("2020-06-01T00:00:00Z/2021-06-01T02:00:00+02:00")
    condition = SearchFilter(interval=interval, ground_sample_distance_m=(1, 5), kinds=("o'hara", "stadium"))
    found = {hit.row for hit in index.search(query(), ROWS, condition)}
    low, high = datetime(2020, 6, 1, tzinfo=UTC), datetime(2021, 6, 1, tzinfo=UTC)
    expected = {
        n
        for n, row in enumerate(rows.to_pylist())
        if row["datetime"] and low <= row["datetime"] <= high and 1 <= row["ground_sample_distance_m"] <= 5
        if {"o'hara", "stadium"} & set(row["kinds"])
    }
    assert found == expected and found


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_a_value_and_never_sql(index: ChipIndex, rows: pa.Table, kind: str) -> None:
    found = {hit.row for hit in index.search(query(), ROWS, SearchFilter(kinds=(kind,)))}
    assert found == {n for n, kinds in enumerate(rows["kinds"].to_pylist()) if kind in kinds}


@pytest.mark.parametrize("text", ["') OR true --", "'; DROP TABLE chips", "\x00", "a'||'b", "\\'", "%"])
def test_hostile_strings_match_nothing(index: ChipIndex, text: str) -> None:
    assert index.search(query(), 5, SearchFilter(kinds=(text,))) == []
    assert index.get([text]) == {}
    with pytest.raises(KeyError):
        index.vector(text)


def test_an_index_of_another_model_is_refused(index: ChipIndex, rows: pa.Table, tmp_path: Path) -> None:
    lance.write_dataset(rows.slice(0, 10), f"{tmp_path}/{TABLE_PATH}")
    finish_index(str(tmp_path), HASH)
    with pytest.raises(ConfigError, match="built with model"):
        ChipIndex(str(tmp_path), "b" * 64)


def test_an_index_of_nothing_is_refused(tmp_path: Path, rows: pa.Table) -> None:
    lance.write_dataset(rows.slice(0, 0), str(tmp_path / TABLE_PATH))
    with pytest.raises(ArtifactError, match="no chip was embedded; its ledger has the reasons: give other `chips`"):
        finish_index(str(tmp_path), HASH)


def test_the_vector_index_finds_what_the_exact_search_finds(tmp_path: Path) -> None:
    lance.write_dataset(make_rows(4000), f"{tmp_path}/{TABLE_PATH}")
    meta = finish_index(str(tmp_path), HASH, exact_below_rows=1000)
    assert meta.search == "ivf_pq"
    assert meta.recall_at_10 is not None and meta.recall_at_10 >= 0.9
    hits = ChipIndex(str(tmp_path), HASH).search(query(), 10, SearchFilter(ground_sample_distance_m=(0, 1)))
    assert len(hits) == 10 and all(hit.ground_sample_distance_m == 0.5 for hit in hits)


def test_lookups_by_id(index: ChipIndex, rows: pa.Table) -> None:
    assert index.get(["chip-7", "nowhere"])["chip-7"].caption == "caption 7"
    assert np.allclose(index.vector("chip-7"), np.asarray(rows["vector"][7].as_py(), dtype=np.float32))
    hits = index.search(index.vector("chip-7"), 3, SearchFilter(excluded_id="chip-7"))
    assert "chip-7" not in {hit.id for hit in hits}
    assert sum(index.kinds().values()) == ROWS // 2


@pytest.mark.parametrize("text", ["", "..", "../..", "yesterday", "2021-13-01/..", "2021-01-02/2021-01-01", "a/b/c"])
def test_bad_intervals_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="datetime"):
        parse_interval(text)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        SearchFilter(bounds_lonlat=(float("nan"), 0, 1, 1)).sql()
