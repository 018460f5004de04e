"""What storage promises: the words for a disk that takes no more bytes, and for a bucket that cannot be looked into."""

import contextlib
import errno
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rsplatform import storage
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


class Forbidden(BaseHTTPRequestHandler):
    """An S3 server that lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def forbidding() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("place", [forbidding(), contextlib.nullcontext("http://127.0.0.1:9")], ids=["403", "dead"])
def test_a_bucket_that_cannot_be_looked_into_is_named(
    place: contextlib.AbstractContextManager[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    with place as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for look in (storage.exists, storage.list_files, storage.list_folders):
            with pytest.raises(
                storage.StorageError, match=r"^s3://b/p: bucket 'b' is not reachable \(.*; create it or"
            ):
                look("s3://b/p")
