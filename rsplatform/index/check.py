"""What is wrong with the sources of an index, told before anything is embedded."""

from collections.abc import Iterator, Sequence

from rsplatform.artifacts import open_artifact
from rsplatform.config import ConfigError
from rsplatform.curate.pipeline import Shard
from rsplatform.dataset.store import open_table
from rsplatform.index.sources import base_rows, folder_id, is_removed
from rsplatform.index.table import META
from rsplatform.storage import read_json


def check_base(base: str | None, remove_scenes: Sequence[str], root: str, model_hash: str) -> None:
    """ConfigError for an earlier index of another model, or for a scene to be removed that it lacks."""
    if base is None:
        return
    known = read_json(open_artifact(root, base).path(META))["model_hash"]
    if known != model_hash:
        raise ConfigError(
            f"base: {base} was built with model {known[:12]}…, this is model {model_hash[:12]}…; "
            "name the model that made it, or build the index anew"
        )
    if "model_hash" not in base_rows(root, base).schema.names:
        raise ConfigError(f"base: {base} was built by an earlier version; build it again under another version")
    scenes = base_rows(root, base).to_table(columns=["scene"])["scene"].unique().to_pylist()
    for pattern in remove_scenes:
        if not any(is_removed(scene, [pattern]) for scene in scenes):
            some = ", ".join(sorted(scenes)[:12])
            raise ConfigError(f"remove_scenes: {pattern!r} matches no scene of {base}; there are {some}")


def check_ids(shards: Sequence[Shard], root: str) -> None:
    """ConfigError for an id that two rows would have. Only the ids are read, once a source."""
    known: set[str] = set()
    for chip_id in _ids(shards, root):
        if chip_id in known:
            raise ConfigError(
                f"chips: {chip_id} comes twice; give one of its sources an id_suffix, or name its scene in "
                "remove_scenes to replace what the base holds of it"
            )
        known.add(chip_id)


def _ids(shards: Sequence[Shard], root: str) -> Iterator[str]:
    for shard in shards:
        if "base" in shard:
            rows = base_rows(root, shard["base"])
            table = rows.to_table(columns=["id", "scene"], offset=shard["start"], limit=shard["rows"])
            pairs = zip(table["id"].to_pylist(), table["scene"].to_pylist(), strict=True)
            yield from (chip_id for chip_id, scene in pairs if not is_removed(scene, shard["removed"]))
        elif "chips" in shard:
            chips = open_table(root, shard["chips"])
            table = chips.to_table(columns=["id"], offset=shard["start"], limit=shard["rows"])
            yield from (f"{chip_id}{shard['id_suffix']}" for chip_id in table["id"].to_pylist())
        else:
            yield from (folder_id(shard["scene"], name) for name in shard["files"])
