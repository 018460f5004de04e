"""The step's benchmark: its reference is the original, and it runs on a machine that has only torch."""

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.reference_mammut import ReferenceMammut, ReferenceShape, conformance_gaps
from rsplatform.model.mammut import Mammut
from rsplatform.model.normalise import normalise
from rsplatform.model.sizes import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from tests.unit.test_architecture import REPOSITORY, files_of

SCRIPT = REPOSITORY / "benchmarks" / "train_step.py"
SHAPE = ReferenceShape(16, 2, 2, 8, 16, 16, 2, 2, context_length=24, vocab_size=40, has_mlp=False)


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it finds its neighbour beside it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("train_step")


@pytest.mark.parametrize("name", ["openmammut_with_mlp", "openmammut_without_mlp"])
def test_the_reference_reproduces_the_original_outputs_and_losses(data_root: Path, name: str) -> None:
    path = data_root / "conformance" / f"{name}.safetensors"
    assert path.is_file(), f"the real data lack {path}"
    gaps = conformance_gaps(path)
    assert set(gaps) == {"image_features", "text_features", "logits", "image_tokens"} | {
        "contrastive_loss",
        "caption_loss_x2",
    }
    assert max(gaps.values()) < 1e-4, gaps


@pytest.mark.parametrize("lengths", [[3, 5, 8, 11], [24, 24, 24, 24]])
def test_the_timed_model_loses_what_the_reference_does(train_step: ModuleType, lengths: list[int]) -> None:
    torch.manual_seed(0)
    reference = ReferenceMammut(SHAPE)
    batch = train_step.make_batch(SHAPE, lengths, torch.Generator().manual_seed(1))
    images_BCHW = normalise(batch.images_BHWC, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)
    expected = train_step.reference_losses(reference, images_BCHW, batch.tokens_BT)
    expected["legacy"] = float(reference.loss(images_BCHW, batch.tokens_BT).detach())
    _, _, found = train_step.our_timed_step(SHAPE, reference, batch)
    assert found == pytest.approx(expected, abs=1e-5)
    train_step.hold_to_equal_losses("tiny", [found, expected])


def test_a_timed_model_that_pools_otherwise_is_no_comparison(
    train_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    reference = ReferenceMammut(SHAPE)
    batch = train_step.make_batch(SHAPE, [3, 5, 8, 11], torch.Generator().manual_seed(1))
    expected = train_step.reference_losses(
        reference, normalise(batch.images_BHWC, CLIP_PIXEL_MEAN, CLIP_PIXEL_STD), batch.tokens_BT
    )
    made = train_step.our_model

    def pools_all_positions(shape: ReferenceShape, weights: ReferenceMammut, *, skips_pads: bool) -> Mammut:
        return made(shape, weights, skips_pads=False)

    monkeypatch.setattr(train_step, "our_model", pools_all_positions)
    _, _, found = train_step.our_timed_step(SHAPE, reference, batch)
    with pytest.raises(AssertionError, match="tiny: the contrastive losses differ"):
        train_step.hold_to_equal_losses("tiny", [expected, found])


def test_captions_are_timed_at_the_lengths_of_their_tokens(
    tmp_path: Path, train_step: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dataset_rsicd.json"
    assert str(path) in train_step.why_no_rsicd(path)
    captions = ["a runway .", "many storage tanks are near a river ."]
    sentences = [{"raw": caption} for caption in captions]
    path.write_text(json.dumps({"images": [{"split": "train", "sentences": sentences}]}))
    assert train_step.why_no_rsicd(path) is None
    assert train_step.rsicd_lengths(path, 2, 77) == [3 + 2, 8 + 2]  # both are learned whole
    assert train_step.rsicd_lengths(path, 2, 7) == [5, 7]
    assert "words mean 7.5, at most 10" in capsys.readouterr().out


def test_rsicds_lengths_are_those_of_clips_tokens_or_longer(data_root: Path, train_step: ModuleType) -> None:
    path = data_root / "rsicd" / "dataset_rsicd.json"
    assert path.is_file(), f"the real data lack {path}"
    found = train_step.rsicd_lengths(path, 8, 77)
    assert all(own >= clips for own, clips in zip(found, [10, 11, 12, 13, 14, 15, 17, 19], strict=True))


def test_the_benchmark_starts_where_only_torch_is() -> None:
    """Whatever is imported when it starts, by itself or by modules of ours."""
    found, waiting = set(), [SCRIPT, SCRIPT.with_name("reference_mammut.py")]
    foreign = set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported_at_start(path):
            top = name.split(".")[0]
            waiting += files_of(name)
            if top not in sys.stdlib_module_names | {"torch", "numpy", "rsplatform", "reference_mammut"}:
                foreign.add(f"{path.name}: {name}")
    assert not foreign, foreign
    assert REPOSITORY / "rsplatform" / "train" / "step.py" in found


def imported_at_start(path: Path) -> Iterator[str]:
    """Names that importing a module imports: not those inside of its functions."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
