"""Front door `make_world_artifact`: the procedural world as an artifact, so that other jobs can name it as input."""

import tempfile
from pathlib import Path

from rich.progress import Progress

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import StageConfig
from rsplatform.stage import finished, open_stage
from rsplatform.storage import is_s3, list_files, local_folder, upload_folder
from rsplatform.world.generate import WorldConfig, make_world


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
            _make(config.world, local_folder(stage.artifact.uri))
        num_scenes = config.world.num_train_scenes + config.world.num_val_scenes
        stage.counts = {"inputs": num_scenes, "kept": num_scenes, "dropped": {}}
        stage.log({"megabytes": sum(list_files(stage.artifact.uri).values()) / 2**20})
    return stage.artifact


def _make(config: WorldConfig, folder: Path) -> None:
    with Progress() as progress:
        task = progress.add_task("making the world", total=None)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"making the world: {name}")

        make_world(config, folder, progress=advance)
