"""MaMMUT's training loss: contrastive (softmax, focal sigmoid or SigLIP) plus captioning, on one process or many.

In: MammutOutput, the token ids it was made from, a LossConfig, and a FeatureGather where there are several
processes. Out: the loss to call backward on, and its detached parts. Does not run the model or average gradients.

Several processes: each computes its own rows of the loss against the features of all of them, scaled so that the
mean over processes (what DDP, FSDP and DeepSpeed make of gradients) is the loss of the global batch.
Shapes: B own batch, G global batch, E embedding, T tokens.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rsplatform.model.gather import FeatureGather
from rsplatform.model.mammut import MammutOutput


@dataclass(frozen=True)
class LossConfig:
    """Weights 1:1 are the paper's [F]; the open reproduction has caption_weight 2. Softmax is our default [D].

    "sigmoid" is SigLIP's [F] and needs a model with `logit_bias`. `z_loss_weight`: see `vocabulary_loss`; PaLM used
    1e-4 [F], off is our default [D].
    `mask_identical_texts` [D]: the same sentence on two images of a batch is no negative pair.
    """

    contrastive: Literal["softmax", "focal_sigmoid", "sigmoid"] = "softmax"
    contrastive_weight: float = 1.0
    caption_weight: float = 1.0
    focal_gamma: float = 1.0
    focal_alpha: float = 0.5
    mask_identical_texts: bool = True
    z_loss_weight: float = 0.0

    def __post_init__(self):
        choices = get_args(LossConfig.__annotations__["contrastive"])
        if self.contrastive not in choices:
            raise ValueError(f"loss.contrastive: '{self.contrastive}' is not one of {', '.join(choices)}")
        if min(self.contrastive_weight, self.caption_weight, self.z_loss_weight) < 0:
            raise ValueError("loss weights must not be negative")


class ContrastiveBatch(NamedTuple):
    """This process's embeddings, those of all processes in rank order, and where the own rows start among them.

    The sigmoid loss counts each pair once and reads no images but the own: for it, `all_image_GE` is only those.
    `ignored_BG` is True at pairs that are neither positive nor negative; None where there is none.
    """

    image_BE: Tensor
    text_BE: Tensor
    all_image_GE: Tensor
    all_text_GE: Tensor
    first_row: int = 0
    ignored_BG: Tensor | None = None

    @property
    def positives_B(self) -> Tensor:
        """The column of each own row's positive pair."""
        return torch.arange(len(self.image_BE), device=self.image_BE.device) + self.first_row


