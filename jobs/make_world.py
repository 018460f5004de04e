#!/usr/bin/env python
"""Make the small procedural world that the demo and the examples run on."""

from rsplatform.cli import run_job
from rsplatform.world.build import MakeWorldConfig, make_world_artifact

if __name__ == "__main__":
    run_job("make_world", MakeWorldConfig, make_world_artifact, "configs/make_world/world.yaml cluster/local.yaml")
