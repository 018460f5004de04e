"""A process that keeps its freed memory meets the kernel once, not at every step."""

import os
import subprocess
import sys

import pytest

from rsplatform.train.allocator import KEEP_FREED_MEMORY

STEPS = """
import resource, sys, threading
from rsplatform.train.allocator import keep_freed_memory

def step():
    blocks = [bytearray(megabytes * 2**20) for megabytes in (1, 20, 60)]

def faults():
    for _ in range(2):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)

if "call" in sys.argv:
    assert keep_freed_memory()
if "thread" in sys.argv:
    worker = threading.Thread(target=faults)
    worker.start()
    worker.join()
else:
    faults()
"""
PAGES = 81 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def faults_per_step(*arguments: str, environment: dict[str, str] | None = None) -> int:
    call = [sys.executable, "-c", STEPS, *arguments]
    done = subprocess.run(call, env=os.environ | (environment or {}), capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_the_call_keeps_the_memory_of_the_main_thread() -> None:
    assert faults_per_step() > PAGES / 2  # the machine has the cost that is avoided
    assert faults_per_step("call") < PAGES / 20


@pytest.mark.parametrize("thread", [[], ["thread"]])
def test_the_environment_keeps_the_memory_of_every_thread(thread: list[str]) -> None:
    assert faults_per_step(*thread, environment=KEEP_FREED_MEMORY) < PAGES / 20
