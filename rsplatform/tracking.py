"""MLflow: one experiment a pipeline, one run a job, parent and child links. The only module that imports mlflow.

It records lineage; it does not choose what is live. Params are written once (MLflow refuses changes), metrics
over steps. Default store: SQLite and local artifacts under the root; MLFLOW_TRACKING_URI is honoured.
"""

import contextlib
import contextvars
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from rsplatform.storage import is_s3

_parent_run: contextvars.ContextVar[str | None] = contextvars.ContextVar("parent_run", default=None)
_SECRET = re.compile(r"(?i)(secret|password|token$|access_key|api_key)")
_URL_QUERY = re.compile(r"(\w+://[^\s?#]+)\?[^\s]*")


class TrackingError(RuntimeError):
    """MLflow cannot be reached; the message names the address and the remedy."""


def tracking_uri(root: str) -> str:
    """MLFLOW_TRACKING_URI, else SQLite under a local root.

    Raises:
        TrackingError: the root is an object store, which can hold no SQLite file, and no server is named.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if is_s3(root):
        raise TrackingError(f"root {root} cannot hold MLflow's database; set MLFLOW_TRACKING_URI to your server")
    return f"sqlite:///{root}/mlflow.db"


def check_reachable(uri: str) -> None:
    """Fail within seconds, naming the server, instead of after MLflow's minutes of retries.

    Raises:
        TrackingError: the server at `uri` does not answer its health check.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        httpx.get(f"{uri.rstrip('/')}/health", timeout=5, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise TrackingError(
            f"MLflow at {uri} does not answer ({error}); start it, fix MLFLOW_TRACKING_URI, or unset it to use "
            "SQLite under the root"
        ) from error


def _client(uri: str) -> Any:
    # Imported here: MLflow takes seconds to import, which `--help` and `--dry-run` should not pay.
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


@dataclass(frozen=True)
class Run:
    """One MLflow run; picklable, so that rank 0 of a training job can write to it from another process."""

    uri: str
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Write scalars at `step`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(_metric_name(key), float(value), now, step) for key, value in metrics.items()]
        _client(self.uri).log_batch(self.run_id, metrics=rows)

    def latest_metrics(self) -> dict[str, float]:
        """The last value of each metric (another process may be the one that writes them)."""
        return dict(_client(self.uri).get_run(self.run_id).data.metrics)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; values are redacted and cut to MLflow's limit."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, redact(str(value))[:5000]) for key, value in tags.items()]
        _client(self.uri).log_batch(self.run_id, tags=rows)

    def log_picture(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure or a PIL image as artifact `name`."""
        _client(self.uri).log_figure(self.run_id, figure, name) if hasattr(figure, "savefig") else _client(
            self.uri
        ).log_image(self.run_id, figure, name)

    def log_document(self, document: Mapping[str, Any], name: str) -> None:
        """Store a JSON document as artifact `name`."""
        _client(self.uri).log_dict(self.run_id, dict(document), name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Store a local file below `folder` of the run's artifacts."""
        _client(self.uri).log_artifact(self.run_id, str(path), folder or None)

    def end(self, status: str) -> None:
        """Close the run as FINISHED or FAILED."""
        _client(self.uri).set_terminated(self.run_id, status)


def start_run(
    root: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    *,
    tags: Mapping[str, str],
    resume: str | None = None,
) -> Run:
    """Create a run (or continue `resume`) under the current parent; params are flattened and redacted.

    Raises:
        TrackingError: the tracking server does not answer.
    """
    uri = tracking_uri(root)
    check_reachable(uri)
    client = _client(uri)
    if resume and _run_exists(client, resume):
        client.update_run(resume, status="RUNNING")
        return Run(uri, resume)
    experiment_id = _experiment_id(client, experiment, uri, root)
    parent = _parent_run.get() or os.environ.get("RSPLATFORM_PARENT_RUN_ID")
    parent_tags = {"mlflow.parentRunId": parent} if parent and _run_exists(client, parent) else {}
    created = client.create_run(experiment_id, run_name=name, tags={**tags, **parent_tags})
    run = Run(uri, created.info.run_id)
    from mlflow.entities import Param

    flat = [Param(key, redact(str(value))[:6000]) for key, value in flatten(params).items() if not _SECRET.search(key)]
    for start in range(0, len(flat), 100):  # MLflow's limit for one batch
        client.log_batch(run.run_id, params=flat[start : start + 100])
    return run


@contextlib.contextmanager
def child_runs_of(run: Run) -> Iterator[None]:
    """Runs started inside this block become children of `run`."""
    token = _parent_run.set(run.run_id)
    try:
        yield
    finally:
        _parent_run.reset(token)


def _experiment_id(client: Any, name: str, uri: str, root: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = f"{root}/mlflow-artifacts" if uri.startswith("sqlite:") else None
    return client.create_experiment(name, artifact_location=location)


def _run_exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException:
        return False
    return True


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name)


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, as in the overrides of the command line."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def redact(text: str) -> str:
    """Strip query strings (signatures, tokens) from URLs and hide credentials that the environment holds."""
    text = _URL_QUERY.sub(r"\1", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET.search(name):
            text = text.replace(value, "[redacted]")
    return text


def local_copy(run: Run, name: str) -> Path:
    """Download one artifact of a run into a temporary folder (tests and reports)."""
    return Path(_client(run.uri).download_artifacts(run.run_id, name, tempfile.mkdtemp()))
