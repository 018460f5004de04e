"""Front door `demo`: the whole chain, one job after the other, on one Ray runtime, with a summary a person can read.

It composes the recipes of the single jobs and adds nothing to them: every arrow can be run alone with the same
YAML. It fails unless retrieval beats chance and smooth attention beats raw patches by what the recipe demands.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from rsplatform import commands, summary
from rsplatform.artifacts import Artifact, ArtifactError, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import Config, StageConfig, nested_jobs
from rsplatform.curate.caption import CaptionConfig, caption
from rsplatform.curate.chips import IngestScenesConfig, ingest_scenes
from rsplatform.curate.filter_web import FilterWebConfig, filter_web
from rsplatform.curate.overhead import TrainOverheadConfig, train_overhead
from rsplatform.dataset.build import BuildDatasetConfig, build_dataset
from rsplatform.evaluate.run import EvaluateConfig, evaluate
from rsplatform.index.build import BuildIndexConfig, build_index
from rsplatform.localize.run import LocalizeConfig, localize
from rsplatform.localize.self_train import SelfTrainConfig, self_train
from rsplatform.runtime import ray_runtime
from rsplatform.serve.client import Client
from rsplatform.serve.deployment import ServeConfig, serving
from rsplatform.stage import check_input_artifacts, finished, open_stage, plan
from rsplatform.storage import read_bytes, write_bytes, write_json
from rsplatform.train.launch import PretrainConfig, pretrain
from rsplatform.train.sweep import tune
from rsplatform.train.sweep_recipe import TuneConfig
from rsplatform.world.build import MakeWorldConfig, make_world_artifact

CHAIN, SUMMARY = "chain.json", "summary.txt"
LOGGER = logging.getLogger("rsplatform.demo")


class DemoChecks(Config):
    """What the demo must reach, by the names of the benchmarks in `evaluate`; None leaves a check out.

    `min_overhead_average_precision` holds for the held-out part and for every test of `train_overhead`.
    """

    retrieval: str
    min_recall_over_chance: float = Field(default=5, ge=0)
    segmentation: str | None = None
    min_overhead_average_precision: float = Field(default=0, ge=0, le=1)


class DemoSearch(Config):
    """The search that is asked over HTTP at the end."""

    text: str
    k: int = Field(default=3, ge=1)


class DemoConfig(StageConfig):
    """One recipe per job (`!recipe path`), what must be reached, and one search."""

    world: MakeWorldConfig | None = None
    ingest_scenes: IngestScenesConfig
    train_overhead: TrainOverheadConfig
    filter_web: FilterWebConfig
    caption: CaptionConfig
    build_dataset: BuildDatasetConfig
    pretrain: PretrainConfig
    evaluate: EvaluateConfig
    tune: TuneConfig
    localize: LocalizeConfig
    self_train: SelfTrainConfig
    evaluate_self_trained: EvaluateConfig
    build_index: BuildIndexConfig
    serve: ServeConfig
    checks: DemoChecks
    search: DemoSearch


class DemoFailed(RuntimeError):
    """The chain ran, but a number stayed below what the recipe demands."""


def demo(config: DemoConfig, cluster: Cluster) -> Artifact:
    """Run the whole chain from scenes to a search answered over HTTP, and print a summary."""
    done = finished(config, cluster)
    if done:
        _check_chain(done, config, cluster)
        print(read_bytes(done.path(SUMMARY)).decode())
        return done
    plan(config, cluster)  # looks up what the last arrow reads, too: else it would fail after minutes of training
    check_input_artifacts(config, cluster)
    started = time.monotonic()
    with open_stage(config, cluster) as stage:
        with ray_runtime(cluster):
            stood, made = _run_stages(config, cluster)
            answer = _search(config, cluster)
        write_json(stage.artifact.path("search.json"), answer)
        write_json(stage.artifact.path(CHAIN), {item.ref: item.fingerprint() for item in made.values()})
        facts = summary.collect(made, stood, answer, time.monotonic() - started)
        text = summary.render(facts, config.search.text, commands.lines(config.serve, cluster))
        write_bytes(stage.artifact.path(SUMMARY), text.encode())
        stage.run.log_text(text, SUMMARY)
        print(text)
        stage.log(summary.numbers(facts))
        stage.log({"recall_over_chance": recall_over_chance(config.checks, facts["evaluation"])})
        stage.counts = facts["chips"]
        check(config.checks, facts["evaluation"])
        check_overhead(config.checks, facts["overhead"])
    return stage.artifact


def _check_chain(done: Artifact, config: DemoConfig, cluster: Cluster) -> None:
    """ArtifactError if an artifact of the chain is gone, was made again since, or of raw data that differ today."""
    for ref, fingerprint in done.read_json(CHAIN).items():
        if open_artifact(done.root, ref).fingerprint() != fingerprint:
            raise ArtifactError(f"{done.uri}: {ref} was made again since; name a new version in `output`")
    for job in nested_jobs(config).values():
        finished(job, cluster)


def _run_stages(config: DemoConfig, cluster: Cluster) -> tuple[list[str], dict[str, Artifact]]:
    """Every arrow once: the names of those that stood from an earlier run, and all artifacts by name."""
    doors: list[tuple[str, StageConfig | None, Callable[..., Artifact]]] = [
        ("world", config.world, make_world_artifact),
        ("ingest_scenes", config.ingest_scenes, ingest_scenes),
        ("train_overhead", config.train_overhead, train_overhead),
        ("filter_web", config.filter_web, filter_web),
        ("caption", config.caption, caption),
        ("build_dataset", config.build_dataset, build_dataset),
        ("pretrain", config.pretrain, pretrain),
        ("evaluate", config.evaluate, evaluate),
        ("build_index", config.build_index, build_index),
        ("tune", config.tune, tune),
        ("localize", config.localize, localize),
        ("self_train", config.self_train, self_train),
        ("evaluate_self_trained", config.evaluate_self_trained, evaluate),
    ]
    stood: list[str] = []
    made: dict[str, Artifact] = {}
    for name, recipe, front_door in doors:
        if recipe is None:
            continue
        stands = finished(recipe, cluster)
        if stands:
            LOGGER.info("%s stands from an earlier run", name)
            stood.append(name)
            made[name] = stands
            continue
        LOGGER.info("%s → %s", name, recipe.output)
        started = time.monotonic()
        made[name] = front_door(recipe, cluster)
        LOGGER.info("%s done in %.0f s", name, time.monotonic() - started)
    return stood, made


def _search(config: DemoConfig, cluster: Cluster) -> dict[str, Any]:
    """One search with localization through a real HTTP call to Ray Serve, which is stopped again."""
    with serving(config.serve, cluster) as base_url, Client(base_url) as client:
        response = client.search(text=config.search.text, k=config.search.k, localize=True)
    return response.model_dump(mode="json")


def recall_over_chance(checks: DemoChecks, benchmarks: Mapping[str, Mapping[str, Any]]) -> float:
    """Text→image R@10 of the demanded retrieval, in multiples of what a random order reaches."""
    retrieval = benchmarks[checks.retrieval]
    return retrieval["t2i_r10"] / retrieval["chance_t2i_r10"]


def check(checks: DemoChecks, benchmarks: Mapping[str, Mapping[str, Any]]) -> None:
    """DemoFailed unless text→image R@10 is `min_recall_over_chance` times chance and smooth mIoU is above raw."""
    ratio, bar = recall_over_chance(checks, benchmarks), checks.min_recall_over_chance
    if not ratio >= bar:  # NaN reaches no bar
        raise DemoFailed(f"text→image R@10 on {checks.retrieval} is {ratio:.1f} × chance, below {bar} ×")
    if checks.segmentation is not None:
        scores = benchmarks[checks.segmentation]
        if not scores["smooth_miou"] > scores["raw_miou"]:
            raise DemoFailed(
                f"smooth mIoU {scores['smooth_miou']:.1f} on {checks.segmentation} is not above raw "
                f"{scores['raw_miou']:.1f}"
            )


def check_overhead(checks: DemoChecks, metrics: Mapping[str, float]) -> None:
    """DemoFailed if the overhead filter separates one of its test sets worse than demanded."""
    for name, value in metrics.items():
        if name.endswith("_average_precision") and not value >= checks.min_overhead_average_precision:
            raise DemoFailed(f"overhead filter: {name} {value:.3f} is below {checks.min_overhead_average_precision}")
