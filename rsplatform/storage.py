"""Bytes on a local path or `s3://bucket/prefix` through one Arrow filesystem; Lance and GDAL get the same place.

boto3 is used for what Arrow does not do: a bucket check with a clear error and presigned links. Credentials
and endpoint come from the standard AWS environment (AWS_ENDPOINT_URL_S3, AWS_REGION, …), never from a recipe.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import boto3
import botocore.exceptions
import pyarrow.fs as pafs


class StorageError(OSError):
    """A place that cannot be read or written; the message names the place and the remedy."""


class NotWholeError(StorageError):
    """A file that is there, but cut off or damaged."""


# The names that `write_bytes` gives to files it has not finished.
_TEMPORARY = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{32}\.tmp$")

# Of a file that is copied, held in memory at a time.
COPY_BYTES = 8 * 2**20


def is_s3(uri: str) -> bool:
    """Whether `uri` lies in an object store."""
    return uri.startswith("s3://")


def s3_endpoint() -> str | None:
    """The S3 endpoint of the environment, None for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def s3_region() -> str:
    """The region of the environment; us-east-1 when it names none, as the AWS tools do."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


@cache
def _s3_filesystem(endpoint: str | None, region: str) -> pafs.S3FileSystem:
    parsed = urlparse(endpoint or "")
    return pafs.S3FileSystem(
        endpoint_override=parsed.netloc or None,
        scheme=parsed.scheme or "https",
        region=region,
        request_timeout=30,
    )


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow filesystem of `uri` and the path inside it.

    Raises:
        StorageError: a scheme other than a plain path, `file://` or `s3://`.
    """
    if is_s3(uri):
        return _s3_filesystem(s3_endpoint(), s3_region()), uri.removeprefix("s3://")
    if "://" in uri and not uri.startswith("file://"):
        raise StorageError(f"{uri}: only local paths and s3:// are supported")
    return pafs.LocalFileSystem(), str(Path(uri.removeprefix("file://")).absolute())


def check_writable(root: str) -> None:
    """Fail early, naming the place, if `root` cannot take new files (missing bucket, read-only or full disk).

    Raises:
        StorageError: with the reason and what to change.
    """
    if is_s3(root):
        try:
            s3_client().head_bucket(Bucket=_bucket(root))
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
            raise _unreachable(root, error) from error
        return
    probe = Path(root) / f".write-probe-{uuid.uuid4().hex}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{root}: cannot write here ({error.strerror}); free or remount the disk, or set root"
        ) from error


def _bucket(uri: str) -> str:
    return uri.removeprefix("s3://").split("/")[0]


def _unreachable(uri: str, error: Exception) -> StorageError:
    reason = " ".join(str(error).split())
    return StorageError(
        f"{uri}: bucket {_bucket(uri)!r} is not reachable ({reason}); create it, or fix its name or AWS_*"
    )


@contextlib.contextmanager
def _reached(uri: str) -> Iterator[tuple[pafs.FileSystem, str]]:
    """`filesystem(uri)` for what only looks: there an error of an object store is one of access, not of the file."""
    system, path = filesystem(uri)
    try:
        yield system, path
    except OSError as error:
        if is_s3(uri):
            raise _unreachable(uri, error) from error
        raise


def s3_client() -> Any:
    """A boto3 S3 client for the environment's endpoint."""
    return boto3.client("s3", endpoint_url=s3_endpoint(), region_name=s3_region())


def presigned_url(uri: str, expires_s: int = 3600) -> str:
    """A time-limited download link of one object; a local file gives its file:// URI."""
    if not is_s3(uri):
        return Path(uri).absolute().as_uri()
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return s3_client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=expires_s)


def lance_options(uri: str) -> dict[str, str] | None:
    """`storage_options` for Lance and LanceDB at `uri`; None for a local path."""
    if not is_s3(uri):
        return None
    options = {"region": s3_region()}
    endpoint = s3_endpoint()
    if endpoint:
        options |= {"aws_endpoint": endpoint, "aws_virtual_hosted_style_request": "false"}
        options["allow_http"] = str(endpoint.startswith("http://")).lower()
    return options


def gdal_path(uri: str) -> str:
    """`uri` as GDAL spells it (/vsis3/…)."""
    return f"/vsis3/{uri.removeprefix('s3://')}" if is_s3(uri) else uri.removeprefix("file://")


