"""Each loss against its formula in loops; identical texts are no negatives."""

import math

import pytest
import torch
import torch.nn.functional as F

from rsplatform.model.losses import (
    ContrastiveBatch,
    LossConfig,
    focal_contrastive_loss,
    identical_text_pairs,
    mammut_loss,
    sigmoid_contrastive_loss,
    softmax_contrastive_loss,
    text_keys,
)
from rsplatform.model.mammut import MammutOutput

SCALE = torch.tensor(7.0, dtype=torch.float64)


def embeddings(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, rows, 6, generator=generator, dtype=torch.float64)
    image_BE, text_BE = F.normalize(both, dim=-1)
    return image_BE, text_BE


def whole(image_BE, text_BE, ignored_BG=None) -> ContrastiveBatch:
    return ContrastiveBatch(image_BE, text_BE, image_BE, text_BE, 0, ignored_BG)


def plain_softmax(image_BE, text_BE, ignored=()) -> float:
    total, count = 0.0, len(image_BE)
    for rows, columns in ((image_BE, text_BE), (text_BE, image_BE)):
        for i in range(count):
            logits = {j: SCALE.item() * (rows[i] @ columns[j]).item() for j in range(count) if (i, j) not in ignored}
            total -= logits[i] - math.log(sum(math.exp(value) for value in logits.values()))
    return total / (2 * count)


def plain_focal(image_BE, text_BE, gamma, alpha, ignored=()) -> float:
    """The formula of the recipe; at alpha 0.5 the two directions add up to it once."""
    total, count = 0.0, len(image_BE)
    for i in range(count):
        for j in range(count):
            if (i, j) in ignored:
                continue
            p = 1 / (1 + math.exp(-SCALE.item() * (image_BE[i] @ text_BE[j]).item()))
            p = p if i == j else 1 - p
            total -= 2 * (alpha if i == j else 1 - alpha) * (1 - p) ** gamma * math.log(p)
    return total / count


def test_softmax_loss_equals_its_formula():
    image_BE, text_BE = embeddings()
    loss = softmax_contrastive_loss(whole(image_BE, text_BE), SCALE)
    assert loss.item() == pytest.approx(plain_softmax(image_BE, text_BE))


@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 0.5), (0.0, 0.5), (2.0, 0.25), (0.5, 0.9)])
def test_focal_loss_equals_its_formula(gamma, alpha):
    image_BE, text_BE = embeddings()
    loss = focal_contrastive_loss(whole(image_BE, text_BE), SCALE, gamma=gamma, alpha=alpha)
    assert loss.item() == pytest.approx(plain_focal(image_BE, text_BE, gamma, alpha))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_pairs_are_already_perfect(gamma):
    same_BE = torch.eye(4, requires_grad=True)
    focal_contrastive_loss(whole(same_BE, -same_BE + 2 * same_BE), torch.tensor(100.0), gamma=gamma).backward()
    assert same_BE.grad is not None and same_BE.grad.isfinite().all()


def plain_sigmoid(image_BE, text_BE, bias: float, ignored=()) -> float:
    """Equation 1 of SigLIP's paper, pair by pair."""
    total, count = 0.0, len(image_BE)
    for i in range(count):
        for j in range(count):
            sign = 1 if i == j else -1
            logit = SCALE.item() * (image_BE[i] @ text_BE[j]).item() + bias
            total += 0.0 if (i, j) in ignored else math.log(1 / (1 + math.exp(-sign * logit)))
    return -total / count


@pytest.mark.parametrize("bias", [-10.0, 0.0, 1.5])
def test_sigmoid_loss_equals_its_formula(bias):
    image_BE, text_BE = embeddings()
    loss = sigmoid_contrastive_loss(whole(image_BE, text_BE), SCALE, torch.tensor(bias))
    assert loss.item() == pytest.approx(plain_sigmoid(image_BE, text_BE, bias))


def test_sigmoid_loss_keeps_its_digits_where_pairs_are_already_perfect():
    same_BE = torch.eye(4, requires_grad=True)
    loss = sigmoid_contrastive_loss(whole(same_BE, same_BE), torch.tensor(60.0), torch.tensor(-30.0))
    loss.backward()
    assert loss.item() == pytest.approx(4 * math.exp(-30), rel=1e-5)
    assert same_BE.grad is not None and same_BE.grad.isfinite().all() and same_BE.grad.any()


