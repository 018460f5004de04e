"""Front door `make_world_artifact`: the procedural world as an artifact, so that other jobs can name it as input."""

import io
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from rich.progress import Progress

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import StageConfig
from rsplatform.stage import finished, open_stage
from rsplatform.storage import filesystem, is_s3, list_files, read_bytes, read_json, upload_folder
from rsplatform.world.generate import WorldConfig, make_world
from rsplatform.world.web import PAIR_SETS

MADE_RASTERS = ("scenes", "masks")


class MakeWorldConfig(StageConfig):
    """What world to make; see WorldConfig."""

    world: WorldConfig = WorldConfig()


def make_world_artifact(config: MakeWorldConfig, cluster: Cluster) -> Artifact:
    """Make the small procedural world that the demo runs on, with no network."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        if is_s3(stage.artifact.uri):
            with tempfile.TemporaryDirectory() as folder:
                _make(config.world, Path(folder))
                upload_folder(Path(folder), stage.artifact.uri)
        else:
            _make(config.world, Path(filesystem(stage.artifact.uri)[1]))
        stage.counts = count_made(stage.artifact)
        stage.log({"megabytes": sum(list_files(stage.artifact.uri).values()) / 2**20})
    return stage.artifact


def count_made(artifact: Artifact) -> dict[str, int]:
    """What the artifact's files hold. A world has no inputs, so there is no funnel to state."""
    names = list_files(artifact.uri)
    made = {part: sum(name.startswith(f"{part}/") and name.endswith(".tif") for name in names) for part in MADE_RASTERS}
    made["landmarks"] = len(read_json(artifact.path("landmarks.geojson"))["features"])
    for pair_set in PAIR_SETS:
        table = pq.ParquetFile(io.BytesIO(read_bytes(artifact.path(f"web/{pair_set}.parquet"))))
        made[f"web_{pair_set}"] = table.metadata.num_rows
    return made


def _make(config: WorldConfig, folder: Path) -> None:
    with Progress(transient=True) as progress:
        task = progress.add_task("making the world", total=None)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"making the world: {name}")

        make_world(config, folder, progress=advance)
