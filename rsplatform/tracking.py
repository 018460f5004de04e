"""MLflow: one experiment a pipeline, one run a job, parent and child links. The only module that imports mlflow.

It records lineage; it does not choose what is live. Params are written once (MLflow refuses changes), metrics
over steps. Default store: SQLite and local artifacts under the root; MLFLOW_TRACKING_URI is honoured.
"""

import contextlib
import contextvars
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from rsplatform.dotted_keys import flatten
from rsplatform.storage import is_s3

LOGGER = logging.getLogger("rsplatform.tracking")
METRICS_PER_CALL = 1000  # MLflow's limit for one batch
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


def is_server(uri: str) -> bool:
    """Whether several machines may write to it; else it is a database on a disk."""
    return uri.startswith(("http://", "https://"))


def check_reachable(uri: str) -> None:
    """Fail within seconds, naming the server, instead of after MLflow's minutes of retries.

    Raises:
        TrackingError: the server at `uri` does not answer its health check.
    """
    if not is_server(uri):
        return
    try:
        httpx.get(f"{uri.rstrip('/')}/health", timeout=5, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise TrackingError(
            f"MLflow at {uri} does not answer ({error}); start it, fix MLFLOW_TRACKING_URI, or unset it to use "
            "SQLite under the root"
        ) from error


def _client(uri: str) -> Any:
    import mlflow  # here: it takes seconds, which `--help` and `--dry-run` should not pay

    return mlflow.MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _answered(uri: str) -> Iterator[Any]:
    """A client inside this block; TrackingError if a server does not answer it (a refusal stays MLflow's error)."""
    # By itself it repeats a call for minutes, while GPUs stand still, and tells its makers of each.
    defaults = {"HTTP_REQUEST_MAX_RETRIES": "1", "HTTP_REQUEST_TIMEOUT": "10", "DISABLE_TELEMETRY": "true"}
    os.environ.update({f"MLFLOW_{name}": os.environ.get(f"MLFLOW_{name}", value) for name, value in defaults.items()})
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield _client(uri)
    except RestException:
        raise
    except MlflowException as error:
        if not is_server(uri):  # a database on our own disk is not away: it is broken
            raise
        reason = str(error).rpartition(": ")[2].strip("\"')")  # requests tell their whole nesting, the cause last
        raise TrackingError(f"MLflow at {uri} does not answer ({reason})") from error


@dataclass
class Outbox:
    """Metrics that the server has not taken yet, oldest first: (name, value, timestamp in ms, step)."""

    rows: list[tuple[str, float, int, int]] = field(default_factory=list)
    is_server_away: bool = False
    retry_at_s: float = 0.0


@dataclass(frozen=True)
class Run:
    """One MLflow run; picklable, so that rank 0 of a training job can write to it from another process.

    Once a run is open, a server that goes away stops no job: metrics wait in the outbox and are sent in order when it
    answers again; of anything else a warning says that it is not recorded. A broken database under the root raises.
    """

    uri: str
    run_id: str
    outbox: Outbox = field(default_factory=Outbox, compare=False, repr=False)
    last_steps: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def queue_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Have scalars at `step` sent with the next ones that are written, unless `last_steps` has that step."""
        now = int(time.time() * 1000)
        rows = [(_metric_name(key), float(value), now, step) for key, value in metrics.items()]
        self.outbox.rows.extend(row for row in rows if step > self.last_steps.get(row[0], -1))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Write scalars at `step`, after those that still wait."""
        self.queue_metrics(metrics, step)
        if time.monotonic() >= self.outbox.retry_at_s:
            self._deliver()

    def flush(self) -> None:
        """Send what still waits; a warning says what could not be sent, and will not be, after this process."""
        if self.outbox.rows:
            self._deliver()
        if self.outbox.rows:
            number, steps = len(self.outbox.rows), sorted({step for *_, step in self.outbox.rows})
            place = f"steps {steps[0]} to {steps[-1]} of run {self.run_id}"
            LOGGER.warning("%d metrics of %s could not be sent to MLflow at %s", number, place, self.uri)

    def _deliver(self) -> None:
        from mlflow.entities import Metric

        box, started_s = self.outbox, time.monotonic()
        try:
            with _answered(self.uri) as client:
                while box.rows:
                    batch = box.rows[:METRICS_PER_CALL]
                    client.log_batch(self.run_id, metrics=[Metric(*row) for row in batch])
                    del box.rows[: len(batch)]
        except TrackingError as error:
            if not box.is_server_away:
                LOGGER.warning("%s; the job goes on and sends its metrics later", error)
            # a server that hangs until the timeout is asked seldom: at most a tenth of the job's time is lost
            box.retry_at_s = time.monotonic() + 10 * (time.monotonic() - started_s)
        else:
            if box.is_server_away:
                LOGGER.info("MLflow at %s answers again", self.uri)
        box.is_server_away = bool(box.rows)

    def _write(self, what: str, write: Callable[[Any], object]) -> None:
        try:
            with _answered(self.uri) as client:
                write(client)
        except TrackingError as error:
            LOGGER.warning("%s is not recorded in run %s: %s", what, self.run_id, error)

    def latest_metrics(self) -> dict[str, float]:
        """The last value of each metric (another process may be the one that writes them).

        Raises:
            TrackingError: the server does not answer.
        """
        with _answered(self.uri) as client:
            return dict(client.get_run(self.run_id).data.metrics)

    def going_on(self) -> "Run":
        """This run, of each metric only steps after its last: MLflow would show both points of a step taken twice."""
        try:
            with _answered(self.uri) as client:
                metrics = client.get_run(self.run_id).data.to_proto().metrics
        except TrackingError as error:
            LOGGER.warning("%s; steps that are taken again will have two points", error)
            return self
        return replace(self, last_steps={metric.key: metric.step for metric in metrics})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; values are redacted and cut to MLflow's limit."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, redact(str(value))[:5000]) for key, value in tags.items()]
        self._write(f"tags {', '.join(tags)}", lambda client: client.log_batch(self.run_id, tags=rows))

    def log_picture(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure or a PIL image as artifact `name`."""
        kind = "log_figure" if hasattr(figure, "savefig") else "log_image"
        self._write(name, lambda client: getattr(client, kind)(self.run_id, figure, name))

    def log_document(self, document: Mapping[str, Any], name: str) -> None:
        """Store a JSON document as artifact `name`."""
        self._write(name, lambda client: client.log_dict(self.run_id, dict(document), name))

    def log_text(self, text: str, name: str) -> None:
        """Store a text as artifact `name`."""
        self._write(name, lambda client: client.log_text(self.run_id, text, name))

    def end(self, status: str) -> None:
        """Close the run as FINISHED or FAILED, with all its metrics."""
        self.flush()
        self._write(f"the end ({status})", lambda client: client.set_terminated(self.run_id, status))

    def fail(self, status: str = "FAILED") -> None:
        """Close the run on an error's way out: whatever MLflow says, that error must reach the user."""
        try:
            self.end(status)
        except Exception as error:
            LOGGER.warning("run %s could not be marked %s: %s", self.run_id, status, error)


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
    with _answered(uri) as client:
        if resume and _run_exists(client, resume):
            client.update_run(resume, status="RUNNING")
            return Run(uri, resume)
        parent = _parent_run.get()
        parent_tags = {"mlflow.parentRunId": parent} if parent and _run_exists(client, parent) else {}
        experiment_id = _experiment_id(client, experiment, uri, root)
        run_id = client.create_run(experiment_id, run_name=name, tags={**tags, **parent_tags}).info.run_id
        _log_params(client, run_id, params)
    return Run(uri, run_id)


def _log_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    public = {key: redact(str(value))[:6000] for key, value in flatten(params).items() if not _SECRET.search(key)}
    flat = [Param(_param_name(key), value) for key, value in public.items()]
    for start in range(0, len(flat), 100):  # MLflow's limit for one batch
        client.log_batch(run_id, params=flat[start : start + 100])


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
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return False
    return True


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name)


def _param_name(name: str) -> str:
    """A dotted key whose parts may be any text (the keys of a mapping) as MLflow takes it: no path, 250 characters."""
    return re.sub(r"[^\w. -]", "_", name)[:250]


def redact(text: str) -> str:
    """Strip query strings (signatures, tokens) from URLs and hide credentials that the environment holds."""
    text = _URL_QUERY.sub(r"\1", text)
    for name in filter(_SECRET.search, list(os.environ)):  # a list: other threads set and unset meanwhile
        if len(value := os.environ.get(name, "")) >= 8:
            text = text.replace(value, "[redacted]")
    return text
