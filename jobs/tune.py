#!/usr/bin/env python
"""Search a pretraining recipe's fields and write the best recipe."""

from rsplatform.cli import run_job
from rsplatform.train.sweep import tune
from rsplatform.train.sweep_recipe import TuneConfig

if __name__ == "__main__":
    run_job("tune", TuneConfig, tune, "configs/tune/world.yaml cluster/local.yaml output=sweep/larger/v1 num_trials=8")
