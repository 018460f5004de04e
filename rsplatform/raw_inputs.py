"""Raw inputs: which files lie below the paths of a recipe, and what of them has changed since an artifact was begun.

An artifact keeps a listing of what it was begun with in `raw_inputs.json`: name, size and stamp of each file, which an
object store gives as ETag and a disk as time of modification. One listing a path is all that it costs; files are not
read, but for SAMPLE_BLOCKS blocks a path. These tell a copy from new data: where every file below a path has another
stamp and none another size, as after `cp -r` to another disk or to a bucket, equal blocks make it the same data.
Hidden files do not count. Artifacts without such a file, made before there was one, are taken as they are.
"""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import botocore.exceptions
import pyarrow.fs as pafs

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, RecipeInput, SelectsFiles, StageConfig, iter_inputs

RAW_INPUTS = "raw_inputs.json"
SAMPLE_BLOCKS, BLOCK_BYTES = 16, 2**16
NAMED = 5  # files of each kind that a refusal names
# A shapefile is several files of one stem, of which recipes name the first.
_SHAPEFILE = ("dbf", "shx", "prj", "cpg")


@dataclass(frozen=True)
class FileState:
    """Size in bytes, and a stamp that changes whenever the file is written: its ETag, or its time of modification."""

    size: int
    stamp: str


@dataclass(frozen=True)
class RawInput:
    """The files behind one path of a recipe: their folder as the recipe spells it, where it lies, and their states."""

    folder: str
    place: str
    files: dict[str, FileState]

    def sample(self) -> str:
        """sha256 of SAMPLE_BLOCKS blocks, spread evenly over the bytes of all files in the order of their names."""
        names = sorted(self.files)
        ends = list(itertools.accumulate(self.files[name].size for name in names))
        digest = hashlib.sha256()
        for number in range(SAMPLE_BLOCKS if ends and ends[-1] else 0):
            position = number * ends[-1] // SAMPLE_BLOCKS
            index = bisect.bisect_right(ends, position)
            offset = position - (ends[index - 1] if index else 0)
            digest.update(_block(f"{self.place}/{names[index]}", offset))
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `raw_inputs.json` holds of it."""
        return {
            "files": {name: f"{state.size} {state.stamp}" for name, state in self.files.items()},
            "sample": self.sample(),
        }

    def changes(self, known: dict[str, Any]) -> list[str]:
        """Readable differences from what `to_json` gave before."""
        old = {name: FileState(*_size_and_stamp(text)) for name, text in known["files"].items()}
        kept = sorted(old.keys() & self.files.keys())
        resized = {name for name in kept if old[name].size != self.files[name].size}
        stamped = {name for name in kept if old[name].stamp != self.files[name].stamp}
        if len(stamped) == len(old) == len(self.files) and not resized and self.sample() == known["sample"]:
            return []  # a copy
        changed = [
            f"{name} ({old[name].size:,} → {self.files[name].size:,} bytes)"
            if name in resized
            else f"{name} (rewritten)"
            for name in kept
            if name in resized or name in stamped
        ]
        added, removed = sorted(self.files.keys() - old.keys()), sorted(old.keys() - self.files.keys())
        found = {"added": added, "removed": removed, "changed": changed}
        folder = f"{self.folder}/" if self.folder else ""
        return [f"{what} {_few([folder + name for name in names])}" for what, names in found.items() if names]


def _size_and_stamp(text: str) -> tuple[int, str]:
    size, _, stamp = text.partition(" ")
    return int(size), stamp


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _block(uri: str, offset: int) -> bytes:
    """What cannot be read is the stage's to tell, as a ledger row."""
    system, path = storage.filesystem(uri)
    try:
        with system.open_input_file(path) as file:
            return file.read_at(BLOCK_BYTES, offset)
    except OSError:
        return b""


def list_raw_inputs(config: StageConfig, cluster: Cluster, *, may_be_gone: bool = False) -> dict[str, RawInput]:
    """Path as the recipe names it → its files, for every raw input of a recipe; artifacts are no raw inputs.

    `may_be_gone` leaves out what is not there: the raw data of a finished artifact may be put away.

    Raises:
        ConfigError: a path does not exist, or lacks a file that its section reads; the message names the field.
    """
    states_of = functools.cache(list_states)  # sections may read different files below one path
    listed: dict[str, RawInput] = {}
    for item in iter_inputs(config):
        if item.artifact is not None:
            continue
        try:
            found = _raw_input(item, cluster.resolve(item.value).rstrip("/"), states_of)
        except ConfigError:
            if may_be_gone:
                continue
            raise
        known = listed.get(item.value, found)
        listed[item.value] = replace(found, files=known.files | found.files)
    return listed


