"""What every front door does around its work: claim the artifact, open the MLflow run, commit the manifest last.

A finished artifact of the same recipe is a no-op; an unfinished one is resumed, by one process at a time; a failed one
stays unfinished.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError

from rsplatform import artifacts, lease, provenance, raw_inputs, storage, tracking
from rsplatform.artifacts import Artifact, ArtifactError, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, RecipeInput, StageConfig, iter_inputs, nested_jobs
from rsplatform.dotted_keys import flatten
from rsplatform.raw_inputs import RawInput, list_raw_inputs


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
    return {item.field: item.artifact for item in iter_inputs(config) if item.artifact is not None}


def recipe_identity(config: StageConfig, cluster: Cluster) -> dict[str, Any]:
    """The recipe and the fingerprints of its input artifacts; ArtifactError if one is not finished."""
    inputs = {ref: open_artifact(cluster.root, ref).fingerprint() for ref in input_artifacts(config).values()}
    return artifacts.identity(_document(config), inputs)


def _document(config: StageConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"pipeline"})


def _as_now(config_class: type[StageConfig], stored: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the fields that its class has got since, at their defaults; as it is if it fits no more."""
    try:
        return _document(config_class.model_validate(stored))
    except ValidationError:
        return stored


def finished(config: StageConfig, cluster: Cluster) -> Artifact | None:
    """The artifact, if this very recipe has already made it, of raw inputs that are as they were.

    Raises:
        ArtifactError: it was made by another recipe or of other raw inputs, or an input artifact is not finished.
    """
    artifact = Artifact(cluster.root, config.output)
    if not artifact.is_finished:
        return None
    artifacts.check_recipe(artifact, recipe_identity(config, cluster), partial(_as_now, type(config)))
    raw_inputs.check_unchanged(artifact, list_raw_inputs(config, cluster, may_be_gone=True))
    return artifact


@contextlib.contextmanager
def open_stage(config: StageConfig, cluster: Cluster) -> Iterator[Stage]:
    """Open the stage of an unfinished artifact; commits on success, leaves it unfinished and marks FAILED otherwise.

    Call `finished` first. Raises ArtifactError (also where another process is at work on it, or an input has lost
    files), ConfigError, StorageError or TrackingError before any work is done.
    """
    storage.check_writable(cluster.root)
    artifact, as_now = Artifact(cluster.root, config.output), partial(_as_now, type(config))
    recipe, raw = recipe_identity(config, cluster), list_raw_inputs(config, cluster)
    artifacts.check_recipe(artifact, recipe, as_now)
    raw_inputs.check_unchanged(artifact, raw)
    for ref in recipe["inputs"]:
        artifacts.check_sizes(Artifact(cluster.root, ref))
    with lease.held(artifact) as held:
        if artifacts.begin(artifact, recipe, as_now) is not None:
            raise ArtifactError(f"{artifact.uri} was finished by another process just now; run the same command again")
        raw_inputs.record(artifact, raw)
        run = _start_run(config, cluster, artifact)
        stage = Stage(artifact, run)
        try:
            with tracking.child_runs_of(run):
                yield stage
            flat = flatten({"counts": stage.counts})
            run.log_metrics({key: value for key, value in flat.items() if isinstance(value, int | float)})
            held.check()
            manifest = artifacts.commit(
                artifact,
                recipe,
                counts=stage.counts,
                metrics=stage.metrics,
                run_id=run.run_id,
                raw_inputs=raw_inputs.summary(raw),
            )
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
    tags |= {"git_sha": provenance.git_sha()} | parents
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
        ConfigError: a raw input that does not exist, or not in an artifact that is finished.
        ArtifactError: the output was made or begun by another recipe or of other raw inputs, as the run itself would
            say. An input artifact that is missing is a line: `check_input_artifacts` raises.
    """
    return _plan(config, cluster, _made_by(config))


def check_input_artifacts(config: StageConfig, cluster: Cluster) -> None:
    """ArtifactError if a job, or one that it runs, reads an artifact that is neither finished nor made here."""
    made = _made_by(config)
    for job in (*nested_jobs(config).values(), config):
        for ref in input_artifacts(job).values():
            if ref not in made:
                open_artifact(cluster.root, ref)


def _made_by(config: StageConfig) -> dict[str, str]:
    """Artifact → the job in this recipe that makes it."""
    return {job.output: name for name, job in nested_jobs(config).items()}


def _plan(config: StageConfig, cluster: Cluster, made: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for name, job in nested_jobs(config).items():
        try:
            lines += [f"{name}: {line}" for line in _plan(job, cluster, made)]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    artifact = Artifact(cluster.root, config.output)
    raw = list_raw_inputs(config, cluster, may_be_gone=artifact.is_finished)
    for item in iter_inputs(config):
        state = _raw_state(raw.get(item.value)) if item.artifact is None else _artifact_state(item, cluster, made)
        lines.append(f"input  {item.field} = {item.value} ({state})")
    if isinstance(config, Planning):
        lines += config.plan_lines(cluster)
    state = "finished: nothing to do" if artifact.is_finished else "to be made"
    if not artifact.is_finished and storage.exists(artifact.uri):
        state = "unfinished: will be resumed"
    if all(Artifact(cluster.root, ref).is_finished for ref in input_artifacts(config).values()):
        artifacts.check_recipe(artifact, recipe_identity(config, cluster), partial(_as_now, type(config)))
    raw_inputs.check_unchanged(artifact, raw)
    return [*lines, f"output {artifact.uri} ({state})"]


def _raw_state(raw: RawInput | None) -> str:
    if raw is None:
        return "gone; what was made of it stands"
    number = len(raw.files)
    return f"{number:,} {'file' if number == 1 else 'files'} in {raw.place}"


def _artifact_state(item: RecipeInput, cluster: Cluster, made: Mapping[str, str]) -> str:
    assert item.artifact is not None, "the caller's branch"
    absence = Artifact(cluster.root, item.artifact).absence()
    if absence is None:
        if not item.is_artifact and not storage.exists(cluster.resolve(item.value)):
            place = cluster.resolve(item.value)
            raise ConfigError(f"{item.field}: {place} does not exist, though its artifact is finished; fix the path")
        return "finished"
    return f"made by {made[item.artifact]}" if item.artifact in made else f"{absence}: run its job first"
