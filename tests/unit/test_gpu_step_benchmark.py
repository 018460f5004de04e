"""The GPU step's table: what sharding costs on one card stands beside the plain engine."""

import importlib.util
from dataclasses import asdict, replace

import pytest

from benchmarks.gpu_step import Setting, plain_pace, settings, told, why_left_out


def test_fsdp_and_zero1_each_have_a_plain_row_above_them_to_compare_with() -> None:
    rows = settings([64, 128], can_compile=True)
    sharding = [setting for setting in rows if setting.engine != "plain"]
    assert {setting.engine for setting in sharding} == {"fsdp", "zero1"}
    for setting in sharding:
        assert replace(setting, engine="plain") in rows[: rows.index(setting)]


def test_a_row_tells_how_a_steps_time_compares_with_plains() -> None:
    setting, found = Setting("zero1", 128, compiles=True), {"samples_per_s": 80.0, "mfu": 0.4}
    plain = asdict(replace(setting, engine="plain")) | {"samples_per_s": 100.0}
    other = asdict(Setting("plain", 64)) | {"samples_per_s": 50.0}
    assert plain_pace(setting, [other, plain]) == 100.0
    assert told(found, plain_pace(setting, [other, plain])).endswith("1.25 × plain's time")
    assert plain_pace(setting, [other]) is None
    assert "plain's" not in told(found, None)


def test_zero_is_left_out_with_a_word_where_deepspeed_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "deepspeed is not installed" in str(why_left_out(Setting("zero1", 128)))
    assert why_left_out(Setting("fsdp", 128)) is None
