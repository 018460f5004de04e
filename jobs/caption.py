#!/usr/bin/env python
"""Describe every chip in sentences that its landmarks support."""

from rsplatform.cli import run_job
from rsplatform.curate.caption import CaptionConfig, caption

if __name__ == "__main__":
    run_job("caption", CaptionConfig, caption, "configs/caption/world.yaml cluster/local.yaml")
