"""In CI a skip fails the session, whether a test or a whole module was skipped; absent data or a GPU may."""

import pytest

from tests.skips import SkipsAreFailures

pytest_plugins = "pytester"

SKIPPED = {
    "test": "import pytest\ndef test_it(): pytest.skip({!r})",
    "fixture": "import pytest\n@pytest.fixture\ndef it(): pytest.skip({!r})\ndef test_it(it): pass",
    "module": "import pytest\npytest.skip({!r}, allow_module_level=True)",
}


@pytest.mark.parametrize(("reason", "code"), [("no browser", 1), ("no GPU here", 0), ("no real data: set …", 0)])
@pytest.mark.parametrize("place", SKIPPED)
def test_only_data_and_gpus_may_be_absent(place: str, reason: str, code: int, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_skipped=SKIPPED[place].format(reason), test_fine="def test_fine(): pass")
    session = pytester.runpytest_inprocess("-p", "no:cacheprovider", plugins=[SkipsAreFailures()])
    assert session.ret == code
    session.assert_outcomes(passed=1, skipped=1)


def test_a_library_that_a_module_needs_may_not_be_absent(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_skipped="import pytest\npytest.importorskip('no_such_library')")
    session = pytester.runpytest_inprocess("-p", "no:cacheprovider", plugins=[SkipsAreFailures()])
    assert session.ret == 1
    session.stdout.fnmatch_lines(["*skipped in CI*", "*test_skipped.py*no_such_library*"])
