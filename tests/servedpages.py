"""Pages in a browser, for tests. That of a service: requests are recorded, files are chosen, results are awaited."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = '#rows tr:not([hidden])'
"""The rows that the table of all images shows."""
CLIPPED = """() => [...document.querySelectorAll('.entry, .tile, .notice, .no-prediction, h1, p')].filter(
    element => element.scrollWidth > element.clientWidth + 1).length"""
"""The number of elements whose contents do not fit into them."""


def assert_page_is_whole(page, log, address: str, width: int) -> None:
    """Open the self-contained page at `address`: its pictures are in it, nothing is clipped, and it fits `width`."""
    log.watch(page)
    page.goto(address)
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function('[...document.images].every(image => image.complete && image.naturalWidth > 0)')
    assert log.messages == [] and log.dialogs == []
    assert [url for url in log.urls if not url.startswith('data:image/')] == [address]
    assert page.evaluate('document.documentElement.scrollWidth') <= width and page.evaluate(CLIPPED) == 0


class RequestRecorder:
    """ASGI middleware that keeps the bodies of all requests."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send) -> None:
        async def record():
            message = await receive()
            self.bodies.append(message.get('body', b''))
            return message

        await self.app(scope, record if scope['type'] == 'http' else receive, send)


def upload(content: Path | bytes, name: str = 'image.png') -> dict[str, Any]:
    """A file for the file chooser."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return {'name': name, 'mimeType': 'application/octet-stream', 'buffer': data}


def expect(locator):
    """The assertions of Playwright about `locator`, which wait until they hold."""
    from playwright.sync_api import expect

    return expect(locator)


def choose(page, address: str, *uploads) -> None:
    """Open the page at `address` and choose these files."""
    page.goto(address)
    page.set_input_files('#chooser', list(uploads))


def finished(page, count: int = 1):
    """The rows of `count` images, when all of them have a prediction or an error. One image has its details, too."""
    expect(page.locator('#rows tr:is([data-state=done], [data-state=no-prediction])')).to_have_count(count)
    return page.locator('#rows tr')


def finished_card(page):
    """The details of the only image, when it has a prediction or an error."""
    finished(page)
    return page.locator('#single .image')


def names(page) -> list[str]:
    """The names of the images that the table shows, in its order."""
    return page.locator(f'{ROWS} .name').all_text_contents()


def wait_for_opacity(page, opacity: float) -> None:
    """Wait until the map has this opacity, which a transition changes slowly."""
    script = 'expected => Math.abs(getComputedStyle(document.querySelector(".map")).opacity - expected) < 1e-3'
    page.wait_for_function(script, arg=opacity)


def tab_to(page, selector: str, key: str = 'Tab') -> None:
    """Press `key` until the element `selector` has the focus."""
    for _ in range(40):
        if page.evaluate('selector => document.activeElement.matches(selector)', selector):
            return
        page.keyboard.press(key)
    pytest.fail(f'{selector} cannot be reached by {key}')
