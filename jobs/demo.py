#!/usr/bin/env python
"""The main job: the whole chain from scenes to a search answered over HTTP."""

from rsplatform.cli import run_job
from rsplatform.demo import DemoConfig, demo

if __name__ == "__main__":
    run_job(
        "demo",
        DemoConfig,
        demo,
        "configs/demo/world.yaml cluster/local.yaml output=demo/harbours/v1 search.text='a harbour'",
    )
