"""One driver at a time on an artifact: real processes that have it, die with it, wait for it at the same moment."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from rsplatform import lease, storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster
from rsplatform.config import StageConfig
from rsplatform.lease import BusyError
from rsplatform.shared_file import shared_file
from rsplatform.stage import open_stage
from tests.processes.process_group import start_server

NUM_RACES, NUM_RACERS = 20, 3


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return start_server()


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(str(tmp_path), "text/a/v1")


def work(artifact: Artifact, pipe: Connection) -> None:
    """A driver that says when it is at work, and ends when it is told to."""
    with lease.held(artifact):
        pipe.send("at work")
        pipe.recv()


class Driver:
    """`work` in a process of its own, until it is at work."""

    def __init__(self, server: ForkServerContext, artifact: Artifact) -> None:
        self.pipe, theirs = server.Pipe()
        self.process = server.Process(target=work, args=(artifact, theirs))
        self.process.start()
        theirs.close()  # so that a driver which fails is an end of the file, not a wait for ever
        assert self.pipe.recv() == "at work"


@pytest.fixture
def driver(server: ForkServerContext, artifact: Artifact) -> Iterator[Driver]:
    driver = Driver(server, artifact)
    yield driver
    driver.process.kill()
    driver.process.join()


def claim(artifact: Artifact) -> None:
    with lease.held(artifact):
        pass


def leases(artifact: Artifact) -> list[str]:
    return [name for name in storage.list_files(artifact.uri) if "lease" in name]


def test_a_second_driver_is_told_who_is_at_work(driver: Driver, artifact: Artifact) -> None:
    config, cluster = StageConfig(output=artifact.ref), Cluster(root=artifact.root)
    words = rf"text/a/v1 is being made by process {driver.process.pid} on \S+ since 20\S+: .* delete .*lease\.json"
    with pytest.raises(BusyError, match=words), open_stage(config, cluster):
        pass
    driver.pipe.send("end")
    driver.process.join()
    assert driver.process.exitcode == 0
    with open_stage(config, cluster) as stage:
        storage.write_bytes(stage.artifact.path("text"), b"made")
    assert list(artifact.manifest()["checksums"]) == ["text"]
    assert not leases(artifact)
    with pytest.raises(ArtifactError, match="was finished by another process just now"), open_stage(config, cluster):
        pass


def test_a_killed_drivers_work_is_free_at_once(driver: Driver, artifact: Artifact) -> None:
    assert driver.process.pid is not None
    os.kill(driver.process.pid, signal.SIGSTOP)  # neither dead nor alive: still theirs
    with pytest.raises(BusyError):
        claim(artifact)
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.process.join()
    claim(artifact)
    assert not leases(artifact)


def test_a_process_that_got_the_number_of_a_dead_one_is_not_it(driver: Driver, artifact: Artifact) -> None:
    path = Path(artifact.path(lease.LEASE))
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"started": "1"}))
    claim(artifact)


def test_a_driver_elsewhere_is_waited_for_until_its_lease_is_old(driver: Driver, artifact: Artifact) -> None:
    path = Path(artifact.path(lease.LEASE))
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"machine": "another", "pid": 1, "started": "0"}))
    now_s = path.stat().st_mtime
    os.utime(path, (now_s, now_s - lease.STALE_S + 30))
    with pytest.raises(BusyError, match="process 1 on"):
        claim(artifact)
    os.utime(path, (now_s, now_s - lease.STALE_S))
    claim(artifact)


def test_a_lease_that_says_nothing_is_free(artifact: Artifact) -> None:
    storage.write_bytes(artifact.path(lease.LEASE), b"")
    claim(artifact)


def test_stages_inside_of_a_stage_have_leases_of_their_own(tmp_path: Path) -> None:
    cluster = Cluster(root=str(tmp_path))
    with open_stage(StageConfig(output="demo/a/v1"), cluster), open_stage(StageConfig(output="text/a/v1"), cluster):
        assert all(len(leases(Artifact(str(tmp_path), ref))) == 1 for ref in ("demo/a/v1", "text/a/v1"))


def test_a_lease_is_kept_young(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with lease.held(artifact):
        path = Path(artifact.path(lease.LEASE))
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            pass
        with pytest.raises(BusyError):
            claim(artifact)


def test_who_has_lost_the_lease_stops_and_commits_nothing(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    config, cluster = StageConfig(output=artifact.ref), Cluster(root=artifact.root)
    path = Path(artifact.path(lease.LEASE))
    with pytest.raises(BusyError, match="another has taken the work over"), open_stage(config, cluster):
        storage.write_bytes(str(path), b"somebody else's")  # at once: a half written one is lost already
        threading.Event().wait(60)
    assert not artifact.is_finished
    assert path.read_text() == "somebody else's"


def race(folder: Path, number: int, start: Barrier, pipe: Connection) -> None:
    """In which races this process took the file."""
    won = []
    for round_number in range(NUM_RACES):
        file = shared_file(str(folder / str(round_number) / "lease.json"))
        found = file.look()
        start.wait()
        if file.swap(found, f"{number}".encode()) is not None:
            won.append(round_number)
    pipe.send(won)


@pytest.mark.parametrize("is_there", [False, True])
def test_of_several_at_the_same_moment_one_gets_it(server: ForkServerContext, tmp_path: Path, is_there: bool) -> None:
    if is_there:
        for round_number in range(NUM_RACES):
            storage.write_bytes(str(tmp_path / str(round_number) / "lease.json"), b"a dead one's")
    start, pipes, processes = server.Barrier(NUM_RACERS), [], []
    for number in range(NUM_RACERS):
        ours, theirs = server.Pipe()
        processes.append(server.Process(target=race, args=(tmp_path, number, start, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    won = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    for round_number in range(NUM_RACES):
        (winner,) = [number for number in range(NUM_RACERS) if round_number in won[number]]
        assert (tmp_path / str(round_number) / "lease.json").read_bytes() == f"{winner}".encode()
        assert len(list((tmp_path / str(round_number)).iterdir())) == 1
