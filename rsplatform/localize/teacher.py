"""The teacher of self-training: smooth score maps of unlabelled pictures, averaged over views that must agree.

In: a model, pictures, prompts, and which classes a picture can show where that is known. Out: pseudo-labels per patch
and how far the views agree. There is no argument through which a mask could enter.
Shapes: B pictures, H W pixels or patches, P prompts, C classes (background first), E embedding, V views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from rsplatform.localize.pseudo_labels import IGNORED, PseudoLabelRule, pseudo_labels, rule_out
from rsplatform.localize.smooth_attention import smooth_attention
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import Square

BATCH = 64


@dataclass(frozen=True)
class View:
    """How a picture is looked at: turned by quarters, then mirrored left to right, at `scale` times its size."""

    quarter_turns: int = 0
    is_mirrored: bool = False
    scale: float = 1.0


# Our default: all quarter turns, a mirror, and two sizes that a small ViT still reads (at 1.5 and beyond, the demo
# model's maps fall apart). A map that depends on how the camera was held, or how high, is noise.
VIEWS = (*(View(turns) for turns in range(4)), View(is_mirrored=True), View(scale=0.75), View(scale=1.25))


@dataclass(frozen=True)
class TeacherLabels:
    """labels_BHW int64 (-1 ignored), and each picture's share of patches that all views give the same best prompt."""

    labels_BHW: torch.Tensor
    agreement_B: torch.Tensor

    @property
    def agreement(self) -> float:
        """Its mean over the pictures."""
        return float(self.agreement_B.mean())

    @property
    def labelled_fraction(self) -> float:
        """Share of patches that carry a label."""
        return float((self.labels_BHW != IGNORED).float().mean())


def view_maps(
    embedder: Embedder,
    pictures: Sequence[Square],
    texts_PE: torch.Tensor,
    window: int,
    views: Sequence[View] = VIEWS,
) -> torch.Tensor:
    """Smooth maps (V, B, P, H, W) of pictures, each view's map turned back into the picture's own frame and grid.

    On the model's device, wherever the texts are. The model is told the scale of each picture, as the view changes it.
    """
    images_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC for picture in pictures]))
    distances_m = torch.tensor([picture.ground_sample_distance_m for picture in pictures])
    texts_PE, maps = texts_PE.to(embedder.device), []
    grid = (images_BHWC.shape[1] // embedder.patch_size, images_BHWC.shape[2] // embedder.patch_size)
    for view in views:
        seen_BHWC = _seen(images_BHWC, view, embedder.patch_size)
        factor = images_BHWC.shape[1] / seen_BHWC.shape[1]
        features = embedder.patch_features(seen_BHWC, (distances_m * factor).tolist())
        maps_BPHW = smooth_attention(
            features.values_BHWD, texts_PE, head=embedder.head, scores_BHW=features.scores_BKHW, window=window
        )
        maps.append(_turned_back(maps_BPHW, view, grid))
    return torch.stack(maps)


def _seen(images_BHWC: torch.Tensor, view: View, patch_size: int) -> torch.Tensor:
    seen_BHWC = torch.rot90(images_BHWC, view.quarter_turns, (1, 2))
    seen_BHWC = seen_BHWC.flip(2) if view.is_mirrored else seen_BHWC
    if view.scale == 1.0:
        return seen_BHWC
    side = max(1, round(seen_BHWC.shape[1] * view.scale / patch_size)) * patch_size
    resized_BCHW = _resized(seen_BHWC.permute(0, 3, 1, 2).float(), (side, side))
    return resized_BCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _turned_back(maps_BPHW: torch.Tensor, view: View, grid: tuple[int, int]) -> torch.Tensor:
    maps_BPHW = maps_BPHW if view.scale == 1.0 else _resized(maps_BPHW, grid)
    maps_BPHW = maps_BPHW.flip(-1) if view.is_mirrored else maps_BPHW
    return torch.rot90(maps_BPHW, -view.quarter_turns, (-2, -1))


def _resized(images_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False)


def teach(
    embedder: Embedder,
    pictures: Sequence[Square],
    texts_PE: torch.Tensor,
    rule: PseudoLabelRule,
    window: int,
    possible_BC: torch.Tensor | None = None,
) -> TeacherLabels:
    """Pseudo-labels of all pictures together, so that "top 20 %" and class balance mean the whole set.

    A patch whose best prompt changes between views is ignored. Where `possible_BC` is given, only the prompts of
    classes that a picture can show compete in it.
    """
    means, agreements = [], []
    for start in track(range(0, len(pictures), BATCH), "pseudo-labels", transient=True):
        maps_VBPHW = view_maps(embedder, pictures[start : start + BATCH], texts_PE, window).cpu()
        if possible_BC is not None:
            maps_VBPHW = rule_out(maps_VBPHW, rule, possible_BC[start : start + BATCH])
        best_VBHW = maps_VBPHW.argmax(dim=2)
        means.append(maps_VBPHW.mean(dim=0))
        agreements.append((best_VBHW == best_VBHW[0]).all(dim=0))
    agrees_BHW = torch.cat(agreements)
    labels_BHW = pseudo_labels(torch.cat(means).masked_fill(~agrees_BHW.unsqueeze(1), torch.nan), rule)
    return TeacherLabels(labels_BHW, agrees_BHW.double().mean(dim=(1, 2)))
