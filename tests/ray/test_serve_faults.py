"""Two replicas of each kind under load: one killed, one hung, the index swapped, more asked than can be done."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from tiny_service import CHIPS, INDEX, MODEL, finish, make_all, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.curate.pipeline import run_plain
from rsplatform.index.build import BuildIndexConfig, index_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.index.finish import finish_index
from rsplatform.serve.app import APPLICATION
from rsplatform.serve.deployment import ServeConfig, served_by, serving
from rsplatform.serve.replicas import MAX_ONGOING_REQUESTS, MAX_QUEUED_REQUESTS, build_application, picture_deployment
from rsplatform.serve.versions import STABLE

pytestmark = pytest.mark.ray

OTHER_INDEX = "index/tiny/v2"  # the same chips without captions, by which answers tell what they came from
CONFIG = ServeConfig(output="deployment/tiny/v1", model=MODEL, index=INDEX, chips=CHIPS, request_timeout_s=15)
CLIENTS = 8
PATIENCE_S = 150


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    root = str(tmp_path_factory.mktemp("served") / "artifacts")
    make_all(root)
    config = BuildIndexConfig(output=OTHER_INDEX, model=MODEL, chips=CHIPS)
    artifact = Artifact(root, OTHER_INDEX)
    counts = run_plain(*index_pipeline(config, tiny_cluster(root), artifact))
    finish_index(artifact.uri, load_embedder(root, MODEL).model_hash)
    finish(root, OTHER_INDEX, counts)
    return tiny_cluster(root, serve={"port": 0, "num_replicas": 2, "cpus_per_replica": 0.2})


@pytest.fixture(scope="module")
def base_url(cluster: Cluster) -> Iterator[str]:
    with serving(CONFIG, cluster) as url:
        yield url


@dataclass
class Load:
    """Clients that search without a pause; a read that fails is sent once more, as client.py does."""

    base_url: str
    answers: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopped: bool = False

    async def client(self, number: int) -> None:
        limits = httpx.Timeout(25)
        async with httpx.AsyncClient(base_url=self.base_url, timeout=limits, trust_env=False) as http:
            while not self.stopped:
                body = {"text": f"a stadium {number} {len(self.answers)}", "k": 3}
                first = await self._ask(http, body)
                outcome = await self._ask(http, body) if isinstance(first, str) else first
                if isinstance(outcome, str):
                    self.failures.append(outcome)
                else:
                    self.answers.append(outcome)

    async def _ask(self, http: httpx.AsyncClient, body: dict) -> dict | str:
        try:
            response = await http.post("/v1/search", json=body)
        except httpx.TransportError as error:
            return f"{type(error).__name__}"
        return response.json() if response.status_code == 200 else f"{response.status_code} {response.text[:80]}"

    async def more(self, number: int) -> None:
        """Until so many more answers have come."""
        wanted = len(self.answers) + number
        await until(lambda: len(self.answers) >= wanted)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.05)


async def under_load(base_url: str, during: Callable[[Load], Awaitable[None]]) -> Load:
    load = Load(base_url)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(load.client(number))
        try:
            await load.more(30)
            await during(load)
            await load.more(30)
        finally:
            load.stopped = True
    return load


def replica_pids(deployment: str) -> set[int]:
    """Processes of the running replicas."""
    controller = _get_global_client()
    assert controller is not None
    details = controller.get_serve_details()
    replicas = details["applications"][APPLICATION]["deployments"][deployment]["replicas"]
    return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}


@pytest.mark.parametrize("deployment", ["gateway", picture_deployment(STABLE)])
def test_a_killed_replica_costs_no_answer_and_is_replaced(base_url: str, deployment: str) -> None:
    async def kill(load: Load) -> None:
        victim = min(replica_pids(deployment))
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in (now := replica_pids(deployment)) and len(now) == 2)

    load = asyncio.run(under_load(base_url, kill))
    assert len(load.failures) <= 0.001 * len(load.answers), load.failures


def test_a_hung_replica_is_replaced_while_the_other_answers(base_url: str) -> None:
    async def hang(load: Load) -> None:
        victim = min(replica_pids("gateway"))
        os.kill(victim, signal.SIGSTOP)
        await load.more(30)  # by the other one
        await until(lambda: victim not in (now := replica_pids("gateway")) and len(now) == 2)

    load = asyncio.run(under_load(base_url, hang))
    assert len(load.failures) <= 2 * CLIENTS, load.failures  # what the hung one held, asked twice


def test_an_index_is_swapped_without_a_wrong_or_failed_answer(base_url: str, cluster: Cluster) -> None:
    async def swap(load: Load) -> None:
        new = build_application(served_by(CONFIG.model_copy(update={"index": OTHER_INDEX}), cluster))
        await asyncio.to_thread(serve.run, new, name=APPLICATION, route_prefix="/")
        load.answers.append({"results": []})  # marks the moment from which only the new one may answer
        await load.more(CLIENTS)

    load = asyncio.run(under_load(base_url, swap))
    assert not load.failures
    captions = [{bool(item["caption"]) for item in answer["results"]} for answer in load.answers]
    swapped = captions.index(set())
    assert all(len(found) <= 1 for found in captions), "an answer of both"
    assert {True} in captions[:swapped]
    assert all(found == {False} for found in captions[swapped + 1 + CLIENTS :])  # but for those under way


def test_more_than_can_be_done_gets_503_with_retry_after_and_memory_stays(base_url: str) -> None:
    number = MAX_QUEUED_REQUESTS + 2 * MAX_ONGOING_REQUESTS + 150  # of two replicas, and more

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=number)
        timeout = httpx.Timeout(PATIENCE_S)
        async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=timeout, trust_env=False) as http:
            body = {"text": "a road", "k": 64, "localize": True}
            return list(await asyncio.gather(*(http.post("/v1/search", json=body) for _ in range(number))))

    processes = [psutil.Process(pid) for name in ("gateway", picture_deployment(STABLE)) for pid in replica_pids(name)]
    before = sum(process.memory_info().rss for process in processes)
    answers = asyncio.run(flood())
    grown = sum(process.memory_info().rss for process in processes) - before
    refused = [answer for answer in answers if answer.status_code != 200]
    others = {answer.text for answer in refused if answer.status_code != 503}
    assert {answer.status_code for answer in answers} == {200, 503}, others
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert grown < 2**30
    assert httpx.get(f"{base_url}/health", trust_env=False, timeout=60).status_code == 200
