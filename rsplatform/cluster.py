"""WHERE a job runs: one YAML serves `ray up` and our jobs.

Ray's cluster schema refuses unknown top-level keys but leaves `metadata` to the user, so our placement
lives under `metadata.rsplatform`. Nothing here may change a result: sizes of recipes stay in configs/.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from rsplatform.config import Config, ConfigError, apply_override, read_yaml, validate


@dataclass(frozen=True)
class Gpu:
    """A card by its data sheet: memory in 10^9 bytes, and bfloat16 matrix products without sparsity."""

    memory_gb: float
    bfloat16_tflops: float


GPUS = {
    "A10G": Gpu(24, 70),
    "L4": Gpu(24, 121),
    "L40S": Gpu(48, 362),
    "A100-40GB": Gpu(40, 312),
    "A100-80GB": Gpu(80, 312),
    "H100": Gpu(80, 989),
    "H200": Gpu(141, 989),
    "B200": Gpu(180, 2250),
}


class DataPlacement(Config):
    """Resources of one Ray Data stage: `num_actors` model replicas and what each task or actor asks for."""

    num_actors: int = Field(default=1, ge=1)
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    memory_per_task_gb: float = Field(default=0.5, gt=0)


class TrainPlacement(Config):
    """Workers of Ray Train and the engine that shards the model over them.

    `engine` never changes the numbers beyond rounding: parity with the plain engine is a test. Nor does the number of
    workers, since what is drawn at random for a sample follows from its place in the global batch. Any engine may be
    elastic: with `min_workers` a training starts as soon as that many fit the cluster, goes on with fewer when a
    machine is lost, and looks every `grow_every_minutes` whether more fit. Each change is a restart from the newest
    checkpoint. A worker's share of the batch grows as workers go; where the card is named, micro-batches keep it within
    its memory.

    `max_failures`: deaths of workers, over the whole run, that Ray Train starts again after. `max_preemptions`: the
    same for machines that were taken away with notice (None: any number); without notice it is a failure.
    """

    launcher: Literal["ray", "local"] = "ray"  # local: one worker in this process, for debugging
    engine: Literal["plain", "deepspeed", "fsdp"] = "plain"
    zero_stage: Literal[0, 1, 2, 3] = 1  # deepspeed
    shard_size: int | None = Field(default=None, ge=1)  # fsdp: workers that share one copy of the model; None: all
    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)  # elastic; None: always num_workers
    grow_every_minutes: float = Field(default=10, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    decode_threads: int = Field(default=2, ge=1)
    max_failures: int = Field(default=2, ge=0)
    max_preemptions: int | None = Field(default=None, ge=0)
    checkpoint_every_minutes: float = Field(default=10, gt=0)
    recompute_every_blocks: int | None = Field(default=None, ge=1)  # recompute every nth block; 1: all, None: none
    compile_blocks: bool = False  # torch.compile of each block
    # The card, by a name of GPUS: its memory gives the default of micro_batch_size, its peak `mfu`; numbers go first
    gpu: str | None = None
    gpu_memory_gb: float | None = Field(default=None, gt=0)  # 10^9 bytes
    peak_tflops: float | None = Field(default=None, gt=0)  # of one device in the recipe's precision

    @field_validator("gpu")
    @classmethod
    def _card_is_known(cls, gpu: str | None) -> str | None:
        if gpu is not None and gpu not in GPUS:
            raise ValueError(
                f"unknown card; known are {', '.join(GPUS)}. For another one leave gpu out and give gpu_memory_gb "
                "and peak_tflops"
            )
        return gpu

    @property
    def worker_memory_gb(self) -> float | None:
        """What one worker has of its card; None on a CPU and where no card is named."""
        card_gb = self.gpu_memory_gb or (GPUS[self.gpu].memory_gb if self.gpu else None)
        if card_gb is None or self.gpus_per_worker == 0:
            return None
        return card_gb * min(1.0, self.gpus_per_worker)

    def peak_tflops_in(self, precision: Literal["float32", "bfloat16"]) -> float | None:
        """The peak that `mfu` is a part of: the number given, else the card's in bfloat16; of float32 none is known."""
        if self.peak_tflops is not None or self.gpu is None or self.gpus_per_worker == 0:
            return self.peak_tflops
        return GPUS[self.gpu].bfloat16_tflops if precision == "bfloat16" else None

    @model_validator(mode="after")
    def _the_range_is_one(self) -> "TrainPlacement":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}: elastic training runs "
                "with min_workers to num_workers; leave min_workers out for a fixed number"
            )
        return self

    def worker_counts(self, batch_size: int) -> tuple[int, ...]:
        """Numbers of workers, ascending, that a global batch divides among and whole copies of the model fit."""
        fewest = self.num_workers if self.min_workers is None else self.min_workers
        copy_size = self.shard_size if self.engine == "fsdp" and self.shard_size is not None else 1
        counts = range(fewest, self.num_workers + 1)
        return tuple(count for count in counts if batch_size % count == 0 and count % copy_size == 0)

    def fewest_workers(self, batch_size: int) -> int:
        """The smallest number that may train together; the local launcher starts one."""
        return 1 if self.launcher == "local" else min(self.worker_counts(batch_size), default=self.num_workers)

    @model_validator(mode="after")
    def _one_process_is_one_worker(self) -> "TrainPlacement":
        if self.launcher == "local" and self.num_workers > 1:
            raise ValueError(
                f"launcher local is one worker in this process, not num_workers {self.num_workers}: "
                "set num_workers to 1, or launcher to ray"
            )
        return self


