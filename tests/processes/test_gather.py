"""Processes with equal parts of a batch: mean gradients equal those of one process with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsplatform.model.gather import FeatureGather
from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut, mammut_config
from tests.processes.process_group import run_processes

BATCH_SIZE = 8


def loss_configs() -> list[LossConfig]:
    return [
        LossConfig(),
        LossConfig(mask_identical_texts=False),
        LossConfig("focal_sigmoid", caption_weight=2.0),
        LossConfig("sigmoid"),
        LossConfig("sigmoid", mask_identical_texts=False, z_loss_weight=0.1),
    ]


def model_and_batch(loss: LossConfig) -> tuple[Mammut, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sides = {
        f"{part}_{name}": value for part in ("vision", "text") for name, value in (("width", 16), ("mlp_width", 24))
    }
    config = mammut_config(
        "mini", image_size=16, vocab_size=20, context_length=8, **sides, logit_bias=loss.contrastive == "sigmoid"
    )
    tokens_BT = torch.randint(3, 20, (BATCH_SIZE, 7))
    tokens_BT[0, 3:] = 0  # the parts have different numbers of caption tokens
    tokens_BT[5] = tokens_BT[1]  # one text stands in two parts
    return Mammut(config).double(), torch.randn(BATCH_SIZE, 3, 16, 16, dtype=torch.float64), tokens_BT


def gradients_of_rank() -> dict[str, torch.Tensor]:
    """By loss and parameter, the mean gradients and the mean loss of all processes."""
    gather, rank, world_size = FeatureGather.of_group(), dist.get_rank(), dist.get_world_size()
    results = {}
    for number, config in enumerate(loss_configs()):
        model, images_BCHW, tokens_BT = model_and_batch(config)
        rows = BATCH_SIZE // world_size
        own = slice(rank * rows, rank * rows + rows)
        loss, parts = mammut_loss(
            model(images_BCHW[own], tokens_BT[own], z_loss_weight=config.z_loss_weight), tokens_BT[own], config, gather
        )
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            results[f"{number}|{name}"] = parameter.grad / world_size
        results[f"{number}|loss"] = gather.total(parts["loss"]) / world_size
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_of_several_processes_equal_those_of_one(tmp_path: Path, world_size: int) -> None:
    for results in run_processes(world_size, tmp_path, gradients_of_rank):
        for number, config in enumerate(loss_configs()):
            model, images_BCHW, tokens_BT = model_and_batch(config)
            loss, _ = mammut_loss(model(images_BCHW, tokens_BT, z_loss_weight=config.z_loss_weight), tokens_BT, config)
            loss.backward()
            found = {name.split("|")[1]: value for name, value in results.items() if name.startswith(f"{number}|")}
            torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-12, atol=1e-12)
            expected = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=f"{config} {name}")
