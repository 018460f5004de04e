#!/usr/bin/env python
"""Keep the overhead pictures among web pairs, with a reason for every drop."""

from rsplatform.cli import run_job
from rsplatform.curate.filter_web import FilterWebConfig, filter_web

if __name__ == "__main__":
    run_job("filter_web", FilterWebConfig, filter_web, "configs/filter_web/world.yaml cluster/local.yaml")
