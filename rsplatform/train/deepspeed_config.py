"""DeepSpeed's own configuration, made from ours. Does not import it."""

from typing import Any, Literal

from rsplatform.train.optimizer import OptimizerConfig


def deepspeed_config(
    batch_size: int, config: OptimizerConfig, zero_stage: int, precision: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given; `batch_size` is one process's."""
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        # stage 0 keeps whole gradients, and DeepSpeed tells no norm of them: there we clip
        "gradient_clipping": config.gradient_clip if zero_stage else 0.0,
        "zero_optimization": {"stage": zero_stage},
        # without it DeepSpeed turns torch.autocast off in its forward. The modules named here would send their weights
        # and gradients in the lower precision: none, so that sums over processes stay float32 as in the other engines
        "torch_autocast": {
            "enabled": precision == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # torch's AdamW: DeepSpeed's CPUAdam would compile C++ at run time
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