def _raw_input(item: RecipeInput, place: str, states_of: Callable[[str], dict[str, FileState]]) -> RawInput:
    states = states_of(place)
    if not states and not storage.exists(place):
        raise ConfigError(f"{item.field}: {place} does not exist; fix the recipe or metadata.rsplatform.data_root")
    if "" in states:
        parent, _, name = place.rpartition("/")
        return RawInput(item.value.rpartition("/")[0], parent, {name: states[""]} | _beside(parent, name))
    files = {name: state for name, state in states.items() if not name.startswith(".") and "/." not in name}
    if isinstance(item.section, SelectsFiles):
        try:
            files = {name: files[name] for name in item.section.select_files(sorted(files))}
        except ConfigError as error:
            raise ConfigError(f"{item.field}: {place}: {error}") from None
    return RawInput(item.value.rstrip("/"), place, files)


def _beside(folder: str, name: str) -> dict[str, FileState]:
    """The other files of a shapefile."""
    stem, dot, ending = name.rpartition(".")
    others = [f"{stem}.{other}" for other in _SHAPEFILE] if dot + ending == ".shp" else []
    found = {other: list_states(f"{folder}/{other}") for other in others}
    return {other: states[""] for other, states in found.items() if "" in states}


def check_unchanged(artifact: Artifact, listed: dict[str, RawInput]) -> None:
    """Compare the raw inputs with those that the artifact was begun with; writes nothing.

    Raises:
        ArtifactError: files were added, removed or changed, and something was made; the message names them.
    """
    known = artifact.read_json(RAW_INPUTS) if storage.exists(artifact.path(RAW_INPUTS)) else {}
    changes = [line for path, raw in listed.items() if path in known for line in raw.changes(known[path])]
    if changes and not artifacts.is_only_claimed(artifact):
        state = "made" if artifact.is_finished else "begun"
        raise ArtifactError(
            f"{artifact.uri} was {state} with other raw data: {'; '.join(changes)}. Name a new version in `output` for "
            "the data of today, or delete the folder"
        )


def record(artifact: Artifact, listed: dict[str, RawInput]) -> None:
    """Keep what an artifact is begun with; the first record stays once something was made of it."""
    if listed and (not storage.exists(artifact.path(RAW_INPUTS)) or artifacts.is_only_claimed(artifact)):
        storage.write_json(artifact.path(RAW_INPUTS), {path: raw.to_json() for path, raw in listed.items()})


def summary(listed: dict[str, RawInput]) -> dict[str, dict[str, int]]:
    """Number of files and bytes by path, for the manifest."""
    return {
        path: {"files": len(raw.files), "bytes": sum(state.size for state in raw.files.values())}
        for path, raw in listed.items()
    }


def list_states(uri: str) -> dict[str, FileState]:
    """State of every file below `uri` by relative path, sorted; of a file itself as that of ""; {} if there is nothing.

    Raises:
        StorageError: a folder or bucket that cannot be listed.
    """
    if storage.is_s3(uri):
        return dict(sorted(_list_objects(uri).items()))
    system, path = storage.filesystem(uri)
    try:
        info = system.get_file_info(path)
        if info.type == pafs.FileType.File:
            return {"": FileState(info.size, str(info.mtime_ns))}
        found = system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    except OSError as error:
        raise storage.StorageError(f"{uri}: cannot be listed ({error}); see that you may read it") from error
    files = {item.path[len(path.rstrip("/")) + 1 :]: item for item in found if item.type == pafs.FileType.File}
    return {name: FileState(item.size, str(item.mtime_ns)) for name, item in sorted(files.items())}


def _list_objects(uri: str) -> dict[str, FileState]:
    """By boto3, as Arrow tells no ETags. They are MD5 sums of what was put: a copy inside of S3 keeps them."""
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    prefix = f"{key}/" if key else ""
    try:
        objects = (item for item in _objects(bucket, prefix) if not item["Key"].endswith("/"))
        found = {item["Key"].removeprefix(prefix): item for item in objects}
        if not found and key:
            # the first of the keys that begin with a key is that key itself
            found = dict(("", item) for item in itertools.islice(_objects(bucket, key), 1) if item["Key"] == key)
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        raise storage.StorageError(
            f"{uri}: bucket {bucket!r} cannot be listed ({error}); fix the path or AWS_*"
        ) from error
    return {name: FileState(item["Size"], item["ETag"].strip('"')) for name, item in found.items()}


def _objects(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    pages = storage.s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return (item for page in pages for item in page.get("Contents", []))
