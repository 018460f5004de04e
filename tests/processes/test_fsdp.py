"""In float64, at any world size and sharding, plain processes and FSDP2 have the losses and gradients of one plain
process and train its model; checkpoints cross over.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rsplatform.model.draws import sample_keys
from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut
from rsplatform.train.engine import FIRST_MOMENT, Engine, PlainEngine, gather_of_default_group
from rsplatform.train.fsdp import FsdpEngine
from rsplatform.train.loader import Share
from rsplatform.train.optimizer import AveragedWeights, OptimizerConfig
from rsplatform.train.pretrain import EMA, Hooks, LoopConfig, fit, full_state
from rsplatform.train.step import StepConfig
from rsplatform.train.validate import validation_losses
from tests.processes.process_group import run_processes
from tests.unit.train.tiny_training import tiny_loader, tiny_model

NUM_STEPS, BATCH_SIZE, TOLERANCE = 4, 8, 1e-10
# A key's bias has no gradient but rounding, which Adam would blow up to a full step: eps well above that rounding
OPTIMIZER = OptimizerConfig(eps=1e-4, gradient_clip=0.5)
State = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A loss, what is added to the logarithm of the first logit scale (2 is above the clamp), and an optimizer."""

    loss: LossConfig = LossConfig()
    above: float = 0.0
    optimizer: OptimizerConfig = OPTIMIZER


CASES = {
    "softmax": Case(),
    "focal_sigmoid": Case(LossConfig("focal_sigmoid", caption_weight=2.0), above=2.0),
    "sigmoid": Case(LossConfig("sigmoid", z_loss_weight=1e-2)),
    "muon": Case(optimizer=replace(OPTIMIZER, kind="muon")),
}


def make_model(case: Case = CASES["softmax"]) -> Mammut:
    """Every kind of part: blocks without MLP, cross-attention with one, a pooling with parameters of its own; and
    what is drawn at random for each sample."""
    sizes = {"text_num_layers": 3, "self_mlp_before_cross": False, "cross_mlp": True, "vision_pooling": "map"}
    sizes |= {"logit_bias": case.loss.contrastive == "sigmoid", "ground_sample_distance_encoding": True}
    sizes |= {"patch_dropout": 0.25, "cropped_positions": True, "ground_sample_distance_positions": True}
    model = tiny_model(**sizes).double()
    with torch.no_grad():
        model.log_logit_scale.add_(case.above)
    return model


def make_engine(kind: str, case: Case = CASES["softmax"]) -> Engine:
    """plain; fsdp; fsdp/2: two processes to a copy of the model."""
    if kind == "plain":
        return PlainEngine(make_model(case), case.optimizer, gather_of_default_group())
    shard_size = kind.partition("/")[2]
    return FsdpEngine(make_model(case), case.optimizer, shard_size=int(shard_size) if shard_size else None)


def own_places() -> torch.Tensor:
    """The places of this process's rows in the batch."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return torch.arange(rank, BATCH_SIZE, world_size)


def own_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of the step's batch; texts differ in length, and two are the same."""
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(3, 300, (BATCH_SIZE, 12), generator=generator)
    for row in range(BATCH_SIZE):
        tokens_BT[row, 4 + row :] = 0
    tokens_BT[6] = tokens_BT[1]
    images_BCHW = torch.randn(BATCH_SIZE, 3, 16, 16, dtype=torch.float64, generator=generator)
    return images_BCHW[own_places()], tokens_BT[own_places()]


def own_distances(step: int) -> torch.Tensor | None:
    """Ground sample distances of this process's rows; at four processes, one knows none, and step 2 has none."""
    distance_m_B = torch.linspace(0.3, 9.0, BATCH_SIZE, dtype=torch.float64)
    distance_m_B[1::4] = torch.nan
    return None if step == 2 else distance_m_B[own_places()]


def one_step(engine: Engine, step: int, loss: LossConfig) -> torch.Tensor:
    """The step's losses, logit scale and gradient norm, over all processes."""
    images_BCHW, tokens_BT = own_batch(step)
    keys_B = sample_keys(3, step, own_places())
    output = engine.forward(images_BCHW, tokens_BT, own_distances(step), loss.z_loss_weight, keys_B)
    value, parts = mammut_loss(output, tokens_BT, loss, engine.gather)
    engine.backward(value)
    values_K = torch.stack([part.double() for part in parts.values()])
    if engine.gather is not None:
        values_K = engine.gather.total(values_K) / engine.gather.world_size
    return torch.cat([values_K, torch.tensor([engine.step(1e-3)], dtype=torch.float64)])


