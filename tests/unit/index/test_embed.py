"""Chips become vectors that know their scale: the table's ground sample distance reaches the model."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import tiny_service
from tiny_service import CHIPS, MODEL

from rsplatform.index.embed import ChipEmbedder
from rsplatform.index.sources import ReadRows


def test_vectors_are_those_of_the_chips_at_their_own_scale(tmp_path: Path) -> None:
    root = str(tmp_path)
    tiny_service.make_scaled_model(root)
    tiny_service.make_chips(root)
    embed = ChipEmbedder(root, MODEL, {})
    shard = {"shard": "first", "chips": CHIPS, "id_suffix": "", "start": 0, "rows": 3}
    chips = ReadRows(root, embed.embedder.embedding_width)(shard)
    place = chips.schema.get_field_index("ground_sample_distance_m")
    distances_m = [0.5, 4.0, None]
    chips = chips.set_column(place, chips.schema.field(place), pa.array(distances_m, pa.float32()))
    vectors_IE = np.array(embed(chips)["vector"].to_pylist(), dtype=np.float32)
    images = chips["image"].to_pylist()
    expected_IE = embed.embedder.embed_images(images, [0.5, 4.0, float("nan")])
    np.testing.assert_allclose(vectors_IE, expected_IE, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors_IE, axis=1), 1, atol=1e-3)
    assert (np.abs(vectors_IE - embed.embedder.embed_images(images)).max(axis=1) > 0.01).tolist() == [True, True, False]
