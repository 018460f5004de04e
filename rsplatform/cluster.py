"""WHERE a job runs: one YAML serves `ray up` and our jobs.

Ray's cluster schema refuses unknown top-level keys but leaves `metadata` to the user, so our placement
lives under `metadata.rsplatform`. Nothing here may change a result: sizes of recipes stay in configs/.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from rsplatform.config import Config, ConfigError, apply_override, read_yaml, validate


class DataPlacement(Config):
    """Resources of one Ray Data stage: `num_actors` model replicas and what each task or actor asks for."""

    num_actors: int = Field(default=1, ge=1)
    cpus_per_actor: float = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    memory_per_task_gb: float = Field(default=0.5, gt=0)


class TrainPlacement(Config):
    """Workers of Ray Train and the engine that shards the model over them.

    `engine` never changes the numbers beyond rounding: parity with the plain engine is a test.
    """

    launcher: Literal["ray", "local"] = "ray"  # local: one worker in this process, for debugging
    engine: Literal["plain", "deepspeed", "fsdp"] = "plain"
    zero_stage: Literal[0, 1, 2, 3] = 1  # deepspeed
    shard_size: int | None = Field(default=None, ge=1)  # fsdp: workers that share one copy of the model; None: all
    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    decode_threads: int = Field(default=2, ge=1)
    max_failures: int = Field(default=2, ge=0)
    checkpoint_every_minutes: float = Field(default=10, gt=0)
    recompute_every_blocks: int | None = Field(default=None, ge=1)  # recompute every nth block; 1: all, None: none
    compile_blocks: bool = False  # torch.compile of each block
    peak_tflops: float | None = Field(default=None, gt=0)  # of one device in the recipe's precision, for `mfu`

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
    """Listening address and replicas. Without API keys only a loopback host is accepted."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    num_replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=0, ge=0)


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
