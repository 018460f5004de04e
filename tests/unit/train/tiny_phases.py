"""A short training of phases that freeze parts and change the size, for the tests of every engine."""

from collections.abc import Callable

import torch

from rsplatform.train.curriculum import Curriculum, Phase
from rsplatform.train.engine import Engine
from rsplatform.train.loader import LoaderPhase, Share
from rsplatform.train.optimizer import Schedule
from rsplatform.train.pretrain import Hooks, LoopConfig, Progress, Resume, fit
from tests.unit.train.tiny_training import tiny_loader, tiny_model

SCHEDULE = Schedule(1e-3, decay="constant")
CURRICULUM = Curriculum(
    (
        Phase("tower locked", 2, SCHEDULE, freeze=("vision", "logit_scale"), image_size=8),
        Phase("whole", 2, SCHEDULE),
        Phase("text locked", 2, SCHEDULE, freeze=("text", "image_to_text"), image_size=20),
        Phase("pooling only", 2, SCHEDULE, freeze=("vision_trunk", "text")),
    )
)
State = dict[str, torch.Tensor]


def train_phases(
    engine: Engine, end: int = CURRICULUM.num_steps, resume: Resume | None = None, share: Share | None = None
) -> dict[int, tuple[State, Progress]]:
    """What was saved after every step up to `end`, with the losses; from the beginning or from `resume`."""
    saved: dict[int, tuple[State, Progress]] = {}
    losses: dict[int, torch.Tensor] = {}

    def report(metrics: dict[str, float], step: int) -> None:
        losses[step] = torch.tensor([metrics["loss"], metrics["gradient_norm"]], dtype=torch.float64)

    def save(tensors: State, progress: Progress) -> None:
        copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        saved[progress.step] = (copies | {"losses": losses[progress.step]}, progress)

    sizes = tuple(LoaderPhase(phase.steps, phase.image_size or 16) for phase in CURRICULUM.phases)
    hooks = Hooks(report, save, frozen_parts=CURRICULUM.frozen_parts)
    config = LoopConfig(end, seed=2, report_every_steps=1, checkpoint_every_steps=1)
    fit(engine, tiny_loader(share, phases=sizes).batches, CURRICULUM.learning_rate, config, hooks, resume)
    return saved


def assert_freezing(saved: dict[int, tuple[State, Progress]]) -> None:
    """Frozen: bitwise the same weights and moments. Trained: all changed but what gets no gradient by its nature."""
    start = {f"model/{name}": value.detach() for name, value in tiny_model().named_parameters()}
    states = {0: start} | {step: tensors for step, (tensors, _) in saved.items()}
    for step in range(1, CURRICULUM.num_steps + 1):
        before, after = states[step - 1], states[step]
        parts = CURRICULUM.frozen_parts(step - 1)
        for name in start:
            frozen = _is_frozen(name.removeprefix("model/"), parts)
            keys = [name.replace("model/", kind) for kind in ("exp_avg/", "exp_avg_sq/", "momentum/")]
            for key in (name, *(key for key in keys if key in states[CURRICULUM.num_steps])):
                same = (key in before) == (key in after) and (key not in after or torch.equal(before[key], after[key]))
                assert same == frozen, f"step {step}: {key} is {'changed' if frozen else 'as it was'}"


def _is_frozen(name: str, parts: tuple[str, ...]) -> bool:
    """Written out again, so that a wrong prefix in the table shows."""
    belongs: dict[str, Callable[[str], bool]] = {
        "vision": lambda n: n.split(".")[0] == "vision",
        "text": lambda n: n.split(".")[0] == "text",
        "image_to_text": lambda n: n == "image_to_text.weight",
        "logit_scale": lambda n: n == "log_logit_scale",
        "vision_trunk": lambda n: (
            n.split(".")[0] == "vision" and n.split(".")[1] not in ("pool", "norm_output", "projection")
        ),
    }
    return any(belongs[part](name) for part in parts)
