#!/usr/bin/env python
"""Job: see the front door's docstring, or run it without arguments."""

from rsplatform.cli import run_job
from rsplatform.curate.overhead import TrainOverheadConfig, train_overhead

if __name__ == "__main__":
    run_job(
        "train_overhead", TrainOverheadConfig, train_overhead, "configs/train_overhead/world.yaml cluster/local.yaml"
    )
