#!/usr/bin/env python
"""Score a training's checkpoints while it runs."""

from rsplatform.cli import run_job
from rsplatform.evaluate.follow import FollowConfig, follow

if __name__ == "__main__":
    run_job(
        "follow",
        FollowConfig,
        follow,
        "configs/follow/world.yaml cluster/local.yaml output=evaluation_curve/often/v1 every_steps=100",
    )
