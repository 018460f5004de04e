"""The pipeline without Ray: rows in order, funnel, resume, and refusals of broken operations."""

from typing import Any

import lance
import pyarrow as pa
import pytest

from rsplatform.artifacts import Artifact
from rsplatform.curate.pipeline import DROP_FIELDS, Loaded, Pipeline, PipelineError, run_plain
from rsplatform.ledger import Drop, read_drops, write_drops

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("names", pa.list_(pa.string()))])


def read(shard: dict[str, Any]) -> pa.Table:
    rows = [{"id": f"{n:03d}", "value": n, "names": [str(n)]} for n in range(shard["start"], shard["stop"])]
    return pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, *DROP_FIELDS]))


def drop_odd(table: pa.Table) -> pa.Table:
    reasons = ["odd" if value % 2 else None for value in table["value"].to_pylist()]
    return table.set_column(table.column_names.index("drop_reason"), DROP_FIELDS[0], pa.array(reasons, pa.string()))


class Adder:
    def __init__(self, amount: int):
        self.amount = amount

    def __call__(self, table: pa.Table) -> pa.Table:
        values = [value + self.amount for value in table["value"].to_pylist()]
        return table.set_column(table.column_names.index("value"), "value", pa.array(values, pa.int64()))


def pipeline(root: str, *operations: Any, reader: Any = read) -> Pipeline:
    artifact = Artifact(root, "rows/test/v1")
    return Pipeline("test", artifact, "rows.lance", SCHEMA, reader, operations)


SHARDS = [{"shard": f"s{n}", "start": 10 * n, "stop": 10 * n + 10} for n in range(3)]


def rows(made: Pipeline) -> list[dict[str, Any]]:
    return lance.dataset(made.artifact.path(made.table)).to_table().to_pylist()


def test_kept_rows_in_order_and_every_drop_in_the_ledger(root: str) -> None:
    made = pipeline(root, drop_odd, Loaded(Adder, (100,)))
    counts = run_plain(made, SHARDS)
    assert counts == {"inputs": 30, "kept": 15, "dropped": {"odd": 15}}
    assert [row["value"] for row in rows(made)] == [n + 100 for n in range(0, 30, 2)]
    assert sorted(read_drops(made.artifact)["id"].to_pylist()) == [f"{n:03d}" for n in range(1, 30, 2)]


def test_a_rerun_reads_only_unfinished_shards(root: str) -> None:
    failing = pipeline(root, reader=lambda shard: read(shard) if shard["start"] < 20 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_plain(failing, SHARDS)
    seen = []
    resumed = pipeline(root, reader=lambda shard: seen.append(shard["shard"]) or read(shard))
    assert run_plain(resumed, SHARDS)["kept"] == 30
    assert seen == ["s2"]
    assert [row["value"] for row in rows(resumed)] == list(range(30))
    run_plain(resumed, [*SHARDS[:2], {**SHARDS[2], "stop": 25}])
    assert seen == ["s2", "s2"], "a changed shard is read again"
    assert len(rows(resumed)) == 25


def test_drops_of_shards_that_are_no_more_leave_the_ledger(root: str) -> None:
    """A run that was killed had cut its inputs otherwise, and others have written drops of their own."""
    failing = pipeline(root, drop_odd, reader=lambda shard: read(shard) if shard["start"] < 20 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_plain(failing, SHARDS)
    write_drops(failing.artifact, "test", "scenes", [Drop("scene", "no_crs")])
    fewer = [{"shard": "s0", "start": 0, "stop": 4}]
    assert run_plain(pipeline(root, drop_odd), fewer) == {"inputs": 4, "kept": 2, "dropped": {"odd": 2}}
    assert sorted(read_drops(failing.artifact)["id"].to_pylist()) == ["001", "003", "scene"]


@pytest.mark.parametrize("broken", [lambda table: table.slice(1), lambda table: table.take(list(range(9, -1, -1)))])
def test_an_operation_may_not_lose_or_reorder_rows(root: str, broken: Any) -> None:
    with pytest.raises(PipelineError, match="must keep every row"):
        run_plain(pipeline(root, broken), SHARDS)


def test_nothing_kept_is_an_error_and_is_looked_at_again(root: str) -> None:
    odd = [{"shard": "odd", "start": 1, "stop": 2}]
    with pytest.raises(PipelineError, match="kept no row \\(odd 1\\)"):
        run_plain(pipeline(root, drop_odd), odd)
    assert run_plain(pipeline(root), odd)["kept"] == 1


def test_shards_need_unique_ids_and_rows(root: str) -> None:
    with pytest.raises(PipelineError, match="unique"):
        run_plain(pipeline(root), [SHARDS[0], SHARDS[0]])
    with pytest.raises(PipelineError, match="no rows"):
        run_plain(pipeline(root), [{"shard": "empty", "start": 0, "stop": 0}])
