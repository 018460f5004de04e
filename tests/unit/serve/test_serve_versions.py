"""Two models side by side: shares by weight, one by name, and no answer of both."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_service import CHIPS, INDEX, MODEL, SCENE, build_config, finish, make_all, make_model, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.config import ConfigError
from rsplatform.curate.pipeline import run_plain
from rsplatform.index.build import index_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.index.finish import finish_index
from rsplatform.serve.api import SearchRequest
from rsplatform.serve.deployment import Canary, ServeConfig, served_by
from rsplatform.serve.guard import Guarded
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import RequestError, Services, local_services
from rsplatform.serve.versions import CANARY, STABLE, Versions

OTHER_MODEL, OTHER_INDEX = "model/other/v1", "index/other/v1"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    root = str(tmp_path_factory.mktemp("served") / "artifacts")
    make_all(root)
    make_model(root, OTHER_MODEL, seed=1)
    config = build_config().model_copy(update={"model": OTHER_MODEL, "output": OTHER_INDEX})
    artifact = Artifact(root, OTHER_INDEX)
    counts = run_plain(*index_pipeline(config, tiny_cluster(root), artifact))
    finish_index(artifact.uri, load_embedder(root, OTHER_MODEL).model_hash)
    finish(root, OTHER_INDEX, counts)
    services: dict[str, Services] = {}
    for name, refs in {STABLE: (MODEL, INDEX), CANARY: (OTHER_MODEL, OTHER_INDEX)}.items():
        services[name] = local_services(Retrieval(tiny_cluster(root), *refs, CHIPS), version=name)
    return Versions(services, {STABLE: 0.75, CANARY: 0.25})


def test_an_index_over_other_chips_than_those_served_is_refused(tmp_path: Path) -> None:
    make_all(str(tmp_path))
    with pytest.raises(ConfigError, match=f"{INDEX} holds pictures of {CHIPS}, served are those of chips/elsewhere/v1"):
        Retrieval(tiny_cluster(str(tmp_path)), MODEL, INDEX, "chips/elsewhere/v1")


def test_each_version_gets_its_share(versions: Versions) -> None:
    chosen = [versions.choose(None, draw / 1000).version for draw in range(1000)]
    assert chosen.count(CANARY) == 250 and versions.choose(None, 1.0).version == STABLE
    assert all(versions.choose(CANARY, draw / 10).version == CANARY for draw in range(10))
    with pytest.raises(RequestError, match="nightly.*stable, canary"):
        versions.choose("nightly", 0)


def test_an_answer_and_its_links_are_of_one_version(versions: Versions) -> None:
    app = build_app(versions, Guarded(100_000, 5))

    async def run() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            hashes: dict[str, Any] = {}
            for name, services in versions.services.items():
                body = {"text": "a road", "k": 3, "localize": True}
                answer = await http.post("/v1/search", params={"version": name}, json=body)
                hashes[name] = answer.json()["model_hash"]
                assert answer.headers["x-model-version"] == name and hashes[name] == services.model_hash
                for item in answer.json()["results"]:
                    for url in (item["thumbnail_url"], item["heatmap_url"]):
                        shown = await http.get(url)
                        assert shown.status_code == 200 and shown.headers["x-model-version"] == name
            assert hashes[STABLE] != hashes[CANARY]
            unknown = await http.post("/v1/search", params={"version": "x"}, json={"text": "a"})
            assert unknown.status_code == 404

    asyncio.run(run())


def test_a_link_is_kept_only_while_its_model_and_index_are_served(versions: Versions) -> None:
    """The link of one version asked of the other: what a browser sees while one is swapped for the other."""

    async def run() -> None:
        apps = {name: build_app(services, Guarded(100_000, 5)) for name, services in versions.services.items()}
        answers: dict[tuple[str, str], set[str]] = {}
        for asked, app in apps.items():
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
                for name, services in versions.services.items():
                    chip = services.retrieval.chip(f"{SCENE}-0003")
                    found = services.retrieval.result(chip, SearchRequest(text="a", localize=True), asked)
                    pictures = [await http.get(url) for url in (found.thumbnail_url, found.heatmap_url or "")]
                    answers[asked, name] = {each.headers["cache-control"] for each in pictures}
        assert {pair: kept == {"private, max-age=3600"} for pair, kept in answers.items()} == {
            (asked, name): asked == name for asked in apps for name in apps
        }
        assert {"no-store"} in answers.values()

    asyncio.run(run())


def test_a_recipe_with_a_canary_names_both_and_their_shares() -> None:
    canary = Canary(model=OTHER_MODEL, index=OTHER_INDEX, weight=0.1)
    config = ServeConfig(output="deployment/a/v1", model=MODEL, index=INDEX, chips=CHIPS, canary=canary)
    served = served_by(config, tiny_cluster("/nowhere"))
    assert [(each.name, each.weight) for each in served.versions] == [(STABLE, 0.9), (CANARY, 0.1)]
