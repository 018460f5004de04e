"""What a training step sends over the network, from the model's shape and the engine: arithmetic, no measurement.

In: a model's config, the engine and the number of devices. Out: the collective calls of one step, the bytes that each
device sends for them, their seconds on a given network, and the memory of the state. tests/processes/test_sent_bytes.py
holds those of PlainEngine and FsdpEngine to real steps; ZeRO's were counted once, on two processes. Left out: a few
scalars a step, and the slices that pad a shard.
Shapes: B own batch, G global batch, E embedding.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import nn

from rsplatform.cluster import TrainPlacement
from rsplatform.model.mammut import Mammut, MammutConfig
from rsplatform.train.engine import BUCKET_NUMBERS
from rsplatform.train.muon import hidden_matrices

TrafficEngine = Literal["plain", "zero0", "zero1", "zero2", "zero3", "fsdp"]

# Weights, gradients and embeddings cross the network in float32 in every engine here, also under bfloat16 autocast.
BYTES_PER_NUMBER = 4
# DeepSpeed's stage3_max_live_parameters: a model below it is collected once a step and stays until its end
_ZERO3_LIVE_NUMBERS = 10**9


class ModelNumbers(NamedTuple):
    """Numbers (parameters) in the parts that engines send apart, and how many units (blocks) each part has."""

    vision_blocks: int
    text_blocks: int
    cross_blocks: int
    rest: int
    num_units: int
    embedding_width: int
    turned: int  # in the matrices that Muon turns, and how many those are
    num_turned: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.vision_blocks + self.text_blocks + self.cross_blocks + self.rest


def model_numbers(config: MammutConfig) -> ModelNumbers:
    """Counted on a model without storage."""
    with torch.device("meta"):
        model = Mammut(config)
    stacks = (model.vision.blocks, model.text.blocks, model.text.cross_blocks)
    vision, text, cross = (_count(stack) for stack in stacks)
    num_units = 1 + sum(len(stack) for stack in stacks)
    rest, matrices = _count(model) - vision - text - cross, hidden_matrices(model)
    turned = sum(matrix.numel() for matrix in matrices)
    return ModelNumbers(vision, text, cross, rest, num_units, config.embedding_width, turned, len(matrices))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Layout:
    """An engine on `num_devices`; `shard_size` devices share one copy of the model (fsdp; None: all of them)."""

    engine: TrafficEngine
    num_devices: int
    shard_size: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"

    @property
    def devices_per_copy(self) -> int:
        """Devices that hold one copy of what the engine shards."""
        return self.shard_size or self.num_devices


class Transfer(NamedTuple):
    """The calls of one kind in a step. `whole_bytes`: all of them together, unsharded. `num_members`: devices that
    take part in one call; `stride`: distance between neighbours among them. `overlaps`: runs beside the computing."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    whole_bytes: float
    num_calls: int
    num_members: int
    stride: int = 1
    overlaps: bool = False

    @property
    def sent_bytes(self) -> float:
        """What each device sends by the ring algorithm: (n - 1) / n of the whole, twice that for all_reduce
        (Patarasuk and Yuan 2009; NCCL's "bus bandwidth" counts the same)."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * (self.num_members - 1) / self.num_members * self.whole_bytes


def weight_transfers(layout: Layout, model: ModelNumbers, num_pieces: int = 1) -> list[Transfer]:
    """The calls of one step for weights and gradients; `num_pieces` micro-batches, 1 for the whole batch at once.

    ZeRO's paper (arXiv 1910.02054, section 7) has Ψ numbers reduced and Ψ collected for stages 1 and 2, one Ψ more
    for stage 3. DeepSpeed 0.19 with our settings reduces by all_reduce under stages 1 and 2, so that they send 3 Ψ
    where 2 Ψ are needed, and leaves stage 3 at 2 Ψ as long as the model is below its limit of live parameters; above
    it the paper's 3 Ψ stand here, which no test has held to a real step.
    """
    if layout.num_devices == 1:
        return []
    whole = model.total * BYTES_PER_NUMBER
    num_buckets = math.ceil(model.total / BUCKET_NUMBERS)
    if layout.engine == "fsdp":
        return _fsdp_transfers(layout, model, num_pieces)
    if layout.engine == "zero3":
        is_live = model.total < _ZERO3_LIVE_NUMBERS
        collections = (1 if is_live else 2 if num_pieces == 1 else 3 * num_pieces) * whole
        return [
            Transfer("all_gather", collections, model.num_units, layout.num_devices, overlaps=True),
            Transfer("reduce_scatter", whole, num_buckets, layout.num_devices, overlaps=True),
        ]
    reduction = Transfer("all_reduce", whole, num_buckets, layout.num_devices)
    if layout.engine in ("plain", "zero0"):
        return [reduction]
    return [reduction, Transfer("all_gather", whole, num_buckets, layout.num_devices)]


def _fsdp_transfers(layout: Layout, model: ModelNumbers, num_pieces: int) -> list[Transfer]:
    """FsdpEngine: each block is collected for every forward and backward of it; the decoder's blocks run twice in
    both. Micro-batches have a forward without gradients before. The root stays until a backward ends.

    Muon collects each matrix that it turns once more, and waits for it. Gradients are reduced once; with micro-batches
    FSDP2 sends those of the decoder's blocks twice, once with what earlier pieces left and once with the rest.
    """
    passes = 2 if num_pieces == 1 else 3 * num_pieces
    once = model.vision_blocks + model.cross_blocks
    collected = passes * (once + 2 * model.text_blocks) + num_pieces * model.rest
    reduced = model.total + (model.text_blocks if num_pieces > 1 else 0)
    size = layout.devices_per_copy
    calls = [
        Transfer("all_gather", collected * BYTES_PER_NUMBER, passes * model.num_units, size, overlaps=True),
        Transfer("reduce_scatter", reduced * BYTES_PER_NUMBER, model.num_units, size, overlaps=True),
    ]
    if layout.optimizer == "muon":
        calls.append(Transfer("all_gather", model.turned * BYTES_PER_NUMBER, model.num_turned, size))
    if size < layout.num_devices:
        shard = reduced * BYTES_PER_NUMBER / size
        copies = layout.num_devices // size
        calls.append(Transfer("all_reduce", shard, model.num_units, copies, stride=size, overlaps=True))
    return calls


def contrastive_transfers(num_devices: int, batch_size: int, embedding_width: int) -> list[Transfer]:
    """The gather of both embeddings (B x E each, float32) and of a 64-bit key a text, and the gradient's way back.

    The gradient of all G = n B rows is summed by all_reduce, of which each device keeps its own rows: twice what a
    reduce_scatter would send (gather.py says why). The sigmoid loss gathers texts only; this is the softmax's.
    """
    if num_devices == 1:
        return []
    rows_bytes = num_devices * batch_size * embedding_width * BYTES_PER_NUMBER
    keys_bytes = num_devices * batch_size * 8
    return [
        Transfer("all_gather", 2 * rows_bytes + keys_bytes, 3, num_devices),
        Transfer("all_reduce", 2 * rows_bytes, 2, num_devices),
    ]


def sent_bytes(transfers: Collection[Transfer]) -> float:
    """What each device sends in all of these calls."""
    return sum(transfer.sent_bytes for transfer in transfers)


@dataclass(frozen=True)
class Network:
    """Links, one direction, in 10^9 bytes a second: of one device inside its node, and of a whole node to the others.

    `hop_latency_us` is what a message costs however small it is.
    """

    device_gb_s: float
    node_gb_s: float
    devices_per_node: int
    hop_latency_us: float

    def seconds(self, transfer: Transfer) -> float:
        """Time of the calls where nothing else is on the network: bytes over bandwidth plus latency (our model).

        Calls among all devices of several nodes run as rings that enter and leave each node once, over all of its
        links: the node's bandwidth serves one ring. Devices with a `stride` of a node have one call each at the same
        time, which share it. Latency: n - 1 hops around a ring; all_reduce takes trees, 2 log2 n.
        """
        bandwidth_gb_s = self.device_gb_s
        if transfer.num_members * transfer.stride > self.devices_per_node:
            sharing = min(transfer.stride, self.devices_per_node)
            bandwidth_gb_s = min(self.device_gb_s, self.node_gb_s / sharing)
        members = transfer.num_members
        hops = 2 * math.ceil(math.log2(members)) if transfer.kind == "all_reduce" else members - 1
        return transfer.sent_bytes / (bandwidth_gb_s * 1e9) + transfer.num_calls * hops * self.hop_latency_us * 1e-6

    def exposed_seconds(self, transfers: Collection[Transfer], computing_s: float) -> float:
        """What the calls add to a step: all that waits, and of the rest what outlasts the computing (our model)."""
        waiting_s = sum(self.seconds(transfer) for transfer in transfers if not transfer.overlaps)
        beside_s = sum(self.seconds(transfer) for transfer in transfers if transfer.overlaps)
        return waiting_s + max(0.0, beside_s - computing_s)


def state_bytes(layout: Layout, model: ModelNumbers, *, autocasts: bool) -> float:
    """Weights, gradients and two moments in float32, less what the engine shards (ZeRO's P_os, P_os+g, P_os+g+p),
    and under bfloat16 autocast a copy of the weights until the backward pass, in every engine. Stage 3 keeps the whole
    weights of a step beside its shards while they are below its limit. No activations and no buffers."""
    whole = model.total * BYTES_PER_NUMBER
    shards = layout.devices_per_copy
    sharded = {"plain": 0, "zero0": 0, "zero1": 2, "zero2": 3, "zero3": 4, "fsdp": 4}[layout.engine]
    collected = layout.engine == "zero3" and shards > 1 and model.total < _ZERO3_LIVE_NUMBERS
    return whole * (4 - sharded + collected + sharded / shards + autocasts / 2)


def layout_of(placement: TrainPlacement, num_devices: int, optimizer: Literal["adamw", "muon"] = "adamw") -> Layout:
    """The layout that a placement asks for."""
    engine = f"zero{placement.zero_stage}" if placement.engine == "deepspeed" else placement.engine
    assert engine in get_args(TrafficEngine)
    return Layout(cast(TrafficEngine, engine), num_devices, placement.shard_size, optimizer)


def sent_gb_per_step(layout: Layout, model: MammutConfig, batch_size: int, micro_batch_size: int | None) -> float:
    """10^9 bytes that each device sends in a step of `batch_size` own samples."""
    num_pieces = math.ceil(batch_size / (micro_batch_size or batch_size))
    transfers = weight_transfers(layout, model_numbers(model), num_pieces)
    return sent_bytes([*transfers, *contrastive_transfers(layout.num_devices, batch_size, model.embedding_width)]) / 1e9
