#!/usr/bin/env python
"""Score a model on pinned benchmarks."""

from rsplatform.cli import run_job
from rsplatform.evaluate.run import EvaluateConfig, evaluate

if __name__ == "__main__":
    run_job(
        "evaluate",
        EvaluateConfig,
        evaluate,
        "configs/evaluate/world.yaml cluster/local.yaml output=evaluation/wide/v1 window=5",
    )
