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


# In CI nothing else may be skipped: a test that cannot run there is a failure of the setup.
ALLOWED_SKIPS = ("no real data", "no GPU")
_forbidden_skips: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember skips that CI does not allow."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            _forbidden_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn forbidden skips into a failure where CI is set."""
    if os.environ.get("CI") and _forbidden_skips:
        print("\nskipped in CI, which only absent real data or a GPU may do:", *_forbidden_skips, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
