"""The vision encoder against plain formulas: convolution patches, each pooling, patch dropout, other sizes."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from rsplatform.model.draws import sample_keys
from rsplatform.model.vision_encoder import VisionConfig, VisionEncoder, drop_patches


def encoder(**overrides) -> VisionEncoder:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "width": 24,
        "num_layers": 2,
        "num_heads": 3,
        "mlp_width": 40,
        "patch_size": 4,
        "image_size": 16,
    }
    return VisionEncoder(VisionConfig(**{**settings, **overrides}), embedding_width=10).eval()


def plain_tokens(model: VisionEncoder, images_BCHW: torch.Tensor) -> torch.Tensor:
    """The encoder written out, class token included, with a strided convolution and torch's own attention function."""
    config = model.config
    kernel = model.patch_embedding.weight.view(config.width, 3, config.patch_size, config.patch_size)
    patches = F.conv2d(images_BCHW, kernel, stride=config.patch_size).flatten(2).transpose(1, 2)
    tokens = patches + model.position_HWD.flatten(0, 1)
    if model.class_token_D is not None and model.class_position_D is not None:
        first = model.class_token_D + model.class_position_D
        tokens = torch.cat([first.expand(len(tokens), 1, -1), tokens], 1)
    tokens = model.norm_input(tokens)
    for block in cast(Any, model.blocks):
        normed = block.norm_attention(tokens).transpose(0, 1)
        attention = block.attention
        mixed, _ = F.multi_head_attention_forward(
            normed, normed, normed, config.width, config.num_heads, attention.qkv.weight, attention.qkv.bias,
            None, None, False, 0.0, attention.out.weight, attention.out.bias, need_weights=False,
        )  # fmt: skip
        tokens = tokens + mixed.transpose(0, 1)
        tokens = tokens + block.mlp.contract(F.gelu(block.mlp.expand(block.norm_mlp(tokens))))
    return tokens


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("input_norm", [False, True])
def test_tokens_equal_the_plain_formula(class_token, input_norm):
    model = encoder(class_token=class_token, input_norm=input_norm, pooling="mean_all")
    images_BCHW = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images_BCHW), plain_tokens(model, images_BCHW), atol=1e-5, rtol=1e-5)


def test_mean_poolings_equal_the_plain_formula():
    """A class token that the pooling leaves out is not given to cross-attention either."""
    images_BCHW = torch.randn(2, 3, 16, 16)
    for pooling, first in (("mean", 1), ("mean_all", 0)):
        model = encoder(pooling=pooling, class_token=True)
        plain_BND = plain_tokens(model, images_BCHW)[:, first:]
        torch.testing.assert_close(model(images_BCHW), plain_BND, atol=1e-5, rtol=1e-5)
        expected = model.norm_output(plain_BND.mean(1)) @ model.projection.weight.T
        torch.testing.assert_close(model.embed_tokens(model(images_BCHW)), expected, atol=1e-5, rtol=1e-5)


def test_map_pooling_equals_the_plain_formula():
    model = encoder(pooling="map")
    pool = model.pool
    assert pool is not None
    tokens_BND = model(torch.randn(2, 3, 16, 16))
    normed_BND = model.norm_output(tokens_BND)
    keys, values = normed_BND @ pool.key_KdD.flatten(0, 1).T, pool.value(normed_BND)
    pooled = []
    for head in range(3):
        columns = slice(head * 8, head * 8 + 8)
        scores_BN = keys[..., columns] @ pool.query_Kd[head] / 8**0.5
        pooled.append(torch.einsum("bn,bnd->bd", scores_BN.softmax(-1), values[..., columns]))
    projected = pool.out(torch.cat(pooled, -1))
    expected = (projected + pool.mlp(pool.norm_mlp(projected))) @ model.projection.weight.T
    torch.testing.assert_close(model.embed_tokens(tokens_BND), expected, atol=1e-5, rtol=1e-5)


def test_another_size_keeps_the_embedding_of_a_flat_picture_near():
    model = encoder()
    small = model.embed_tokens(model(torch.full((1, 3, 16, 16), 0.5)))
    large = model.embed_tokens(model(torch.full((1, 3, 32, 24), 0.5)))
    assert F.cosine_similarity(small, large).item() > 0.8


def test_a_picture_that_does_not_divide_into_patches_is_an_error():
    with pytest.raises(ValueError, match="18x16.*patches of 4"):
        encoder()(torch.zeros(1, 3, 18, 16))


def test_patch_dropout_keeps_distinct_patches_and_only_in_training():
    tokens_BND = torch.arange(2 * 16.0).view(2, 16, 1).expand(2, 16, 5)
    kept_BMD = drop_patches(tokens_BND, 0.75, sample_keys(0, 0, torch.arange(2)))
    assert kept_BMD.shape == (2, 4, 5)
    for row in range(2):
        values = set(kept_BMD[row, :, 0].tolist())
        assert len(values) == 4 and values <= set(tokens_BND[row, :, 0].tolist())
    model = encoder(patch_dropout=0.5, class_token=True, pooling="mean_all")
    images_BCHW = torch.randn(2, 3, 16, 16)
    assert model(images_BCHW).shape[1] == 17
    assert model.train()(images_BCHW).shape[1] == 9


@pytest.mark.parametrize("pooling", ["map", "mean"])
def test_patch_features_keep_the_whole_grid_in_training(pooling):
    """Self-training's patch loss asks a training model for its grid."""
    model = encoder(patch_dropout=0.5, pooling=pooling)
    images_BCHW = torch.randn(2, 3, 16, 16)
    expected = model.patch_features(images_BCHW)
    found = model.train().patch_features(images_BCHW)
    torch.testing.assert_close(found.values_BHWD, expected.values_BHWD)
    assert found.values_BHWD.shape[1:3] == (4, 4)


def test_cropped_positions_act_only_in_training():
    model = encoder(cropped_positions=True, cropped_position_grid=8)
    images_BCHW = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)
    evaluated = model(images_BCHW)
    torch.testing.assert_close(evaluated[0], evaluated[1])
    trained = model.train()(images_BCHW)
    assert (trained[0] - trained[1]).abs().max() > 1e-3  # another crop per picture


@pytest.mark.parametrize(
    ("field", "value"),
    [("pooling", "max"), ("num_heads", 5), ("image_size", 18), ("patch_dropout", 1.0)],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        encoder(**{field: value})


def test_scaled_positions_need_channels_for_two_waves_of_two_axes():
    with pytest.raises(ValueError, match=r"vision\.width 6 is not a multiple of 4"):
        encoder(width=6, num_heads=1, ground_sample_distance_positions=True)
