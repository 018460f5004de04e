"""Artifacts: `{root}/{kind}/{name}/{version}`, trusted only once their manifest stands.

The manifest is written last and atomically: config, inputs with fingerprints, counts with drops by reason, git
sha, package versions, MLflow run id, checksums. A folder without one is unfinished: it is resumed by the same
recipe and refused for another, once something was made in it. This module moves no pixels and knows no stage.
"""

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rsplatform import provenance, storage
from rsplatform.storage import list_folders

MANIFEST = "manifest.json"
RECIPE = "recipe.json"
# Above this size a checksum would read the data again; the size is recorded instead.
CHECKSUM_LIMIT_BYTES = 256 * 2**20
# What says who began an artifact with what (recipe, raw inputs, lease): nothing that was made.
_CLAIMS = re.compile(r"recipe\.json|raw_inputs\.json|work/\.?lease\.json[^/]*")


class ArtifactError(ValueError):
    """An artifact that is missing, unfinished, damaged or made by another recipe."""


@dataclass(frozen=True)
class Artifact:
    """The address of an artifact: `ref` is kind/name/version below `root`."""

    root: str
    ref: str

    @property
    def uri(self) -> str:
        """Folder of the artifact."""
        return f"{self.root.rstrip('/')}/{self.ref}"

    def path(self, relative: str) -> str:
        """URI of a file inside the artifact."""
        return f"{self.uri}/{relative}"

    @property
    def is_finished(self) -> bool:
        """Whether the manifest stands."""
        return storage.exists(self.path(MANIFEST))

    def manifest(self) -> dict[str, Any]:
        """The manifest; ArtifactError if the artifact is missing or unfinished."""
        absence = self.absence()
        if absence:
            raise ArtifactError(f"{self.uri} {absence}; run the job that makes {self.ref} first")
        return self.read_json(MANIFEST)

    def read_json(self, relative: str) -> Any:
        """The JSON document in a file of the artifact; ArtifactError if it is cut off or damaged."""
        try:
            return storage.read_json(self.path(relative))
        except storage.NotWholeError as error:
            raise ArtifactError(
                f"{self.path(relative)} is not whole JSON ({error.__cause__}); "
                f"delete the folder {self.uri} and run its job again"
            ) from error

    def absence(self) -> str | None:
        """What keeps others from reading it, with the names that it may be a slip of; None if it is finished."""
        if self.is_finished:
            return None
        if storage.exists(self.uri):
            return "is unfinished (no manifest)"
        similar = similar_refs(self.root, self.ref)
        return f"does not exist (did you mean {' or '.join(similar)}?)" if similar else "does not exist"

    def fingerprint(self) -> str:
        """sha256 of the manifest: changes whenever the artifact was made again."""
        self.manifest()
        return hashlib.sha256(storage.read_bytes(self.path(MANIFEST))).hexdigest()


def open_artifact(root: str, ref: str) -> Artifact:
    """A finished artifact, ready to read.

    Raises:
        ArtifactError: it does not exist or has no manifest.
    """
    artifact = Artifact(root, ref)
    artifact.manifest()
    return artifact


