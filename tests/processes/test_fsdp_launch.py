"""The front door with `engine: fsdp` in this process: the plain engine's model, also as a moving average.

Apart from test_fsdp.py because the processes that start there would import the launcher, which takes seconds.
"""

from pathlib import Path

from safetensors.torch import load_file

from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig
from tests.processes.test_fsdp import assert_same
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe


def test_the_front_door_trains_with_fsdp(tmp_path: Path) -> None:
    make_tiny_dataset(str(tmp_path))
    fsdp = TrainPlacement(launcher="local", engine="fsdp")
    weights = []
    for placement in (TrainPlacement(launcher="local"), fsdp):
        changes = {"output": f"model/{placement.engine}/v1", "optimizer": {"eps": 1e-4}, "ema_decay": 0.5}
        recipe = PretrainConfig(**tiny_recipe(**changes))
        artifact = pretrain(recipe, Cluster(root=str(tmp_path), train=placement))
        weights.append(load_file(Path(artifact.uri) / "model" / "model.safetensors"))
    assert_same(weights[1], weights[0], 1e-5)
