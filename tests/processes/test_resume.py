"""N steps equal k steps, a SIGKILL of any process at any moment, and N - k steps: bitwise, under every engine.

Compared: weights, moments and moving average of every checkpoint, the losses, the samples of every surviving step.
"""

import json
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.train.job import WorkerJob
from rsplatform.train.launch import prepare_tokenizer
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import read_history
from tests.processes.killed_training import (
    IN_A_SAVE,
    IN_A_STEP,
    IN_AN_EXPORT,
    PATIENCE_S,
    Attempt,
    Kill,
    pretrain_until_killed,
    run_attempt,
)
from tests.processes.process_group import start_server
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

NUM_STEPS, NUM_KILLS = 6, 20
# What a run is seeded with, and which of the engine's kills it gets: DeepSpeed's are dealt to its stages.
SHARES = {"plain": (0, 0, 1), "fsdp": (1, 0, 1)} | {f"zero{stage}": (2, stage, 4) for stage in range(4)}
PACE = ("samples_per_s", "samples_per_s_per_device", "data_wait_fraction", "validate_s", "save_s")
DRAWN = {"patch_dropout": 0.25, "cropped_positions": True}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return start_server()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(folder)
    prepare_tokenizer(make_recipe(), Cluster(root=folder), f"{folder}/made")
    return folder


def make_recipe(**changes) -> PretrainConfig:
    """Random draws in the model, in the pictures and in the captions; the best model is kept."""
    schedule = {"learning_rate": 1e-3, "warmup_steps": 2}
    recipe = {
        "model": {"size": "mini", "settings": tiny_recipe()["model"]["settings"] | DRAWN},
        "phases": [
            {"name": "web", "steps": 3, "schedule": schedule, "mixture": {"web_pairs": 1.0}},
            {"name": "mix", "steps": 3, "schedule": schedule},
        ],
        "ema_decay": 0.8,
        "report_every_steps": 1,
        "validate_every_steps": 4,
        "keep_checkpoints": 1,
        "keep_best": {"metric": "val_contrastive", "export": "last"},
    }
    return PretrainConfig(**tiny_recipe(**(recipe | changes)))


def make_job(root: str, engine: str, folder: Path, **changes) -> WorkerJob:
    if engine[:4] != "zero":  # which has AdamW alone; Muon has it beside
        changes = {"optimizer": {"kind": "muon"}} | changes
    config = make_recipe(tokenizer=f"{root}/made/tokenizer/tokenizer.json", **changes)
    prepare_tokenizer(config, Cluster(root=root), str(folder))
    return WorkerJob(config, root, str(folder), placement_of(engine))


def placement_of(engine: str) -> TrainPlacement:
    sharding = {"engine": "deepspeed", "zero_stage": int(engine[-1])} if engine[:4] == "zero" else {"engine": engine}
    return TrainPlacement.model_validate({"launcher": "local"} | sharding)


class Run:
    """One run of a job over several attempts, in a folder of its own."""

    def __init__(self, server: ForkServerContext, job: WorkerJob) -> None:
        self.server, self.job = server, job
        self.attempts: list[Attempt] = []

    @property
    def step(self) -> int:
        """Where it would go on from."""
        return max(self.job.checkpoints.steps(), default=0)

    def start(self, kill: Kill | None = None, world_size: int = 2) -> bool:
        """One attempt; whether it was killed."""
        attempt = Attempt(self.job, Path(self.job.folder) / "logs", len(self.attempts), world_size, kill)
        self.attempts.append(attempt)
        return run_attempt(self.server, attempt)

    def states(self) -> dict[int, State]:
        """Every checkpoint that is there, by its step."""
        return {step: self.job.checkpoints.load(step)[0] for step in self.job.checkpoints.steps()}

    def metrics(self) -> list[dict[str, float]]:
        """The history without what the clock says."""
        rows = read_history(self.job.folder)
        return [{name: value for name, value in row.items() if name not in PACE} for row in rows]

    def samples(self) -> list[list[list[str]]]:
        """Sample ids by step and rank, as they went into the weights that survived."""
        survived: dict[int, list[list[str]]] = {}
        for attempt in self.attempts:
            logs = [read_lines(attempt.log(rank)) for rank in range(attempt.world_size)]
            (start,) = {lines[0]["start"] for lines in logs if lines}
            steps = [{line["step"]: line["ids"] for line in lines[1:]} for lines in logs]
            survived = {step: ids for step, ids in survived.items() if step < start}
            survived |= {step: [ids.get(step, []) for ids in steps] for step in steps[0]}
        return [survived[step] for step in range(NUM_STEPS)]


