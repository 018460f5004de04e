#!/usr/bin/env python
"""Train a MaMMUT on a dataset."""

from rsplatform.cli import run_job
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig

if __name__ == "__main__":
    run_job(
        "pretrain",
        PretrainConfig,
        pretrain,
        "configs/pretrain/world.yaml cluster/local.yaml output=model/longer/v1 phases.1.steps=1000",
    )
