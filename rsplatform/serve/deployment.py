"""Front door `serve`: a model, its index and the chips behind it in, an HTTP server until it is told to stop.

The artifact pins what was served: refs, fingerprints (in the manifest) and openapi.json. It is committed as soon as
the server answers, so that it stands while the server runs. A server that was recorded before is started again.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import httpx
from pydantic import Field

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, load_cluster
from rsplatform.config import (
    ChipsArtifact,
    Config,
    IndexArtifact,
    ModelArtifact,
    StageConfig,
    load_config,
)
from rsplatform.localize.window import SmoothWindow
from rsplatform.serve.app import running, stop_signal
from rsplatform.serve.guard import Guarded
from rsplatform.serve.replicas import Served, ServedVersion, build_application
from rsplatform.serve.security import check_address, key_hashes
from rsplatform.serve.versions import CANARY, STABLE
from rsplatform.stage import finished, open_stage
from rsplatform.storage import write_bytes, write_json


class Canary(Config):
    """Another model with its index over the same chips, which answers a share of the requests (`?version=canary`)."""

    model: ModelArtifact
    index: IndexArtifact
    weight: float = Field(default=0.05, ge=0, lt=1)


class ServeConfig(StageConfig):
    """What is served, and the limits of one request. Where it listens is the cluster file's `serve`.

    `chips` are all those that the index was made of, one artifact or a list; none for an index of folders alone.
    `requests_per_minute` is each API key's, at most so many of all replicas together, of tiles and chips ten times as
    many; null: no limit.
    """

    model: ModelArtifact
    index: IndexArtifact
    chips: ChipsArtifact | list[ChipsArtifact] = Field(default_factory=list)
    canary: Canary | None = None
    smooth_attention_window: SmoothWindow = 3
    max_body_bytes: int = Field(default=12 * 2**20, ge=1024)
    max_body_seconds: float = Field(default=20, gt=0)
    request_timeout_s: float = Field(default=60, gt=0)
    requests_per_minute: float | None = Field(default=600, gt=0)


def serve(config: ServeConfig, cluster: Cluster) -> Artifact:
    """Answer searches over HTTP and show them on a map, until Ctrl-C or SIGTERM."""
    with stop_signal() as stopped, serving(config, cluster) as base_url:
        logging.getLogger(__name__).info("serving %s at %s (Ctrl-C stops it)", config.index, base_url)
        stopped.wait()
    return Artifact(cluster.root, config.output)


@contextlib.contextmanager
def serving(config: ServeConfig, cluster: Cluster) -> Iterator[str]:
    """The server inside this block; yields its base URL when it answers, and leaves the deployment artifact.

    Raises:
        ArtifactError: an input is missing, or the artifact was made by another recipe.
        ConfigError: the index belongs to another model, or the address is taken, or open to others without API keys.
        RuntimeError: the server did not become healthy.
    """
    done = finished(config, cluster)
    logging.getLogger(__name__).info("starting Ray Serve with %s and %s …", config.model, config.index)
    with running(served_by(config, cluster)) as base_url:
        if not done:
            _record(config, cluster, base_url)
        yield base_url


def application(args: dict[str, Any]) -> Any:
    """What `serve deploy cluster/serve.yaml` builds: args `recipe` and `cluster` are files, `overrides` key=value.

    A changed file that is deployed again replaces the replicas one by one, each after what it still answers, so that an
    index or model can be swapped under load.

    Raises:
        ConfigError: a wrong file, or an address that others can reach, without API keys.
    """
    overrides = args.get("overrides", [])
    for_cluster = [item.removeprefix("cluster.") for item in overrides if item.startswith("cluster.")]
    for_recipe = [item for item in overrides if not item.startswith("cluster.")]
    config = load_config(ServeConfig, args["recipe"], for_recipe)
    cluster = load_cluster(args["cluster"], for_cluster)
    served = served_by(config, cluster)
    check_address(cluster.serve.host, served.guard.key_hashes)
    return build_application(served)


def served_by(config: ServeConfig, cluster: Cluster) -> Served:
    """A recipe with its placement and the API keys of the environment; the rate is shared among the replicas."""
    per_minute, placement = config.requests_per_minute, cluster.serve
    most_replicas = placement.max_replicas or placement.num_replicas
    guard = Guarded(
        config.max_body_bytes,
        config.max_body_seconds,
        key_hashes(),
        max_request_seconds=config.request_timeout_s,
        requests_per_minute=per_minute and per_minute / most_replicas,
    )
    canary = config.canary
    others = [ServedVersion(CANARY, canary.model, canary.index, canary.weight)] if canary else []
    stable = ServedVersion(STABLE, config.model, config.index, 1 - sum(each.weight for each in others))
    chips = (config.chips,) if isinstance(config.chips, str) else tuple(config.chips)
    return Served(cluster, (stable, *others), chips, guard, config.smooth_attention_window)


def _record(config: ServeConfig, cluster: Cluster, base_url: str) -> None:
    with open_stage(config, cluster) as stage, httpx.Client(base_url=base_url, timeout=30, trust_env=False) as client:
        description = client.get("/openapi.json").raise_for_status().content
        health = client.get("/health").raise_for_status().json()
        write_bytes(stage.artifact.path("openapi.json"), description)
        pinned = {"model": config.model, "index": config.index, "chips": config.chips} | health
        write_json(stage.artifact.path("deployment.json"), pinned)
        stage.log({"chips_served": float(health["num_chips"])})