class TunePlacement(Config):
    """Trials at the same time, and the cores each asks for."""

    max_concurrent_trials: int = Field(default=2, ge=1)
    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float = Field(default=0, ge=0)


class FollowPlacement(Config):
    """How a follower waits for a training's checkpoints, which may come from another machine.

    It looks after at most `poll_seconds` (at once where the disk tells of changes) and gives up, to be resumed, after
    `patience_minutes` without a new one.
    """

    poll_seconds: float = Field(default=30, gt=0)
    patience_minutes: float = Field(default=120, ge=0)


class ServePlacement(Config):
    """Listening address and replicas. Without API keys only a loopback host is accepted.

    With `max_replicas` there are as many as the load asks for, from `num_replicas` on; without it, always so many.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    num_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    cpus_per_replica: float = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _the_range_is_one(self) -> "ServePlacement":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than num_replicas {self.num_replicas}")
        return self


class Cluster(Config):
    """Placement of a job: artifact root, data root, Ray address and resources per kind of stage."""

    root: str = Field(min_length=1)
    data_root: str | None = None
    ray_address: str | None = None
    num_cpus: int | None = Field(default=None, ge=1)
    data: DataPlacement = DataPlacement()
    train: TrainPlacement = TrainPlacement()
    tune: TunePlacement = TunePlacement()
    follow: FollowPlacement = FollowPlacement()
    serve: ServePlacement = ServePlacement()
    _arguments: tuple[str, ...] = PrivateAttr(default=())

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a person writes on a job's command line to get this placement; empty if no file was read."""
        return self._arguments

    def resolve(self, path: str) -> str:
        """An input path of a recipe as a local path or URI.

        `artifact://kind/name/version/sub` lies under `root`; absolute paths and `s3://…` stay; anything else
        is relative to `data_root` (or the environment's RSPLATFORM_TEST_DATA when the file names none).

        Raises:
            ConfigError: a relative path while no data root is known.
        """
        if path.startswith("artifact://"):
            return f"{self.root}/{path.removeprefix('artifact://')}"
        if "://" in path or path.startswith("/"):
            return path
        data_root = self.data_root or os.environ.get("RSPLATFORM_TEST_DATA")
        if not data_root:
            raise ConfigError(
                f"{path}: a relative input needs a data root; set metadata.rsplatform.data_root in the cluster "
                "file, pass cluster.data_root=/your/data, or set RSPLATFORM_TEST_DATA"
            )
        return f"{data_root.rstrip('/')}/{path}"


def load_cluster(path: str | Path, overrides: list[str] | None = None) -> Cluster:
    """Read `metadata.rsplatform` of a cluster file; a relative root or data_root becomes absolute.

    Raises:
        ConfigError: the file is missing or broken, has no such section, or holds an unknown key.
    """
    document = read_yaml(path)
    metadata = document.get("metadata")
    values = metadata.get("rsplatform") if isinstance(metadata, dict) else None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: no section metadata.rsplatform; see cluster/local.yaml for one")
    for override in overrides or []:
        apply_override(values, override)
    for key in ("root", "data_root"):
        if isinstance(values.get(key), str):
            place = os.path.expandvars(values[key]).rstrip("/")
            values[key] = place if "://" in place else str(Path(place or "/").expanduser().absolute())
    cluster = validate(Cluster, values, f"{path} metadata.rsplatform")
    cluster._arguments = (str(path), *(f"cluster.{override}" for override in overrides or []))
    return cluster
