#!/usr/bin/env python
"""Cut georeferenced scenes into chips and join each with the landmarks that it shows."""

from rsplatform.cli import run_job
from rsplatform.curate.chips import IngestScenesConfig, ingest_scenes

if __name__ == "__main__":
    run_job("ingest_scenes", IngestScenesConfig, ingest_scenes, "configs/ingest_scenes/world.yaml cluster/local.yaml")
