"""Processes with equal parts of a batch: mean gradients equal those of one process with the whole batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from rsplatform.model.gather import FeatureGather
from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut, mammut_config

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


def gradients_of_rank(rank: int, folder: str, world_size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    gather = FeatureGather.of_group()
    results = []
    for config in loss_configs():
        model, images_BCHW, tokens_BT = model_and_batch(config)
        rows = BATCH_SIZE // world_size
        own = slice(rank * rows, rank * rows + rows)
        loss, parts = mammut_loss(
            model(images_BCHW[own], tokens_BT[own], z_loss_weight=config.z_loss_weight), tokens_BT[own], config, gather
        )
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        mean_loss = gather.total(parts["loss"]) / world_size
        results.append(([p.grad / world_size for p in model.parameters() if p.grad is not None], mean_loss))
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_of_several_processes_equal_those_of_one(tmp_path: Path, world_size: int) -> None:
    spawn(gradients_of_rank, args=(str(tmp_path), world_size), nprocs=world_size)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for config, (gradients, mean_loss) in zip(loss_configs(), results, strict=True):
        model, images_BCHW, tokens_BT = model_and_batch(config)
        loss, _ = mammut_loss(model(images_BCHW, tokens_BT, z_loss_weight=config.z_loss_weight), tokens_BT, config)
        loss.backward()
        torch.testing.assert_close(mean_loss, loss.detach(), rtol=1e-12, atol=1e-12)
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12, msg=f"{config} {name}")
