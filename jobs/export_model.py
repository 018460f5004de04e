#!/usr/bin/env python
"""Write a model as a folder for others: weights, config, tokenizer and model card."""

from rsplatform.cli import run_job
from rsplatform.train.export_model import ExportModelConfig, export_model

if __name__ == "__main__":
    run_job("export_model", ExportModelConfig, export_model, "configs/export_model/world.yaml cluster/local.yaml")
