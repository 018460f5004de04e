"""Tiles fit every model and window, and a map covers exactly its picture, whatever the picture's size."""

import itertools

import bright_embedder
import numpy as np
import pytest
import torch

from rsplatform.config import ConfigError, validate
from rsplatform.evaluate.run import EvaluateConfig
from rsplatform.evaluate.segmentation import decide
from rsplatform.localize.picture import BATCH_TILES, Scale, picture_maps, tiling
from rsplatform.localize.run import LocalizeConfig
from rsplatform.localize.scene import Tiling
from rsplatform.localize.self_train import SelfTrainConfig
from rsplatform.localize.smooth_attention import smooth_attention
from rsplatform.localize.window import MAX_WINDOW
from rsplatform.model.embedder import Embedder
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.serve.deployment import ServeConfig


def tiny(native_patches: int, patch_size: int = 8, **settings) -> Embedder:
    """A random small embedder whose own picture is `native_patches` patches a side."""
    torch.manual_seed(0)
    narrow = {f"{part}_{name}": 32 for part in ("vision", "text") for name in ("width", "mlp_width")}
    sizes = {"image_size": native_patches * patch_size, "patch_size": patch_size, "vision_num_layers": 1}
    config = mammut_config("mini", vocab_size=300, **sizes, **narrow, **settings)
    return Embedder(Mammut(config), Tokenizer.train(["a field"], 280))


@pytest.mark.parametrize("native_patches", [1, 2, 4, 8, 14])
@pytest.mark.parametrize("window", [1, 3, 5, 7, MAX_WINDOW])
def test_tiles_fit_every_model_and_window(native_patches: int, window: int) -> None:
    found = tiling(tiny(native_patches), window)
    assert found.tile_patches >= native_patches and found.dropped_patches == window - 1
    # what is kept of a tile between its dropped edges is never less than half of the model's own side
    assert found.tile_patches - 2 * found.dropped_patches >= max(1, native_patches // 2)
    assert 1 <= found.batch_tiles <= BATCH_TILES
    assert found.batch_tiles * found.tile_patches**2 <= max(BATCH_TILES * native_patches**2, found.tile_patches**2)


def test_the_tiles_of_the_demo_model_stay_as_they_were() -> None:
    assert tiling(tiny(8), 3) == Tiling(8, 4, 3, batch_tiles=32)
    assert tiling(tiny(14), 3) == Tiling(14, 7, 3, batch_tiles=32)


@pytest.mark.parametrize(("native_patches", "patch_size", "window"), [(4, 16, 3), (8, 8, 5)])
def test_models_with_few_patches_are_tiled_too(native_patches: int, patch_size: int, window: int) -> None:
    embedder = tiny(native_patches, patch_size)
    image = np.random.default_rng(0).integers(0, 256, (12 * patch_size, 15 * patch_size, 3), dtype=np.uint8)
    texts_CE = torch.from_numpy(embedder.embed_texts(["a field", "water"]))
    maps_CHW = picture_maps(embedder, image, texts_CE, window=window)
    assert maps_CHW.shape == (2, 12, 15) and maps_CHW.isfinite().all() and maps_CHW.abs().max() <= 1 + 1e-5


def test_the_scale_of_the_model_reaches_every_tile() -> None:
    told = tiny(8, ground_sample_distance_encoding=True)
    encoding = told.model.vision.scale_encoding
    assert encoding is not None
    with torch.no_grad():
        encoding.weight_DF.normal_(generator=torch.Generator().manual_seed(0))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    texts_CE = torch.from_numpy(told.embed_texts(["a field", "water"]))
    maps = [picture_maps(told, image, texts_CE, scale=Scale(1.0, metres)) for metres in (float("nan"), 0.5, 5.0)]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(maps, 2))
    features = told.patch_features(torch.from_numpy(image)[None], 5.0)
    whole = smooth_attention(features.values_BHWD, texts_CE, head=told.head, scores_BHW=features.scores_BKHW)[0]
    torch.testing.assert_close(maps[2], whole, atol=1e-6, rtol=0)


