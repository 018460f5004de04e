"""Fixtures that every room of the tests shares."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def find_data_root() -> Path | None:
    """Real data: RSPLATFORM_TEST_DATA, else ../shared/data beside the checkout; None if absent."""
    named = os.environ.get("RSPLATFORM_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; the test is skipped, saying so, where it is absent."""
    folder = find_data_root()
    if folder is None:
        pytest.skip("no real data: set RSPLATFORM_TEST_DATA or put it at ../shared/data")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _tracking_stays_in_test_folders() -> None:
    """Tests write MLflow data under their own roots, never to a server that the user's environment names."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """An empty artifact root."""
    return str(tmp_path / "artifacts")
