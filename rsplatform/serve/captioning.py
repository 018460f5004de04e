"""The model's own caption of a picture: greedy generation, one token at a time, through `caption_logits`.

In: picture bytes, and the metres that a pixel of them covers where known. Out: text. No sampling
and no beam: the same picture always gets the same words.
"""

import math

import numpy as np
import torch

from rsplatform.model.embedder import Embedder
from rsplatform.model.normalise import normalise
from rsplatform.model.preprocess import read_square
from rsplatform.model.tokenizer import PAD_ID
from rsplatform.serve.api import MAX_IMAGE_PIXELS


def greedy_caption(embedder: Embedder, image: bytes, ground_sample_distance_m: float = math.nan) -> str:
    """Caption of one picture, at most as long as the model's context.

    The image is encoded again for each token (the model keeps no state between calls), so a caption costs as many
    forwards as it has tokens.

    Raises:
        ImageError: bytes that are no acceptable picture.
    """
    model = embedder.model
    vision = model.config.vision
    seen = read_square(image, embedder.image_size, ground_sample_distance_m, max_pixels=MAX_IMAGE_PIXELS)
    images_BHWC = torch.from_numpy(seen.pixels_HWC)[None].to(embedder.device)
    images_BCHW = normalise(images_BHWC, vision.pixel_mean, vision.pixel_std)
    distance_m_B = images_BCHW.new_tensor([seen.ground_sample_distance_m])
    start_id, end_id = embedder.tokenizer.start_id, embedder.tokenizer.end_id
    tokens = [start_id]
    with torch.no_grad():
        while len(tokens) < model.config.text.context_length:
            tokens_BT = torch.tensor([[*tokens, PAD_ID]], device=embedder.device)
            logits_V = model.caption_logits(images_BCHW, tokens_BT, distance_m_B)[0, -1]
            logits_V[[PAD_ID, start_id]] = -torch.inf
            token = int(logits_V.argmax())
            if token == end_id:
                break
            tokens.append(token)
    return embedder.tokenizer.decode(np.asarray(tokens))