def test_narrower_windows_share_the_patches_of_the_wide_one() -> None:
    """Each map is what smooth attention gives in one tile, and the picture is encoded once for all windows."""
    embedder = tiny(8)
    side = tiling(embedder, 5).tile_patches * embedder.patch_size
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    texts_CE = torch.from_numpy(embedder.embed_texts(["a field", "water"]))
    features = embedder.patch_features(torch.from_numpy(image)[None])
    encoded: list[int] = []
    embedder.model.vision.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    maps_CHW = picture_maps(embedder, image, texts_CE, window=5, narrower=[1, 3])
    assert encoded == [1]
    for first, window in ((0, 5), (2, 1), (4, 3)):
        expected = smooth_attention(
            features.values_BHWD, texts_CE, head=embedder.head, scores_BHW=features.scores_BKHW, window=window
        )
        torch.testing.assert_close(maps_CHW[first : first + 2], expected[0], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="not be wider"):
        picture_maps(embedder, image, texts_CE, window=3, narrower=[5])


def test_tiles_meet_the_model_where_it_is() -> None:
    """Meta tensors refuse to meet those of the CPU: all goes well up to the copy of the finished maps."""
    embedder = tiny(8)
    embedder.model.to("meta")
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        picture_maps(embedder, np.zeros((80, 80, 3), dtype=np.uint8), torch.ones(1, embedder.embedding_width))


def spot_picture(height: int, width: int, row: float, column: float) -> np.ndarray:
    """Black, with a white disc of 12 px radius round a centre."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    disc = (rows - row) ** 2 + (columns - column) ** 2 <= 12**2
    return np.repeat(np.where(disc, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize(("height", "width", "scale"), [(97, 201, 1.0), (131, 77, 0.75), (50, 83, 1.6), (96, 160, 1.0)])
def test_labels_lie_where_the_picture_is_bright(height: int, width: int, scale: float) -> None:
    """The disc lies in the far corner, where a grid that is larger than the picture is off by most."""
    row, column = height - 16.0, width - 16.0
    image = spot_picture(height, width, row, column)
    embedder = bright_embedder.bright_embedder()
    maps_CHW = picture_maps(embedder, image, bright_embedder.bright_and_dark_texts(), scale=Scale(scale), window=1)
    assert maps_CHW.shape[1:] == (max(1, round(height * scale / 8)), max(1, round(width * scale / 8)))
    labels_HW = decide(maps_CHW, [0, 1], (height, width))
    found_rows, found_columns = np.nonzero(labels_HW == 1)
    assert abs(found_rows.mean() + 0.5 - row) < 1.5 and abs(found_columns.mean() + 0.5 - column) < 1.5


@pytest.mark.parametrize("window", [0, 4, MAX_WINDOW + 2])
def test_windows_without_a_centre_or_out_of_range_are_refused_with_the_recipe(window: int) -> None:
    classes = {"classes": [{"name": "a", "prompts": ["a"]}], "background_prompts": ["b"]}
    refs = {"model": "model/a/v1", "chips": "chips/a/v1", "dataset": "dataset/a/v1", "index": "index/a/v1"}
    benchmark = {"type": "dataset_retrieval", "name": "a", "dataset": refs["dataset"]}
    recipes = {
        EvaluateConfig: {"benchmarks": [benchmark]},
        LocalizeConfig: classes | {"scenes": {"path": "scenes"}, "ground_sample_distance_m": 1.0},
        SelfTrainConfig: classes,
        ServeConfig: {},
    }
    for config_class, values in recipes.items():
        field = "smooth_attention_window" if config_class is ServeConfig else "window"
        known = {name: ref for name, ref in refs.items() if name in config_class.model_fields}
        recipe = {"output": "x/a/v1", **known, **values}
        assert getattr(validate(config_class, recipe | {field: 5}, "recipe.yaml"), field) == 5
        words = "take 3 or 5" if window == 4 else "equal to"
        with pytest.raises(ConfigError, match=rf"recipe\.yaml: {field}: .*{words}"):
            validate(config_class, recipe | {field: window}, "recipe.yaml")
