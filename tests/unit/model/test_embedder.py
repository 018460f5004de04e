"""Vectors: the same whatever the batch, unit length, and patches that pool to the image's embedding."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rsplatform.model.embedder import Embedder, driver_device, granted_device
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.preprocess import ImageError, resize_crop
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.vision_encoder import pool_values
from rsplatform.model.weights import save_model

TEXTS = ["fields", "an aerial image of a harbour with many boats", "", "roads and fields"]


def embedder(pooling: str = "map", **settings) -> Embedder:
    torch.manual_seed(0)
    narrow = {f"{part}_{name}": 32 for part in ("vision", "text") for name in ("width", "mlp_width")}
    options = {"vision_num_layers": 2, "vision_pooling": pooling, "cropped_positions": True}
    config = mammut_config("mini", vocab_size=300, image_size=32, **narrow, **options, **settings)
    return Embedder(Mammut(config), Tokenizer.train(TEXTS, 280), batch_size=2)


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((32, 32, 3), (50, 70, 3), (33, 32, 3))]


def test_embeddings_are_unit_float32_and_do_not_depend_on_the_batch():
    model = embedder()
    cases: list[tuple[Any, list[Any]]] = [(model.embed_images, pictures()), (model.embed_texts, TEXTS)]
    for embed, inputs in cases:
        together = embed(inputs)
        assert together.dtype == np.float32 and together.shape == (len(inputs), model.embedding_width)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(together, np.concatenate([embed([one]) for one in inputs]), atol=1e-5)
        assert embed([]).shape == (0, model.embedding_width)
    with pytest.raises(TypeError, match="list of texts"):
        model.embed_texts("fields")


def test_encoded_bytes_and_arrays_give_the_same_vector():
    model = embedder()
    file = io.BytesIO()
    Image.fromarray(pictures()[1]).save(file, "PNG")
    np.testing.assert_array_equal(model.embed_images([file.getvalue()]), model.embed_images(pictures()[1:2]))
    with pytest.raises(ImageError):
        model.embed_images([b"no picture"])


@pytest.mark.parametrize("pooling", ["map", "mean"])
def test_pooling_all_patches_gives_the_image_embedding(pooling):
    model = embedder(pooling)
    image_HWC = pictures()[0]
    features = model.patch_features(torch.from_numpy(image_HWC)[None])
    scores_BKN = None if features.scores_BKHW is None else features.scores_BKHW.flatten(2)
    pooled_BD = pool_values(features.values_BHWD.flatten(1, 2), scores_BKN)
    np.testing.assert_allclose(model.head(pooled_BD).numpy(), model.embed_images([image_HWC]), atol=1e-5)
    assert model.patch_features(torch.zeros(2, 48, 64, 3, dtype=torch.uint8)).values_BHWD.shape[:3] == (2, 6, 8)
    with pytest.raises(ValueError, match="patches"):
        model.patch_features(torch.zeros(1, 30, 32, 3, dtype=torch.uint8))


def test_distances_are_those_of_the_pixels_that_the_model_sees():
    told = embedder(ground_sample_distance_encoding=True)
    encoding = told.model.vision.scale_encoding
    assert encoding is not None
    with torch.no_grad():
        encoding.weight_DF.normal_(generator=torch.Generator().manual_seed(0))
    unknown, wide = told.embed_images(pictures()), pictures()[1]
    known = told.embed_images(pictures(), [0.5, 2.0, float("nan")])
    np.testing.assert_allclose(known[2], unknown[2], atol=1e-6)
    assert (np.abs(known - unknown).max(axis=1)[:2] > 1e-3).all()
    # 50 pixels of 2 m on the shorter side become 32 of 3.125 m
    square = told.embed_images([resize_crop(wide, 32)], [50 * 2.0 / 32])
    np.testing.assert_allclose(known[1:2], square, atol=1e-5)
    features = told.patch_features(torch.from_numpy(pictures()[0])[None], 0.5)
    assert features.scores_BKHW is not None
    pooled_BD = pool_values(features.values_BHWD.flatten(1, 2), features.scores_BKHW.flatten(2))
    np.testing.assert_allclose(told.head(pooled_BD).numpy(), known[:1], atol=1e-5)
    with pytest.raises(ValueError, match="argument"):
        told.embed_images(pictures(), [0.5])


def test_a_model_in_training_is_embedded_as_in_evaluation_and_stays_in_training():
    model = embedder()
    model.model.train()
    np.testing.assert_array_equal(model.embed_images(pictures()), model.embed_images(pictures()))
    assert model.model.training


def test_a_loaded_embedder_is_the_same_with_the_same_hash(tmp_path):
    model = embedder()
    save_model(tmp_path, model.model, model.tokenizer)
    loaded = Embedder.load(tmp_path)
    assert loaded.model_hash == model.model_hash and len(loaded.model_hash) == 64
    np.testing.assert_array_equal(loaded.embed_texts(TEXTS), Embedder(model.model, model.tokenizer).embed_texts(TEXTS))
    with torch.no_grad():
        loaded.model.log_logit_scale.add_(0.1)
    assert Embedder(loaded.model, loaded.tokenizer).model_hash != model.model_hash


def test_only_a_grant_puts_an_actor_on_a_gpu_and_only_a_visible_gpu_a_driver():
    assert [granted_device(num_gpus) for num_gpus in (0, 0.25, 1)] == ["cpu", "cuda", "cuda"]
    assert driver_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_model_on_another_device_gets_its_inputs_there(tmp_path):
    """Meta tensors refuse to meet those of the CPU, so what comes this far was moved; they hold no values to copy."""
    model = embedder()
    save_model(tmp_path, model.model, model.tokenizer)
    elsewhere = Embedder.load(tmp_path, "meta")
    assert elsewhere.device == torch.device("meta")
    features = elsewhere.patch_features(torch.zeros(2, 32, 48, 3, dtype=torch.uint8))
    assert features.values_BHWD.device.type == "meta" and features.values_BHWD.shape[:3] == (2, 4, 6)
    assert elsewhere.head(features.values_BHWD).device.type == "meta"
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        elsewhere.embed_images(pictures())
    with pytest.raises(RuntimeError, match="device"):
        elsewhere.head(torch.zeros(1, features.values_BHWD.shape[-1]))
