"""Pseudo-labels follow the rule patch by patch, stay balanced, and their loss pulls towards the texts."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplatform.localize import pseudo_labels as module
from rsplatform.localize.pseudo_labels import IGNORED, PseudoLabelRule, class_weights, map_loss, pseudo_labels, rule_out

LOOSE = {"balance": 1e9}


def slow_labels(maps, rule):
    """The rule written as sentences, without balancing."""
    classes = sorted(set(rule.class_of_prompt))
    owner = torch.tensor(rule.class_of_prompt)
    cells = [(b, y, x) for b in range(maps.shape[0]) for y in range(maps.shape[2]) for x in range(maps.shape[3])]
    chance = {}
    for b, y, x in cells:
        softmax = (maps[b, :, y, x] / rule.temperature).softmax(0)
        chance[b, y, x] = {label: float(softmax[owner == label].sum()) for label in classes}
    labels = torch.full(maps[:, 0].shape, IGNORED)
    for cell in cells:
        found = {label: value for label, value in chance[cell].items() if label}
        if max(found.values()) < rule.negative_probability:
            labels[cell] = 0
        for label, value in found.items():
            ranked = sorted((chance[other][label] for other in cells), reverse=True)
            in_top = value >= ranked[max(1, int(rule.top_share * len(cells))) - 1]
            if value > rule.positive_probability and in_top:
                labels[cell] = label
    return labels


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.2, 0.5, 1.0]))
def test_equals_the_rule_in_sentences(seed, share):
    maps = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(seed))
    rule = PseudoLabelRule((0, 0, 1, 2), temperature=0.5, top_share=share, **LOOSE)
    assert torch.equal(pseudo_labels(maps, rule), slow_labels(maps, rule))


def test_classes_are_balanced_by_certainty():
    maps = torch.zeros(1, 3, 1, 100)
    maps[0, 1, 0, :60] = torch.linspace(1, 2, 60)
    maps[0, 2, 0, 60:64] = 1.0
    maps[0, 0, 0, 64:] = 1.0
    free = pseudo_labels(maps, PseudoLabelRule((0, 1, 2), 0.1, top_share=1.0, **LOOSE))
    assert [int((free == label).sum()) for label in (0, 1, 2)] == [36, 60, 4]
    rule = PseudoLabelRule((0, 1, 2), 0.1, top_share=1.0, balance=1.0)
    labels = pseudo_labels(maps, rule)
    assert [int((labels == label).sum()) for label in (0, 1, 2)] == [36, 36, 4]
    # Kept labels are a subset, and dropped ones are never more certain than kept ones.
    assert bool(((labels == free) | (labels == IGNORED)).all())
    assert labels[0, 0, :24].eq(IGNORED).all() and labels[0, 0, 24:60].eq(1).all()


def test_missing_patches_are_ignored():
    maps = torch.randn(1, 2, 4, 4)
    maps[:, :, 0] = torch.nan
    labels = pseudo_labels(maps, PseudoLabelRule((0, 1), 0.1, top_share=1.0))
    assert labels[:, 0].eq(IGNORED).all() and not labels[:, 1:].eq(IGNORED).all()
    nothing = pseudo_labels(torch.full((1, 2, 2, 2), torch.nan), PseudoLabelRule((0, 1), 0.1))
    assert nothing.eq(IGNORED).all()


def test_no_way_in_for_a_mask():
    for function in (pseudo_labels, PseudoLabelRule):
        assert not [name for name in inspect.signature(function).parameters if "mask" in name or "truth" in name]
    assert not hasattr(module, "open") and "rasterio" not in inspect.getsource(module)


def test_the_loss_is_cross_entropy_over_labelled_patches_and_teaches():
    torch.manual_seed(0)
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.randint(-1, 3, (1, 4, 4))
    loss = map_loss(maps, labels, (0, 1, 2), 0.1)
    torch.testing.assert_close(loss, F.cross_entropy(maps / 0.1, labels, ignore_index=IGNORED))
    loss.backward()
    assert maps.grad is not None
    assert maps.grad.movedim(1, -1)[labels == IGNORED].eq(0).all()
    with torch.no_grad():
        better = map_loss(maps - 0.1 * maps.grad, labels, (0, 1, 2), 0.1)
    assert better < loss


def test_classes_count_alike_whatever_their_number_of_labels():
    labels = torch.tensor([[[0] * 8 + [1] * 2 + [2] * 4 + [IGNORED] * 2]])
    weights = class_weights(labels, 4)
    assert [float(weights[label]) * int((labels == label).sum()) for label in range(3)] == [4.0, 4.0, 4.0]
    maps = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(0))
    by_class = [F.cross_entropy(maps.movedim(1, -1)[labels == label], labels[labels == label]) for label in range(3)]
    torch.testing.assert_close(map_loss(maps, labels, (0, 1, 2, 3), 1.0, weights), torch.stack(by_class).mean())
    few = torch.cat([torch.zeros(100), torch.ones(1), torch.full((100,), 2.0)]).long().view(1, 1, -1)
    assert class_weights(few, 3).tolist() == [1.0, 4.0, 1.0]
    assert class_weights(torch.full((1, 1, 3), IGNORED), 2).tolist() == [1.0, 1.0]


def test_nothing_labelled_costs_nothing():
    maps = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = map_loss(maps, torch.full((1, 2, 2), IGNORED), (0, 1, 2), 0.1)
    loss.backward()
    assert loss.item() == 0 and maps.grad is not None and maps.grad.eq(0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_class_that_is_ruled_out_gets_no_label_and_its_probability_goes_to_the_others(seed):
    draw = torch.Generator().manual_seed(seed)
    maps, rule = torch.randn(2, 4, 3, 4, generator=draw), PseudoLabelRule((0, 0, 1, 2), 0.5, top_share=1.0, **LOOSE)
    possible = torch.tensor([[False, True, True], [False, True, False]])  # the background is possible all the same
    labels = pseudo_labels(rule_out(maps, rule, possible), rule)
    assert torch.equal(labels[0], pseudo_labels(maps[:1], rule)[0])
    fewer = PseudoLabelRule((0, 0, 1), 0.5, top_share=1.0, **LOOSE)
    assert torch.equal(labels[1], pseudo_labels(maps[1:, :3], fewer)[0])


def test_bad_input_is_named():
    for fields, words in (
        ({"class_of_prompt": (0, 0)}, "another class"),
        ({"class_of_prompt": (1, 2)}, "background"),
        ({"temperature": 0.0}, "temperature"),
        ({"negative_probability": 0.9}, "negative_probability"),
        ({"top_share": 0.0}, "top_share"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(PseudoLabelRule((0, 1), temperature=0.1), **fields)
    with pytest.raises(ValueError, match="2 prompts on axis 1"):
        pseudo_labels(torch.zeros(1, 3, 2, 2), PseudoLabelRule((0, 1), 0.1))
    with pytest.raises(ValueError, match=r"\[5\] have no text"):
        map_loss(torch.zeros(1, 3, 1, 1), torch.full((1, 1, 1), 5), (0, 1, 2), 0.1)
