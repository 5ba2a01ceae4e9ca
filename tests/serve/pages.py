"""The page of a server in Chromium."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conformance.browser import chromium, in_thread
from tests.conformance.installed import folder_of, has
from tests.serving import Server

ROOT = Path(__file__).parents[2]
MODULES = ("playwright", "greenlet", "program:chromium", "npm:axe-core")
LACKING = [module for module in MODULES if not has(module)]
# Of each file of tests in the browser.
MARKS = [pytest.mark.slow, pytest.mark.skipif(bool(LACKING), reason=f"{', '.join(LACKING)} not installed")]
# Milliseconds that the page gets for anything, a load of the model included.
PATIENCE = 60_000
# The width of a picture, once it is loaded.
LOADED_WIDTH = "(image) => image.decode().then(() => image.naturalWidth)"
# A folder; where it is given, the tests write the screenshots of docs/page.md into it.
SCREENSHOTS = os.environ.get("FLUXONNX_SCREENSHOTS")


def in_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in the thread that talks to Chromium."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        in_thread(lambda: test(*args, **kwargs))

    return run


class House:
    """A server that can be killed and comes back under its address."""

    def __init__(self, model: Path, data: Path, *flags: str) -> None:
        self._words = (model, data, "--lora-dir", str(ROOT / "models"), *flags)
        self._server = Server(*self._words)
        self._port = self._server.port
        self.url = f"{self._server.url}/"

    def kill(self) -> None:
        """End it in the middle of what it does."""
        self._server.kill()

    def start(self) -> None:
        """Start it again."""
        self._server = Server(*self._words, "--port", str(self._port))

    def revive(self) -> None:
        """Start it again, unless it runs."""
        if self._server.process.poll() is not None:
            self.start()

    def end(self) -> None:
        """Ask it to end."""
        if self._server.process.poll() is None:
            self._server.stop()


@contextmanager
def opened(url: str, **options: Any) -> Iterator[Any]:
    """A page in a browser profile of its own; used in the browser's thread only. Errors in its scripts are raised."""
    context = chromium().new_context(
        **{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", "reduced_motion": "reduce", **options}
    )
    context.set_default_timeout(PATIENCE)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    try:
        page.goto(url)
        yield page
        assert faults == []
    finally:
        context.close()


def connected(page: Any) -> None:
    """Wait until the page has what the server knows."""
    page.locator("#connection[data-state=connected]").wait_for()


def fill(page: Any, **values: Any) -> None:
    """Fill in fields by their ids."""
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def make(page: Any, **values: Any) -> str:
    """Fill in fields, make a picture, wait until it is on show, and return its id."""
    fill(page, **values)
    return after(page, lambda: page.keyboard.press("Control+Enter"))


def after(page: Any, act: Callable[[], object]) -> str:
    """Do what leads to another picture on show, wait for it, and return its id."""
    before = page.get_attribute("#stage-picture", "data-id")
    act()
    page.locator(f"#stage-picture[data-id]:not([data-id='{before}'])").wait_for()
    return shown(page)


def shown(page: Any) -> str:
    """The id of the picture on show."""
    return page.locator("#compare img.whole").first.get_attribute("src").rpartition("/")[2]


def gallery(page: Any) -> list[str]:
    """The ids of the pictures in the gallery."""
    return page.locator("#pictures li").evaluate_all("items => items.map((item) => item.dataset.id)")


def pixels(page: Any, url: str, name: str) -> np.ndarray:
    """A picture of the server: u8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(page.request.get(f"{url}pictures/{name}").body())).convert("RGB"))


def circle(path: Path, size: tuple[int, int] = (128, 128)) -> Path:
    """Write a picture that no program made from parameters."""
    image = Image.new("RGB", size, (30, 60, 160))
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), (220, 40, 30))
    image.save(path)
    return path


def drop(page: Any, path: Path, target: str, kind: str = "image/png") -> None:
    """Drop a file onto an element, as the browser does when a person lets go of it."""
    data = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([data, name, type]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [data, path.name, kind],
    )
    for event in ("dragenter", "dragover"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})
    page.locator("#drop-zones").wait_for()
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})


@functools.cache
def _axe() -> str:
    folder = folder_of("axe-core")
    assert folder is not None
    return (folder / "axe.min.js").read_text("utf-8")


def faults(page: Any) -> list[str]:
    """What axe-core finds, in the light and in the dark, where only colours are another matter."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(_axe())
    found = []
    for scheme, rules in (("dark", ["color-contrast"]), ("light", [])):
        page.emulate_media(color_scheme=scheme)
        told = page.evaluate("(rules) => axe.run(rules.length ? { runOnly: rules } : {})", rules)
        for rule in told["violations"]:
            found.append(f"{scheme}, {rule['id']}: {', '.join(str(node['target']) for node in rule['nodes'])}")
    return found


def overflow(page: Any) -> int:
    """How many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def screenshot(page: Any, name: str, **options: Any) -> None:
    """Write a screenshot for the documentation, if these are wanted."""
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"page-{name}.png"), **options)
