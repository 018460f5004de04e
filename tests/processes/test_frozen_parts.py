"""Frozen phases under every engine: what one process trains, bitwise still parts, exact resume across the borders."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsplatform.train.deepspeed import DeepSpeedEngine
from rsplatform.train.engine import Engine, PlainEngine, gather_of_default_group
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.loader import Share
from rsplatform.train.optimizer import OptimizerConfig
from tests.processes.process_group import run_processes
from tests.unit.train.tiny_phases import CURRICULUM, State, assert_freezing, train_phases
from tests.unit.train.tiny_training import BATCH_SIZE, tiny_model

# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5)
ENGINES = ("plain", "fsdp", "zero0", "zero1", "zero2", "zero3")
# before, at and after borders between phases, and inside of one that is frozen
ENDS = (1, 2, 3)


def make_engine(kind: str) -> Engine:
    if kind == "plain":
        return PlainEngine(tiny_model(), OPTIMIZER, gather_of_default_group())
    if kind == "fsdp":
        return FsdpEngine(tiny_model(), OPTIMIZER)
    rows = BATCH_SIZE // dist.get_world_size()
    freezable = CURRICULUM.freezable
    return DeepSpeedEngine(tiny_model(), OPTIMIZER, batch_size=rows, zero_stage=int(kind[-1]), freezable=freezable)


def train_all() -> State:
    """Every engine from the beginning and again from each of ENDS, which must give the same bits."""
    share, last = Share(dist.get_rank(), dist.get_world_size()), {}
    for kind in ENGINES:
        whole = train_phases(make_engine(kind), share=share)
        assert_freezing(whole)
        for end in ENDS:
            tensors, progress = whole[end]
            resume = {name: value for name, value in tensors.items() if name != "losses"}, progress
            resumed = train_phases(make_engine(kind), resume=resume, share=share)
            for step, (state, _) in resumed.items():
                assert state.keys() == whole[step][0].keys(), f"{kind} from {end}"
                differing = [name for name, value in state.items() if not torch.equal(value, whole[step][0][name])]
                assert not differing, f"{kind} from {end}, step {step}: {differing[:5]}"
        last |= {f"{kind}|{name}": value for name, value in whole[CURRICULUM.num_steps][0].items()}
    return last


def test_frozen_phases_are_the_same_under_every_engine(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    single = train_phases(PlainEngine(tiny_model(), OPTIMIZER))[CURRICULUM.num_steps][0]
    for tensors in run_processes(2, tmp_path, train_all):
        for kind in ENGINES:
            found = {key.split("|")[1]: value for key, value in tensors.items() if key.startswith(f"{kind}|")}
            assert found.keys() == single.keys(), kind
            for name, value in single.items():
                torch.testing.assert_close(
                    found[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=f"{kind} {name}": f"{name}: {text}"
                )


def test_deepspeed_refuses_to_freeze_what_it_was_not_made_for(tmp_path: Path) -> None:
    run_processes(1, tmp_path, refuse)


def refuse() -> State:
    engine = DeepSpeedEngine(tiny_model(), OPTIMIZER, batch_size=8, zero_stage=1, freezable=["text"])
    with pytest.raises(ValueError, match=r"not made to freeze \['vision'\]"):
        engine.freeze(["vision"])
    return {}
