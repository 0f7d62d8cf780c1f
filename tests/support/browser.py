"""A headless Chromium of the machine for tests, driven by Playwright."""

import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MISSING = (
    ""
    if PROGRAM and find_spec("playwright")
    else "needs a browser; `apt-get install chromium` and `pip install playwright` bring them back"
)
"""Why there can be no browser; empty if there can be one."""
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 60_000  # milliseconds that an answer may take


class Browser:
    """One page."""

    def __init__(self) -> None:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._program = self._playwright.chromium.launch(
            executable_path=PROGRAM, headless=True, args=FLAGS, timeout=PATIENCE
        )
        self.page = self._program.new_page()
        self.page.set_default_timeout(PATIENCE)
        self._media: dict[str, Any] = {}
        self._devtools = self.page.context.new_cdp_session(self.page)
        self._requests: list[str] = []
        self._errors: list[str] = []
        self.page.on("request", lambda request: self._requests.append(request.url))
        self.page.on("pageerror", lambda error: self._errors.append(str(error)))
        self.page.on("console", lambda message: self._errors.append(message.text))

    def close(self) -> None:
        self._program.close()
        self._playwright.stop()

    def send(self, method: str) -> dict[str, Any]:
        """Ask the DevTools for what Playwright has no words for."""
        return self._devtools.send(method)

    def open(self, path: Path) -> float:
        """Load a file; the seconds until it was loaded and drawn."""
        self._requests.clear()
        self._errors.clear()
        start = time.monotonic()
        self.page.goto(path.resolve().as_uri(), timeout=PATIENCE)
        self.page.emulate_media(**self._media)  # a new page is on the screen again
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        return time.monotonic() - start

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript; a promise's when it comes."""
        return self.page.evaluate(script)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def look(self, width: int, *, dark: bool = False, paper: bool = False) -> None:
        """How wide the window is, which colours its user prefers, and whether it prints."""
        self.page.set_viewport_size({"width": width, "height": 900})
        scheme = "dark" if dark else "light"
        self._media = {"media": "print" if paper else "screen", "color_scheme": scheme}
        self.page.emulate_media(**self._media)

    def picture(self, path: Path) -> None:
        self.page.screenshot(path=path, full_page=True)

    def problems(self) -> list[str]:
        """Errors of the page, what it wrote to the console, requests for anything but itself."""
        return self._errors + self._requests[1:]
