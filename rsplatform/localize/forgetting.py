"""What a model still retrieves: the number that a round of self-training may not lose.

In: a model, a split of a dataset. Out: its mean recall. The pictures and captions are the dataset's; no mask enters.
"""

import numpy as np

from rsplatform.config import ConfigError
from rsplatform.dataset.store import SampleStore
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import ImageError
from rsplatform.model.recall import recall_at_k

MAX_PICTURES = 5000
# In points of mean recall, against the course's first teacher (our default).
MAX_LOSS = 1.0


def held_out_recall(embedder: Embedder, root: str, dataset: str, split: str) -> float:
    """Mean recall in percent (recall.py) over all captions of at most 5,000 pictures of a split, evenly spread.

    Raises:
        ConfigError: the dataset has no such split, or a picture of it cannot be decoded.
    """
    store = SampleStore(root, dataset, split)
    samples = store.read(np.unique(np.linspace(0, len(store) - 1, min(len(store), MAX_PICTURES)).astype(int)))
    owners = [index for index, sample in enumerate(samples) for _ in sample.captions]
    try:
        images_ID = embedder.embed_images(
            [sample.image for sample in samples], [sample.ground_sample_distance_m for sample in samples]
        )
    except ImageError as error:
        raise ConfigError(
            f"{dataset}: a picture of split {split!r} is {error}; build the dataset without it"
        ) from error
    texts_TD = embedder.embed_texts([caption for sample in samples for caption in sample.captions])
    return recall_at_k(images_ID, texts_TD, owners)["mean_recall"]
