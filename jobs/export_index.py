#!/usr/bin/env python
"""Write an index as GeoParquet and STAC for other programs."""

from rsplatform.cli import run_job
from rsplatform.index.export import ExportIndexConfig, export_index

if __name__ == "__main__":
    run_job("export_index", ExportIndexConfig, export_index, "configs/export_index/world.yaml cluster/local.yaml")
