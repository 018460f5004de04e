"""Labels for patches from a teacher's score maps, and the loss that learns from them.

In: score maps of unlabelled pictures. Out: a class or "ignored" for every patch. No mask enters here: there
is no argument through which one could.
Shapes: B pictures, P prompts, C classes, HxW patches, E embedding, N patches of all pictures together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

IGNORED = -1
BACKGROUND = 0
MAX_CLASS_WEIGHT = 4.0


@dataclass(frozen=True)
class PseudoLabelRule:
    """When a patch is trusted. All numbers are our defaults: the recipe's source publishes none.

    `class_of_prompt` gives each prompt's class, 0 for the background prompts. `temperature` divides cosines;
    the teacher's own, 1 / logit scale, is the natural one. No class keeps more than `balance` times the
    median number of labels of the classes that have any.
    """

    class_of_prompt: tuple[int, ...]
    temperature: float
    positive_probability: float = 0.7
    negative_probability: float = 0.3
    top_share: float = 0.2
    balance: float = 2.0

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that makes no sense."""
        if BACKGROUND not in self.class_of_prompt or max(self.class_of_prompt, default=0) == BACKGROUND:
            raise ValueError(f"class_of_prompt needs background (0) and another class, got {self.class_of_prompt}")
        if min(self.class_of_prompt) < BACKGROUND:
            raise ValueError(f"class_of_prompt must not be negative, got {self.class_of_prompt}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.negative_probability <= self.positive_probability < 1:
            raise ValueError("need 0 < negative_probability <= positive_probability < 1")
        if not 0 < self.top_share <= 1 or self.balance < 1:
            raise ValueError(f"need 0 < top_share <= 1 <= balance, got {self.top_share} and {self.balance}")


def pseudo_labels(maps_BPHW: torch.Tensor, rule: PseudoLabelRule) -> torch.Tensor:
    """Class ids (B, H, W), int64; -1 where the teacher is not to be trusted.

    A patch is positive for a class if its probability is above 0.7 and among the top 20 % of that class over
    all the pictures given; background if every class is below 0.3; ignored between. Then classes are
    balanced: the most certain labels stay. Patches with NaN (no data) are ignored; a prompt of -inf is ruled out
    (`rule_out`). Raises ValueError if P is not the rule's.
    """
    if maps_BPHW.ndim != 4 or maps_BPHW.shape[1] != len(rule.class_of_prompt):
        raise ValueError(f"maps {tuple(maps_BPHW.shape)} need {len(rule.class_of_prompt)} prompts on axis 1")
    maps_NP = maps_BPHW.detach().float().movedim(1, -1).flatten(0, 2)
    present_N = ~maps_NP.isnan().any(dim=1)
    log_probabilities_NC = class_log_probabilities(
        maps_NP.masked_fill(~present_N[:, None], 0.0), rule.class_of_prompt, rule.temperature
    )
    probabilities_NC = log_probabilities_NC.exp().masked_fill(~present_N[:, None], 0.0)
    labels_N = torch.full((len(maps_NP),), IGNORED, dtype=torch.int64, device=maps_NP.device)
    best_N, best_class_N = probabilities_NC[:, BACKGROUND + 1 :].max(dim=1)
    labels_N[present_N & (best_N < rule.negative_probability)] = BACKGROUND
    certainty_N = torch.where(labels_N == BACKGROUND, 1 - best_N, best_N)
    for label in sorted(set(rule.class_of_prompt) - {BACKGROUND}):
        present = probabilities_NC[present_N, label]
        if not len(present):
            continue
        bar = torch.topk(present, max(1, int(rule.top_share * len(present)))).values[-1]
        trusted_N = (best_N > rule.positive_probability) & (best_N >= bar)
        labels_N[trusted_N & (best_class_N + 1 == label)] = label
    return _balanced(labels_N, certainty_N, rule.balance).view(maps_BPHW[:, 0].shape)


def rule_out(maps_BPHW: torch.Tensor, rule: PseudoLabelRule, possible_BC: torch.Tensor) -> torch.Tensor:
    """The maps (..., B, P, H, W) with -inf for every prompt whose class is not possible in the picture.

    `possible_BC` (bool) is what is known of whole pictures; the background (class 0) is possible everywhere. Our
    default: the published recipe names no such knowledge. Raises ValueError unless it has a column for each class.
    """
    if possible_BC.shape != (maps_BPHW.shape[-4], max(rule.class_of_prompt) + 1):
        raise ValueError(
            f"possible_BC {tuple(possible_BC.shape)} must be ({maps_BPHW.shape[-4]}, {max(rule.class_of_prompt) + 1})"
        )
    owners_P = torch.tensor(rule.class_of_prompt, device=possible_BC.device)
    possible_BP = possible_BC[:, owners_P] | (owners_P == BACKGROUND)
    return maps_BPHW.masked_fill(~possible_BP.to(maps_BPHW.device)[:, :, None, None], -torch.inf)


def map_loss(
    maps_BPHW: torch.Tensor,
    labels_BHW: torch.Tensor,
    class_of_prompt: Sequence[int],
    temperature: float,
    weights_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of the labelled patches of score maps, by cosine / temperature; a scalar.

    `weights_C`: how much a patch of each class counts in the mean (`class_weights`); None: all alike. Zero, with zero
    gradients, if every patch is ignored. Raises ValueError for a label that no prompt stands for, or unless there is a
    class for each of P prompts.
    """
    if len(class_of_prompt) != maps_BPHW.shape[1]:
        raise ValueError(f"{len(class_of_prompt)} classes for {maps_BPHW.shape[1]} prompts")
    labelled = labels_BHW != IGNORED
    labels_N = labels_BHW[labelled]
    unknown = set(labels_N.unique().tolist()) - set(class_of_prompt)
    if unknown:
        raise ValueError(f"labels {sorted(unknown)} have no text; texts stand for {sorted(set(class_of_prompt))}")
    if not len(labels_N):
        return maps_BPHW.sum() * 0.0
    cosines_NP = maps_BPHW.movedim(1, -1)[labelled]
    return F.nll_loss(class_log_probabilities(cosines_NP, class_of_prompt, temperature), labels_N, weight=weights_C)


def class_weights(labels_BHW: torch.Tensor, num_classes: int) -> torch.Tensor:
    """weights_C that make every class of a labelled set count alike, as far as 4 times the median class's patch.

    Without, a class that is often confused with a commoner one vanishes: on most of its patches the other is the better
    bet. The limit is for classes with a handful of labels, which are noise. All our defaults.
    """
    counts_C = torch.bincount(labels_BHW[labels_BHW != IGNORED], minlength=num_classes).float()
    if not counts_C.any():
        return torch.ones_like(counts_C)
    median = counts_C[counts_C > 0].median()
    return median / counts_C.clamp(min=float(median) / MAX_CLASS_WEIGHT)


def class_log_probabilities(
    cosines_NP: torch.Tensor, class_of_prompt: Sequence[int], temperature: float
) -> torch.Tensor:
    """Log softmax over all prompts, summed over the prompts of a class: (N, largest class + 1).

    A class id in between that no prompt stands for has probability 0, log -inf.
    """
    log_NP = (cosines_NP / temperature).log_softmax(dim=1)
    columns = []
    for label in range(max(class_of_prompt) + 1):
        prompts = [prompt for prompt, owner in enumerate(class_of_prompt) if owner == label]
        empty = torch.full_like(log_NP[:, 0], -torch.inf)
        columns.append(log_NP[:, prompts].logsumexp(dim=1) if prompts else empty)
    return torch.stack(columns, dim=1)


def _balanced(labels_N: torch.Tensor, certainty_N: torch.Tensor, balance: float) -> torch.Tensor:
    """Ignore the least certain labels of every class beyond its cap; ties keep the earlier patch."""
    found, counts = labels_N[labels_N != IGNORED].unique(return_counts=True)
    if not len(found):
        return labels_N
    cap = max(1, int(balance * counts.float().median()))
    kept_N = labels_N.clone()
    for label in found[counts > cap]:
        members = (labels_N == label).nonzero().squeeze(1)
        order = certainty_N[members].argsort(descending=True, stable=True)
        kept_N[members[order[cap:]]] = IGNORED
    return kept_N
