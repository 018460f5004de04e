"""The teacher of self-training: smooth score maps of unlabelled pictures, averaged over views that must agree.

In: a model, pictures, prompts. Out: pseudo-labels per patch and how far the views agree. There is no argument
through which a mask could enter.
Shapes: B pictures, H W pixels or patches, P prompts, E embedding, V views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track

from rsplatform.localize.pseudo_labels import IGNORED, PseudoLabelRule, pseudo_labels
from rsplatform.localize.smooth_attention import smooth_attention
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import Square

# Axes flipped in each view: the identity, both mirrors and the half turn, which keep the patch grid (our default).
VIEWS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (1, 2))
BATCH = 64


@dataclass(frozen=True)
class TeacherLabels:
    """labels_BHW int64 (-1 ignored), and the share of patches whose best prompt is the same in every view."""

    labels_BHW: torch.Tensor
    agreement: float

    @property
    def labelled_fraction(self) -> float:
        """Share of patches that carry a label."""
        return float((self.labels_BHW != IGNORED).float().mean())


def view_maps(embedder: Embedder, pictures: Sequence[Square], texts_PE: torch.Tensor, window: int) -> torch.Tensor:
    """Smooth maps (V, B, P, H, W) of pictures, each view's map turned back into the picture's own frame.

    On the model's device, wherever the texts are. The model is told the scale of each picture.
    """
    images_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC for picture in pictures]))
    distances_m = [picture.ground_sample_distance_m for picture in pictures]
    texts_PE, views = texts_PE.to(embedder.device), []
    for axes in VIEWS:
        features = embedder.patch_features(images_BHWC.flip(axes) if axes else images_BHWC, distances_m)
        maps_BPHW = smooth_attention(
            features.values_BHWD, texts_PE, head=embedder.head, scores_BHW=features.scores_BKHW, window=window
        )
        views.append(maps_BPHW.flip([axis + 1 for axis in axes]) if axes else maps_BPHW)
    return torch.stack(views)


def teach(
    embedder: Embedder, pictures: Sequence[Square], texts_PE: torch.Tensor, rule: PseudoLabelRule, window: int
) -> TeacherLabels:
    """Pseudo-labels of all pictures together, so that "top 20 %" and class balance mean the whole set.

    A patch whose best prompt changes between views is ignored: a map that depends on the camera's turn is noise.
    """
    means, agreements = [], []
    for start in track(range(0, len(pictures), BATCH), "pseudo-labels", transient=True):
        maps_VBPHW = view_maps(embedder, pictures[start : start + BATCH], texts_PE, window)
        best_VBHW = maps_VBPHW.argmax(dim=2)
        means.append(maps_VBPHW.mean(dim=0).cpu())
        agreements.append((best_VBHW == best_VBHW[0]).all(dim=0).cpu())
    agrees_BHW = torch.cat(agreements)
    labels_BHW = pseudo_labels(torch.cat(means).masked_fill(~agrees_BHW.unsqueeze(1), torch.nan), rule)
    return TeacherLabels(labels_BHW, float(agrees_BHW.float().mean()))