def mammut_loss(
    output: MammutOutput,
    tokens_BT: Tensor,
    config: LossConfig,
    gather: FeatureGather | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the contrastive and the captioning loss, and its detached parts.

    With `gather`, parts are this process's; their mean over processes is the value of the global batch.

    Raises:
        ValueError: the model was not built or not run for this config: no logit bias for the sigmoid loss or one for
            another loss, or a forward without the z-loss.
    """
    _check_output(output, config)
    batch = contrastive_batch(output, tokens_BT, config, gather)
    if config.contrastive == "softmax":
        contrastive = softmax_contrastive_loss(batch, output.logit_scale)
    elif output.logit_bias is not None:
        contrastive = sigmoid_contrastive_loss(batch, output.logit_scale, output.logit_bias)
    else:
        contrastive = focal_contrastive_loss(
            batch, output.logit_scale, gamma=config.focal_gamma, alpha=config.focal_alpha
        )
    caption = caption_loss(output, gather)
    loss = config.contrastive_weight * contrastive + config.caption_weight * caption
    parts = {"loss": loss, "contrastive": contrastive, "caption": caption, "logit_scale": output.logit_scale}
    if output.logit_bias is not None:
        parts["logit_bias"] = output.logit_bias
    if output.caption_z_loss_sum is not None:
        parts["z_loss"] = mean_per_token(output.caption_z_loss_sum, output, gather)
        parts["caption"] = caption - config.z_loss_weight * parts["z_loss"]
    return loss, {name: value.detach() for name, value in parts.items()}


def _check_output(output: MammutOutput, config: LossConfig) -> None:
    if (config.contrastive == "sigmoid") != (output.logit_bias is not None):
        raise ValueError(
            f"loss.contrastive '{config.contrastive}' on a model {'without' if output.logit_bias is None else 'with'} "
            "a logit bias: 'sigmoid' and the model setting logit_bias: true belong together"
        )
    if bool(config.z_loss_weight) != (output.caption_z_loss_sum is not None):
        raise ValueError(
            f"loss.z_loss_weight is {config.z_loss_weight}, the model's forward was run "
            f"{'without' if output.caption_z_loss_sum is None else 'with'} one: give it the same z_loss_weight"
        )


def contrastive_batch(
    output: MammutOutput, tokens_BT: Tensor, config: LossConfig, gather: FeatureGather | None
) -> ContrastiveBatch:
    """The embeddings to contrast, gathered over processes if there are several."""
    image_BE, text_BE = output.image_embeddings_BE, output.text_embeddings_BE
    all_image_GE, all_text_GE, first_row, rows = image_BE, text_BE, 0, None
    if gather is not None:
        all_text_GE = gather.rows(text_BE)
        if config.contrastive != "sigmoid":
            all_image_GE = gather.rows(image_BE)
        first_row, rows = gather.rank * len(image_BE), gather.rows
    ignored_BG = None
    if config.mask_identical_texts:
        keys_B = text_keys(tokens_BT)
        ignored_BG = identical_text_pairs(keys_B, keys_B if rows is None else rows(keys_B), first_row)
    return ContrastiveBatch(image_BE, text_BE, all_image_GE, all_text_GE, first_row, ignored_BG)


def softmax_contrastive_loss(batch: ContrastiveBatch, logit_scale: Tensor) -> Tensor:
    """InfoNCE: the mean of image-to-text and text-to-image cross-entropy over the own rows."""
    image_logits_BG = logit_scale * batch.image_BE @ batch.all_text_GE.T
    text_logits_BG = logit_scale * batch.text_BE @ batch.all_image_GE.T
    if batch.ignored_BG is not None:
        image_logits_BG = image_logits_BG.masked_fill(batch.ignored_BG, -torch.inf)
        text_logits_BG = text_logits_BG.masked_fill(batch.ignored_BG, -torch.inf)
    positives_B = batch.positives_B
    return (F.cross_entropy(image_logits_BG, positives_B) + F.cross_entropy(text_logits_BG, positives_B)) / 2


def focal_contrastive_loss(
    batch: ContrastiveBatch, logit_scale: Tensor, *, gamma: float = 1.0, alpha: float = 0.5
) -> Tensor:
    """Focal sigmoid loss: -(1/B) sum_ij (1 - p_ij)^gamma log p_ij, p = sigmoid on the diagonal, 1 - sigmoid off it.

    gamma and alpha as in code of the same group [F]; 1/B is inferred [F]. alpha weighs positive pairs and
    1 - alpha negative ones, and both directions are added, so that 0.5 is the formula above: our reading [D].
    """
    positive_BG = F.one_hot(batch.positives_B, len(batch.all_text_GE)).bool()
    weights_BG = torch.where(positive_BG, alpha, 1 - alpha)
    if batch.ignored_BG is not None:
        weights_BG = weights_BG.masked_fill(batch.ignored_BG, 0.0)
    total = torch.zeros((), device=batch.image_BE.device, dtype=batch.image_BE.dtype)
    pairs = ((batch.image_BE, batch.all_text_GE), (batch.text_BE, batch.all_image_GE))
    for rows_BE, columns_GE in pairs:
        logits_BG = logit_scale * rows_BE @ columns_GE.T
        log_p_BG = F.logsigmoid(torch.where(positive_BG, logits_BG, -logits_BG))
        # 1 - p through expm1: p near 1 would lose all its digits otherwise
        focus_BG = (-torch.expm1(log_p_BG)) ** gamma if gamma else torch.ones_like(log_p_BG)
        total = total - (weights_BG * focus_BG * log_p_BG).sum()
    return total / len(batch.image_BE)


def sigmoid_contrastive_loss(batch: ContrastiveBatch, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """SigLIP: -(1/B) sum_ij log sigmoid(z_ij (scale v_i·l_j + bias)), z = 1 on the diagonal and -1 off it.

    Equation 1 of "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343) [F]; each pair counts once. Its
    scale is not limited; that ours stops at 100 is our default [D].
    """
    logits_BG = logit_scale * batch.image_BE @ batch.all_text_GE.T + logit_bias
    positive_BG = F.one_hot(batch.positives_B, len(batch.all_text_GE)).bool()
    log_p_BG = F.logsigmoid(torch.where(positive_BG, logits_BG, -logits_BG))
    if batch.ignored_BG is not None:
        log_p_BG = log_p_BG.masked_fill(batch.ignored_BG, 0.0)
    return -log_p_BG.sum() / len(batch.image_BE)


def caption_loss(output: MammutOutput, gather: FeatureGather | None = None) -> Tensor:
    """Mean loss of the next token over all non-pad targets, of the global batch if there is a gather.

    Cross-entropy, and with it the weighted z-loss where forward was given a weight.
    """
    return mean_per_token(output.caption_loss_sum, output, gather)


def mean_per_token(values_sum: Tensor, output: MammutOutput, gather: FeatureGather | None) -> Tensor:
    """A sum over this process's caption tokens, by the mean number of them on a process."""
    if gather is None:
        return values_sum / output.caption_token_count.clamp(min=1)
    # captions differ in length, so the mean of the processes' means is not the mean of the global batch
    all_tokens = gather.total(output.caption_token_count).clamp(min=1)
    return values_sum * gather.world_size / all_tokens


def text_keys(tokens_BT: Tensor) -> Tensor:
    """A 64-bit key per text that does not depend on the padding: equal texts, equal keys."""
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    mixed_BT = tokens_BT * 0x2545F4914F6CDD1D + places_T * 0x1B873593CC9E2D51
    for multiplier in (0x369DEA0F31A53F85, 0x106689D45497FDB5):
        mixed_BT = (mixed_BT ^ (mixed_BT >> 31)) * multiplier  # int64 wraps, which is what a hash wants
    return torch.where(tokens_BT == 0, 0, mixed_BT ^ (mixed_BT >> 29)).sum(1)


def identical_text_pairs(keys_B: Tensor, all_keys_G: Tensor, first_row: int = 0) -> Tensor:
    """True where another sample has the same text (B, G); a sample's own pair is False."""
    same_BG = keys_B.unsqueeze(1) == all_keys_G.unsqueeze(0)
    own_B = torch.arange(len(keys_B), device=keys_B.device)
    same_BG[own_B, own_B + first_row] = False
    return same_BG
