"""A small file that several processes write, each only if nobody else has since it looked; on a local path or S3.

In: what was found there, what is to be there. Out: whether it is. Local: hard links and renames, which are atomic on
network disks too. S3: conditional requests by ETag (an object store that ignores the conditions lets the last writer
win). Ages are by the clock of the place, so those of machines need not agree.
"""

import contextlib
import os
import time
import uuid
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

import botocore.exceptions

from rsplatform import storage

# What an object store answers where the condition does not hold: gone, written at this moment, written since.
_NOT_AS_KNOWN = (404, 409, 412)
_NOT_IMPLEMENTED = 501


@dataclass(frozen=True)
class Found:
    """What lies there, how long ago it was written or touched, and S3's tag of it."""

    data: bytes
    age_s: float = 0.0
    tag: str = ""


class SharedFile(Protocol):
    """`swap` and `touch` give what lies there afterwards, None if somebody else was there since `known` was found."""

    def look(self) -> Found | None: ...

    def swap(self, known: Found | None, data: bytes) -> Found | None: ...

    def touch(self, known: Found) -> Found | None: ...

    def remove(self, known: Found) -> None: ...


def shared_file(uri: str) -> SharedFile:
    """The file at `uri`, which need not exist."""
    return S3File(uri) if storage.is_s3(uri) else LocalFile(uri)


class LocalFile:
    """A file on a local or network disk. Its folder is made by the first `swap`."""

    def __init__(self, uri: str) -> None:
        self._path = Path(storage.filesystem(uri)[1])

    def look(self) -> Found | None:
        """What is there, if anything is."""
        try:
            data, written_s = self._path.read_bytes(), self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        probe = self._beside(b"")  # the disk's clock
        now_s = probe.stat().st_mtime
        probe.unlink()
        return Found(data, now_s - written_s)

    def swap(self, known: Found | None, data: bytes) -> Found | None:
        """Put `data` where `known` is, or where nothing is."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if known is not None and not self._take_away(known):
            return None
        own = self._beside(data)
        try:
            os.link(own, self._path)
        except FileExistsError:
            return None
        except OSError:  # no hard links here: the last of two at the same moment wins
            own.replace(self._path)
        finally:
            own.unlink(missing_ok=True)
        return Found(data)

    def touch(self, known: Found) -> Found | None:
        """Make it new again."""
        try:
            if self._path.read_bytes() != known.data:
                return None
            os.utime(self._path)
        except FileNotFoundError:
            return None
        return known

    def remove(self, known: Found) -> None:
        """Delete it, if it is still `known`."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.read_bytes() == known.data:
                self._path.unlink()

    def _take_away(self, known: Found) -> bool:
        """Of several processes that try, one succeeds: a rename takes the file from all others."""
        taken = self._path.with_name(self._new_name())
        try:
            self._path.rename(taken)
        except FileNotFoundError:
            return False
        is_known = taken.read_bytes() == known.data
        if not is_known:  # another was faster, and this is theirs
            with contextlib.suppress(OSError):
                os.link(taken, self._path)
        taken.unlink()
        return is_known

    def _beside(self, data: bytes) -> Path:
        path = self._path.with_name(self._new_name())
        path.write_bytes(data)
        return path

    def _new_name(self) -> str:
        return f".{self._path.name}.{uuid.uuid4().hex}"


class S3File:
    """An object."""

    def __init__(self, uri: str) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self._place = {"Bucket": bucket, "Key": key}
        self._client = storage.s3_client()  # made once: boto3 makes none safely beside another thread

    def look(self) -> Found | None:
        """What is there, if anything is."""
        try:
            answer = self._client.get_object(**self._place)
        except self._client.exceptions.NoSuchKey:
            return None
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now_s = parsedate_to_datetime(told).timestamp() if told else time.time()
        return Found(answer["Body"].read(), now_s - answer["LastModified"].timestamp(), answer["ETag"])

    def swap(self, known: Found | None, data: bytes) -> Found | None:
        """Put `data` where `known` is, or where nothing is."""
        return self._put(data, {"IfNoneMatch": "*"} if known is None else {"IfMatch": known.tag})

    def touch(self, known: Found) -> Found | None:
        """Make it new again."""
        return self._put(known.data, {"IfMatch": known.tag})

    def remove(self, known: Found) -> None:
        """Delete it, if it is still `known`."""
        found = self.look()
        if found is not None and found.data == known.data:
            self._client.delete_object(**self._place)

    def _put(self, data: bytes, condition: dict[str, str]) -> Found | None:
        try:
            answer: Any = self._client.put_object(**self._place, Body=data, **condition)
        except botocore.exceptions.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in _NOT_AS_KNOWN:
                return None
            if status != _NOT_IMPLEMENTED:
                raise
            answer = self._client.put_object(**self._place, Body=data)
        return Found(data, tag=answer["ETag"])
