"""Blocks compiled by torch's real compiler, where there is one for C++: the embeddings and gradients of plain blocks.

A picture's block, whose sizes are fixed, and a text's, whose lengths change; the other passes take as long again.
"""

import pytest
import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from rsplatform.model.mammut import Mammut
from rsplatform.train.blocks import BlockConfig, prepare_blocks
from tests.unit.train.tiny_training import tiny_model


def has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def agreement_and_gradients(model: Mammut, num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    images_BCHW = torch.randn(3, 3, 16, 16, generator=generator)
    tokens_BT = torch.randint(3, 300, (3, num_tokens), generator=generator)
    tokens_BT[1, 4:] = 0
    model.zero_grad()
    agreement = (model.encode_image(images_BCHW) * model.encode_text(tokens_BT)).sum()
    agreement.backward()
    return [agreement.detach(), *(value.grad.clone() for value in model.parameters() if value.grad is not None)]


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_have_the_gradients_of_plain_ones() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (tiny_model(vision_num_layers=1, text_num_layers=1) for _ in range(2))
    prepare_blocks(compiled, BlockConfig(compile_blocks=True))
    for num_tokens in (9, 14):
        found, expected = (agreement_and_gradients(model, num_tokens) for model in (compiled, plain))
        assert len(found) == len(expected) > 20
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one graph for each block, made once"
