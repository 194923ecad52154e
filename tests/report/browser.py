"""A real Chromium for the report's tests: the distribution's, because Playwright's own is a download.

Where there is none the tests are skipped and say so; KEEPSIGHT_BROWSER=required makes that a failure.
KEEPSIGHT_SCREENSHOTS names a folder for pictures of what was seen.

`python -m tests.report.browser runs/demo/report.html docs/images` takes the pictures of the docs.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def missing() -> str:
    """Why no browser can be started, or nothing."""
    if not any(map(shutil.which, NAMES)):
        return "no Chromium is installed (Debian: apt-get install chromium); the report's browser tests did not run"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "Playwright is not installed (pip install playwright); the report's browser tests did not run"
    return ""


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips, or fails where one is required."""
    if reason := missing():
        pytest.fail(reason) if os.environ.get("KEEPSIGHT_BROWSER") == "required" else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    path = next(found for name in NAMES if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # as root there is no sandbox
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page opened from disk, offline, with everything that it says or asks for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(offline=True, **{"viewport": {"width": 1200, "height": 900}, **context})
        self.context.set_default_timeout(120_000)  # machines that test have other work too
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)

    def ready(self) -> Any:
        """The page, once the explorer has drawn its first picture."""
        self.page.wait_for_selector("#explorer[data-ready]")
        return self.page

    def close(self) -> None:
        """Nothing may have been asked for but the file, and nothing may have gone wrong."""
        self.context.close()
        assert set(self.requests) == {self.url}
        assert self.errors == []


def screenshot(page: Any, name: str, *, full: bool = False) -> None:
    """Keep a picture where KEEPSIGHT_SCREENSHOTS asks for them."""
    if folder := os.environ.get("KEEPSIGHT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=full)


def take_pictures(report: Path, folder: Path) -> None:
    """The probes and the explorer of a report, as the docs show them."""
    with chromium() as browser:
        tab = Tab(browser, report, viewport={"width": 1120, "height": 900})
        page = tab.ready()
        page.add_style_tag(content=".top { position: static !important } section { padding: 24px !important }")
        for section, name in (("probes", "report"), ("explorer", "explorer")):
            path = folder / f"{name}.png"
            page.locator(f"#{section}").screenshot(path=path)
            Image.open(path).convert("RGB").save(path, optimize=True)
        tab.close()


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2]))
