"""The map page where pictures, links, servers or browsers are unusual; its server and its browser are conftest.py's."""

import base64
import io
from typing import Any

import pytest
from page_browser import search
from page_world import PageWorld
from PIL import Image

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("kind", ["many_pixels", "many_bytes"])
def test_a_picture_too_large_to_send_is_made_smaller(page: Any, kind: str) -> None:
    """More pixels, or more bytes, than the API takes, as telephones make them."""
    data = io.BytesIO()
    if kind == "many_pixels":
        Image.new("RGB", (8000, 4200), (40, 90, 60)).save(data, "JPEG")
    else:
        Image.new("RGB", (1600, 1500), (40, 90, 60)).save(data, "PNG", compress_level=0)
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


@pytest.mark.parametrize("served", [None, [0.5, 0.5]])
def test_a_linked_scale_that_the_server_cannot_span_is_asked_and_can_be_cleared(
    page: Any, base_url: str, served: list[float] | None
) -> None:
    def serve_scales(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"gsd_m": served})

    page.route("**/v1/stats", serve_scales)
    with page.expect_response("**/v1/search") as waiting:
        page.goto(f"{base_url}/?q=a+road&gsd=900,")
    assert waiting.value.request.post_data_json["gsd_m"] == [900, 1e6]
    page.wait_for_selector("#results:not([aria-busy])")
    assert page.locator("#gsd output").inner_text() == "900 m – coarsest"
    with page.expect_response("**/v1/search") as waiting:
        page.click("#gsd .clear")
    assert "gsd_m" not in waiting.value.request.post_data_json
    assert "gsd=" not in page.url and page.locator("#gsd").is_hidden()


def test_without_webgl_the_page_says_so_and_results_still_show(page: Any, base_url: str) -> None:
    page.add_init_script(
        "const get = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {"
        "  return kind.startsWith('webgl') ? null : get.call(this, kind, ...rest); };"
    )
    page.goto(f"{base_url}/?bbox=8,48,10,50")
    page.wait_for_selector("#suggestions button")
    assert "hardware acceleration" in page.locator("#no-map").inner_text() and page.locator("#draw").is_hidden()
    search(page, "a road")
    assert page.locator(".card").count() == 12 and page.locator("#error").is_hidden()
    page.wait_for_function("() => document.querySelector('#figure .heat')?.naturalWidth > 0")
    page.locator(".card .open").nth(1).click()
    chosen = page.locator(".card.selected").get_attribute("data-chip")
    assert page.locator("#figure figcaption").inner_text() == chosen
    page.press("body", "Escape")


def test_of_many_scenes_only_those_nearest_to_the_middle_of_the_view_load_tiles(page: Any, base_url: str) -> None:
    """A town of 3000 more scenes around the served ones."""

    def serve_many(route: Any) -> None:
        answer = route.fetch()
        stats = answer.json()
        west, south, east, north = stats["scenes"][0]["bounds_lonlat"]
        for number in range(3000):
            right, up = (east - west) * (number % 60 - 30), (north - south) * (number // 60 - 25)
            bounds = [west + right, south + up, east + right, north + up]
            stats["scenes"].append(stats["scenes"][0] | {"id": f"many{number}", "bounds_lonlat": bounds, "min_zoom": 0})
        route.fulfill(response=answer, json=stats)

    asked: set[str] = set()
    page.route("**/v1/stats", serve_many)
    page.on("request", lambda request: asked.add(request.url.split("/")[4]) if "/tiles/many" in request.url else None)
    page.route("**/tiles/many*/**", lambda route: route.fulfill(status=204))
    page.goto(base_url)
    if len(asked) < 50:
        page.wait_for_event("requestfinished", predicate=lambda _: len(asked) >= 50)
    page.wait_for_load_state("networkidle")
    assert len(asked) <= 64
    in_view = page.evaluate(
        "async () => {"
        "  const { inView } = await import('/static/scenes.js');"
        "  const box = (number) => [number / 10, 0, number / 10 + 0.05, 0.05];"
        "  const scenes = [...Array(1000).keys()]"
        "    .map((id) => ({ id, min_zoom: id % 2 ? 5 : 0, bounds_lonlat: box(id) }));"
        "  const ids = ({ tiled, rest }) => [tiled, rest].map((some) => some.map((scene) => scene.id));"
        "  return [ids(inView(scenes, [1, -1, 3, 1], 9, 5)), ids(inView(scenes, [361.96, -1, 362.14, 1], 2, 5))]; }"
    )
    (tiled, rest), (far_tiled, far_rest) = in_view
    assert tiled == [20, 19, 21, 18, 22] and sorted(tiled + rest) == list(range(10, 31))
    assert (far_tiled, far_rest) == ([20], [21])


def test_a_question_by_picture_shows_its_heatmap_too(page: Any, world: PageWorld) -> None:
    """It comes with the answer, as no address could ask for it again: over the card and on the map."""
    page.set_input_files("#picture", f"{world.cluster.data_root}/photos/bright.jpg")
    page.wait_for_selector("#results:not([aria-busy]) .card")
    page.locator(".card:not(:has(.placeless)) .open >> nth=0").click()
    page.wait_for_function("() => document.querySelector('.card.selected .heat')?.naturalWidth > 0")
    page.wait_for_selector("#overlay:not([hidden])")
    assert page.locator("#error:not([hidden])").count() == 0
