#!/usr/bin/env python
"""Learn a tokenizer from the captions of datasets."""

from rsplatform.cli import run_job
from rsplatform.train.train_tokenizer import TrainTokenizerConfig, train_tokenizer

if __name__ == "__main__":
    run_job(
        "train_tokenizer",
        TrainTokenizerConfig,
        train_tokenizer,
        "configs/train_tokenizer/world.yaml cluster/local.yaml",
    )
