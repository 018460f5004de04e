#!/usr/bin/env python
"""Let a model teach itself where things are, without a single mask."""

from rsplatform.cli import run_job
from rsplatform.localize.self_train import SelfTrainConfig, self_train

if __name__ == "__main__":
    run_job(
        "self_train",
        SelfTrainConfig,
        self_train,
        "configs/self_train/world.yaml cluster/local.yaml output=model/taught_twice/v1 rounds=2",
    )
