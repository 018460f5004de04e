"""The traffic model: orderings and limits that hold for any network, and totals against parameters counted alone."""

import pytest

from rsplatform.model.mammut import mammut_config
from rsplatform.train.traffic import (
    BYTES_PER_NUMBER,
    Layout,
    Network,
    contrastive_transfers,
    model_numbers,
    sent_bytes,
    state_bytes,
    weight_transfers,
)
from tests.unit.train.tiny_training import tiny_model

NETWORK = Network(device_gb_s=400, node_gb_s=100, devices_per_node=8, hop_latency_us=0)


def test_every_parameter_is_counted_once() -> None:
    model = tiny_model()
    numbers = model_numbers(model.config)
    assert numbers.total == sum(parameter.numel() for parameter in model.parameters())
    assert numbers.num_units == 1 + len(model.vision.blocks) + len(model.text.blocks) + len(model.text.cross_blocks)


@pytest.mark.parametrize("engine", ["plain", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_a_device_alone_sends_nothing_and_holds_the_whole_state(engine) -> None:
    numbers = model_numbers(mammut_config("mini"))
    layout = Layout(engine, 1)
    assert weight_transfers(layout, numbers) == contrastive_transfers(1, 8, 128) == []
    assert state_bytes(layout, numbers, autocasts=False) == 16 * numbers.total


def test_bytes_by_hand_for_four_devices() -> None:
    numbers = model_numbers(mammut_config("mini"))
    whole = numbers.total * BYTES_PER_NUMBER
    assert sent_bytes(weight_transfers(Layout("plain", 4), numbers)) == 1.5 * whole
    assert sent_bytes(weight_transfers(Layout("zero1", 4), numbers)) == 2.25 * whole
    assert sent_bytes(weight_transfers(Layout("zero3", 4), numbers)) == 1.5 * whole
    # two sets of (B, E) collected from three others, and the gradient of all rows added up
    assert sent_bytes(contrastive_transfers(4, 8, 128)) == 3 * (2 * 8 * 128 * 4 + 8 * 8) + 1.5 * 2 * 4 * 8 * 128 * 4


def test_sharing_in_a_node_keeps_the_bytes_between_nodes_at_those_of_the_gradient() -> None:
    numbers = model_numbers(mammut_config("mini"))
    transfers = weight_transfers(Layout("fsdp", 64, shard_size=8), numbers)
    between = [transfer for transfer in transfers if transfer.stride > 1]
    assert sum(transfer.sent_bytes for transfer in between) * 8 == pytest.approx(
        sent_bytes(weight_transfers(Layout("plain", 8), numbers))
    )
    assert sent_bytes(transfers) - sent_bytes(between) == sent_bytes(weight_transfers(Layout("fsdp", 8), numbers))


def test_state_shrinks_with_what_is_sharded_and_micro_batches_cost_collections() -> None:
    numbers = model_numbers(mammut_config("mini"))
    engines = ("plain", "zero1", "zero2", "fsdp")
    states = [state_bytes(Layout(engine, 8), numbers, autocasts=True) for engine in engines]
    assert states == sorted(states, reverse=True)
    pieces = [sent_bytes(weight_transfers(Layout("fsdp", 8), numbers, number)) for number in (1, 2, 4)]
    assert pieces == sorted(pieces) and pieces[0] < pieces[2]


def test_time_is_limited_by_the_narrower_link_and_hidden_by_computing() -> None:
    numbers = model_numbers(mammut_config("mini"))
    (inside,), (across,) = (weight_transfers(Layout("plain", n), numbers) for n in (8, 16))
    assert NETWORK.seconds(inside) == inside.sent_bytes / 400e9
    assert NETWORK.seconds(across) == across.sent_bytes / 100e9
    shared = weight_transfers(Layout("fsdp", 8), numbers)
    assert NETWORK.exposed_seconds(shared, computing_s=10) == 0
    assert NETWORK.exposed_seconds([inside], computing_s=10) == NETWORK.seconds(inside)


def test_the_paper_s_model_has_the_size_that_the_design_names() -> None:
    numbers = model_numbers(mammut_config("so400m"))
    assert 780e6 < numbers.total < 840e6