def gdal_options() -> dict[str, Any]:
    """GDAL configuration for remote rasters (our defaults, measured) and for the environment's S3 endpoint."""
    options: dict[str, Any] = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
        "GDAL_HTTP_MULTIPLEX": "YES",
        "VSI_CACHE": "TRUE",
        "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
        "GDAL_CACHEMAX": 128 * 2**20,  # bytes: 128 would be megabytes to GDAL, but 128 bytes to rasterio.Env
        "GDAL_HTTP_MAX_RETRY": "5",
        "GDAL_HTTP_TIMEOUT": "30",
        "GDAL_NUM_THREADS": "1",
    }
    endpoint = s3_endpoint()
    if endpoint:
        parsed = urlparse(endpoint)
        options |= {"AWS_S3_ENDPOINT": parsed.netloc, "AWS_VIRTUAL_HOSTING": "FALSE"}
        options["AWS_HTTPS"] = "YES" if parsed.scheme == "https" else "NO"
    return options


def exists(uri: str) -> bool:
    """Whether a file or folder lies at `uri`; StorageError if its bucket cannot be reached or does not let us look."""
    with _reached(uri) as (system, path):
        return system.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str) -> dict[str, int]:
    """Every file below `uri`: relative path → size in bytes, sorted; empty if there is nothing. Raises as `exists`."""
    with _reached(uri) as (system, path):
        found = system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    files = {item.path[len(path.rstrip("/")) + 1 :]: item.size for item in found if item.type == pafs.FileType.File}
    return dict(sorted(files.items()))


def list_folders(uri: str) -> list[str]:
    """Names of the folders right below `uri`, sorted. Raises as `exists`."""
    with _reached(uri) as (system, path):
        found = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(item.base_name for item in found if item.type == pafs.FileType.Directory)


def delete_others(uri: str, kept: set[str]) -> None:
    """Remove every file below `uri` whose relative path is not in `kept`."""
    system, path = filesystem(uri)
    for relative in set(list_files(uri)) - kept:
        system.delete_file(f"{path}/{relative}")


def read_bytes(uri: str) -> bytes:
    """The whole file at `uri`; FileNotFoundError if absent."""
    system, path = filesystem(uri)
    with system.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write `data` so that a reader sees the old file or the whole new one, never a part."""
    system, path = filesystem(uri)
    if is_s3(uri):  # an S3 PUT is atomic by itself
        with system.open_output_stream(path) as stream:
            stream.write(data)
        return
    with _replacing(Path(path), uri) as stream:
        stream.write(data)


@contextlib.contextmanager
def _replacing(target: Path, uri: str) -> Iterator[BinaryIO]:
    """A temporary file beside `target` that takes its name when the block has ended well and the disk has it all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{uri}: cannot write ({error.strerror}); free or remount the disk") from error


def write_file(uri: str, file: Path) -> None:
    """Copy a local file of any size to `uri`, so that a reader sees the old one or the whole new one."""
    system, path = filesystem(uri)
    with file.open("rb") as source:
        if is_s3(uri):  # visible when its last part has been sent
            with system.open_output_stream(path) as stream:
                shutil.copyfileobj(source, stream, COPY_BYTES)
            return
        with _replacing(Path(path), uri) as stream:
            shutil.copyfileobj(source, stream, COPY_BYTES)


def delete_temporaries(uri: str) -> None:
    """Remove what killed writers of `write_bytes` left anywhere below `uri`; nobody may be writing there."""
    system, path = filesystem(uri)
    for relative in list_files(uri):
        if _TEMPORARY.search(relative):
            system.delete_file(f"{path}/{relative}")


def read_json(uri: str) -> Any:
    """The JSON document at `uri`; FileNotFoundError if absent.

    Raises:
        NotWholeError: it is cut off or damaged.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:  # also bytes that are no UTF-8
        raise NotWholeError(f"{uri} is not whole JSON ({error}); delete it and make it again") from error


def write_json(uri: str, document: Any) -> None:
    """Write `document` atomically as JSON with sorted keys."""
    write_bytes(uri, json.dumps(document, indent=2, sort_keys=True, default=str).encode())


def upload_folder(folder: Path, uri: str) -> None:
    """Copy every file of a local folder below `uri`, each atomically."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            write_bytes(f"{uri}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def download_folder(uri: str, folder: Path) -> Path:
    """Copy every file below `uri` into a local folder (for libraries that read only local files)."""
    for relative in list_files(uri):
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(f"{uri}/{relative}"))
    return folder


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A local folder with the files below `uri` inside this block: itself if local, else a temporary copy."""
    if not is_s3(uri):
        yield Path(uri.removeprefix("file://"))
        return
    with tempfile.TemporaryDirectory(prefix="rsplatform-") as folder:
        yield download_folder(uri, Path(folder))
