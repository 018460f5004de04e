"""What a person sees and does on the map page; its server and its browser are conftest.py's."""

import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import opened, search
from page_world import COAST, LANDMARK_CHIP, LANDMARK_KIND, PageWorld, centre_px
from PIL import Image
from tiny_service import GSD_M, SCENE
from uvicorn_server import on_uvicorn

from rsplatform.serve.guard import Guarded
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import local_services

pytestmark = pytest.mark.e2e


def test_a_search_shows_cards_and_the_heatmap_of_the_best(page: Any) -> None:
    with page.expect_response(re.compile(r"/heatmaps/.*\.png")) as heatmap:
        answer = search(page, "a stadium")
    assert heatmap.value.ok
    assert page.locator(".card").count() == len(answer["results"]) == 12
    assert page.locator(".card .open[aria-current=true]").count() == 1
    assert page.locator(".peak").count() == 1
    assert page.locator("#overlay").is_visible()
    page.fill("#opacity", "20")
    assert page.evaluate("() => document.documentElement.style.getPropertyValue('--heat')") == "0.2"


def test_every_hit_lies_inside_the_drawn_area(page: Any) -> None:
    page.fill("#query", "a road")
    page.click("#draw")
    assert page.locator("#hint").is_visible()
    box = page.locator("#map").bounding_box()
    left, top = box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.2
    page.mouse.move(left, top)
    page.mouse.down()
    page.mouse.move(left + 200, top + 150)
    page.mouse.move(left + 330, top + 330)
    page.mouse.up()
    with page.expect_response("**/v1/search") as waiting:
        page.press("#query", "Enter")
    sent, results = waiting.value.request.post_data_json, waiting.value.json()["results"]
    west, south, east, north = sent["bbox"]
    assert results and sent["bbox_relation"] == "within"
    for item in results:
        bounds = item["bounds_lonlat"]
        assert bounds[0] >= west and bounds[1] >= south and bounds[2] <= east and bounds[3] <= north
    page.wait_for_selector("#results:not([aria-busy])")
    assert "inside the area" in page.locator("#status").inner_text()
    page.click("#clear-area")
    page.wait_for_selector(".card >> nth=11")


def test_a_shared_link_restores_the_query_and_the_choice(page: Any, base_url: str) -> None:
    search(page, "harbour and water")
    for select in (
        lambda: page.select_option("#kind", "harbour"),
        lambda: page.locator("#dates input").nth(0).fill("30"),
        lambda: page.locator("#gsd input").nth(1).fill("50"),
        lambda: page.click("#view"),
    ):
        with page.expect_response("**/v1/search") as waiting:
            select()
    page.wait_for_selector("#results:not([aria-busy])")
    asked = waiting.value.request.post_data_json
    page.locator(".card .open").nth(2).click()
    chosen = page.locator(".card.selected").get_attribute("data-chip")
    page.click("#share")
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('Link copied')")
    link = page.evaluate("() => navigator.clipboard.readText()")
    assert link == page.url and link.startswith(base_url)
    page.goto("about:blank")
    with page.expect_response("**/v1/search") as waiting:
        page.goto(link)
    page.wait_for_selector(".card.selected")
    again = waiting.value.request.post_data_json
    assert again.pop("bbox") == pytest.approx(asked.pop("bbox"), abs=1e-6) and again == asked
    assert page.input_value("#query") == "harbour and water" and page.input_value("#kind") == "harbour"
    assert page.locator(".card.selected").get_attribute("data-chip") == chosen


def test_a_click_on_the_map_finds_more_like_that_place(page: Any) -> None:
    box = page.locator("#map").bounding_box()
    with page.expect_response(lambda answer: "chip_id" in (answer.request.post_data or "")) as waiting:
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    asked = waiting.value.request.post_data_json["chip_id"]
    page.wait_for_selector(".card")
    assert asked.startswith(SCENE) and f"like={asked}" in page.url
    assert page.locator(f".card[data-chip='{asked}']").count() == 0


