"""Two replicas of each kind under load: one killed, one hung, the index swapped, more asked than can be done."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from tiny_service import CHIPS, INDEX, MODEL, finish, make_all, tiny_cluster

from benchmarks.serve_load import Load, replaced, replica_pids, under_load
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.curate.pipeline import run_plain
from rsplatform.index.build import BuildIndexConfig, index_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.index.finish import finish_index
from rsplatform.serve.app import APPLICATION
from rsplatform.serve.client import Client
from rsplatform.serve.deployment import ServeConfig, served_by, serving
from rsplatform.serve.replicas import MAX_ONGOING_REQUESTS, MAX_QUEUED_REQUESTS, build_application, picture_deployment
from rsplatform.serve.versions import STABLE

pytestmark = pytest.mark.ray

OTHER_INDEX = "index/tiny/v2"  # the same chips without captions, by which answers tell what they came from
CONFIG = ServeConfig(output="deployment/tiny/v1", model=MODEL, index=INDEX, chips=CHIPS, request_timeout_s=15)
CLIENTS = 8
PATIENCE_S = 300
DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana.json"


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


async def loaded(base_url: str, during: Callable[[Load], Awaitable[None]]) -> Load:
    async def amid_answers(load: Load) -> None:
        await load.more(30)
        await during(load)
        await load.more(30)

    load = Load(base_url, lambda number: {"text": f"a stadium {number}", "k": 3})
    return await under_load(load, CLIENTS, amid_answers, PATIENCE_S)


@pytest.mark.parametrize("deployment", ["gateway", picture_deployment(STABLE)])
def test_a_killed_replica_costs_no_answer_and_is_replaced(base_url: str, deployment: str) -> None:
    async def kill(load: Load) -> None:
        victim = min(replica_pids(deployment))
        os.kill(victim, signal.SIGKILL)
        await replaced(deployment, victim)

    load = asyncio.run(loaded(base_url, kill))
    assert len(load.failures) <= 0.001 * len(load.answers), load.failures


def test_a_hung_replica_is_replaced_while_the_other_answers(base_url: str) -> None:
    async def hang(load: Load) -> None:
        victim = min(replica_pids("gateway"))
        os.kill(victim, signal.SIGSTOP)
        await load.more(30)  # by the other one
        await replaced("gateway", victim)

    load = asyncio.run(loaded(base_url, hang))
    assert not load.failures, load.failures
    assert len(load.first_failures) <= CLIENTS, load.first_failures  # what the hung one held was asked again


def test_an_index_is_swapped_without_a_wrong_or_failed_answer(base_url: str, cluster: Cluster) -> None:
    swapped: list[float] = []

    async def swap(load: Load) -> None:
        new = build_application(served_by(CONFIG.model_copy(update={"index": OTHER_INDEX}), cluster))
        await asyncio.to_thread(serve.run, new, name=APPLICATION, route_prefix="/")
        swapped.append(time.monotonic())
        await load.more(CLIENTS)

    load = asyncio.run(loaded(base_url, swap))
    assert not load.failures and not load.first_failures
    captions = [{bool(item["caption"]) for item in answer.document["results"]} for answer in load.answers]
    assert all(len(found) == 1 for found in captions), "an answer of both"
    assert {True} in captions
    late = [
        found for found, answer in zip(captions, load.answers, strict=True) if answer.at - answer.seconds > swapped[0]
    ]
    assert late and all(found == {False} for found in late)


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


def test_prometheus_finds_every_series_of_the_dashboard(base_url: str) -> None:
    queries = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    wanted = set(re.findall(r"\bray_\w+", " ".join(queries)))
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def missing() -> set[str]:
        scraped = httpx.get(address, trust_env=False, timeout=30).raise_for_status().text
        return wanted - {sample.name for family in text_string_to_metric_families(scraped) for sample in family.samples}

    with Client(base_url, retries=20) as client:  # the flood may still be worked off
        assert client.search("a road", k=1, localize=True).results
    deadline = time.monotonic() + PATIENCE_S
    while (lacking := missing()) and time.monotonic() < deadline:  # Ray's processes report every few seconds
        time.sleep(1)
    assert len(wanted) >= 6 and not lacking
