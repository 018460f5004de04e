"""Shard-atomic streaming pipeline on Ray Data: JSON-able shard descriptions in, one Lance table and a ledger out.

    read (CPU tasks) -> operations (functions as tasks, `Loaded` classes as actor pools) -> write -> commit (driver)

A shard is one block all the way. Its kept rows become ONE Lance fragment, then a part file `work/parts/<shard>.json`
is written atomically; the driver commits the fragments of all part files at once, in the order of the shards. So a
task or worker that dies is simply run again and a rerun skips finished shards: only what a part file names counts, and
of the ledger only what belongs to such a shard (`ledger/<stage>/<shard>.parquet`).
Shards do not see each other: duplicates are found in the committed table (filter_web.drop_repeats).
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa
import ray.data
from rich.progress import track

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.curate.contact_sheet import keep_dropped_pictures
from rsplatform.ledger import Drop, counts, forget_parts, write_drops
from rsplatform.runtime import ray_runtime

PARTS = "work/parts"
DROP_FIELDS = [pa.field("drop_reason", pa.string()), pa.field("drop_detail", pa.string())]
# Which shard a row belongs to and how many rows that shard has: the writer checks that the block is the whole shard.
SHARD_COLUMN, SHARD_ROWS_COLUMN = "_shard", "_shard_rows"

Shard = dict[str, Any]
TableOperation = Callable[[pa.Table], pa.Table]


class PipelineError(ValueError):
    """A pipeline whose operations broke the contract, or that kept nothing."""


@dataclass(frozen=True)
class Loaded:
    """An operation with state: `factory(*arguments)` runs once in each actor and gives a table -> table callable."""

    factory: Callable[..., TableOperation]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """What happens to each shard.

    `read(shard)` gives a table of ALL input rows of the shard, at least one, with the columns `id`, `drop_reason`,
    `drop_detail` (DROP_FIELDS; null reason = kept so far). Each operation returns the same rows in the same order,
    with columns added or changed and `drop_reason` set for what it rejects. Kept rows are written with `schema` to
    `artifact.path(table)`, drops to the ledger under `stage`. Everything here is pickled to the workers.
    """

    stage: str
    artifact: Artifact
    table: str
    schema: pa.Schema
    read: Callable[[Shard], pa.Table]
    operations: tuple[TableOperation | Loaded, ...] = ()


def run_pipeline(pipeline: Pipeline, shards: Sequence[Shard], cluster: Cluster) -> dict[str, Any]:
    """Run every unfinished shard on Ray and commit all; the funnel as `ledger.counts` gives it.

    A shard is a JSON-able dict whose key "shard" is its id, unique and fit for a file name. Rows of the table are in
    the order of `shards`, whatever the number of workers. Starts (and stops) Ray unless one is running.

    Raises:
        PipelineError: repeated shard ids, an operation that lost or reordered rows, or nothing kept at all.
        ConfigError: the local Ray has too few CPUs for the actors that the cluster file asks for.
    """
    unfinished = _unfinished(pipeline, shards)
    if unfinished:
        _check_cpus(pipeline, cluster)
        with ray_runtime(cluster), ray.data.DataContext.current(_context()):
            _run_on_ray(pipeline, unfinished, cluster)
    return commit(pipeline, shards)


def run_plain(pipeline: Pipeline, shards: Sequence[Shard]) -> dict[str, Any]:
    """The same rows without Ray, one shard after the other in this process; same arguments, result and errors."""
    operations = [_instance(operation) for operation in pipeline.operations]
    for shard in track(_unfinished(pipeline, shards), description=pipeline.stage, transient=True):
        table = _read(pipeline, shard)
        for operation in operations:
            table = _checked(operation, table)
        _write(pipeline, table)
    return commit(pipeline, shards)


def replace_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with one column set, or added."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def commit(pipeline: Pipeline, shards: Sequence[Shard]) -> dict[str, Any]:
    """Make the fragments that the part files name one table version; nothing else ever becomes visible.

    Drops of shards that an earlier run cut otherwise leave the ledger: nobody counts them.
    """
    parts = [storage.read_json(_part_uri(pipeline, shard["shard"])) for shard in shards]
    forget_parts(pipeline.artifact, pipeline.stage, [shard["shard"] for shard in shards])
    reasons = Counter[str]()
    for part in parts:
        reasons.update(part["reasons"])
    fragments = [lance.FragmentMetadata.from_json(json.dumps(part["fragment"])) for part in parts if part["fragment"]]
    if not fragments:
        # the next run shall look at the inputs again, not at these part files
        system, path = storage.filesystem(pipeline.artifact.path(PARTS))
        system.delete_dir_contents(path, missing_dir_ok=True)
        found = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common()) or "no inputs"
        raise PipelineError(f"{pipeline.artifact.uri}: {pipeline.stage} kept no row ({found}); see its ledger")
    uri = pipeline.artifact.path(pipeline.table)
    operation = lance.LanceOperation.Overwrite(pipeline.schema, fragments)
    lance.LanceDataset.commit(uri, operation, storage_options=storage.lance_options(uri))
    num_inputs, num_kept = (sum(part[key] for part in parts) for key in ("inputs", "kept"))
    return counts(num_inputs, num_kept, reasons.elements())


def _unfinished(pipeline: Pipeline, shards: Sequence[Shard]) -> list[Shard]:
    repeated = [name for name, number in Counter(shard["shard"] for shard in shards).items() if number > 1]
    if repeated:
        raise PipelineError(f"{pipeline.stage}: shard ids must be unique, repeated: {', '.join(repeated[:5])}")
    done = set(storage.list_files(pipeline.artifact.path(PARTS)))
    todo = [shard for shard in shards if f"{shard['shard']}.json" not in done or _has_changed(pipeline, shard)]
    if len(todo) < len(shards):
        message = "%s: %d of %d shards stand from an earlier run"
        logging.getLogger(__name__).info(message, pipeline.stage, len(shards) - len(todo), len(shards))
    return todo


def _has_changed(pipeline: Pipeline, shard: Shard) -> bool:
    return storage.read_json(_part_uri(pipeline, shard["shard"]))["shard"] != shard


def _part_uri(pipeline: Pipeline, shard_id: str) -> str:
    return pipeline.artifact.path(f"{PARTS}/{shard_id}.json")


def _context() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # a shard stays one block, however large
    context.max_errored_blocks = 0  # bad inputs are ledger rows; an exception is a bug and stops the job
    context.print_on_execution_start = False
    return context


def _check_cpus(pipeline: Pipeline, cluster: Cluster) -> None:
    """A local Ray whose actors take every CPU would wait for ever to read."""
    num_pools = sum(isinstance(operation, Loaded) for operation in pipeline.operations)
    needed = num_pools * cluster.data.num_actors * cluster.data.cpus_per_actor + 1
    if cluster.num_cpus is not None and cluster.ray_address is None and num_pools and cluster.num_cpus < needed:
        raise ConfigError(
            f"metadata.rsplatform: {pipeline.stage} needs num_cpus >= {needed:g} (data.num_actors × "
            f"data.cpus_per_actor, and one to read), got {cluster.num_cpus}; raise it or lower data.cpus_per_actor"
        )


def _run_on_ray(pipeline: Pipeline, shards: Sequence[Shard], cluster: Cluster) -> None:
    placement = cluster.data
    # Ray runs a task again, up to three times, if its worker or node died; an error of our own code ends the job
    task: dict[str, Any] = {"num_cpus": 1, "memory": placement.memory_per_task_gb * 2**30}
    rows = [{"shard": json.dumps(shard)} for shard in shards]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    # batch_size=None hands over a whole block; no operator below merges or splits blocks
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    for loaded, functions in _worker_stages(pipeline):
        if loaded is None:
            dataset = dataset.map_batches(_Task(functions), **whole, **task)
            continue
        dataset = dataset.map_batches(
            _Actor,
            fn_constructor_args=(loaded, functions),
            compute=ray.data.ActorPoolStrategy(size=placement.num_actors),
            num_cpus=placement.cpus_per_actor,
            num_gpus=placement.gpus_per_actor,
            **whole,
        )
    for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        pass  # the rows are in the part files; this only drives the stream


def _worker_stages(pipeline: Pipeline) -> list[tuple[Loaded | None, list[TableOperation]]]:
    """Which functions run in one process: a new stage begins where a model is loaded, the last one also writes.

    A stage of its own for a cheap function would cost a process that imports everything again.
    """
    stages: list[tuple[Loaded | None, list[TableOperation]]] = [(None, [_Read(pipeline)])]
    for operation in pipeline.operations:
        if isinstance(operation, Loaded):
            stages.append((operation, []))
        else:
            stages[-1][1].append(_Checked(operation))
    stages[-1][1].append(_Write(pipeline))
    return stages


@dataclass(frozen=True)
class _Read:
    pipeline: Pipeline

    def __call__(self, shards: pa.Table) -> pa.Table:
        (text,) = shards["shard"].to_pylist()
        return _read(self.pipeline, json.loads(text))


@dataclass(frozen=True)
class _Checked:
    operation: TableOperation

    def __call__(self, table: pa.Table) -> pa.Table:
        return _checked(self.operation, table)


@dataclass(frozen=True)
class _Write:
    pipeline: Pipeline

    def __call__(self, table: pa.Table) -> pa.Table:
        return _write(self.pipeline, table)


@dataclass(frozen=True)
class _Task:
    functions: list[TableOperation]

    def __call__(self, table: pa.Table) -> pa.Table:
        for function in self.functions:
            table = function(table)
        return table


class _Actor:
    """The state of one actor, and what follows it in the same process."""

    def __init__(self, loaded: Loaded, functions: list[TableOperation]):
        self._chain = _Task([_Checked(_instance(loaded)), *functions])

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._chain(table)


def _instance(operation: TableOperation | Loaded) -> TableOperation:
    return operation.factory(*operation.arguments) if isinstance(operation, Loaded) else operation


def _read(pipeline: Pipeline, shard: Shard) -> pa.Table:
    table = pipeline.read(shard)
    if not table.num_rows:
        raise PipelineError(
            f"shard {shard['shard']}: no rows; a shard must account for its inputs, with a drop at least"
        )
    identity = pa.array([json.dumps(shard)] * table.num_rows, pa.string())
    table = table.append_column(SHARD_COLUMN, identity)
    return table.append_column(SHARD_ROWS_COLUMN, pa.array([table.num_rows] * table.num_rows, pa.int64()))


def _checked(operation: TableOperation, table: pa.Table) -> pa.Table:
    result = operation(table)
    for column in ("id", SHARD_COLUMN, SHARD_ROWS_COLUMN):
        if column not in result.column_names or result[column].to_pylist() != table[column].to_pylist():
            raise PipelineError(f"{operation}: changed {column!r}; it must keep every row, in order, and mark drops")
    return result


def _write(pipeline: Pipeline, table: pa.Table) -> pa.Table:
    """Write one whole shard: fragment, ledger part, and the part file last."""
    shards = set(table[SHARD_COLUMN].to_pylist())
    if len(shards) != 1 or table[SHARD_ROWS_COLUMN][0].as_py() != table.num_rows:
        raise PipelineError(f"{pipeline.stage}: a block of {table.num_rows} rows is not one whole shard: {shards}")
    shard = json.loads(shards.pop())
    reasons = table["drop_reason"].to_pylist()
    kept = table.filter(pa.array([reason is None for reason in reasons]))
    fragment = _write_fragment(pipeline, kept) if kept.num_rows else None
    rows = zip(table["id"].to_pylist(), reasons, table["drop_detail"].to_pylist(), strict=True)
    drops = [Drop(row_id, reason, detail or "") for row_id, reason, detail in rows if reason is not None]
    write_drops(pipeline.artifact, pipeline.stage, f"{pipeline.stage}/{shard['shard']}", drops)
    keep_dropped_pictures(pipeline.artifact, shard["shard"], table.filter(table["drop_reason"].is_valid()))
    part = {"shard": shard, "inputs": table.num_rows, "kept": kept.num_rows, "fragment": fragment}
    part["reasons"] = Counter(drop.reason for drop in drops)
    storage.write_json(_part_uri(pipeline, shard["shard"]), part)
    return pa.table({"shard": [shard["shard"]], "kept": [kept.num_rows]})


def _write_fragment(pipeline: Pipeline, kept: pa.Table) -> dict[str, Any]:
    uri = pipeline.artifact.path(pipeline.table)
    rows = kept.select(pipeline.schema.names).cast(pipeline.schema).combine_chunks()
    fragment = lance.LanceFragment.create(uri, rows, storage_options=storage.lance_options(uri))
    return fragment.to_json()
