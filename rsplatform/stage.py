"""What every front door does around its work: claim the artifact, open the MLflow run, commit the manifest last.

A finished artifact of the same recipe is a no-op; an unfinished one is resumed, by one process at a time; a failed one
stays unfinished.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rsplatform import artifacts, lease, storage, tracking
from rsplatform.artifacts import Artifact, ArtifactError, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, StageConfig, flatten, iter_inputs, nested_jobs


@runtime_checkable
class Planning(Protocol):
    """A recipe with more to say in a plan than its inputs and its output."""

    def plan_lines(self, cluster: Cluster) -> list[str]: ...


@dataclass
class Stage:
    """One open stage: its artifact, its MLflow run, and the counts and metrics its manifest will hold."""

    artifact: Artifact
    run: tracking.Run
    counts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def log(self, metrics: dict[str, float], step: int = 0) -> None:
        """Write metrics to MLflow and keep the last value of each for the manifest."""
        self.metrics |= {key: float(value) for key, value in metrics.items()}
        self.run.log_metrics(metrics, step)


def input_artifacts(config: StageConfig) -> dict[str, str]:
    """Field path → artifact ref, for every artifact that the recipe reads (also through artifact:// paths)."""
    refs = {}
    for path, value, is_artifact in iter_inputs(config):
        if is_artifact:
            refs[path] = value
        elif value.startswith("artifact://"):
            refs[path] = "/".join(value.removeprefix("artifact://").split("/")[:3])
    return refs


def recipe_identity(config: StageConfig, cluster: Cluster) -> dict[str, Any]:
    """The recipe and the fingerprints of its input artifacts; ArtifactError if one is not finished."""
    inputs = {ref: open_artifact(cluster.root, ref).fingerprint() for ref in input_artifacts(config).values()}
    return artifacts.identity(config.model_dump(mode="json", exclude={"pipeline"}), inputs)


def finished(config: StageConfig, cluster: Cluster) -> Artifact | None:
    """The artifact, if this very recipe has already made it."""
    artifact = Artifact(cluster.root, config.output)
    if not artifact.is_finished:
        return None
    artifacts.begin(artifact, recipe_identity(config, cluster))
    return artifact


@contextlib.contextmanager
def open_stage(config: StageConfig, cluster: Cluster) -> Iterator[Stage]:
    """Open the stage of an unfinished artifact; commits on success, leaves it unfinished and marks FAILED otherwise.

    Call `finished` first. Raises ArtifactError (also where another process is at work on it, or an input has lost
    files), StorageError or TrackingError before any work is done.
    """
    storage.check_writable(cluster.root)
    artifact = Artifact(cluster.root, config.output)
    recipe = recipe_identity(config, cluster)
    artifacts.check_recipe(artifact, recipe)
    for ref in recipe["inputs"]:
        artifacts.check_sizes(Artifact(cluster.root, ref))
    with lease.held(artifact) as held:
        if artifacts.begin(artifact, recipe) is not None:
            raise ArtifactError(f"{artifact.uri} was finished by another process just now; run the same command again")
        run = _start_run(config, cluster, artifact)
        stage = Stage(artifact, run)
        try:
            with tracking.child_runs_of(run):
                yield stage
            flat = flatten({"counts": stage.counts})
            run.log_metrics({key: value for key, value in flat.items() if isinstance(value, int | float)})
            held.check()
            manifest = artifacts.commit(artifact, recipe, counts=stage.counts, metrics=stage.metrics, run_id=run.run_id)
            run.log_document(manifest, "manifest.json")
        except BaseException:
            run.fail()
            raise
        run.end("FINISHED")


def _start_run(config: StageConfig, cluster: Cluster, artifact: Artifact) -> tracking.Run:
    kind, name, version = config.output.split("/")
    parents = {
        f"input.{ref}": open_artifact(cluster.root, ref).manifest()["mlflow_run_id"]
        for ref in input_artifacts(config).values()
    }
    tags = {"kind": kind, "name": name, "version": version, "ref": config.output, "uri": artifact.uri}
    tags |= {"git_sha": artifacts.git_sha()} | parents
    params = config.model_dump(mode="json")
    resume = artifacts.noted_run(artifact)
    run = tracking.start_run(
        cluster.root, config.pipeline, f"{kind}/{name}/{version}", params, tags=tags, resume=resume
    )
    if run.run_id != resume:
        artifacts.note_run(artifact, run.run_id)
    return run


def plan(config: StageConfig, cluster: Cluster) -> list[str]:
    """What a job would do, as lines for `--dry-run`; every input is looked up.

    Raises:
        ConfigError: a source path that does not exist.
        ArtifactError: the output was made or begun by another recipe, as the run itself would say.
    """
    lines = [f"{name}: {line}" for name, job in nested_jobs(config).items() for line in plan(job, cluster)]
    for path, value, is_artifact in iter_inputs(config):
        if is_artifact or value.startswith("artifact://"):
            ref = input_artifacts(config)[path]
            state = "finished" if Artifact(cluster.root, ref).is_finished else "NOT FINISHED: run its job first"
            lines.append(f"input  {path} = {value} ({state})")
            continue
        place = cluster.resolve(value)
        if not storage.exists(place):
            raise ConfigError(f"{path}: {place} does not exist; fix the recipe or metadata.rsplatform.data_root")
        lines.append(f"input  {path} = {place}")
    if isinstance(config, Planning):
        lines += config.plan_lines(cluster)
    artifact = Artifact(cluster.root, config.output)
    state = "finished: nothing to do" if artifact.is_finished else "to be made"
    if not artifact.is_finished and storage.exists(artifact.uri):
        state = "unfinished: will be resumed"
    if all(Artifact(cluster.root, ref).is_finished for ref in input_artifacts(config).values()):
        artifacts.check_recipe(artifact, recipe_identity(config, cluster))
    return [*lines, f"output {artifact.uri} ({state})"]
