#!/usr/bin/env python
"""Find texts in whole scenes: georeferenced scores, masks and polygons."""

from rsplatform.cli import run_job
from rsplatform.localize.run import LocalizeConfig, localize

if __name__ == "__main__":
    run_job(
        "localize",
        LocalizeConfig,
        localize,
        "configs/localize/world.yaml cluster/local.yaml output=localization/wide/v1 window=5",
    )
