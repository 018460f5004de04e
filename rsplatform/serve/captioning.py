"""The model's own captions of pictures: greedy generation, one token at a time for all pictures of a batch.

In: picture bytes, and the metres that a pixel of them covers where known. Out: text. No sampling and no beam: the
same picture always gets the same words.
Shapes: B pictures, T tokens, V vocabulary, S D image tokens and their width.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from rsplatform.model.embedder import Embedder
from rsplatform.model.normalise import normalise
from rsplatform.model.preprocess import read_square
from rsplatform.model.tokenizer import PAD_ID
from rsplatform.serve.api import MAX_IMAGE_PIXELS


def greedy_caption(embedder: Embedder, image: bytes, ground_sample_distance_m: float = math.nan) -> str:
    """`greedy_captions` of one picture."""
    return greedy_captions(embedder, [image], [ground_sample_distance_m])[0]


def greedy_captions(
    embedder: Embedder, images: Sequence[bytes], ground_sample_distances_m: Sequence[float]
) -> list[str]:
    """Captions, each at most as long as the model's context.

    Images are encoded once; the text is read again for each token (the decoder keeps no state between calls).

    Raises:
        ImageError: bytes that are no acceptable picture.
    """
    model, vision = embedder.model, embedder.model.config.vision
    pairs = zip(images, ground_sample_distances_m, strict=True)
    seen = [read_square(image, embedder.image_size, metres, max_pixels=MAX_IMAGE_PIXELS) for image, metres in pairs]
    images_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC for picture in seen])).to(embedder.device)
    images_BCHW = normalise(images_BHWC, vision.pixel_mean, vision.pixel_std)
    distance_m_B = images_BCHW.new_tensor([picture.ground_sample_distance_m for picture in seen])
    start_id, end_id = embedder.tokenizer.start_id, embedder.tokenizer.end_id
    tokens_BT = torch.full((len(seen), 1), start_id, device=embedder.device)
    is_done_B = torch.zeros(len(seen), dtype=torch.bool, device=embedder.device)
    with torch.no_grad():
        image_BSD = model.image_to_text(model.image_tokens(images_BCHW, distance_m_B))
        while tokens_BT.shape[1] < model.config.text.context_length and not bool(is_done_B.all()):
            hidden_BD = model.text.generative(tokens_BT, image_BSD)[:, -1]
            logits_BV = functional.linear(hidden_BD, model.text.vocabulary_weight_VD)
            logits_BV[:, [PAD_ID, start_id]] = -torch.inf
            # the end stays in place, never a pad: a pad has no hidden state to go on from
            next_B = logits_BV.argmax(dim=1).masked_fill(is_done_B, end_id)
            is_done_B |= next_B == end_id
            tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
    return [embedder.tokenizer.decode(_until(row_T, end_id)) for row_T in tokens_BT.cpu().numpy()]


def _until(tokens_T: np.ndarray, end_id: int) -> np.ndarray:
    """The tokens before the end."""
    ends = np.flatnonzero(tokens_T == end_id)
    return tokens_T[: ends[0]] if len(ends) else tokens_T
