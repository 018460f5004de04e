"""Ray Serve around the plain classes: two deployments, started and stopped as one, and the front door's runtime.

    proxy -> Gateway (FastAPI, text encoding in batches, search) -> PictureWork (smooth attention, captions)

Text encoding and search share a replica because a hop costs more than either. Must not use postponed evaluation
of annotations: FastAPI reads them where Serve builds the application.
"""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import ray
import torch
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.index.embed import load_embedder
from rsplatform.model.embedder import granted_device
from rsplatform.runtime import ray_runtime
from rsplatform.serve.localization import Look
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.security import Guarded, check_address, key_hashes
from rsplatform.serve.services import Services
from rsplatform.serve.tiles import Tiles
from rsplatform.serve.vision import MAX_PICTURE_BATCH, Described, PictureModel, VisionWork

APPLICATION = "rsplatform"
MAX_TEXT_BATCH = 32
# A text waits at most this long for others to share its forward.
BATCH_WAIT_S = 0.002
# A picture's forward takes longer, so that more are worth waiting for.
PICTURE_BATCH_WAIT_S = 0.005
# Serve caps every batch at max_ongoing_requests, whose default is 5; twice the batch keeps the next one filling.
MAX_ONGOING_REQUESTS = 2 * MAX_TEXT_BATCH
MAX_QUEUED_REQUESTS = 256
# For the first answer of the application.
START_TIMEOUT_S = 180
CONNECT_RETRIES = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Served:
    """What a deployment serves, and its limits."""

    cluster: Cluster
    model: str
    index: str
    chips: str
    guard: Guarded
    window: int
    request_timeout_s: float

    @property
    def device(self) -> str:
        """Where replicas put the model."""
        return granted_device(self.cluster.serve.gpus_per_replica)


class PictureWork:
    """One replica of the heavy work on pictures, on the device that the placement grants its replicas.

    Pictures of different requests share a forward; each call of Serve's handle brings all pictures of its request.
    """

    def __init__(self, served: Served) -> None:
        _use_own_cores()
        embedder = load_embedder(served.cluster.root, served.model, served.device)
        self.embedder = embedder
        work = PictureModel(embedder, served.window)

        @serve.batch(max_batch_size=MAX_PICTURE_BATCH, batch_wait_timeout_s=PICTURE_BATCH_WAIT_S)
        async def look(looks: list[Look]) -> list[np.ndarray]:
            return await asyncio.to_thread(work.look, looks)

        @serve.batch(max_batch_size=MAX_PICTURE_BATCH, batch_wait_timeout_s=PICTURE_BATCH_WAIT_S)
        async def embed(pixels: list[np.ndarray]) -> list[np.ndarray]:
            return await asyncio.to_thread(work.embed, pixels)

        @serve.batch(max_batch_size=MAX_PICTURE_BATCH, batch_wait_timeout_s=PICTURE_BATCH_WAIT_S)
        async def describe(pictures: list[Described]) -> list[str]:
            return await asyncio.to_thread(work.captions, pictures)

        self._look, self._embed, self._describe = look, embed, describe

    async def maps(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """See VisionWork."""
        return list(await asyncio.gather(*(self._look(each) for each in looks)))

    async def embed(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """See VisionWork."""
        return np.stack(await asyncio.gather(*(self._embed(each) for each in pixels)))

    async def caption(self, picture: Described) -> str:
        """See VisionWork."""
        return await self._describe(picture)

    async def check_health(self) -> None:
        """Encode one picture; Serve replaces a replica for which this raises or hangs."""
        size = self.embedder.image_size
        await asyncio.to_thread(self.embedder.embed_images, [np.zeros((size, size, 3), dtype=np.uint8)])


class RemotePictureWork:
    """`VisionWork` through Serve's handle to PictureWork."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def maps(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """See VisionWork."""
        return await self._handle.maps.remote(list(looks))

    async def embed(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """See VisionWork."""
        return await self._handle.embed.remote(list(pixels))

    async def caption(self, picture: Described) -> str:
        """See VisionWork."""
        return await self._handle.caption.remote(picture)


class Gateway:
    """One replica of the HTTP application with its embedder and index."""

    def __init__(self, served: Served, picture_work: Any) -> None:
        _use_own_cores()
        retrieval = Retrieval(served.cluster, served.model, served.index, served.chips, served.device)
        vision: VisionWork = RemotePictureWork(picture_work)

        @serve.batch(max_batch_size=MAX_TEXT_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
        async def encode(texts: list[str]) -> list[np.ndarray]:
            return list(await asyncio.to_thread(retrieval.embedder.embed_texts, texts))

        self.services = Services(retrieval, Tiles(retrieval.catalogue), encode, vision)
        self.guard = served.guard

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve in the replica, after the constructor: an application with open readers is not pickled."""
        return build_app(self.services, self.guard)

    async def check_health(self) -> None:
        """Encode one text; Serve replaces a replica for which this raises or hangs."""
        await self.services.check()


def _use_own_cores() -> None:
    """One Torch thread per whole CPU of this replica: more of them than cores cost 100 × on a busy machine."""
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))