def train(kind: str, case: Case = CASES["softmax"], end: int = NUM_STEPS, given: State | None = None) -> State:
    """The state at `end` with its moving average, from step 0 or from a given state; under "rows" what each step gave.

    From step 0 also under "gradient/" each parameter's gradient in it, clipped: its first moment, by 1 - beta1.
    """
    engine = make_engine(kind, case)
    averaged = AveragedWeights(engine.shards(), 0.8)
    if given is not None:
        engine.load_state(given)
        averaged.load(engine.cut({name.removeprefix(EMA): given[name] for name in given if name.startswith(EMA)}))
    start = 0 if given is None else int(given["num_steps"])
    rows, gradients = [], {}
    for step in range(start, end):
        rows.append(one_step(engine, step, case.loss))
        averaged.update(engine.shards(), step)
        if step == 0:
            moments = {name: value for name, value in engine.state().items() if name.startswith(FIRST_MOMENT)}
            gradients = {f"gradient/{name}": value / (1 - OPTIMIZER.betas[0]) for name, value in moments.items()}
    state = {name: value.clone() for name, value in full_state(engine, averaged).items()}
    return state | gradients | {"rows": torch.stack(rows)}


def assert_same(actual: State, expected: State, tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_resumes_bitwise(kind: str, case: Case, whole: State) -> None:
    """Half of the steps, a new engine, the other half: the same bits as all steps in one."""
    half = train(kind, case, end=NUM_STEPS // 2)
    resumed = train(kind, case, given=half)
    rows = torch.cat([half["rows"], resumed["rows"]])
    assert all(torch.equal(value, whole[name]) for name, value in (resumed | {"rows": rows}).items()), kind


def assert_inference_equals(kind: str) -> None:
    """The methods beside `forward` work between steps, on all processes together, and leave shards behind."""
    engine, model = make_engine(kind), make_model()
    images_BCHW, tokens_BT = own_batch(0)
    before = engine.state()
    for each in (engine.model, model):
        each.eval()
    with torch.no_grad():
        for method in ("encode_image", "image_tokens", "patch_features"):
            actual, expected = getattr(engine.model, method)(images_BCHW), getattr(model, method)(images_BCHW)
            torch.testing.assert_close(tuple(actual), tuple(expected), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(engine.model.encode_text(tokens_BT), model.encode_text(tokens_BT))
        pooled_BD = model.patch_features(images_BCHW).values_BHWD.mean((1, 2))
        torch.testing.assert_close(engine.model.head(pooled_BD), model.head(pooled_BD))
        logits = [each.caption_logits(images_BCHW, tokens_BT) for each in (engine.model, model)]
        torch.testing.assert_close(*logits)
    assert_same(engine.state(), before, 0.0)
    for each in (engine.model, model):
        each.train()
    plain = PlainEngine(model, OPTIMIZER, gather_of_default_group())
    for step in range(2):
        torch.testing.assert_close(one_step(engine, step, LossConfig()), one_step(plain, step, LossConfig()))


def assert_the_loop_equals() -> None:
    """The whole loop in float32 with held-out losses after each step: those of the plain engine."""
    share = Share(dist.get_rank(), dist.get_world_size())
    results = []
    for make in (
        lambda: PlainEngine(tiny_model(), OPTIMIZER, gather_of_default_group()),
        lambda: FsdpEngine(tiny_model(), OPTIMIZER),
    ):
        engine, reported, saved, asked = make(), [], {}, []
        hooks = Hooks(
            report=lambda metrics, step, reported=reported: reported.append({**metrics, "step": step}),
            save=lambda tensors, progress, saved=saved: saved.update(tensors),
            validate=lambda engine=engine: validation_losses(engine, tiny_loader().batches, 2, StepConfig()),
            wants_checkpoint=lambda asked=asked: asked.append(dist.barrier()) or False,
        )
        config = LoopConfig(3, ema_decay=0.8, report_every_steps=1, validate_every_steps=1)
        with pytest.MonkeyPatch.context() as patch:  # processes whose clocks disagree ask at the same steps
            patch.setattr("rsplatform.train.pretrain.ASK_EVERY_SECONDS", 0.0 if share.rank == 0 else 3600.0)
            fit(engine, tiny_loader(share).batches, lambda step: 1e-3, config, hooks)
        assert len(asked) == 3
        names = ("loss", "gradient_norm", "val_loss", "val_caption", "val_contrastive")
        values = [row[name] for row in reported for name in names if name in row]
        results.append(saved | {"values": torch.tensor(values)})
    assert_same(results[1], results[0], 1e-5)


def assert_sharded(kind: str) -> None:
    """Between steps, also after a forward without backward, the processes hold as many copies as asked for."""
    engine, shard_size = make_engine(kind), int(kind.partition("/")[2] or dist.get_world_size())
    with torch.no_grad():
        engine.forward(*own_batch(0))
    engine.state()
    own = [parameter.to_local().numel() for parameter in engine.model.parameters() if isinstance(parameter, DTensor)]
    total = torch.tensor(sum(own))
    dist.all_reduce(total)
    whole = sum(parameter.numel() for parameter in make_model().parameters())
    assert total == whole * dist.get_world_size() // shard_size


def assert_diverged_gradients_change_nothing() -> None:
    engine = make_engine("fsdp")
    before = engine.state()
    images_BCHW, tokens_BT = own_batch(0)
    loss, _ = mammut_loss(engine.forward(images_BCHW, tokens_BT), tokens_BT, LossConfig(), engine.gather)
    # one process's gradient is enough: the norm is everybody's
    engine.backward(loss * (torch.nan if dist.get_rank() == 0 else 1.0))
    assert not torch.tensor(engine.step(1e-3)).isfinite()
    assert_same(engine.state(), before, 0.0)


def assert_refused() -> None:
    """What needs whole weights says so, before the first step."""

    def arguments(engine: Engine):
        return engine, tiny_loader().batches, lambda step: 1e-3

    engine = FsdpEngine(tiny_model(), OPTIMIZER)
    hooks = Hooks(lambda metrics, step: None, lambda tensors, progress: None)
    auxiliary = Hooks(hooks.report, hooks.save, auxiliary_loss=lambda model, step: (torch.zeros(()), {}))
    with pytest.raises(ValueError, match="auxiliary loss runs the module itself, which FsdpEngine shards"):
        fit(*arguments(engine), LoopConfig(1), auxiliary)
    with pytest.raises(ValueError, match="shard_size 3 does not divide"):
        FsdpEngine(tiny_model(), OPTIMIZER, shard_size=3)


def run_all(kinds: tuple[str, ...], given: State | None) -> State:
    """All cases of one world size in one set of processes: starting them costs more than the training."""
    results = {f"{kind}|{name}": train(kind, case) for kind in kinds for name, case in CASES.items()}
    for kind in kinds:
        for name in ("softmax", "muon"):
            assert_resumes_bitwise(kind, CASES[name], results[f"{kind}|{name}"])
        if kind != "plain":
            assert_sharded(kind)
    if dist.get_world_size() == 2:
        assert_inference_equals("fsdp")
        assert_refused()
        assert_diverged_gradients_change_nothing()
        assert_the_loop_equals()
        results["fsdp|first part"] = train("fsdp", end=1)
    if given is not None:
        results["fsdp|last part"] = train("fsdp", given=given)
    return {f"{case}|{name}": value for case, state in results.items() for name, value in state.items()}


def split(tensors: State) -> dict[str, State]:
    cases: dict[str, State] = {}
    for key, value in tensors.items():
        kind, case, name = key.split("|")
        cases.setdefault(f"{kind}|{case}", {})[name] = value
    return cases


def test_fsdp_trains_the_model_of_one_process(tmp_path: Path) -> None:
    single = {name: train("plain", case) for name, case in CASES.items()}
    kinds = {1: ("plain", "fsdp"), 2: ("plain", "fsdp"), 4: ("plain", "fsdp", "fsdp/2")}
    given, last = None, {}
    for world_size, names in kinds.items():
        for tensors in run_processes(world_size, tmp_path / str(world_size), run_all, names, given):
            cases = split(tensors)
            first, last = cases.pop("fsdp|first part", None), cases.pop("fsdp|last part", {})
            if first is not None:  # two processes, then this one alone, then four
                given = {name: value for name, value in train("plain", end=3, given=first).items() if name != "rows"}
            assert len(cases) == len(names) * len(CASES)
            for key, actual in cases.items():
                assert_same(actual, single[key.split("|")[1]])
    expected = {name: value for name, value in single["softmax"].items() if not name.startswith("gradient/")}
    assert_same(last, expected | {"rows": expected["rows"][3:]})


def test_fsdp_without_a_process_group_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        FsdpEngine(tiny_model(), OPTIMIZER)
