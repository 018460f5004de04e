#!/usr/bin/env python
"""Train the classifier that tells pictures from above from all others, on their pixels alone."""

from rsplatform.cli import run_job
from rsplatform.curate.overhead import TrainOverheadConfig, train_overhead

if __name__ == "__main__":
    run_job(
        "train_overhead", TrainOverheadConfig, train_overhead, "configs/train_overhead/world.yaml cluster/local.yaml"
    )
