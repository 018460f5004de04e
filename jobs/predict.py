#!/usr/bin/env python
"""Embed or score pictures and texts in batch: JSONL instances, lists of URIs, or chips."""

from rsplatform.cli import run_job
from rsplatform.serve.batch import PredictConfig, predict

if __name__ == "__main__":
    run_job("predict", PredictConfig, predict, "configs/predict/world.yaml cluster/local.yaml")
