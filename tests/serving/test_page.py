"""The page at /, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from support.runs.served import Served

from layerpack.runtime import GenerateOptions

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@pytest.fixture
def page(server: Served) -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark")
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda asked: faults.append(asked.url) if server.url not in asked.url else None,
        )
        page.goto(server.url)
        yield page
        browser.close()
        assert not faults


def test_a_conversation(server: Served, page: Any) -> None:
    page.locator("summary", has_text="System").click()
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#tokens", "12")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    expect(page.locator("#speed")).to_contain_text("a pass", timeout=20_000)
    how = GenerateOptions(max_new_tokens=12, system="Be brief.")
    wanted = server.model.generate("hello", how).text
    assert page.locator("article.assistant p").last.text_content() == wanted
    assert page.locator("#model").text_content() == "tiny"
    page.locator("article.assistant button", has_text="Ask again").click()
    expect(page.locator("#stop")).to_be_hidden(timeout=20_000)
    assert page.locator("article.assistant p").last.text_content() == wanted
    page.reload()  # chats stay
    assert page.locator("article.assistant p").last.text_content() == wanted
    page.locator("article.user button", has_text="Edit").click()
    assert page.input_value("#text") == "hello"
    assert page.locator("article").count() == 0


def test_stop_and_errors(server: Served, page: Any) -> None:
    page.locator("summary", has_text="System").click()
    page.fill("#tokens", "1400")
    page.fill("#text", "hello")
    page.click("#send")
    expect(page.locator("article.assistant p").last).not_to_be_empty(timeout=20_000)
    assert page.locator("#bar").is_visible()
    page.click("#stop")
    expect(page.locator("#stop")).to_be_hidden(timeout=20_000)
    page.fill("#text", "x" * 5000)
    page.press("#text", "Enter")
    page.wait_for_selector("[role=alert]")
    assert "context" in page.locator("[role=alert]").text_content()


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, progress')].filter(one =>
        !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).map(
        one => one.outerHTML)"""
    )
    assert nameless == []
