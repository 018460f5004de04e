"""What storage promises: the words for a disk that takes no more bytes, and for a bucket that cannot be looked into."""

import contextlib
import errno
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rsplatform import storage
from rsplatform.refused_writes import refused_write


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
                storage.StorageError, match=r"^s3://b/p: bucket 'b' is not reachable \(.*; create it, or"
            ):
                look("s3://b/p")


def test_a_file_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    """In pieces, whatever its size; a copy that fails leaves what was there, and no temporary file."""
    source, target = tmp_path / "source.bin", tmp_path / "artifact" / "target.bin"
    source.write_bytes(bytes(range(256)) * 40_000)  # more than one piece
    assert source.stat().st_size > storage.COPY_BYTES
    storage.write_file(str(target), source)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        storage.write_file(str(target), tmp_path / "missing.bin")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        storage.write_file(str(tmp_path / "file" / "below"), source)
    assert target.read_bytes() == source.read_bytes() and [entry.name for entry in target.parent.iterdir()] == [
        "target.bin"
    ]
