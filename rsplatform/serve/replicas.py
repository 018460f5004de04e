"""Ray Serve's replicas around the plain classes: two deployments and how they are bound to one application.

    proxy -> Gateway (FastAPI, text encoding in batches, search) -> PictureWork (smooth attention, embeddings, captions)

Text encoding and search share a replica because a hop costs more than either. Must not use postponed evaluation
of annotations: FastAPI reads them where Serve builds the application.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError
from starlette.types import ASGIApp

from rsplatform.cluster import Cluster, ServePlacement
from rsplatform.index.embed import load_embedder
from rsplatform.model.embedder import granted_device
from rsplatform.serve.admission import RETRY_AFTER_S
from rsplatform.serve.batching import Batcher
from rsplatform.serve.guard import Guarded
from rsplatform.serve.localization import Look
from rsplatform.serve.metrics import BatchMetrics, RequestMetrics
from rsplatform.serve.record import ACCESS_LOG, RequestRecord, log_request
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import MAX_TEXT_BATCH, RequestError, Services, text_batcher
from rsplatform.serve.tiles import Tiles
from rsplatform.serve.versions import Versions
from rsplatform.serve.vision import MAX_PICTURE_BATCH, Described, PictureModel, VisionWork

# As many requests as a replica works on, of which Serve's default is 5: twice the batch keeps the next one filling.
MAX_ONGOING_REQUESTS = 2 * MAX_TEXT_BATCH
# No more wait than one replica works on at once: they are let in before their time is over, or refused at once.
MAX_QUEUED_REQUESTS = MAX_ONGOING_REQUESTS
# A replica that dies is replaced at once, one that hangs after three misses in a row: at most about 3 × (3 + 10) s.
# Less time would replace healthy ones: a check waits behind as many texts as a replica works on, seconds for a large
# model on one core.
HEALTH_CHECK_PERIOD_S = 3
HEALTH_CHECK_TIMEOUT_S = 10


@dataclass(frozen=True)
class ServedVersion:
    """A model with its index, and the share of requests that they answer unasked."""

    name: str
    model: str
    index: str
    weight: float


@dataclass(frozen=True)
class Served:
    """What a deployment serves, and its limits."""

    cluster: Cluster
    versions: tuple[ServedVersion, ...]
    chips: tuple[str, ...]
    guard: Guarded
    window: int

    @property
    def device(self) -> str:
        """Where replicas put the model."""
        return granted_device(self.cluster.serve.gpus_per_replica)


class PictureWork:
    """One replica of the heavy work on pictures, on the device that the placement grants its replicas.

    Pictures of different requests share a forward; each call of Serve's handle brings all pictures of its request.
    """

    def __init__(self, served: Served, version: ServedVersion) -> None:
        _use_own_cores()
        embedder = load_embedder(served.cluster.root, version.model, served.device)
        self.embedder = embedder
        work = PictureModel(embedder, served.window)

        self._look = Batcher(work.look, MAX_PICTURE_BATCH, BatchMetrics("maps").add)
        self._embed = Batcher(work.embed, MAX_PICTURE_BATCH, BatchMetrics("embed").add)
        self._describe = Batcher(work.captions, MAX_PICTURE_BATCH, BatchMetrics("caption").add)

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
    """`VisionWork` through Serve's handle to PictureWork. A replica that dies under a call is asked for once more."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def maps(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """See VisionWork."""
        return await self._asked("maps", list(looks))

    async def embed(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """See VisionWork."""
        return await self._asked("embed", list(pixels))

    async def caption(self, picture: Described) -> str:
        """See VisionWork."""
        return await self._asked("caption", picture)

    async def _asked(self, method: str, argument: Any) -> Any:
        for is_last in (False, True):
            try:
                return await getattr(self._handle, method).remote(argument)
            except RayActorError as error:
                if is_last:
                    raise RequestError(503, "the replica for pictures was lost; try again") from error
            except BackPressureError as error:
                raise RequestError(503, "too many pictures wait; try again later") from error


class Gateway:
    """One replica of the HTTP application with the embedder and index of each version."""

    def __init__(self, served: Served, picture_work: dict[str, Any]) -> None:
        _use_own_cores()
        services = {each.name: _services(served, each, picture_work[each.name]) for each in served.versions}
        self.versions = Versions(services, {each.name: each.weight for each in served.versions})
        self.guard = served.guard
        self.metrics = RequestMetrics()
        _log_requests()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve in the replica, after the constructor: an application with open readers is not pickled."""
        return build_app(self.versions, self.guard, self._watch)

    def _watch(self, record: RequestRecord) -> None:
        log_request(record)
        self.metrics.add(record)

    async def check_health(self) -> None:
        """Encode one text with each model; Serve replaces a replica for which this raises or hangs."""
        for services in self.versions.services.values():
            await services.check()


def _services(served: Served, version: ServedVersion, picture_work: Any) -> Services:
    """One version in a Gateway: texts of its requests share forwards, pictures go to the replicas for them."""
    retrieval = Retrieval(served.cluster, version.model, version.index, served.chips, served.device)
    vision: VisionWork = RemotePictureWork(picture_work)

    batched = text_batcher(retrieval, BatchMetrics("text").add)
    return Services(retrieval, Tiles(retrieval.catalogue), batched, vision, version=version.name)


def _use_own_cores() -> None:
    """One Torch thread per whole CPU of this replica: more of them than cores cost 100 × on a busy machine."""
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))


def build_application(served: Served) -> serve.Application:
    """The gateway and a deployment for pictures per version, bound together, with the resources of the cluster file."""
    placement = served.cluster.serve
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": placement.cpus_per_replica, "num_gpus": placement.gpus_per_replica},
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "backpressure_config": BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        # what a replaced replica still answers is answered, or refused by the guard's own limits
        "graceful_shutdown_timeout_s": served.guard.max_body_seconds + served.guard.max_request_seconds,
        **_replicas(placement),
    }
    pictures = {
        each.name: serve.deployment(name=picture_deployment(each.name), **options)(PictureWork).bind(served, each)
        for each in served.versions
    }
    gateway = serve.deployment(name="gateway", **options)(serve.ingress()(Gateway))
    return gateway.bind(served, pictures)


def picture_deployment(version: str) -> str:
    """Name of the deployment that works on the pictures of a version."""
    return f"pictures-{version}"


def _replicas(placement: ServePlacement) -> dict[str, Any]:
    """A number of replicas, or a range that follows the load."""
    if placement.max_replicas is None:
        return {"num_replicas": placement.num_replicas}
    autoscaling = {
        "min_replicas": placement.num_replicas,
        "max_replicas": placement.max_replicas,
        "target_ongoing_requests": MAX_ONGOING_REQUESTS // 4,  # one more replica well before requests queue
    }
    return {"autoscaling_config": autoscaling}


def _log_requests() -> None:
    """One line of JSON a request on the replica's stderr, which Ray keeps in its session's logs."""
    logger = logging.getLogger(ACCESS_LOG)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
