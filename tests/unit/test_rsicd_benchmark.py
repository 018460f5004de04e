"""The RSICD benchmark's memory of its runs: the same settings go on, others are refused."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rsicd.py"


@pytest.fixture
def rsicd(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it is in no package."""
    spec = importlib.util.spec_from_file_location("rsicd_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_run_of_the_same_settings_goes_on_or_is_not_repeated(tmp_path: Path, rsicd: ModuleType) -> None:
    path, settings = tmp_path / "out" / "joint_0.json", rsicd.Settings()
    assert rsicd.begin(path, settings) is None
    assert rsicd.begin(path, settings) is None  # stopped before it was measured
    path.write_text(json.dumps({"settings": asdict(settings), "recall": {"i2t_r1": 3.0}}))
    assert rsicd.begin(path, settings) == {"i2t_r1": 3.0}


@pytest.mark.parametrize("stored", [{"recall": {"i2t_r1": 3.0}}, {}])
def test_numbers_and_checkpoints_of_other_settings_are_refused(tmp_path: Path, rsicd: ModuleType, stored: dict) -> None:
    path, settings = tmp_path / "joint_0.json", rsicd.Settings()
    path.write_text(json.dumps({"settings": asdict(settings)} | stored))
    with pytest.raises(SystemExit, match=r"joint_0.json .* batch_size 128 \(asked: 64\), samples 86000 .*--out"):
        rsicd.begin(path, replace(settings, batch_size=64, samples=10))
