#!/usr/bin/env python
"""Make chips searchable by place, date, scale and kind."""

from rsplatform.cli import run_job
from rsplatform.index.build import BuildIndexConfig, build_index

if __name__ == "__main__":
    run_job("build_index", BuildIndexConfig, build_index, "configs/build_index/world.yaml cluster/local.yaml")
