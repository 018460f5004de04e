"""What local storage promises: the words for a disk that takes no more bytes."""

import errno
import sqlite3

import pytest

from rsplatform.storage import refused_write


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "no space is left on a disk"),
        (OSError("LanceError(IO): Generic LocalFileSystem error: (os error 28)"), "no space is left on a disk"),
        (sqlite3.OperationalError("database or disk is full"), "no space is left on a disk"),
        (OSError(errno.EROFS, "Read-only file system"), "a disk is read-only"),
        (ValueError("28 chips"), None),
    ],
)
def test_a_refusing_disk_is_recognised_behind_other_errors(error: Exception, reason: str | None) -> None:
    assert refused_write(error) == reason
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a worker failed") from cause
    except RuntimeError as outer:
        assert refused_write(outer) == reason
