"""Chips become vectors that know their scale: the table's ground sample distance reaches the model."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import tiny_service
import torch
from tiny_service import CHIPS, MODEL

from rsplatform.artifacts import Artifact
from rsplatform.curate.pipeline import DROP_FIELDS
from rsplatform.dataset.store import open_table
from rsplatform.index.embed import CHIP_COLUMNS, ChipEmbedder
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.weights import save_model


def make_model(root: str) -> None:
    """A narrow model at 32 px (chips are resized) that has learned something about scale."""
    torch.manual_seed(0)
    narrow = {f"{part}_{name}": 32 for part in ("vision", "text") for name in ("width", "mlp_width")}
    settings = {"vision_num_layers": 1, "image_size": 32, "vocab_size": 300, "ground_sample_distance_encoding": True}
    model = Mammut(mammut_config("mini", **narrow, **settings))
    assert model.vision.scale_encoding is not None
    with torch.no_grad():
        model.vision.scale_encoding.weight_DF.normal_()
    save_model(Path(Artifact(root, MODEL).path("model")), model, Tokenizer.train(["a field"], 280))
    tiny_service.finish(root, MODEL)


def test_vectors_are_those_of_the_chips_at_their_own_scale(tmp_path: Path) -> None:
    root = str(tmp_path)
    make_model(root)
    tiny_service.make_chips(root)
    chips = open_table(root, CHIPS).to_table(columns=CHIP_COLUMNS, limit=3)
    place = chips.schema.get_field_index("ground_sample_distance_m")
    distances_m = [0.5, 4.0, None]
    chips = chips.set_column(place, chips.schema.field(place), pa.array(distances_m, pa.float32()))
    for field in DROP_FIELDS:
        chips = chips.append_column(field, pa.nulls(3, field.type))
    embed = ChipEmbedder(root, MODEL, None)
    vectors_IE = np.array(embed(chips)["vector"].to_pylist(), dtype=np.float32)
    images = chips["image"].to_pylist()
    expected_IE = embed.embedder.embed_images(images, [0.5, 4.0, float("nan")])
    np.testing.assert_allclose(vectors_IE, expected_IE, atol=1e-3)
    assert (np.abs(vectors_IE - embed.embedder.embed_images(images)).max(axis=1) > 0.01).tolist() == [True, True, False]
