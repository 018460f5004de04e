"""The decoder's two passes against a plain one-text-at-a-time version, and what each pass may see."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from rsplatform.model.text_decoder import TextConfig, TextDecoder

LENGTHS = (9, 4, 1, 6)


def decoder(**overrides) -> TextDecoder:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "width": 24,
        "num_layers": 5,
        "num_heads": 3,
        "mlp_width": 40,
        "context_length": 12,
        "vocab_size": 50,
    }
    model = TextDecoder(TextConfig(**{**settings, **overrides}), embedding_width=24).eval()
    with torch.no_grad():  # biases start at zero, which would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def some_tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    for row, length in enumerate(LENGTHS):
        tokens_BT[row, length:] = 0
    return tokens_BT


def plain_attention(query_TD, key_SD, value_SD, num_heads, causal):
    """Attention written out, one head at a time."""
    heads = []
    for query, key, value in zip(*(x.chunk(num_heads, -1) for x in (query_TD, key_SD, value_SD)), strict=True):
        scores = query @ key.T / query.shape[1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ value)
    return torch.cat(heads, -1)


def plain_mlp(block, x):
    if block.mlp is None:
        return x
    return x + block.mlp.contract(F.gelu(block.mlp.expand(block.norm_mlp(x))))


def plain_pass(model: TextDecoder, tokens_T: torch.Tensor, image_SD: torch.Tensor | None) -> torch.Tensor:
    """One text without pads: hidden states (T, D). With image features it is the generative pass."""
    config = model.config
    x = model.token_embedding_VD[tokens_T] + model.position_TD[: len(tokens_T)]
    for index, block in enumerate(cast(Any, model.blocks)):
        q, k, v = block.attention.qkv(block.norm_attention(x)).chunk(3, -1)
        x = x + block.attention.out(plain_attention(q, k, v, config.num_heads, causal=image_SD is not None))
        x = plain_mlp(block, x)
        if image_SD is not None and index % config.cross_attention_every == 0:
            cross: Any = model.cross_blocks[index // config.cross_attention_every]
            k, v = cross.attention.key_value(cross.norm_image(image_SD)).chunk(2, -1)
            q = cross.attention.query(cross.norm_text(x))
            x = x + cross.attention.out(plain_attention(q, k, v, config.num_heads, causal=False))
            x = plain_mlp(cross, x)
    return model.norm_output(x)


STRUCTURES = [
    {},
    {"cross_mlp": True},
    {"self_mlp_before_cross": False, "cross_mlp": True},
    {"self_mlp_before_cross": False, "cross_attention_every": 1},
    {"cross_attention_every": 3, "projection": False},
]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_masked_mean_equals_one_text_at_a_time_without_pads(structure):
    model, tokens_BT = decoder(**structure), some_tokens()
    expected_BD = torch.stack(
        [plain_pass(model, row[:length], None).mean(0) for row, length in zip(tokens_BT, LENGTHS, strict=True)]
    )
    if model.projection is not None:
        expected_BD = expected_BD @ model.projection.weight.T
    torch.testing.assert_close(model.contrastive(tokens_BT), expected_BD, atol=1e-5, rtol=1e-4)
    more_pads_BT = F.pad(tokens_BT, (0, 3))
    torch.testing.assert_close(model.contrastive(more_pads_BT), expected_BD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["masked_mean", "mean_all"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_generative_pass_equals_one_text_at_a_time_without_pads(structure, pooling):
    model, tokens_BT = decoder(pooling=pooling, **structure), some_tokens()
    image_BSD = torch.randn(len(LENGTHS), 7, 24)
    hidden_BTD = model.generative(tokens_BT, image_BSD)
    for row, length in enumerate(LENGTHS):
        expected_TD = plain_pass(model, tokens_BT[row, :length], image_BSD[row])
        torch.testing.assert_close(hidden_BTD[row, :length], expected_TD, atol=1e-5, rtol=1e-4)


def test_mean_all_averages_every_place_of_the_full_context_whatever_the_batch_was_padded_to():
    model, tokens_BT = decoder(pooling="mean_all"), some_tokens()
    full_BT = F.pad(tokens_BT, (0, 12 - tokens_BT.shape[1]))
    assert model.projection is not None
    expected_BD = torch.stack([plain_pass(model, row, None).mean(0) for row in full_BT]) @ model.projection.weight.T
    torch.testing.assert_close(model.contrastive(tokens_BT), expected_BD, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.contrastive(full_BT), expected_BD, atol=1e-5, rtol=1e-4)


def test_a_later_token_changes_nothing_before_it_in_the_generative_pass_only():
    model, tokens_BT = decoder(), some_tokens()
    image_BSD = torch.randn(len(LENGTHS), 7, 24)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 5] = changed_BT[0, 5] % 49 + 1
    before, after = model.generative(tokens_BT, image_BSD)[0], model.generative(changed_BT, image_BSD)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert (before[5:] - after[5:]).abs().amax(1).min() > 1e-4
    first = plain_pass(model, tokens_BT[0], None)[0]
    assert (first - plain_pass(model, changed_BT[0], None)[0]).abs().max() > 1e-4  # bidirectional sees it


def test_both_passes_share_weights_and_only_the_generative_one_uses_cross_attention():
    model, tokens_BT = decoder(), some_tokens()
    model.contrastive(tokens_BT).sum().backward()
    assert all(p.grad is None for p in model.cross_blocks.parameters())
    assert all(p.grad is not None for p in model.blocks.parameters())
    model.zero_grad()
    model.generative(tokens_BT, torch.randn(len(LENGTHS), 7, 24)).square().sum().backward()
    assert all(p.grad is not None for p in [*model.cross_blocks.parameters(), *model.blocks.parameters()])


def test_gradients_of_the_packed_pass_equal_those_of_one_text_at_a_time():
    model, tokens_BT = decoder().double(), some_tokens()
    model.contrastive(tokens_BT).square().sum().backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = [plain_pass(model, row[:length], None).mean(0) for row, length in zip(tokens_BT, LENGTHS, strict=True)]
    assert model.projection is not None
    (torch.stack(rows) @ model.projection.weight.T).square().sum().backward()
    slow = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert fast.keys() == slow.keys()
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, slow[name], atol=1e-10, rtol=1e-8, msg=name)


def test_an_empty_text_is_finite_and_a_long_one_an_error():
    model = decoder()
    assert model.contrastive(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()
    with pytest.raises(ValueError, match="13 tokens.*context length 12"):
        model.contrastive(torch.ones(1, 13, dtype=torch.int64))


def test_without_a_projection_the_widths_must_agree():
    config = TextConfig(
        width=24, num_layers=1, num_heads=3, mlp_width=8, context_length=4, vocab_size=9, projection=False
    )
    with pytest.raises(ValueError, match=r"text\.projection"):
        TextDecoder(config, embedding_width=16)
