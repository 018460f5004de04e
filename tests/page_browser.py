"""A headless Chromium for the page's tests, which lets nothing out, and what a person does on the page first."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page must need nothing from elsewhere
]
# A machine that trains beside the tests answers late; nothing waits this long where it does not.
TIMEOUT_MS = 90_000


@contextlib.contextmanager
def opened(browser: Any, base_url: str, **settings: Any) -> Iterator[Any]:
    """A tab; any script error, refusal by the CSP or foreign request fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce", **settings)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if is_own(request.url, base_url) else errors.append(request.url))
    yield page
    context.close()
    expected = re.compile(r"status of (401|422)|ERR_FAILED")
    assert [error for error in errors if not expected.search(error)] == []


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
