"""A small pipeline that kills a process of its own choice, for test_curate.py; also runs as a driver by itself.

usage: python interrupted_pipeline.py ROOT (driver|nobody)
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, DataPlacement
from rsplatform.curate.pipeline import DROP_FIELDS, Loaded, Pipeline, run_pipeline

NUM_SHARDS, SHARD_ROWS = 8, 20
SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64())])


def shards(root: str) -> list[dict[str, Any]]:
    return [{"shard": f"s{number}", "number": number, "root": root} for number in range(NUM_SHARDS)]


def read(shard: dict[str, Any]) -> pa.Table:
    """Twenty rows, each fifth of them dropped, and a trace that this shard was read."""
    trace = Path(shard["root"]) / "reads" / f"{shard['shard']}-{time.monotonic_ns()}"
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.touch()
    start = shard["number"] * SHARD_ROWS
    rows = [
        {"id": f"{value:04d}", "value": value, "drop_reason": None if value % 5 else "fifth", "drop_detail": None}
        for value in range(start, start + SHARD_ROWS)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, *DROP_FIELDS]))


class KillOnce:
    """Passes tables on, but the first time it sees row `value` it kills its own process."""

    def __init__(self, root: str, value: int):
        self.root, self.value = Path(root), value

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.value in table["value"].to_pylist():
            try:
                (self.root / f"killed-{self.value}").touch(exist_ok=False)
            except FileExistsError:
                return table
            os.kill(os.getpid(), signal.SIGKILL)
        return table


class KillDriver:
    """Passes tables on; kills the driver at the fourth. The same actor wrote the three before: it is the middle."""

    def __init__(self, driver_pid: int):
        self.driver_pid, self.num_seen = driver_pid, 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self.num_seen += 1
        if self.num_seen == 4:
            os.kill(self.driver_pid, signal.SIGKILL)
        return table


def make_pipeline(root: str, *operations: Any) -> Pipeline:
    return Pipeline("test", Artifact(root, "rows/test/v1"), "rows.lance", SCHEMA, read, operations)


def cluster(root: str) -> Cluster:
    return Cluster(root=root, num_cpus=2, data=DataPlacement(num_actors=1, memory_per_task_gb=0.1))


def main(root: str, victim: str) -> None:
    operations = [Loaded(KillDriver, (os.getpid(),))] if victim == "driver" else []
    print(run_pipeline(make_pipeline(root, *operations), shards(root), cluster(root)))


if __name__ == "__main__":
    main(*sys.argv[1:])
