"""One training batch, as the loader makes it and the loop reads it. Torch only; what fills it is in loader.py.

Shapes: B batch, H W pixels, C channels, T tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsplatform.model.vocabulary_loss import PAD_ID

# Padding to few different widths keeps the number of shapes small for compiled kernels.
TOKEN_MULTIPLE = 8


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch: uint8 pictures, int64 token ids (0 = pad) and the sample ids.

    `places_B` (int64) are the samples' places in the global batch: what is drawn for a sample follows from its place,
    whichever process runs it, beside whichever others. `ground_sample_distance_m_B` is that of the pixels here, after
    resizing and cropping; NaN (or None) is unknown.
    `undecodable`: pictures met on the way that could not be decoded, in whose place others stand (loader.py); infinite
    where none was found, and then the batch is not to be trained on.
    """

    images_BHWC: Tensor
    tokens_BT: Tensor
    sample_ids: tuple[str, ...]
    places_B: Tensor
    ground_sample_distance_m_B: Tensor | None = None
    undecodable: float = 0

    def distances_on(self, device: torch.device) -> Tensor | None:
        """The ground sample distances on `device`."""
        distance_m_B = self.ground_sample_distance_m_B
        return None if distance_m_B is None else distance_m_B.to(device)

    def rows(self, start: int, end: int) -> "Batch":
        """Samples start … end - 1 of every field, their captions padded to a bucket of their own."""
        width = bucket_width(int(self._lengths()[start:end].max()), self.tokens_BT.shape[1])
        distance_m_B = self.ground_sample_distance_m_B
        return replace(
            self,
            images_BHWC=self.images_BHWC[start:end],
            tokens_BT=self.tokens_BT[start:end, :width],
            sample_ids=self.sample_ids[start:end],
            places_B=self.places_B[start:end],
            ground_sample_distance_m_B=None if distance_m_B is None else distance_m_B[start:end],
        )

    def by_length(self) -> "Batch":
        """The same samples in the order of their captions' lengths, for micro-batches that are padded each to its own.

        This is where captions are bucketed, because here it changes nothing: which samples make up the global batch,
        and on which process, stays the sampler's choice for every world size, so the contrastive loss has the
        negatives that it would have without buckets. Buckets of whole batches would give it negatives of like lengths
        only. Samples lie on the processes at random: the n-th micro-batches of all processes hold about the same
        lengths, and none waits for another's long captions.

        A batch that is run at once stays unsorted: where pads are left out of the mean, attention alone computes
        them (transformer.TokenLayout), and four sorted parts took 2 % less than four unsorted ones (`tiny` at 64 px on
        a CPU, captions as long as RSICD's); in the paper's model all attention of the texts is half a percent of a
        forward pass.
        """
        order_B = self._lengths().argsort(stable=True)
        distance_m_B = self.ground_sample_distance_m_B
        return replace(
            self,
            images_BHWC=self.images_BHWC[order_B],
            tokens_BT=self.tokens_BT[order_B],
            sample_ids=tuple(self.sample_ids[row] for row in order_B.tolist()),
            places_B=self.places_B[order_B],
            ground_sample_distance_m_B=None if distance_m_B is None else distance_m_B[order_B],
        )

    def _lengths(self) -> Tensor:
        """Up to the last token that is no padding: another model's tokenizer may use 0 within a caption."""
        places_T = torch.arange(1, self.tokens_BT.shape[1] + 1)
        return ((self.tokens_BT != PAD_ID) * places_T).amax(1)


def bucket_width(longest: int, widest: int) -> int:
    """Tokens that a batch whose longest caption has `longest` is padded to: a multiple of 8, at most `widest`."""
    return min(widest, -(-longest // TOKEN_MULTIPLE) * TOKEN_MULTIPLE)
