"""The whole model: configs, sizes, both passes, and that pooling every patch again gives the image embedding."""

import itertools
import math

import pytest
import torch

from rsplatform.model.frozen_config import ConfigKeyError
from rsplatform.model.mammut import Mammut, MammutConfig, mammut_config
from rsplatform.model.vision_encoder import pool_values

SMALL = {
    "vision_width": 32,
    "vision_num_layers": 2,
    "vision_mlp_width": 48,
    "text_width": 32,
    "text_num_layers": 3,
    "text_mlp_width": 48,
    "image_size": 32,
    "vocab_size": 50,
    "context_length": 10,
}


def small_model(**overrides) -> Mammut:
    torch.manual_seed(0)
    return Mammut(mammut_config("mini", **{**SMALL, **overrides})).eval()


def some_batch(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(3, 50, (batch, 8), generator=generator)
    for row, length in enumerate(itertools.islice(itertools.cycle((8, 5, 3)), batch)):
        tokens_BT[row, length:] = 0
    return torch.randn(batch, 3, 32, 32, generator=generator), tokens_BT


@pytest.mark.parametrize("size", ["mini", "tiny", "small", "so400m"])
def test_a_config_survives_its_dict(size):
    config = mammut_config(size, pixel_mean=(0.1, 0.2, 0.3))
    assert MammutConfig.from_dict(config.to_dict()) == config


def test_unknown_keys_name_the_nearest_valid_one():
    mapping = mammut_config("mini").to_dict()
    mapping["vision"]["patchsize"] = 8
    with pytest.raises(ConfigKeyError, match="vision.*'patchsize'.*'patch_size'"):
        MammutConfig.from_dict(mapping)
    with pytest.raises(ConfigKeyError, match="'imagesize'.*'image_size'"):
        mammut_config("mini", imagesize=32)
    with pytest.raises(ConfigKeyError, match="'width'.*_width"):
        mammut_config("mini", width=32)  # both parts have one: it must say which
    del mapping["vision"]["patchsize"], mapping["text"]["vocab_size"]
    with pytest.raises(ConfigKeyError, match="text.*'vocab_size' is missing"):
        MammutConfig.from_dict(mapping)


def test_the_papers_size_has_400_million_parameters_on_each_side():
    with torch.device("meta"):
        model = Mammut(mammut_config("so400m"))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert 380e6 < sizes["vision"] < 440e6
    assert 380e6 < sizes["text"] < 440e6


def test_forward_gives_what_the_single_calls_give():
    model = small_model()
    images_BCHW, tokens_BT = some_batch()
    output = model(images_BCHW, tokens_BT)
    torch.testing.assert_close(output.image_embeddings_BE, model.encode_image(images_BCHW))
    torch.testing.assert_close(output.text_embeddings_BE, model.encode_text(tokens_BT))
    torch.testing.assert_close(output.text_embeddings_BE.norm(dim=1), torch.ones(3))
    assert model.image_tokens(images_BCHW).shape == (3, 16, 32)
    logits_BTV = model.caption_logits(images_BCHW, tokens_BT)
    assert logits_BTV.shape == (3, 7, 50)
    expected = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), ignore_index=0, reduction="sum"
    )
    torch.testing.assert_close(output.caption_loss_sum, expected)
    assert output.caption_token_count == (tokens_BT[:, 1:] != 0).sum()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(tied):
    model = small_model(vision_pooling="map", class_token=True, cross_mlp=True, tied_vocabulary=tied).train()
    output = model(*some_batch())
    loss = output.image_embeddings_BE @ output.text_embeddings_BE.T * output.logit_scale
    (loss.square().sum() + output.caption_loss_sum).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("pooling", ["map", "mean", "mean_all"])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("size_px", [(32, 32), (24, 48)])
def test_pooling_all_patches_gives_the_image_embedding(pooling, class_token, size_px):
    model = small_model(vision_pooling=pooling, class_token=class_token, vision_num_heads=2)
    images_BCHW = torch.randn(2, 3, *size_px)
    features = model.patch_features(images_BCHW)
    values_BND = features.values_BHWD.flatten(1, 2)
    assert features.values_BHWD.shape == (2, size_px[0] // 8, size_px[1] // 8, 32)
    scores_BKN = None if features.scores_BKHW is None else features.scores_BKHW.flatten(2)
    assert (scores_BKN is not None) == (pooling == "map")
    # a class token that pools too has no place on the grid: it stands apart
    assert (features.class_value_BD is not None) == (class_token and pooling != "mean")
    if features.class_value_BD is not None:
        values_BND = torch.cat([features.class_value_BD.unsqueeze(1), values_BND], 1)
    if scores_BKN is not None and features.class_scores_BK is not None:
        scores_BKN = torch.cat([features.class_scores_BK.unsqueeze(2), scores_BKN], 2)
    embeddings_BE = model.head(pool_values(values_BND, scores_BKN))
    torch.testing.assert_close(embeddings_BE, model.encode_image(images_BCHW), atol=1e-5, rtol=0)


def test_the_logit_scale_starts_at_one_over_0_07_and_stops_at_100_but_can_come_back():
    model = small_model()
    assert model.logit_scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_logit_scale.fill_(9.0)
    assert model.logit_scale().item() == pytest.approx(100.0)
    model.logit_scale().backward()  # descent lowers it: the gradient passes
    assert model.log_logit_scale.grad is not None and model.log_logit_scale.grad.item() == pytest.approx(100.0)
    model.log_logit_scale.grad = None
    (-model.logit_scale()).backward()  # descent would raise it further: stopped
    assert model.log_logit_scale.grad is not None and not model.log_logit_scale.grad.any()


def test_only_a_model_for_the_sigmoid_loss_has_a_bias_and_starts_where_siglip_does():
    assert "logit_bias" not in small_model().state_dict()
    model = small_model(logit_bias=True)
    output = model(*some_batch())
    assert output.logit_bias is not None and model.config.to_dict()["logit_bias"] is True
    assert (output.logit_scale.item(), output.logit_bias.item()) == (pytest.approx(10.0), -10.0)
    assert output.logit_bias.ndim == 0 and all(parameter.ndim for parameter in model.parameters())


def test_a_fresh_model_starts_near_chance():
    torch.manual_seed(0)
    model = Mammut(mammut_config("mini"))
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, 2048, (8, 16), generator=generator)
    output = model(torch.randn(8, 3, 64, 64, generator=generator), tokens_BT)
    mean_loss = output.caption_loss_sum / output.caption_token_count
    assert mean_loss.item() == pytest.approx(math.log(2048), abs=0.6)


def test_bfloat16_autocast_stays_close_to_float32():
    model = small_model(vision_pooling="map")
    batch = some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*batch)
        (low.caption_loss_sum + low.image_embeddings_BE.square().sum()).backward()
    high = model(*batch)
    assert low.image_embeddings_BE.dtype == torch.float32
    torch.testing.assert_close(low.image_embeddings_BE, high.image_embeddings_BE, atol=0.03, rtol=0)
    torch.testing.assert_close(low.caption_loss_sum, high.caption_loss_sum, rtol=0.01, atol=0)
