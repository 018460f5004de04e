"""The index against slow obvious versions: exact search, filters before the search, refusals, quoting."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_rows import HASH, KINDS, START, WIDTH, Compared, make_index, make_rows, open_index, query

from rsplatform.artifacts import ArtifactError
from rsplatform.config import ConfigError
from rsplatform.index.filters import SearchFilter, parse_interval
from rsplatform.index.store import ChipIndex
from rsplatform.index.table import TABLE_PATH
from rsplatform.storage import list_files, read_json, write_json

ROWS = 2000
MANY_ROWS = 5000


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return make_rows(ROWS)


@pytest.fixture(scope="module")
def index(rows: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> ChipIndex:
    folder = tmp_path_factory.mktemp("index")
    meta = make_index(rows, folder)
    assert (meta.num_rows, meta.embedding_width, meta.search) == (ROWS, WIDTH, "exact")
    return ChipIndex(str(folder), HASH)


@pytest.fixture(scope="module")
def many_rows() -> pa.Table:
    return make_rows(MANY_ROWS)


@pytest.fixture(scope="module")
def large(many_rows: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> ChipIndex:
    """With a vector index, which answers where a filter leaves 1000 rows or more."""
    return open_index(many_rows, tmp_path_factory.mktemp("large"), exact_below_rows=1000)


@pytest.fixture(scope="module")
def truth(rows: pa.Table) -> Compared:
    return Compared(rows)


@pytest.fixture(scope="module")
def large_truth(many_rows: pa.Table) -> Compared:
    return Compared(many_rows)


def ids(index: ChipIndex, seed: int, k: int, wanted: SearchFilter | None = None) -> list[str]:
    return [hit.id for hit in index.search(query(seed), k, wanted)]


def test_search_equals_a_full_comparison(index: ChipIndex, rows: pa.Table, truth: Compared) -> None:
    for seed in range(20):
        assert ids(index, seed, 10) == truth.ids(query(seed), 10)
    hits = index.search(query(), 10)
    assert all(a.score >= b.score for a, b in pairwise(hits))
    vector = np.asarray(rows["vector"][hits[0].row].as_py(), dtype=np.float32)
    assert hits[0].score == pytest.approx(float(vector @ query() / np.linalg.norm(vector)), abs=1e-5)


def filters() -> st.SearchStrategy[SearchFilter]:
    """Boxes from the whole Earth down to less than a chip, also across 180°, with and without other conditions."""
    box = st.tuples(st.floats(-180, 180), st.floats(-85, 85), st.floats(0.01, 359), st.floats(0.01, 120)).map(
        lambda side: (side[0], side[1], (side[0] + side[2] + 180) % 360 - 180, min(90.0, side[1] + side[3]))
    )
    day = st.integers(-10, ROWS + 10).map(lambda number: START + timedelta(days=number))
    interval = st.tuples(st.none() | day, st.none() | day)
    scale = st.tuples(st.floats(0, 11), st.floats(0, 11)).map(lambda pair: (min(pair), max(pair)))
    kinds = st.lists(st.sampled_from([*KINDS, "nothing"]), max_size=3).map(tuple)
    return st.builds(
        SearchFilter,
        bounds_lonlat=st.none() | box,
        relation=st.sampled_from(["intersects", "within"]),
        interval=interval,
        ground_sample_distance_m=st.none() | scale,
        kinds=kinds,
        excluded_id=st.none() | st.integers(0, ROWS).map(lambda number: f"chip-{number}"),
    )


@given(wanted=filters(), seed=st.integers(0, 50), k=st.sampled_from([1, 10, 60]))
@settings(max_examples=40, deadline=None)
def test_any_filter_gives_what_a_full_comparison_of_its_rows_gives(
    index: ChipIndex, truth: Compared, wanted: SearchFilter, seed: int, k: int
) -> None:
    assert ids(index, seed, k, wanted) == truth.ids(query(seed), k, wanted)


@given(longitude=st.floats(-170, 160), latitude=st.floats(-75, 70), side=st.floats(2, 40), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_small_box_of_a_large_index_is_searched_exactly(
    large: ChipIndex, large_truth: Compared, longitude: float, latitude: float, side: float, seed: int
) -> None:
    """Boxes that hold from one row in thousands to a twentieth of them: k are returned, or all that there are."""
    wanted = SearchFilter(bounds_lonlat=(longitude, latitude, longitude + side, min(90.0, latitude + side)))
    assert ids(large, seed, 10, wanted) == large_truth.ids(query(seed), 10, wanted)


def test_a_box_around_one_row_finds_it(large: ChipIndex, many_rows: pa.Table) -> None:
    for number in (0, 777, MANY_ROWS - 1):
        row = many_rows.slice(number, 1).to_pylist()[0]
        box = (row["west"], row["south"], row["east"], row["north"])
        assert ids(large, 0, 10, SearchFilter(bounds_lonlat=box, relation="within")) == [row["id"]]


def test_a_filter_that_leaves_much_still_fills_k_and_holds(large: ChipIndex, large_truth: Compared) -> None:
    """Through the vector index: nine in ten of the right ones, and none that the filter excludes."""
    found = 0
    conditions = [SearchFilter(bounds_lonlat=(-90, -60, 90, 70)), SearchFilter(kinds=tuple(KINDS[:3])), None]
    for wanted in conditions:
        for seed in range(20):
            answer = ids(large, seed, 10, wanted)
            allowed = large_truth.ids(query(seed), MANY_ROWS, wanted)
            assert len(answer) == 10 and set(answer) <= set(allowed)
            found += len(set(answer) & set(allowed[:10]))
    assert found >= 0.95 * 10 * 20 * len(conditions)


def test_a_filter_that_holds_none_of_the_nearest_still_fills_k(tmp_path: Path) -> None:
    """The vector index looks where the query is; the filter's rows lie in the opposite direction."""
    rows = make_rows(2000)
    vectors = np.array(rows["vector"].to_pylist(), dtype=np.float32)
    vectors[:, 0] = np.where(np.arange(2000) % 2, 3.0, -3.0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), WIDTH)
    place = rows.schema.get_field_index("vector")
    rows = rows.set_column(place, rows.schema.field(place), column)
    index = open_index(rows, tmp_path, exact_below_rows=1000)
    axis = np.eye(WIDTH, dtype=np.float32)[0]
    wanted = SearchFilter(ground_sample_distance_m=(0, 0.6))  # rows 0, 10, 20, …: all even
    hits = index.search(axis, 10, wanted)
    assert len(hits) == 10 and all(hit.row % 10 == 0 for hit in hits)
    assert all(hit.row % 2 == 1 for hit in index.search(axis, 10))
    odd = SearchFilter(kinds=tuple(KINDS))  # 1000 rows: asked of the vector index, which finds the even ones
    hits = index.search(-axis, 10, odd)
    assert len(hits) == 10 and {hit.row % 2 for hit in hits} == {1}


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