def test_captions_and_attributions_are_text(page: Any) -> None:
    page.fill("#k", "100")
    search(page, "anything")
    page.wait_for_selector(".card >> nth=81")
    hostile = page.locator(".card", has_text="<script>")
    assert hostile.count() == 1 and hostile.locator("script, img[src=x]").count() == 0
    assert page.title() != "owned"
    attribution = page.locator(".maplibregl-ctrl-attrib")
    assert "<b>Survey</b>" in attribution.inner_text() and "© Test Coast" in attribution.inner_text()
    terms = attribution.get_by_role("link", name="OpenStreetMap contributors").get_attribute("href")
    assert terms == "https://www.openstreetmap.org/copyright"


def test_sliders_narrow_by_date_and_scale(page: Any) -> None:
    page.fill("#k", "100")
    search(page, "anything")
    early, late = (page.locator("#dates input").nth(side) for side in (0, 1))
    with page.expect_response("**/v1/search") as waiting:
        early.fill("30")
    assert waiting.value.request.post_data_json["datetime"] == "2019-03-31T00:00:00Z/.."
    assert {item["datetime"] for item in waiting.value.json()["results"]} == {"2021-06-01T10:00:00Z"}
    assert page.locator("#dates output").inner_text() == "2019-03-31 – last"
    early.focus()
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Home")
    with page.expect_response("**/v1/search") as waiting:
        late.fill("0")
    assert {item["scene"] for item in waiting.value.json()["results"]} == {COAST}
    with page.expect_response("**/v1/search"):
        late.fill(late.get_attribute("max"))
    assert page.locator("#dates output").inner_text() == "any"
    with page.expect_response("**/v1/search") as waiting:
        page.locator("#gsd input").nth(1).fill("50")
    assert waiting.value.request.post_data_json["gsd_m"] == [0, 2.83]
    assert {item["ground_sample_distance_m"] for item in waiting.value.json()["results"]} == {GSD_M}


def test_the_peak_and_the_heat_lie_on_the_planted_landmark(page: Any) -> None:
    """As the screen shows it: the colour of the landmark, the marker, and the brightest part of the heatmap."""
    page.select_option("#kind", LANDMARK_KIND)
    search(page, "a lighthouse")
    page.locator(".card .open").click()
    assert page.locator(".card.selected").get_attribute("data-chip") == LANDMARK_CHIP
    marker = page.locator(".peak").bounding_box()
    peak = marker["x"] + marker["width"] / 2, marker["y"] + marker["height"] / 2
    page.evaluate("() => { document.querySelector('.peak').style.visibility = 'hidden'; }")
    screens = {}
    for opacity in (0, 100):
        page.fill("#opacity", str(opacity))
        page.wait_for_load_state("networkidle")
        screens[opacity] = settled_map(page)
    landmark = centre_px(screens[0], (0, 200, 200), (120, 255, 255))
    heat = centre_px(screens[100], (200, 200, 60), (255, 255, 200))
    box = page.locator("#map").bounding_box()
    shown = box["x"] + landmark[0], box["y"] + landmark[1]
    cell_px = min(box["width"], box["height"]) * 0.68 / 8  # the chip fills the map but for its margins
    assert abs(peak[0] - shown[0]) < cell_px and abs(peak[1] - shown[1]) < cell_px
    assert abs(heat[0] - landmark[0]) < cell_px and abs(heat[1] - landmark[1]) < cell_px


def settled_map(page: Any) -> Image.Image:
    """The map's picture once two in a row are alike: tiles come in, and are drawn, one by one."""
    before = b""
    for _ in range(40):
        now = page.locator("#map canvas").screenshot()
        if now == before:
            return Image.open(io.BytesIO(now))
        before = now
        page.evaluate("() => new Promise((done) => setTimeout(done, 150))")
    raise AssertionError("the map does not come to rest")


