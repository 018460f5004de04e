#!/usr/bin/env python
"""Make a model artifact from openMaMMUT or open_clip weights."""

from rsplatform.cli import run_job
from rsplatform.train.import_model import ImportModelConfig, import_model

if __name__ == "__main__":
    run_job("import_model", ImportModelConfig, import_model, "configs/import_model/world.yaml cluster/local.yaml")