def test_identical_texts_are_no_negatives():
    tokens_BT = torch.tensor([[1, 5, 2, 0], [1, 6, 2, 0], [1, 5, 2, 0], [1, 5, 7, 2], [1, 6, 5, 2]])
    ignored_BG = identical_text_pairs(text_keys(tokens_BT), text_keys(F.pad(tokens_BT, (0, 3))))
    assert {tuple(pair) for pair in ignored_BG.nonzero().tolist()} == {(0, 2), (2, 0)}
    image_BE, text_BE = embeddings()
    text_BE[2] = text_BE[0]
    batch = whole(image_BE, text_BE, ignored_BG)
    pairs = {(0, 2), (2, 0)}
    assert softmax_contrastive_loss(batch, SCALE).item() == pytest.approx(plain_softmax(image_BE, text_BE, pairs))
    focal = focal_contrastive_loss(batch, SCALE, gamma=1.0, alpha=0.5)
    assert focal.item() == pytest.approx(plain_focal(image_BE, text_BE, 1.0, 0.5, pairs))
    sigmoid = sigmoid_contrastive_loss(batch, SCALE, torch.tensor(-3.0))
    assert sigmoid.item() == pytest.approx(plain_sigmoid(image_BE, text_BE, -3.0, pairs))
    gradient_BE = torch.zeros_like(image_BE)
    for loss in (softmax_contrastive_loss, focal_contrastive_loss):
        leaf = image_BE.clone().requires_grad_()
        loss(whole(leaf, text_BE, ignored_BG), SCALE).backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad.equal(gradient_BE)


def test_text_keys_tell_texts_apart():
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, 3, (4000, 12), generator=generator)
    distinct = {tuple(row) for row in tokens_BT.tolist()}
    # a pad inside a text still shifts what follows: only trailing pads are free
    assert len(text_keys(tokens_BT).unique()) == len(distinct)


def output(image_BE, text_BE, caption_sum=12.0, caption_count=4.0) -> MammutOutput:
    hidden = torch.zeros(len(image_BE), 1, 1)
    return MammutOutput(image_BE, text_BE, hidden, SCALE, torch.tensor(caption_sum), torch.tensor(caption_count))


def test_the_weights_and_the_mask_option_do_what_they_say():
    image_BE, text_BE = embeddings(3)
    tokens_BT = torch.tensor([[1, 4, 2], [1, 4, 2], [1, 3, 2]])
    for masks, pairs in ((True, {(0, 1), (1, 0)}), (False, set())):
        config = LossConfig(contrastive_weight=0.5, caption_weight=2.0, mask_identical_texts=masks)
        loss, parts = mammut_loss(output(image_BE, text_BE), tokens_BT, config)
        contrastive = plain_softmax(image_BE, text_BE, pairs)
        assert parts["contrastive"].item() == pytest.approx(contrastive)
        assert parts["caption"].item() == 3.0
        assert loss.item() == pytest.approx(0.5 * contrastive + 2.0 * 3.0)
    focal, _ = mammut_loss(output(image_BE, text_BE), tokens_BT, LossConfig("focal_sigmoid", caption_weight=0.0))
    assert focal.item() == pytest.approx(plain_focal(image_BE, text_BE, 1.0, 0.5, {(0, 1), (1, 0)}))


def test_the_sigmoid_loss_and_a_models_bias_belong_together():
    image_BE, text_BE = embeddings(3)
    tokens_BT, config = torch.tensor([[1, 4, 2], [1, 5, 2], [1, 3, 2]]), LossConfig("sigmoid", caption_weight=0.0)
    biased = output(image_BE, text_BE)._replace(logit_bias=torch.tensor(-2.0))
    loss, parts = mammut_loss(biased, tokens_BT, config)
    assert loss.item() == pytest.approx(plain_sigmoid(image_BE, text_BE, -2.0))
    assert parts["logit_bias"].item() == -2.0
    for case, wrong in ((output(image_BE, text_BE), config), (biased, LossConfig())):
        with pytest.raises(ValueError, match="logit_bias: true belong together"):
            mammut_loss(case, tokens_BT, wrong)


def test_the_z_loss_is_part_of_the_caption_loss_and_reported_apart():
    tokens_BT, config = (
        torch.tensor([[1, 4, 2], [1, 5, 2], [1, 3, 2]]),
        LossConfig(caption_weight=2.0, z_loss_weight=0.1),
    )
    # as a forward with that weight leaves them: cross-entropies 12, log² Z 30, four tokens
    with_z = output(*embeddings(3), 12.0 + 0.1 * 30.0)._replace(caption_z_loss_sum=torch.tensor(30.0))
    loss, parts = mammut_loss(with_z, tokens_BT, config)
    assert parts["caption"].item() == pytest.approx(3.0) and parts["z_loss"].item() == 7.5
    assert loss.item() == pytest.approx(parts["contrastive"].item() + 2.0 * (3.0 + 0.1 * 7.5))
    for case, wrong in ((output(*embeddings(3)), config), (with_z, LossConfig())):
        with pytest.raises(ValueError, match="give it the same z_loss_weight"):
            mammut_loss(case, tokens_BT, wrong)


def test_a_batch_without_caption_tokens_has_no_caption_loss():
    loss, _ = mammut_loss(output(*embeddings(2), 0.0, 0.0), torch.tensor([[1], [1]]), LossConfig())
    assert loss.isfinite()


def test_bad_settings_name_the_field():
    with pytest.raises(ValueError, match="contrastive"):
        LossConfig(contrastive="hinge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="weights"):
        LossConfig(caption_weight=-1.0)
    with pytest.raises(ValueError, match="weights"):
        LossConfig(z_loss_weight=-1.0)
