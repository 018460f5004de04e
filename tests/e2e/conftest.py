"""The map page in headless Chromium against a real Ray Serve.

Skips where Chromium or Playwright is absent, saying so; under CI that is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import CHROMIUM_FLAGS, opened
from page_world import PageWorld, make_page_world

from rsplatform.serve.deployment import ServeConfig, serving


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
def world(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> PageWorld:
    place = tmp_path_factory.mktemp("page")
    return make_page_world(str(place / "artifacts"), place)


@pytest.fixture(scope="module")
def base_url(world: PageWorld) -> Iterator[str]:
    config = ServeConfig(output="deployment/tiny/v1", model=world.model, index=world.index, chips=list(world.chips))
    with serving(config, world.cluster) as url:
        yield url


@pytest.fixture
def page(browser: Any, base_url: str) -> Iterator[Any]:
    """The page with its scenes on the map."""
    with opened(browser, base_url, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.goto(base_url)
        page.wait_for_selector("#suggestions button")
        yield page