def read_lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def assert_bitwise(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


def assert_near(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


def draw_kills(engine: str) -> list[Callable[[int], Kill]]:
    """Each place at least once per engine, in random order: given where a run goes on from, a moment soon after."""
    seed, first, every = SHARES[engine]
    rng = np.random.default_rng(seed)
    places = [*IN_A_STEP, *IN_A_SAVE]
    places += rng.choice(places, NUM_KILLS - len(places)).tolist()

    def draw(place: str) -> Callable[[int], Kill]:
        rank = 0 if place in IN_A_SAVE else int(rng.integers(2))
        ahead, delay_s, takes_all = int(rng.integers(3)), float(rng.uniform(0, 0.05)), bool(rng.integers(2))
        return lambda step: Kill(place, rank, min(step + ahead, NUM_STEPS - 1), delay_s, takes_all)

    return [draw(place) for place in rng.permutation(places).tolist()][first::every]


@pytest.mark.parametrize("engine", list(SHARES))
def test_any_kill_changes_nothing(server: ForkServerContext, root: str, tmp_path: Path, engine: str) -> None:
    whole = Run(server, make_job(root, engine, tmp_path / "whole", keep_checkpoints=100))
    assert not whole.start()
    expected, metrics, samples = whole.states(), whole.metrics(), whole.samples()
    assert sorted(expected) == [2, 4, 6]
    kills, num_runs = draw_kills(engine), 0
    while kills:
        num_runs += 1
        run = Run(server, make_job(root, engine, tmp_path / f"run-{num_runs}"))
        while kills and run.step < NUM_STEPS:
            kill = kills.pop()(run.step)
            assert run.start(kill), f"nobody died of {kill}"
            for step, state in run.states().items():
                assert_bitwise(state, expected[step])
        assert not run.start()
        assert_bitwise(run.states()[NUM_STEPS], expected[NUM_STEPS])
        assert run.metrics() == metrics
        assert run.samples() == samples
        assert not [name for name in storage.list_files(run.job.folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("engine", ["plain", "fsdp", "zero1", "zero3"])
def test_other_numbers_of_processes_see_the_same_samples(
    server: ForkServerContext, root: str, tmp_path: Path, engine: str
) -> None:
    """Two processes, then one, then four, against a single plain process.

    Not bitwise: they add in another order. What is drawn for a sample is the same everywhere.
    """
    # eps well above rounding: Adam would blow up the rounding in gradients that are zero (a key's bias)
    changes = {"optimizer": {"eps": 1e-4}}
    single = Run(server, make_job(root, "plain", tmp_path / "single", **changes))
    assert not single.start(world_size=1)
    run = Run(server, make_job(root, engine, tmp_path / "run", **changes))
    for world_size, step in ((2, 2), (1, 4)):
        assert run.start(Kill("prune", 0, step - 1), world_size)
        assert run.step == step
    assert not run.start(world_size=4)
    batches = [sorted(sample_id for ids in ranks for sample_id in ids) for ranks in run.samples()]
    assert batches == [sorted(ids) for (ids,) in single.samples()]
    for row, expected in zip(run.metrics(), single.metrics(), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert_near(run.states()[NUM_STEPS], single.states()[NUM_STEPS])


@pytest.mark.parametrize(
    ("engine", "places"), [("plain", IN_AN_EXPORT), ("fsdp", IN_AN_EXPORT[1:3]), ("zero3", IN_AN_EXPORT[1:3])]
)
def test_a_driver_lost_at_the_end_is_resumed_by_the_same_command(
    server: ForkServerContext, root: str, tmp_path: Path, engine: str, places: tuple[str, ...]
) -> None:
    """Killed while it exports the model or writes the manifest: the artifact is unfinished, then whole."""
    cluster = Cluster(root=root, train=placement_of(engine))

    def drive(name: str, kill: Kill | None) -> Artifact:
        config, log = make_recipe(output=f"model/{engine}_{name}/v1"), tmp_path / f"{name}.log"
        driver = server.Process(target=pretrain_until_killed, args=(config, cluster, kill, log))
        driver.start()
        driver.join(PATIENCE_S)
        assert driver.exitcode == (0 if kill is None else -signal.SIGKILL), log.read_text()
        return Artifact(root, config.output)

    undisturbed = drive("undisturbed", None)
    for place in places:
        name = place.replace(" ", "_")
        artifact = drive(name, Kill(place, 0, 0))
        assert not artifact.is_finished
        drive(name, None)
        assert artifact.is_finished
        artifacts.verify(artifact)
        assert_bitwise(*(load_file(Path(made.uri) / "model" / "model.safetensors") for made in (artifact, undisturbed)))
        assert not [name for name in storage.list_files(artifact.uri) if name.endswith(".tmp")]
        assert artifact.manifest()["checksums"].keys() == undisturbed.manifest()["checksums"].keys()
