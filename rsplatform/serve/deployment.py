"""Front door `serve`: a model, its index and the chips behind it in, an HTTP server until it is told to stop.

The artifact pins what was served: refs, fingerprints (in the manifest) and openapi.json. It is committed as soon as
the server answers, so that it stands while the server runs. A server that was recorded before is started again.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Annotated

import httpx
from pydantic import Field

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ChipsArtifact, InputArtifact, ModelArtifact, StageConfig, of_kind
from rsplatform.localize.window import SmoothWindow
from rsplatform.serve.app import Served, guard, running, stop_signal
from rsplatform.stage import finished, open_stage
from rsplatform.storage import write_bytes, write_json


class ServeConfig(StageConfig):
    """What is served, and the limits of one request. Where it listens is the cluster file's `serve`."""

    model: ModelArtifact
    index: Annotated[InputArtifact, of_kind("index")]
    chips: ChipsArtifact
    smooth_attention_window: SmoothWindow = 3
    max_body_bytes: int = Field(default=12 * 2**20, ge=1024)
    max_body_seconds: float = Field(default=20, gt=0)
    request_timeout_s: float = Field(default=60, gt=0)


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
    served = Served(
        cluster=cluster,
        model=config.model,
        index=config.index,
        chips=config.chips,
        guard=guard(config.max_body_bytes, config.max_body_seconds),
        window=config.smooth_attention_window,
        request_timeout_s=config.request_timeout_s,
    )
    logging.getLogger(__name__).info("starting Ray Serve with %s and %s …", config.model, config.index)
    with running(served) as base_url:
        if not done:
            _record(config, cluster, base_url)
        yield base_url


def _record(config: ServeConfig, cluster: Cluster, base_url: str) -> None:
    with open_stage(config, cluster) as stage, httpx.Client(base_url=base_url, timeout=30, trust_env=False) as client:
        description = client.get("/openapi.json").raise_for_status().content
        health = client.get("/health").raise_for_status().json()
        write_bytes(stage.artifact.path("openapi.json"), description)
        pinned = {"model": config.model, "index": config.index, "chips": config.chips} | health
        write_json(stage.artifact.path("deployment.json"), pinned)
        stage.log({"chips_served": float(health["num_chips"])})
