"""The command line that all jobs share: `python jobs/X.py RECIPE.yaml CLUSTER.yaml key.path=value … [--dry-run]`.

Exit codes: 0 done, 1 the job failed, 2 the call, recipe or cluster file is wrong, 130 stopped by Ctrl-C. Errors that
this package defines say what to change in one sentence, also out of a Ray worker; others keep their traceback.
Keys that start with `cluster.` override the cluster file, all others the recipe.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster, load_cluster
from rsplatform.config import ConfigError, StageConfig, load_config
from rsplatform.refused_writes import refused_write
from rsplatform.stage import check_input_artifacts, plan
from rsplatform.storage import StorageError, is_s3, presigned_url
from rsplatform.tracking import TrackingError, redact

USAGE = """\
{description}

usage:   python jobs/{job}.py RECIPE.yaml CLUSTER.yaml [key.path=value …] [--dry-run]
example: python jobs/{job}.py {example}

RECIPE.yaml   what to do; its keys: {keys}
CLUSTER.yaml  where to do it, e.g. cluster/local.yaml; override its keys as cluster.KEY=VALUE
--dry-run     validate, look up the inputs, print the plan and stop; exits like the job if that could not start
"""

# Reports, summaries, model cards, best recipes and maps: what a job on a bucket gives links to.
READABLE = ("report.json", "scores.json", "summary.txt", "README.md", ".yaml", ".geojson")
MAX_LINKS = 5

FrontDoor = Callable[[Any, Cluster], Artifact]


def run_job(job: str, config_class: type[StageConfig], front_door: FrontDoor, example: str) -> None:
    """Parse the command line, call `front_door(config, cluster)` and exit with a code that says how it went."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        datefmt="[%X]",
        handlers=[RichHandler(console=Console(stderr=True))],
    )
    _quieten()
    sys.exit(_run(job, config_class, front_door, example, sys.argv[1:]))


def _quieten() -> None:
    """Silence what says nothing to a user: warnings at every fork+exec, a line a request of our own client."""
    for message in ("lance is not fork-safe", "lancedb fork support"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("httpx", "numexpr", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # tracking.py says itself what is away


def _run(job: str, config_class: type[StageConfig], front_door: FrontDoor, example: str, arguments: list[str]) -> int:
    description = (front_door.__doc__ or job).strip().splitlines()[0]
    usage = USAGE.format(description=description, job=job, example=example, keys=", ".join(config_class.model_fields))
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        config, cluster, is_dry_run = _parse(config_class, arguments, usage)
        if is_dry_run:
            print("\n".join(plan(config, cluster)))
            check_input_artifacts(config, cluster)  # a dry run exits as the run itself would
            return 0
        artifact = front_door(config, cluster)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(job, error)
    print(f"{job}: {artifact.uri}")
    for line in _links(artifact):
        print(line)
    return 0


def _links(artifact: Artifact) -> list[str]:
    """Links for a browser to what a person reads in an artifact that lies in a bucket; on a disk one just opens it."""
    if not is_s3(artifact.uri):
        return []
    names = [name for name in artifact.manifest()["checksums"] if name.endswith(READABLE)]
    return [f"  {name} (link for an hour): {presigned_url(artifact.path(name), 3600)}" for name in names[:MAX_LINKS]]


def _report(job: str, error: Exception) -> int:
    """Say on stderr what went wrong, with the traceback only of an error that is not ours; returns the exit code."""
    own = own_error(error)
    if isinstance(own, ConfigError | ArtifactError):
        print(redact(f"error: {own}"), file=sys.stderr)
        return 2
    refusal = None if isinstance(own, StorageError | TrackingError) else refused_write(error)
    if refusal:
        advice = "make room below metadata.rsplatform.root and in the temporary folder, then run the same command again"
        print(redact(f"error: {job} failed: {refusal}; {advice} to resume"), file=sys.stderr)
        return 1
    if own is None:
        logging.getLogger("rsplatform").error("%s failed", job, exc_info=error)
    print(redact(f"error: {job} failed: {own or error}"), file=sys.stderr)
    return 1


def own_error(error: BaseException) -> BaseException | None:
    """The error that this package defines: `error` itself, or what Ray wraps when a task, actor or worker raised it.

    Only Ray's wrappers are opened: an error that someone raised while handling ours is another error.
    """
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop(0)
        package = type(link).__module__.split(".")[0]
        if package == "rsplatform":
            return link
        if package == "ray" and id(link) not in seen:
            seen.add(id(link))
            waiting += _wrapped_by_ray(link)
    return None


def _wrapped_by_ray(error: BaseException) -> list[BaseException]:
    """What lies inside an error of Ray's, which is read by attribute: a job without Ray must not import it.

    RayTaskError has `cause`; Ray Train has `worker_failures` by rank, `controller_failure` and `_base_exc`.
    """
    fields = vars(error)
    inside = [fields.get("cause"), fields.get("controller_failure"), fields.get("_base_exc"), error.__cause__]
    inside += (fields.get("worker_failures") or {}).values()
    return [item for item in inside if isinstance(item, BaseException)]


def _parse(config_class: type[StageConfig], arguments: list[str], usage: str) -> tuple[Any, Cluster, bool]:
    flags = [item for item in arguments if item.startswith("--")]
    unknown = [flag for flag in flags if flag != "--dry-run"]
    paths = [item for item in arguments if not item.startswith("--") and "=" not in item]
    overrides = [item for item in arguments if not item.startswith("--") and "=" in item]
    if unknown or len(paths) != 2:
        wrong = f"unknown option {unknown[0]}" if unknown else f"expected RECIPE and CLUSTER, got {len(paths)} paths"
        raise ConfigError(f"{wrong}\n\n{usage}")
    for_cluster = [item.removeprefix("cluster.") for item in overrides if item.startswith("cluster.")]
    for_recipe = [item for item in overrides if not item.startswith("cluster.")]
    config = load_config(config_class, paths[0], for_recipe)
    return config, load_cluster(paths[1], for_cluster), bool(flags)
