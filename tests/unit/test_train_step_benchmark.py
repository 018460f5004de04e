"""The step's benchmark: its reference is the original, and it runs on a machine that has only torch."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.reference_mammut import conformance_gaps
from tests.unit.test_architecture import REPOSITORY, files_of

SCRIPT = REPOSITORY / "benchmarks" / "train_step.py"


@pytest.mark.parametrize("name", ["openmammut_with_mlp", "openmammut_without_mlp"])
def test_the_reference_reproduces_the_original_outputs_and_losses(data_root: Path, name: str) -> None:
    path = data_root / "conformance" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no real data: {path}")
    gaps = conformance_gaps(path)
    assert set(gaps) == {"image_features", "text_features", "logits", "image_tokens"} | {
        "contrastive_loss",
        "caption_loss_x2",
    }
    assert max(gaps.values()) < 1e-4, gaps


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