def test_an_index_of_another_model_or_of_an_earlier_version_is_refused(rows: pa.Table, tmp_path: Path) -> None:
    make_index(rows.slice(0, 10), tmp_path)
    with pytest.raises(ConfigError, match="built with model"):
        ChipIndex(str(tmp_path), "b" * 64)
    document = read_json(f"{tmp_path}/meta.json")
    write_json(f"{tmp_path}/meta.json", document | {"refine_factor": 10})
    with pytest.raises(ConfigError, match="earlier version"):
        ChipIndex(str(tmp_path), HASH)


def test_an_index_of_nothing_is_refused(tmp_path: Path, rows: pa.Table) -> None:
    with pytest.raises(ArtifactError, match="no picture was embedded; its ledger has the reasons: give others"):
        make_index(rows.slice(0, 0), tmp_path)


def test_vectors_of_another_number_are_refused(rows: pa.Table, tmp_path: Path) -> None:
    make_index(rows.slice(0, 10), tmp_path)
    (tmp_path / "vectors.f16").write_bytes(bytes(32))
    with pytest.raises(ValueError, match="10 × 16 vectors"):
        ChipIndex(str(tmp_path), HASH)


def test_the_parameters_are_measured_and_recorded(large: ChipIndex, large_truth: Compared) -> None:
    meta = large.meta
    assert meta.search == "ivf" and meta.num_partitions == 141 and meta.num_probes
    assert meta.target_recall == 0.98 and meta.recall_at_10 is not None and meta.recall_at_10 >= 0.98
    found = sum(
        len({hit.id for hit in large.search(query(seed), 10)} & set(large_truth.ids(query(seed), 10)))
        for seed in range(50)
    )
    assert found >= 0.95 * 500  # other queries than those that it was measured with


def test_a_finish_that_was_killed_starts_again(rows: pa.Table, truth: Compared, tmp_path: Path) -> None:
    lance.write_dataset(rows.slice(100, 7), f"{tmp_path}/{TABLE_PATH}")  # what a killed run left
    (tmp_path / "vectors.f16").write_bytes(b"half")
    index = open_index(rows, tmp_path)
    assert ids(index, 0, 10) == truth.ids(query(0), 10)
    assert not [name for name in list_files(str(tmp_path)) if name.startswith("work/")]


def test_lookups_by_id(index: ChipIndex, rows: pa.Table) -> None:
    assert index.get(["chip-7", "nowhere"])["chip-7"].caption == "caption 7"
    assert index.get(["chip-7"])["chip-7"].table == "chips/hand/v1"
    assert np.allclose(index.vector("chip-7"), np.asarray(rows["vector"][7].as_py(), dtype=np.float32))
    hits = index.search(index.vector("chip-7"), 3, SearchFilter(excluded_id="chip-7"))
    assert "chip-7" not in {hit.id for hit in hits} and len(hits) == 3
    assert sum(index.kinds().values()) == ROWS // 2


def test_intervals() -> None:
    low, high = datetime(2020, 6, 1, tzinfo=UTC), datetime(2021, 6, 1, tzinfo=UTC)
    assert parse_interval("2020-06-01T00:00:00Z/2021-06-01T02:00:00+02:00") == (low, high)


@pytest.mark.parametrize("text", ["", "..", "../..", "yesterday", "2021-13-01/..", "2021-01-02/2021-01-01", "a/b/c"])
def test_bad_intervals_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="datetime"):
        parse_interval(text)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        SearchFilter(bounds_lonlat=(float("nan"), 0, 1, 1))
