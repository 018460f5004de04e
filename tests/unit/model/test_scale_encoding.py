"""The encodings of the ground sample distance: their formulas, that unknown and untrained add nothing, and readers."""

import math

import pytest
import torch

from rsplatform.model.mammut import Mammut
from rsplatform.model.scale_encoding import ScaleEncoding, scale_features, scaled_positions
from tests.unit.model.test_mammut import small_model, some_batch

BOTH = {"ground_sample_distance_encoding": True, "ground_sample_distance_positions": True}
DISTANCES_M = torch.tensor([0.3, math.nan, 10.0])


def conditioned(**settings) -> Mammut:
    """A model whose encodings have learned something; `settings` may leave one out."""
    model = small_model(**(BOTH | settings))
    with torch.no_grad():
        for encoding in (model.vision.scale_encoding, model.vision.scale_positions):
            for parameter in encoding.parameters() if encoding is not None else ():
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def test_it_equals_its_formula():
    encoding = ScaleEncoding(5).double()
    with torch.no_grad():
        encoding.weight_DF.normal_(generator=torch.Generator().manual_seed(0))
    for distance_m in (0.1, 1.0, 2.5, 30.0):
        periods = [32 * (2 / 32) ** (k / 7) for k in range(8)]
        angles = [2 * math.pi * math.log2(distance_m) / period for period in periods]
        features = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
        actual = encoding(torch.tensor([distance_m], dtype=torch.float64))[0]
        torch.testing.assert_close(actual, encoding.weight_DF @ features)


def test_positions_equal_scale_maes_formula():
    """Section 3.1 of arXiv 2212.14532, written out: wave i of a place has the angle g / G * place / 10000^(2 i / D), D
    being the half of the channels that an axis has."""
    width, grid = 12, (3, 4)
    for distance_m in (0.3, 1.0, 10.0):
        found_HWD = scaled_positions(torch.tensor([distance_m], dtype=torch.float64), grid, width)[0]
        for row in range(grid[0]):
            for column in range(grid[1]):
                expected = []
                for place in (column, row):
                    angles = [distance_m / 1.0 * place / 10000 ** (2 * i / (width / 2)) for i in range(width // 4)]
                    expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
                torch.testing.assert_close(found_HWD[row, column], torch.tensor(expected, dtype=torch.float64))


def test_the_same_metres_are_the_same_position_at_every_distance():
    fine, coarse = (scaled_positions(torch.tensor([metres]), (8, 8), 16) for metres in (0.5, 1.0))
    torch.testing.assert_close(fine[:, ::2, ::2], coarse[:, :4, :4])


def test_distances_of_the_field_are_told_apart_by_their_ratio():
    distances_m = torch.logspace(math.log2(0.1), math.log2(30), 100, base=2)
    features_BF = scale_features(distances_m)
    steps = (features_BF[1:] - features_BF[:-1]).norm(dim=1)
    assert steps.min() > 0.1 and steps.max() / steps.min() < 1.01  # the same ratio is the same step everywhere
    gaps = torch.cdist(features_BF, features_BF) + torch.eye(100)
    assert gaps.min() >= steps.min() - 1e-3


@pytest.mark.parametrize("unknown", [math.nan, 0.0, -1.0, math.inf])
@pytest.mark.parametrize("left_out", BOTH)
def test_unknown_adds_exactly_nothing(unknown, left_out):
    model, (images_BCHW, _) = conditioned(**{left_out: False}), some_batch()
    expected = model.encode_image(images_BCHW)
    assert torch.equal(model.encode_image(images_BCHW, torch.full((3,), unknown)), expected)
    actual = model.encode_image(images_BCHW, torch.tensor([0.3, unknown, 10.0]))
    torch.testing.assert_close(actual[1], expected[1])
    assert ((actual - expected)[[0, 2]].norm(dim=1) > 1e-3).all()


def test_it_starts_as_the_model_without_it():
    plain, fresh = small_model(), small_model(**BOTH)
    new = {"vision.scale_encoding.weight_DF": torch.zeros(32, 16), "vision.scale_positions.gain_D": torch.zeros(32)}
    fresh.load_state_dict(plain.state_dict() | new)
    batch = some_batch()
    for ours, theirs in zip(fresh(*batch, DISTANCES_M), plain(*batch, DISTANCES_M), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_every_way_to_the_model_reads_it_once():
    model, (images_BCHW, tokens_BT) = conditioned(vision_pooling="map"), some_batch()
    tokens_BND = model.image_tokens(images_BCHW, DISTANCES_M)
    assert not torch.equal(tokens_BND, model.image_tokens(images_BCHW))
    embeddings_BE = model.encode_image(images_BCHW, DISTANCES_M)
    torch.testing.assert_close(embeddings_BE, model.head(_pooled(model, tokens_BND)))
    output = model(images_BCHW, tokens_BT, DISTANCES_M)
    torch.testing.assert_close(output.image_embeddings_BE, embeddings_BE)
    hidden_BTD = model.text.generative(tokens_BT[:, :-1], model.image_to_text(tokens_BND))
    expected = hidden_BTD @ model.text.vocabulary_weight_VD.T
    torch.testing.assert_close(model.caption_logits(images_BCHW, tokens_BT, DISTANCES_M), expected)
    torch.testing.assert_close(output.caption_hidden_BTD, hidden_BTD)
    values_BHWD = model.patch_features(images_BCHW, DISTANCES_M).values_BHWD
    assert model.vision.pool is not None
    torch.testing.assert_close(values_BHWD.flatten(1, 2), model.vision.pool(model.vision.norm_output(tokens_BND))[0])


def _pooled(model: Mammut, tokens_BND: torch.Tensor) -> torch.Tensor:
    assert model.vision.pool is not None
    values_BND, scores_BKN = model.vision.pool(model.vision.norm_output(tokens_BND))
    weights_BNK = scores_BKN.softmax(2).transpose(1, 2).repeat_interleave(32 // scores_BKN.shape[1], dim=2)
    return (weights_BNK * values_BND).sum(1)


@pytest.mark.parametrize("distances_m", [None, DISTANCES_M])
def test_their_weights_are_part_of_every_step(distances_m):
    """Also of one without any known distance: sharding engines wait for each parameter's gradient."""
    model = small_model(**BOTH).train()
    output = model(*some_batch(), distances_m)
    (output.caption_loss_sum + output.image_embeddings_BE.sum()).backward()
    assert model.vision.scale_encoding is not None and model.vision.scale_positions is not None
    for parameter in (model.vision.scale_encoding.weight_DF, model.vision.scale_positions.gain_D):
        assert parameter.grad is not None and bool(parameter.grad.any()) == (distances_m is not None)


def test_bfloat16_autocast_stays_close_to_float32():
    model, (images_BCHW, _) = conditioned(), some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode_image(images_BCHW, DISTANCES_M)
    torch.testing.assert_close(low, model.encode_image(images_BCHW, DISTANCES_M), atol=0.03, rtol=0)
