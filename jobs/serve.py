#!/usr/bin/env python
"""Answer searches over HTTP and show them on a map."""

from rsplatform.cli import run_job
from rsplatform.serve.deployment import ServeConfig, serve

if __name__ == "__main__":
    run_job("serve", ServeConfig, serve, "configs/serve/world.yaml cluster/local.yaml cluster.serve.port=8000")
