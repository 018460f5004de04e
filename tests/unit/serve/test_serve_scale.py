"""What is served of a chip is the model's at the chip's own scale; of an upload, at an unknown one."""

import asyncio
import base64

import numpy as np
import pytest
import tiny_service
import torch

from rsplatform.cluster import Cluster
from rsplatform.serve.api import SearchRequest
from rsplatform.serve.api_pictures import CaptionRequest, LocalizeRequest
from rsplatform.serve.localization import Localization
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.services import Services, local_services

UNKNOWN = float("nan")
SEEN_M = 2 * tiny_service.GSD_M  # a chip of 64 px is shown to the model at 32 px


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    """A model with a scale encoding, chips of one scale and their index."""
    root = str(tmp_path_factory.mktemp("root"))
    tiny_service.make_scaled_model(root)
    tiny_service.make_chips(root)
    tiny_service.make_index(root)
    refs = (tiny_service.MODEL, tiny_service.INDEX, tiny_service.CHIPS)
    return local_services(Retrieval(Cluster(root=root), *refs))


def test_every_answer_about_a_chip_tells_the_model_its_scale(services: Services) -> None:
    seen_m: list[float] = []
    encoding = services.retrieval.embedder.model.vision.scale_encoding
    assert encoding is not None

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen_m.extend(inputs[0].tolist())

    chip_id = f"{tiny_service.SCENE}-0003"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    upload = base64.b64encode(tiny_service.jpeg(pixels)).decode()
    answers = {
        "search": (services.search(SearchRequest(text="a stadium", k=3, localize=True)), SEEN_M),
        "localize": (services.localize(LocalizeRequest(chip_id=chip_id, texts=["a road"])), SEEN_M),
        "heatmap": (services.heatmap(chip_id, "a road", None, []), SEEN_M),
        "caption": (services.caption(CaptionRequest(chip_id=chip_id)), SEEN_M),
        "upload": (services.localize(LocalizeRequest(image=upload, texts=["a road"])), UNKNOWN),
        "upload's caption": (services.caption(CaptionRequest(image=upload)), UNKNOWN),
    }
    handle = encoding.register_forward_pre_hook(note)
    for name, (answer, expected_m) in answers.items():
        seen_m.clear()
        asyncio.run(answer)
        assert seen_m, name
        np.testing.assert_allclose(seen_m, expected_m, err_msg=name)
    handle.remove()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
def test_maps_of_a_picture_depend_on_its_scale(services: Services, height: int, width: int) -> None:
    embedder = services.retrieval.embedder
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images, texts_CE = [tiny_service.jpeg(pixels)] * 3, embedder.embed_texts(["a road"])
    localization = Localization(embedder)
    near, far, unknown = localization.maps(images, texts_CE, [0.5, 5.0, UNKNOWN])
    (untold,) = localization.maps(images[:1], texts_CE)
    np.testing.assert_allclose(unknown, untold, atol=1e-6)
    assert min(np.abs(near - far).max(), np.abs(near - unknown).max()) > 1e-3
