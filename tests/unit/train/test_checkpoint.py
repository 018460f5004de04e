"""Checkpoints: whole or absent, written beside the training, the newest and the best kept, errors never lost."""

import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rsplatform import storage
from rsplatform.cluster import TrainPlacement
from rsplatform.train.checkpoint import BackgroundWriter, CheckpointError, CheckpointFolder, HostImage, KeepBest
from rsplatform.train.job import WorkerJob
from rsplatform.train.pretrain import Progress
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import Recorder
from tests.unit.train.tiny_dataset import tiny_recipe

LOCAL = TrainPlacement(launcher="local")


def mixed_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 5, generator=generator)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    state = {f"b/{dtype}": (wide * 20).abs().to(dtype) for dtype in (*dtypes, torch.bool)}
    return state | {"a/odd": torch.ones(3, dtype=torch.uint8), "num_steps": torch.tensor(7.0), "empty": torch.empty(0)}


def test_a_host_image_is_a_safetensors_file_and_a_copy() -> None:
    state = mixed_state()
    transposed = torch.arange(6.0).view(2, 3).T
    image = HostImage()
    image.fill(state, Progress(1))
    data = image.fill(state | {"transposed": transposed}, Progress(123456, elapsed_s=1 / 3))
    expected = {name: value.clone() for name, value in (state | {"transposed": transposed}).items()}
    for value in (*state.values(), transposed):
        value.zero_()
    read = safetensors.torch.load(bytes(data))
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name


def test_what_is_read_is_one_copy_of_what_was_asked_for(tmp_path: Path) -> None:
    folder, state = CheckpointFolder(str(tmp_path)), mixed_state()
    state |= {name: torch.full((3, 2), float(number)) for number, name in enumerate(("ema/x", "model/x", "model/y"))}
    folder.save(state, Progress(4))
    path = tmp_path / "step_00000004.safetensors"
    for prefix in ("", "b/", "nothing/", "model/"):
        read, progress = folder.read(4, prefix)
        assert progress.step == 4
        assert read.keys() == {name for name in state if name.startswith(prefix)}
        assert all(read[name].dtype == state[name].dtype and torch.equal(read[name], state[name]) for name in read)
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in read.values()}
        assert len(storages) == bool(read)
    assert list(storages.values()) == [2 * 6 * 4], "no bytes but the model's"
    with path.open("r+b") as file:  # what is read needs the file no more
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(value, state[name]) for name, value in read.items())


def test_a_damaged_file_is_named_however_it_is_read(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    folder.save(mixed_state(), Progress(4))
    path = tmp_path / "step_00000004.safetensors"
    whole = path.read_bytes()
    lying = whole.replace(b'"shape": [3, 5]', b'"shape": [3, 6]', 1)
    for damaged in (b"", whole[:40], whole[:-1], b"\xff" * len(whole), lying):
        path.write_bytes(damaged)
        for read in (lambda: folder.read(4, ""), lambda: folder.load(4)):
            with pytest.raises(CheckpointError, match="step_00000004.safetensors: not a readable checkpoint"):
                read()


def test_the_caller_goes_on_while_the_bytes_are_written_one_piece_at_a_time() -> None:
    writer, may_end, order = BackgroundWriter(), threading.Event(), []

    def first() -> None:
        assert may_end.wait(30)
        order.append("first")

    writer.start(first)
    assert order == []  # we are here although it is not done
    may_end.set()
    writer.start(lambda: order.append("second"))
    writer.close()
    assert order == ["first", "second"]


def test_a_failed_write_is_told_once_by_the_next_one_or_at_the_end() -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    writer = BackgroundWriter()
    writer.start(fail)
    with pytest.raises(OSError, match="disk is full"):
        writer.start(lambda: None)
    writer.start(fail)
    with pytest.raises(OSError, match="disk is full"):
        writer.close()
    writer.close()


@pytest.mark.parametrize(
    ("mode", "among", "expected"), [("min", {2, 4, 6, 8}, 4), ("max", {2, 4, 6}, 2), ("min", {8}, 8)]
)
def test_the_best_step_is_the_earliest_of_the_best_that_has_a_checkpoint(mode, among, expected) -> None:
    values = {1: 0.0, 2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0, 10: float("nan")}
    history = [{"step": step, "val_loss": value} for step, value in values.items()] + [{"step": 12, "loss": 0.1}]
    assert KeepBest("val_loss", mode).step(history, among) == expected
    assert KeepBest("val_loss", mode).step(history, {10, 12}) is None


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["checkpoints/step_00000002.safetensors", "notes.tmp", ".hidden.tmp"]
    left = [f"checkpoints/.step_00000004.safetensors.{'0a' * 16}.tmp", f".history.json.{'1f' * 16}.tmp"]
    for name in kept + left:
        storage.write_bytes(str(tmp_path / name), b"x")
    storage.delete_temporaries(str(tmp_path))
    assert sorted(storage.list_files(str(tmp_path))) == sorted(kept)
    storage.delete_temporaries(str(tmp_path / "absent"))


def test_a_run_that_breaks_finishes_its_last_checkpoint_and_tells_its_own_error(tmp_path: Path) -> None:
    recipe = PretrainConfig(**tiny_recipe())
    job = WorkerJob(recipe, str(tmp_path), str(tmp_path / "run"), LOCAL)
    with pytest.raises(ZeroDivisionError), Recorder(job, is_first=True, from_step=0) as recorder:
        recorder.save({"model/x": torch.ones(1000)}, Progress(2))
        raise ZeroDivisionError
    assert job.checkpoints.steps() == [2]
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "checkpoints").write_text("a file where the folder should be")
    job = WorkerJob(recipe, str(tmp_path), str(tmp_path / "occupied"), LOCAL)
    with pytest.raises(ZeroDivisionError) as raised, Recorder(job, is_first=True, from_step=0) as recorder:
        recorder.save({"model/x": torch.ones(1)}, Progress(2))
        raise ZeroDivisionError
    assert "the last checkpoint was not written either" in raised.value.__notes__[0]
    with pytest.raises(OSError), Recorder(job, is_first=True, from_step=0) as recorder:
        recorder.save({"model/x": torch.ones(1)}, Progress(2))
