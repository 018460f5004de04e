"""One driver at a time on an unfinished artifact: a file beside its work says who has it, kept young while they do.

In: an artifact. Out: a block in which this process has it, or a refusal that names who does. A lease is free when its
process has ended on this machine, or when it has grown old: a killed driver's command goes on at once where it ran,
and after `STALE_S` elsewhere. It keeps drivers apart, not their workers.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.shared_file import Found, SharedFile, shared_file

LEASE = "work/lease.json"
# How often a driver says that it lives, and the age at which nobody waits for it any longer.
BEAT_S, STALE_S = 20.0, 60.0
# Longer than it takes to leave the block.
INTERRUPT_AGAIN_S = 60.0
# Not SIGINT: a shell that starts a command in the background has it ignored.
INTERRUPT = signal.SIGUSR2

logger = logging.getLogger("rsplatform")


class BusyError(ArtifactError):
    """Another process is at work on the artifact, or has taken it from this one."""


class Lease:
    """A lease that this process has; `is_lost` once another has taken it."""

    def __init__(self, artifact: Artifact, file: SharedFile, known: Found) -> None:
        self._artifact, self._file, self._known = artifact, file, known
        self._ends = threading.Event()
        self._is_in_main = threading.current_thread() is threading.main_thread()
        self._earlier = signal.signal(INTERRUPT, signal.default_int_handler) if self._is_in_main else None
        self.is_lost = False
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise BusyError if another process has taken the artifact meanwhile."""
        if self.is_lost:
            raise BusyError(
                f"{self._artifact.uri}: this process gave no sign of life for {STALE_S:.0f} s, and another has taken "
                f"the work over or removed {LEASE}; run the same command again when nobody is at it"
            )

    def end(self) -> None:
        """Let go of it. A place that cannot be reached is no error: there it grows old by itself."""
        self._ends.set()
        self._thread.join()
        if self._is_in_main:
            signal.signal(INTERRUPT, self._earlier or signal.SIG_DFL)
        try:
            self._file.remove(self._known)
        except Exception as error:
            logger.warning("%s: the lease could not be removed (%s)", self._artifact.uri, error)

    def _beat(self) -> None:
        while not self._ends.wait(BEAT_S):
            try:
                known = self._file.touch(self._known)
            except Exception as error:
                logger.warning("%s: the lease could not be renewed (%s); trying again", self._artifact.uri, error)
                continue
            if known is None:
                self.is_lost = True
                self._interrupt()
                return
            self._known = known

    def _interrupt(self) -> None:
        """As Ctrl-C, which also ends waiting; again, as Python drops what is raised in a destructor or a callback."""
        main = threading.main_thread().ident
        while self._is_in_main and main is not None and not self._ends.is_set():
            signal.pthread_kill(main, INTERRUPT)
            self._ends.wait(INTERRUPT_AGAIN_S)


@contextlib.contextmanager
def held(artifact: Artifact) -> Iterator[Lease]:
    """Have the artifact's work to this process inside the block, which is interrupted if it gets lost.

    Raises:
        BusyError: another process has it; the message names it, and how to go on.
    """
    lease = _take(artifact)
    try:
        yield lease
    except KeyboardInterrupt:
        lease.check()
        raise
    finally:
        lease.end()


def _take(artifact: Artifact) -> Lease:
    uri = artifact.path(LEASE)
    file, own = shared_file(uri), json.dumps(_own_entry(), indent=2).encode()
    while True:
        found = file.look()
        if found is not None:
            entry = _entry(found)
            if found.age_s < STALE_S and not _has_ended(entry):
                who = f"process {entry['pid']} on {entry['host']} since {entry['since']}"
                raise BusyError(
                    f"{artifact.uri} is being made by {who}: let it finish or stop it there; if it is gone, its lease "
                    f"ends {STALE_S:.0f} s after its last sign of life, or at once if you delete {uri}"
                )
            logger.info("%s: taking over from process %s on %s", artifact.uri, entry["pid"], entry["host"])
        known = file.swap(found, own)
        if known is not None:
            return Lease(artifact, file, known)


def _own_entry() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _entry(found: Found) -> dict[str, Any]:
    """What `_own_entry` wrote; of a machine that lost its power meanwhile, nothing that lives."""
    try:
        return json.loads(found.data)
    except ValueError:
        return {"host": "a machine that broke down", "machine": _machine(), "pid": 0, "started": "", "since": "unknown"}


def _machine() -> str:
    """What process ids mean something on: a boot of a machine, and a container's own numbers on it."""
    boot, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and numbers.exists():
        return f"{boot.read_text().strip()} {numbers.stat().st_ino}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _has_ended(entry: dict[str, Any]) -> bool:
    """Whether the process is known not to live any more; False if it ran where this one cannot see it."""
    return entry["machine"] == _machine() and _started(entry["pid"]) != entry["started"]  # numbers are given again


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot, which no set clock moves; None if it does not live.

    Where there is no /proc, only whether it lives.
    """
    try:
        if not Path("/proc/self/stat").exists():
            os.kill(pid, 0)
            return ""
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]
