"""How many workers may train: what divides a batch, what Ray's policy makes of a cluster, what is refused before."""

import pytest
from pydantic import ValidationError
from ray.train import ScalingConfig

from rsplatform.cluster import TrainPlacement
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.elastic import CountsPolicy
from rsplatform.train.launch import check_workers


def placement(**values) -> TrainPlacement:
    return TrainPlacement.model_validate(values)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ({"num_workers": 4}, (4,)),
        ({"num_workers": 3}, ()),
        ({"num_workers": 8, "min_workers": 1}, (1, 2, 4, 8)),
        ({"num_workers": 8, "min_workers": 3}, (4, 8)),
        ({"num_workers": 8, "min_workers": 1, "engine": "fsdp", "shard_size": 4}, (4, 8)),
        ({"num_workers": 8, "min_workers": 1, "engine": "deepspeed", "shard_size": 4}, (1, 2, 4, 8)),
    ],
)
def test_workers_divide_the_batch_and_hold_whole_copies(values: dict, counts: tuple[int, ...]) -> None:
    assert placement(**values).worker_counts(256) == counts


@pytest.mark.parametrize(
    ("machines", "possible"),
    [([], 0), ([1], 0), ([2], 2), ([3], 2), ([3, 3], 4), ([4, 4], 8), ([8, 8], 8)],
)
def test_surplus_workers_are_not_started(machines: list[int], possible: int) -> None:
    """Machines with that many GPUs, for 2, 4 or 8 workers of one GPU and two cores."""
    resources = {"CPU": 2, "GPU": 1}
    policy = CountsPolicy(ScalingConfig(num_workers=(2, 8), use_gpu=True, resources_per_worker=resources), (2, 4, 8))
    reserved = {f"machine {index}": {"CPU": 16.0, "GPU": float(gpus)} for index, gpus in enumerate(machines)}
    assert policy._count_possible_workers(reserved) == possible


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_workers": 3}, "^batch_size 256 does not divide among 3 workers; change batch_size"),
        ({"num_workers": 3, "min_workers": 2}, "^batch_size 256 does not divide among 3 workers; change batch_size"),
        (
            {"num_workers": 4, "engine": "fsdp", "shard_size": 3},
            "^train.shard_size 3 does not divide",
        ),
        ({"num_workers": 4, "min_workers": 3}, "^train.min_workers 3 is no choice: of 3 to 4 .* it fits 1, 2, 4$"),
        ({"num_workers": 4, "min_workers": 2, "engine": "fsdp", "shard_size": 4}, "fits 4 alone; it fits 4$"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values: dict, words: str) -> None:
    with pytest.raises(RecipeMismatchError, match=words):
        check_workers(256, placement(**values))


@pytest.mark.parametrize("values", [{}, {"num_workers": 4, "min_workers": 4}, {"num_workers": 4, "min_workers": 1}])
def test_numbers_that_fit_are_let_pass(values: dict) -> None:
    check_workers(256, placement(**values))


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_workers 3 is more than num_workers 2: elastic training runs"):
        placement(num_workers=2, min_workers=3)
