#!/usr/bin/env python
"""Job: see the front door's docstring, or run it without arguments."""

from rsplatform.cli import run_job
from rsplatform.curate.caption import CaptionConfig, caption

if __name__ == "__main__":
    run_job("caption", CaptionConfig, caption, "configs/caption/world.yaml cluster/local.yaml")
