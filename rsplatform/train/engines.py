"""Which engine a placement asks for, made around a model.

In: a recipe, a placement, a model that is equal on all processes. Out: an `Engine`, on the process's device. Starts no
process group.
"""

from rsplatform.cluster import TrainPlacement
from rsplatform.model.mammut import Mammut
from rsplatform.train.blocks import BlockConfig, prepare_blocks
from rsplatform.train.engine import Engine, PlainEngine, gather_of_default_group
from rsplatform.train.loader import Share
from rsplatform.train.recipe import PretrainConfig


def make_engine(config: PretrainConfig, placement: TrainPlacement, model: Mammut, share: Share) -> Engine:
    """The engine of one process; the model is moved to the process's device and changed in place."""
    if placement.gpus_per_worker > 0:
        model = model.to("cuda")
    prepare_blocks(model, BlockConfig(placement.recompute_every_blocks, placement.compile_blocks))
    if placement.engine == "plain":
        return PlainEngine(model, config.optimizer, gather_of_default_group())
    # imported here: both take a while to import (DeepSpeed seconds), which plain runs should not pay
    if placement.engine == "fsdp":
        from rsplatform.train.fsdp import FsdpEngine

        return FsdpEngine(model, config.optimizer, shard_size=placement.shard_size)
    from rsplatform.train.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        config.optimizer,
        batch_size=config.batch_size // share.world_size,
        zero_stage=placement.zero_stage,
        freezable=config.curriculum.freezable,
        precision=config.precision,
    )
