"""What CI allows to be skipped: a test that cannot run there is a failure of the setup."""

import pytest

ALLOWED = ("no real data", "no GPU")


class SkipsAreFailures:
    """A pytest plugin: every other skip, of a test or of a whole module, fails the session.

    pytest-xdist's first process hears of all of them.
    """

    def __init__(self) -> None:
        self._forbidden: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2])
            if not any(allowed in reason for allowed in ALLOWED):
                self._forbidden.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The skips and a failure."""
        if self._forbidden:
            print("\nskipped in CI, which only absent real data or a GPU may do:", *self._forbidden, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
