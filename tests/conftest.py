"""Fixtures that every room of the tests shares."""

import contextlib
import gc
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from rsplatform import tracking
from tests.skips import SkipsAreFailures

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


@pytest.fixture(autouse=True, scope="session")
def _new_databases_are_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow makes a database by all migrations of its history, which take 1.5 s: here once a session, then copied."""
    empty, real_client = tmp_path_factory.mktemp("mlflow") / "mlflow.db", tracking._client

    def client_of_a_copy(uri: str) -> Any:
        database = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not database.exists():
            if not empty.exists():
                real_client(f"sqlite:///{empty}").search_experiments()
            database.parent.mkdir(parents=True, exist_ok=True)
            with (
                contextlib.closing(sqlite3.connect(empty)) as made,
                contextlib.closing(sqlite3.connect(database)) as new,
            ):
                made.backup(new)
        return real_client(uri)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_client", client_of_a_copy)
        yield


@pytest.fixture
def root(tmp_path: Path) -> str:
    """An empty artifact root."""
    return str(tmp_path / "artifacts")


@pytest.fixture(autouse=True)
def _every_test_multiplies_as_torch_starts() -> Iterator[None]:
    """What sets float32 products for its process (an Embedder does) sets them for one test."""
    yield
    torch = sys.modules.get("torch")  # not imported here: pytest_configure comes first
    if torch is not None:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, as on a terminal, also where a shell started the tests in the background."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def pytest_configure(config: pytest.Config) -> None:
    """No example of a property has to be fast; tests beside each other (pytest-xdist) leave the cores to the others."""
    settings.register_profile("any_machine", settings.default, deadline=None)
    settings.load_profile("any_machine")
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is later
    if os.environ.get("CI"):
        config.pluginmanager.register(SkipsAreFailures())
    gc.disable()  # while the tests' modules and all that they import are read: nothing of it becomes garbage


def pytest_collection_finish() -> None:
    """The million objects of the imported libraries stay, so that no later collection walks through them."""
    gc.freeze()
    gc.enable()
