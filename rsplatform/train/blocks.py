"""Less memory or more speed inside a model's blocks, from outside: recomputation and torch.compile.

In: a model before its engine is made. Changes how the blocks' forwards run, never what they compute; names of
parameters and states stay. Both belong to the placement: they trade memory, seconds and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsplatform.model.mammut import Mammut


@dataclass(frozen=True)
class BlockConfig:
    """`recompute_every_blocks` n: every nth block of each tower keeps only its input and runs again in the backward
    pass; None: no block. `compile_blocks`: one graph per kind of block and pass, by torch.compile."""

    recompute_every_blocks: int | None = None
    compile_blocks: bool = False
    compile_backend: str | Callable[..., Any] = "inductor"


def prepare_blocks(model: Mammut, config: BlockConfig) -> None:
    """Compile and checkpoint the blocks' forwards in place; before an engine shards them.

    The forward and not the module's call is wrapped: FSDP2's and ZeRO's hooks stay outside, in plain Python.
    """
    for blocks in (model.vision.blocks, model.text.blocks, model.text.cross_blocks):
        for index, block in enumerate(blocks):
            if config.compile_blocks:
                # texts differ in length from step to step; pictures only from phase to phase: torch traces the
                # first size as it is, and the second one makes a graph for every size
                _compile_forward(block, config.compile_backend, dynamic=None if blocks is model.vision.blocks else True)
            every = config.recompute_every_blocks
            if every is not None and index % every == 0:
                # blocks draw no random numbers, so that none need to be drawn again
                again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                _set_forward(block, again)


def _compile_forward(block: nn.Module, backend: str | Callable[..., Any], *, dynamic: bool | None) -> None:
    """One graph serves all blocks of a kind, per pass (causal or not) and with or without gradients.

    Only while training: batches of validation have other shapes and precisions, and torch gives up after 8 graphs.
    """
    plain = block.forward
    compiled = torch.compile(plain, backend=backend, dynamic=dynamic)

    def forward(*arguments: Any, **named: Any) -> Tensor:
        return (compiled if block.training else plain)(*arguments, **named)

    _set_forward(block, forward)


def _set_forward(block: nn.Module, forward: Callable[..., Tensor]) -> None:
    """An attribute of the one block hides its class's method; it is no submodule, so that no name changes."""
    object.__setattr__(block, "forward", forward)
