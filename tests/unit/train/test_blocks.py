"""Recomputed and compiled blocks: the same gradients, the same names, less kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor

from rsplatform.model.mammut import Mammut
from rsplatform.train.blocks import BlockConfig, prepare_blocks
from tests.unit.train.tiny_training import tiny_model

# Every kind of block: with and without MLP, cross-attention with one
SIZES = {"text_num_layers": 3, "self_mlp_before_cross": False, "cross_mlp": True, "vision_num_layers": 4}


def make_model(config: BlockConfig | None = None, **sizes) -> Mammut:
    model = tiny_model(**(SIZES | sizes)).double()
    if config is not None:
        prepare_blocks(model, config)
    return model


def batch(step: int, num_tokens: int, num_samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(3, 300, (num_samples, num_tokens), generator=generator)
    for row in range(num_samples):
        tokens_BT[row, 3 + (row + step) % (num_tokens - 3) :] = 0
    return torch.randn(num_samples, 3, 16, 16, dtype=torch.float64, generator=generator), tokens_BT


def gradients(model: Mammut, images_BCHW: Tensor, tokens_BT: Tensor) -> list[Tensor]:
    model.zero_grad()
    output = model(images_BCHW, tokens_BT)
    agreement = (output.image_embeddings_BE * output.text_embeddings_BE).sum()
    (agreement * output.logit_scale + output.caption_loss_sum).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def numbers_kept(model: Mammut) -> int:
    """Numbers that a forward pass keeps for its backward pass, weights included, each use of them once."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch(0, 12))
    return sum(kept)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_have_the_gradients_of_kept_ones(every: int) -> None:
    plain, recomputing = make_model(), make_model(BlockConfig(every))
    assert list(recomputing.state_dict()) == list(plain.state_dict())
    for step in range(2):
        own, expected = gradients(recomputing, *batch(step, 12)), gradients(plain, *batch(step, 12))
        assert len(own) == len(list(plain.parameters()))
        assert all(map(torch.equal, own, expected))
    with torch.no_grad():
        assert torch.equal(recomputing.encode_image(batch(0, 12)[0]), plain.encode_image(batch(0, 12)[0]))


def test_recomputed_blocks_keep_less() -> None:
    none, some, every = (numbers_kept(make_model(config)) for config in (None, BlockConfig(2), BlockConfig(1)))
    assert every < 0.5 * none
    assert every < some < none


def test_compiled_blocks_have_the_gradients_of_plain_ones() -> None:
    """Recomputed as well, over texts of changing length, without a graph per length; traced, then run as it stands."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    plain = make_model(None, text_num_layers=2, vision_num_layers=2)
    compiled = make_model(BlockConfig(2, True, backend), text_num_layers=2, vision_num_layers=2)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    counts = []
    for step, num_tokens in enumerate((12, 9, 16)):
        own, expected = gradients(compiled, *batch(step, num_tokens)), gradients(plain, *batch(step, num_tokens))
        torch.testing.assert_close(own, expected, atol=1e-12, rtol=1e-12)
        counts.append(len(graphs))
    # a picture's block; a decoder's block causal and not, with an MLP and without; a cross block
    assert counts == [6, 6, 6]
    compiled.eval()
    with torch.no_grad():  # another number of samples, as in validation: no graph is made for it
        compiled(*batch(0, 12, num_samples=3))
    assert len(graphs) == 6
