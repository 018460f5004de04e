#!/usr/bin/env python
"""Join pictures and captions into one versioned training set."""

from rsplatform.cli import run_job
from rsplatform.dataset.build import BuildDatasetConfig, build_dataset

if __name__ == "__main__":
    run_job(
        "build_dataset",
        BuildDatasetConfig,
        build_dataset,
        "configs/build_dataset/world.yaml cluster/local.yaml",
    )
