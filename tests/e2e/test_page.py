"""The map page in headless Chromium against a real Ray Serve.

Skips where Chromium or Playwright is absent, saying so; under CI that is a failure.
"""

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_service import CHIPS, INDEX, MODEL, SCENE, make_all, tiny_cluster

from rsplatform.serve.deployment import ServeConfig, serving

pytestmark = pytest.mark.e2e

CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page must need nothing from elsewhere
]


def give_up(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; under CI the page must be tested")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        give_up("playwright is not installed: pip install playwright")
        return
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        give_up("no Chromium found: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def base_url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = str(tmp_path_factory.mktemp("page") / "artifacts")
    make_all(root)
    config = ServeConfig(output="deployment/tiny/v1", model=MODEL, index=INDEX, chips=CHIPS)
    with serving(config, tiny_cluster(root)) as url:
        yield url


@pytest.fixture
def page(browser: Any, base_url: str) -> Iterator[Any]:
    """The page with its scenes on the map; any script error, refusal by the CSP or foreign request fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if is_own(request.url, base_url) else errors.append(request.url))
    page.goto(base_url)
    page.wait_for_selector("#suggestions button")
    yield page
    context.close()
    assert [error for error in errors if "status of 422" not in error] == []


def is_own(url: str, base_url: str) -> bool:
    return url.startswith((base_url, "blob:", "data:"))


def search(page: Any, text: str) -> dict[str, Any]:
    """Type, press Enter; the server's answer once the cards stand."""
    with page.expect_response("**/v1/search") as waiting:
        page.fill("#query", text)
        page.press("#query", "Enter")
    answer = waiting.value.json()
    page.wait_for_selector("#results:not([aria-busy])")
    return answer


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
    page.select_option("#kind", "harbour")
    page.wait_for_selector("#results:not([aria-busy])")
    page.locator(".card .open").nth(2).click()
    chosen = page.locator(".card.selected").get_attribute("data-chip")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".card.selected")
    assert page.input_value("#query") == "harbour and water" and page.input_value("#kind") == "harbour"
    assert page.locator(".card.selected").get_attribute("data-chip") == chosen
    assert base_url in link


def test_a_click_on_the_map_finds_more_like_that_place(page: Any) -> None:
    box = page.locator("#map").bounding_box()
    with page.expect_response(lambda answer: "chip_id" in (answer.request.post_data or "")) as waiting:
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    asked = waiting.value.request.post_data_json["chip_id"]
    page.wait_for_selector(".card")
    assert asked.startswith(SCENE) and f"like={asked}" in page.url
    assert page.locator(f".card[data-chip='{asked}']").count() == 0


def test_captions_and_attributions_are_text(page: Any) -> None:
    page.fill("#k", "64")
    search(page, "anything")
    page.wait_for_selector(".card >> nth=63")
    hostile = page.locator(".card", has_text="<script>")
    assert hostile.count() == 1 and hostile.locator("script, img[src=x]").count() == 0
    assert page.title() != "owned"
    assert "<b>Survey</b>" in page.locator(".maplibregl-ctrl-attrib").inner_text()


def test_errors_and_empty_results_show(page: Any) -> None:
    page.fill("#from", "1990-01-01")
    page.fill("#to", "1991-01-01")
    search(page, "a road")
    assert "No chip" in page.locator("#status").inner_text() and page.locator(".card").count() == 0
    page.fill("#to", "1980-01-01")
    page.press("#query", "Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "start lies after the end" in page.locator("#error").inner_text()


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
