"""A run's validation: some samples always, few at once, and the same numbers for every share and micro-batch."""

from pathlib import Path

import pytest

from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.engine import PlainEngine
from rsplatform.train.held_out import HeldOutPlace, held_out_batches, held_out_validation
from rsplatform.train.loader import Share
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.step import StepConfig
from rsplatform.train.validate import HeldOut, validation_losses
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe
from tests.unit.train.tiny_training import tiny_loader, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("batch_size", "num_samples", "expected"),
    [
        (8, 8, (8, 1)),
        (8, 30, (8, 3)),
        (64, 5000, (64, 16)),
        (32, 9, (9, 1)),
        (4096, 5000, (1024, 1)),
        (1000, 1030, (1000, 1)),
    ],
)
def test_there_is_always_a_batch(batch_size: int, num_samples: int, expected: tuple[int, int]) -> None:
    assert held_out_batches(batch_size, num_samples) == expected


def follow_sizes(engine: PlainEngine) -> list[int]:
    sizes: list[int] = []
    engine.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pieces_change_no_metric(precision) -> None:
    engine = PlainEngine(tiny_model(patch_dropout=0.5), PretrainConfig(**tiny_recipe()).optimizer)
    whole = validation_losses(engine, tiny_loader().batches, 2, StepConfig(precision=precision))
    sizes = follow_sizes(engine)
    config = StepConfig(precision=precision, micro_batch_size=3)
    assert validation_losses(engine, tiny_loader().batches, 2, config) == pytest.approx(whole, rel=1e-5)
    assert sizes == [3, 3, 2, 3, 3, 2]


def test_bfloat16_is_that_of_the_steps() -> None:
    engine = PlainEngine(tiny_model(), PretrainConfig(**tiny_recipe()).optimizer)
    losses = [
        validation_losses(engine, tiny_loader().batches, 1, config)["val_loss"]
        for config in (StepConfig(), StepConfig(precision="bfloat16"))
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_batch_larger_than_the_validation_is_validated_in_a_steps_pieces(tmp_path: Path) -> None:
    """More than 1,024 samples to a batch and held out: all of 1,024 are seen, in pieces of a worker's share."""
    make_tiny_dataset(str(tmp_path), num_validation=1030)
    tokenizer: Tokenizer = tiny_tokenizer()
    engine = PlainEngine(tiny_model(), PretrainConfig(**tiny_recipe()).optimizer)
    sizes, seen, found = follow_sizes(engine), [], []
    for changes, share in (({}, Share(1, 2)), ({"micro_batch_size": 256}, Share())):
        config = PretrainConfig(**tiny_recipe(batch_size=1100, **changes))
        settings = config.loader_config(engine.model.config, 1)
        place = HeldOutPlace(str(tmp_path), tokenizer, settings, share, config.micro_batch_size)
        validate = held_out_validation(config, engine, place, seen.append)
        assert validate is not None
        found.append(validate())
    assert sizes == [550, 474, 256, 256, 256, 256]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    first, second = seen
    assert isinstance(first, HeldOut)
    assert len(set(first.sample_ids)) == 1024
    assert first.sample_ids == second.sample_ids


def test_no_split_no_validation(tmp_path: Path) -> None:
    config = PretrainConfig(**tiny_recipe(validation_split=None))
    engine = PlainEngine(tiny_model(), config.optimizer)
    place = HeldOutPlace(str(tmp_path), tiny_tokenizer(), config.loader_config(engine.model.config, 1), Share())
    assert held_out_validation(config, engine, place) is None
