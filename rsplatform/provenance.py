"""Which code and which packages made a result: what a manifest and a run say of them."""

import importlib.metadata
import os
import subprocess
from pathlib import Path

PACKAGES = (
    "torch",
    "ray",
    "deepspeed",
    "mlflow",
    "pylance",
    "lancedb",
    "pyarrow",
    "rasterio",
    "pydantic",
    "numpy",
)


def git_sha() -> str:
    """Commit of this code, with `-dirty` for local changes; RSPLATFORM_GIT_SHA where no checkout travels along."""
    if os.environ.get("RSPLATFORM_GIT_SHA"):
        return os.environ["RSPLATFORM_GIT_SHA"]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions
