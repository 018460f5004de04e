"""The map page where pictures, links, servers or browsers are unusual; its server and its browser are conftest.py's."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from page_browser import search
from PIL import Image

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("kind", ["many_pixels", "many_bytes"])
def test_a_picture_too_large_to_send_is_made_smaller(page: Any, kind: str) -> None:
    """More pixels, or more bytes, than the API takes, as telephones make them."""
    data = io.BytesIO()
    if kind == "many_pixels":
        Image.new("RGB", (8000, 4200), (40, 90, 60)).save(data, "JPEG")
    else:
        noise_HWC = np.random.default_rng(1).integers(0, 256, (1500, 1600, 3), dtype=np.uint8)
        Image.fromarray(noise_HWC).save(data, "PNG", compress_level=0)
        assert len(data.getvalue()) > 6 * 2**20
    with page.expect_response("**/v1/search") as waiting:
        page.set_input_files("#picture", files=[{"name": "a", "mimeType": "image/jpeg", "buffer": data.getvalue()}])
    assert waiting.value.ok
    sent = Image.open(io.BytesIO(base64.b64decode(waiting.value.request.post_data_json["image"].split(",")[1])))
    assert sent.format == "JPEG" and sent.size == ((2048, 1075) if kind == "many_pixels" else (1600, 1500))
    page.wait_for_selector(".card >> nth=11")
    assert page.locator("#error").is_hidden()


def test_a_key_given_again_leaves_scenes_question_and_view_as_they_are(page: Any) -> None:
    search(page, "a road")
    page.evaluate("() => { document.querySelector('#key').hidden = false; }")
    page.fill("#key-value", "renewed")
    with page.expect_response("**/v1/search") as waiting:
        page.press("#key-value", "Enter")
    assert waiting.value.request.post_data_json["text"] == "a road"
    page.wait_for_selector("#results:not([aria-busy]) .card >> nth=11")
    assert page.locator("#error").is_hidden() and page.locator("#key").is_hidden()
    assert page.locator(".peak").count() == 1