def identity(config: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    """What decides whether a rerun is the same run: the recipe and the fingerprints of its input artifacts."""
    return {"config": config, "inputs": inputs}


AsNow = Callable[[dict[str, Any]], dict[str, Any]]


def as_stored(config: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe, taken as it is."""
    return config


def begin(artifact: Artifact, recipe: dict[str, Any], as_now: AsNow = as_stored) -> dict[str, Any] | None:
    """Claim the artifact's folder for `recipe` (an `identity`); the manifest if it is already finished.

    Raises:
        ArtifactError: the folder was made or begun by another recipe; the message lists the differences.
            One that was begun, and in which nothing was made, is begun anew.
    """
    check_recipe(artifact, recipe, as_now)
    if artifact.is_finished:
        return artifact.manifest()
    if known_recipe(artifact) is None or _changes(artifact, recipe, as_now):
        storage.write_json(artifact.path(RECIPE), {"identity": recipe, "begun": _now()})
    return None


def check_recipe(artifact: Artifact, recipe: dict[str, Any], as_now: AsNow = as_stored) -> None:
    """Compare `recipe` with the one that made or began the artifact, if any; writes nothing.

    `as_now` reads a stored recipe as today's code does: fields that it has got since are at their defaults.

    Raises:
        ArtifactError: they differ, and something was made; the message lists the differences.
    """
    differences = _changes(artifact, recipe, as_now)
    if differences and not is_only_claimed(artifact):
        state = "finished" if artifact.is_finished else "begun"
        raise ArtifactError(
            f"{artifact.uri} was {state} with another recipe: {'; '.join(differences)}. "
            f"Name a new version in `output`, or delete the folder"
        )


def is_only_claimed(artifact: Artifact) -> bool:
    """Whether nothing was made in the folder yet: a job that failed before has left its recipe, and no more."""
    return all(_CLAIMS.fullmatch(name) for name in storage.list_files(artifact.uri))


def _changes(artifact: Artifact, recipe: dict[str, Any], as_now: AsNow) -> list[str]:
    known = known_recipe(artifact)
    return [] if known is None else difference(known | {"config": as_now(known["config"])}, _jsonable(recipe))


def known_recipe(artifact: Artifact) -> dict[str, Any] | None:
    """The `identity` that made or began the artifact; None if nobody has."""
    if artifact.is_finished:
        manifest = artifact.manifest()
        return {"config": manifest["config"], "inputs": manifest["inputs"]}
    if storage.exists(artifact.path(RECIPE)):
        return artifact.read_json(RECIPE)["identity"]
    return None


def note_run(artifact: Artifact, run_id: str) -> None:
    """Remember the MLflow run of an unfinished artifact, so that a resumed job continues it."""
    recipe = artifact.read_json(RECIPE)
    storage.write_json(artifact.path(RECIPE), recipe | {"mlflow_run_id": run_id})


def noted_run(artifact: Artifact) -> str | None:
    """The MLflow run that made the artifact or, if it is unfinished, that it was begun under."""
    if artifact.is_finished:
        return artifact.manifest()["mlflow_run_id"]
    if not storage.exists(artifact.path(RECIPE)):
        return None
    return artifact.read_json(RECIPE).get("mlflow_run_id")


def commit(
    artifact: Artifact,
    recipe: dict[str, Any],
    *,
    counts: dict[str, Any],
    metrics: dict[str, float],
    run_id: str,
    raw_inputs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest last; from here on the artifact is finished and immutable."""
    manifest = {
        "ref": artifact.ref,
        "config": recipe["config"],
        "inputs": recipe["inputs"],
        "raw_inputs": raw_inputs or {},
        "counts": counts,
        "metrics": metrics,
        "mlflow_run_id": run_id,
        "git_sha": provenance.git_sha(),
        "packages": provenance.package_versions(),
        "checksums": _checksums(artifact),
        "sizes": _files(artifact),
        "finished": _now(),
    }
    storage.write_json(artifact.path(MANIFEST), manifest)
    return manifest


def verify(artifact: Artifact) -> None:
    """Compare every file with the manifest's checksums.

    Raises:
        ArtifactError: names the first file that is missing or differs.
    """
    expected = artifact.manifest()["checksums"]
    actual = _checksums(artifact)
    for name, checksum in expected.items():
        if actual.get(name) != checksum:
            state = "differs from its manifest" if name in actual else "is missing"
            raise ArtifactError(f"{artifact.path(name)} {state}; delete {artifact.uri} and run its job again")


def check_sizes(artifact: Artifact) -> None:
    """Compare the files' names and sizes with the manifest: what a copy that broke off, or a lost disk, has damaged.

    One listing, whatever the artifact's size; `verify` reads every byte.

    Raises:
        ArtifactError: names the first file that is missing or has another size.
    """
    found = _files(artifact)
    for name, size in artifact.manifest().get("sizes", {}).items():  # older manifests tell none
        if found.get(name) != size:
            state = f"has {found[name]} bytes, its manifest says {size}" if name in found else "is missing"
            raise ArtifactError(f"{artifact.path(name)} {state}; delete {artifact.uri} and run its job again")


def _checksums(artifact: Artifact) -> dict[str, str]:
    return {name: _checksum(artifact.path(name), size) for name, size in _files(artifact).items()}


def _files(artifact: Artifact) -> dict[str, int]:
    """The files that the manifest answers for, with their bytes."""
    return {
        name: size
        for name, size in storage.list_files(artifact.uri).items()
        # work files of resumable stages may be cleaned up later; recipe.json is superseded by the manifest
        if name not in {MANIFEST, RECIPE} and not name.startswith(("work/", "checkpoints/"))
    }


def _checksum(uri: str, size: int) -> str:
    if size > CHECKSUM_LIMIT_BYTES:
        return f"size:{size}"
    digest = hashlib.sha256()
    system, path = storage.filesystem(uri)
    with system.open_input_stream(path) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def difference(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Readable differences between two nested documents, as `path: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in difference(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} → {new!r}"]


def _jsonable(document: Any) -> Any:
    """The document as JSON gives it back (tuples become lists), so that stored and fresh ones compare equal."""
    if isinstance(document, dict):
        return {str(key): _jsonable(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_jsonable(value) for value in document]
    return document


def list_artifacts(root: str, kind: str) -> list[Artifact]:
    """Finished artifacts of one kind below `root`, sorted by ref."""
    place = f"{root.rstrip('/')}/{kind}"
    refs = [f"{kind}/{name}/{version}" for name in list_folders(place) for version in list_folders(f"{place}/{name}")]
    return [artifact for artifact in (Artifact(root, ref) for ref in refs) if artifact.is_finished]


def similar_refs(root: str, ref: str) -> list[str]:
    """At most three finished artifacts whose names one may have meant, the nearest first."""
    kind, _, name = ref.partition("/")
    kinds = difflib.get_close_matches(kind, list_folders(root), n=1, cutoff=0.75)
    names = [item.ref.partition("/")[2] for near in kinds for item in list_artifacts(root, near)]
    return [f"{near}/{found}" for near in kinds for found in difflib.get_close_matches(name, names, cutoff=0.75)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