def test_a_photograph_without_a_place_shows_in_place_of_the_map(page: Any, world: PageWorld) -> None:
    page.set_input_files("#picture", f"{world.cluster.data_root}/photos/bright.jpg")
    page.wait_for_selector("#asked:not([hidden])")
    page.wait_for_selector("#results:not([aria-busy]) .card")
    photo = page.locator(".card[data-chip='photos:bright.jpg']")
    assert "no place on the map" in photo.inner_text()
    page.click("#share")
    assert "cannot hold your picture" in page.locator("#status").inner_text()
    photo.locator(".more").click()
    page.wait_for_selector(".card[data-chip='photos:dim.jpg']")
    page.locator(".card[data-chip='photos:dim.jpg'] .open").click()
    assert page.locator("#figure figcaption").inner_text() == "photos:dim.jpg · no place on the map"
    picture, heat = (page.locator(f"#figure .view img >> nth={number}") for number in (0, 1))
    page.wait_for_function("() => [...document.querySelectorAll('.view img')].every((image) => image.naturalWidth)")
    assert picture.bounding_box() == heat.bounding_box()
    page.locator(".card:not(:has(.placeless)) .open >> nth=0").click()
    assert page.locator("#figure").is_hidden() and page.locator(".maplibregl-marker.peak").count() == 1
    page.click("#clear-asked")
    assert page.locator("#empty").is_visible() and page.locator("#asked").is_hidden()


def test_errors_and_empty_results_show(page: Any, base_url: str) -> None:
    page.goto(f"{base_url}/?q=a+road&from=1990-01-01&to=1991-01-01")
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('No chip')")
    assert page.locator(".card").count() == 0
    assert page.locator("#dates output").inner_text() == "1990-01-01 – 1991-01-01"
    page.goto(f"{base_url}/?q=a+road&from=1990-01-01&to=1980-01-01")
    page.wait_for_selector("#error:not([hidden])")
    assert "start lies after the end" in page.locator("#error").inner_text()
    page.goto(base_url)
    page.wait_for_selector("#suggestions button")
    page.set_input_files("#picture", files=[{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8 broken"}])
    page.wait_for_selector("#error:not([hidden])")
    assert page.locator("#error").inner_text().startswith("image")
    page.route("**/v1/search", lambda route: route.abort())
    page.fill("#query", "a road")
    page.press("#query", "Enter")
    page.wait_for_function("() => document.querySelector('#error').textContent.includes('does not answer')")
    page.unroute("**/v1/search")
    search(page, "a road")
    assert page.locator("#error").is_hidden() and page.locator(".card").count() == 12


@pytest.fixture
def locked_url(world: PageWorld) -> Iterator[str]:
    """The same application with an API key, on uvicorn."""
    retrieval = Retrieval(world.cluster, world.model, world.index, world.chips)
    guarded = Guarded(2_000_000, 5, (hashlib.sha256(b"open-sesame").hexdigest(),))
    with on_uvicorn(build_app(local_services(retrieval), guarded)) as url:
        yield url


def test_where_a_key_is_asked_for_the_page_sends_it_with_every_picture(browser: Any, locked_url: str) -> None:
    with opened(browser, locked_url) as page:
        page.goto(f"{locked_url}/?q=a+road")
        page.wait_for_selector("#key:not([hidden])")
        assert page.locator("#error").is_hidden()
        page.fill("#key-value", "wrong")
        page.press("#key-value", "Enter")
        page.wait_for_selector("#error:not([hidden])")
        page.fill("#key-value", "open-sesame")
        with page.expect_response(lambda answer: "/tiles/" in answer.url) as tile:
            page.press("#key-value", "Enter")
        page.wait_for_selector(".card >> nth=11")
        assert tile.value.ok and page.locator("#key").is_hidden() and page.locator("#error").is_hidden()
        page.wait_for_function("() => document.querySelector('.thumb .heat')?.naturalWidth > 0")
        assert "open-sesame" not in page.url


def test_keyboard_alone_is_enough(page: Any) -> None:
    page.press("body", "/")
    page.keyboard.type("water")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card >> nth=11")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "selected" in (page.locator(".card").nth(1).get_attribute("class") or "")


def test_phone_width_has_no_sideways_scroll_and_the_theme_switches(page: Any) -> None:
    page.set_viewport_size({"width": 375, "height": 740})
    search(page, "a road")
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    before = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != before