def build_application(served: Served) -> serve.Application:
    """The two deployments bound together, with the resources of the cluster file."""
    placement = served.cluster.serve
    options: dict[str, Any] = {
        "num_replicas": placement.num_replicas,
        "ray_actor_options": {"num_cpus": placement.cpus_per_replica, "num_gpus": placement.gpus_per_replica},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "health_check_period_s": 10,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 5,
    }
    pictures = serve.deployment(name="pictures", **options)(PictureWork)
    gateway = serve.deployment(name="gateway", max_queued_requests=MAX_QUEUED_REQUESTS, **options)(
        serve.ingress()(Gateway)
    )
    return gateway.bind(served, pictures.bind(served))


@contextlib.contextmanager
def running(served: Served) -> Iterator[str]:
    """Ray Serve with this application inside the block; yields its base URL once /health answers.

    A port of 0 takes a free one. Everything that was started is stopped at the end: Serve, and Ray if it is ours.

    Raises:
        ConfigError: an address that others can reach, without API keys, or that cannot be listened at.
        RuntimeError: the application did not become healthy.
    """
    placement = served.cluster.serve
    check_address(placement.host, served.guard.key_hashes)
    port = _free_port(placement.host, placement.port)
    handlers = _signal_handlers()
    joined = served.cluster.ray_address is not None or "RAY_ADDRESS" in os.environ
    with ray_runtime(served.cluster):
        _handle_again(handlers)
        http = {"host": placement.host, "port": port, "request_timeout_s": served.request_timeout_s}
        try:
            # one line per request would drown the job's own output; errors still show
            quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
            serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=quiet)
            serve.run(build_application(served), name=APPLICATION, route_prefix="/", logging_config=quiet)
            base_url = f"http://{placement.host}:{port}"
            _check_health(base_url)
            yield base_url
        finally:
            if joined:  # a cluster that others use: take down only what is ours
                serve.delete(APPLICATION)
            else:
                serve.shutdown()


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"metadata.rsplatform.serve: cannot listen at {host} port {port} ({error.strerror}); stop what listens "
                "there, or add cluster.serve.port=8001 (0: any free one) to the command"
            ) from error
        return probe.getsockname()[1]


def _check_health(base_url: str) -> None:
    """One request through the whole application.

    serve.start returns when the proxy listens, and serve.run when replicas run, seconds after the controller has told
    the proxy their routes; the proxy holds a request until a replica takes it. So nothing is asked twice.
    """
    transport = httpx.HTTPTransport(retries=CONNECT_RETRIES)
    try:
        with httpx.Client(transport=transport, timeout=START_TIMEOUT_S, trust_env=False) as client:
            response = client.get(f"{base_url}/health")
    except httpx.TransportError as error:
        raise RuntimeError(f"{base_url}/health does not answer ({error}); see Ray Serve's logs") from error
    if response.status_code != 200:
        raise RuntimeError(f"{base_url}/health answers {response.status_code} {response.text[:200]}")


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of killing the process before it has cleaned up."""
    stopped = threading.Event()
    earlier = _signal_handlers()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        _handle_again(earlier)


def _signal_handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def _handle_again(handlers: dict[int, Any]) -> None:
    """Put handlers back where starting Ray has replaced them: its own aborts the process on SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def guard(max_body_bytes: int, max_body_seconds: float) -> Guarded:
    """Limits of a deployment with the API keys of the environment."""
    return Guarded(max_body_bytes, max_body_seconds, key_hashes())
