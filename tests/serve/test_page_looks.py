"""The page as people see it and do not see it: phones, dark and light, languages, axe-core, mistakes, keys."""

from __future__ import annotations

import os
import shutil

import pytest

pytest.importorskip("uvicorn")

from tests.serve import pages
from tests.serve.pages import House, after, connected, fill, in_browser, make, opened, screenshot

pytestmark = pages.MARKS
KEY = "correct-horse-battery"


@in_browser
def test_axe_core_finds_nothing(house, tmp_path):
    """In each state of the page."""
    with opened(house.url) as page:
        connected(page)
        assert pages.faults(page) == []
        make(page, prompt="a red circle on white", seed=4)
        page.get_by_role("button", name="Edit this").click()
        page.get_by_label("Paint over").check()
        page.set_input_files("#reference-file", pages.circle(tmp_path / "circle.png"))
        page.locator("#references img").wait_for()
        page.select_option("#lora-add", "stripes")
        page.get_by_text("More settings").click()
        page.get_by_text("Parameters", exact=True).click()
        assert pages.faults(page) == []
        page.get_by_role("button", name="Paint a mask").click()
        assert pages.faults(page) == []
        page.keyboard.press("Space")
        page.get_by_role("button", name="Use this mask").click()
        page.get_by_role("button", name="Change the mask").wait_for()
        make(page)
        page.get_by_label("Line between before and after").wait_for()
        assert pages.faults(page) == []
        fill(page, prompt="", steps=0)
        page.keyboard.press("Control+Enter")
        page.locator("#error-prompt").wait_for()
        assert pages.faults(page) == []
        fill(page, prompt="a ring", steps=1000)
        page.keyboard.press("Control+Enter")
        page.keyboard.press("Control+Enter")
        page.get_by_text("1 job before it").first.wait_for()
        page.locator("#preview").wait_for()
        assert pages.faults(page) == []
        for _ in range(2):
            page.locator("#queue-list .stop").last.click()
            page.locator("#queue-list li:nth-child(2)").wait_for(state="detached")
        page.locator("#queue-list").wait_for(state="hidden")
        page.get_by_role("button", name="Delete").click()
        assert pages.faults(page) == []


@pytest.mark.parametrize("language", ["en", "de", "zh"])
@in_browser
def test_a_phone_does_not_scroll_sideways(house, language):
    with opened(
        house.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, locale=language
    ) as page:
        connected(page)
        assert pages.overflow(page) <= 0
        page.tap("#prompt")
        fill(page, prompt="a green star on a black background", seed=2)
        after(page, lambda: page.tap("#make"))
        page.wait_for_function("document.querySelector('#stage').getBoundingClientRect().top < 200")  # it glides
        assert pages.overflow(page) <= 0
        if language == "de":
            screenshot(page, "phone")
        page.tap("[data-word=editThis]")
        page.get_by_role("radio").nth(1).check()
        page.tap("#more summary")
        page.tap("#picture-details summary")
        page.select_option("#lora-add", "stripes")
        assert pages.overflow(page) <= 0
        page.tap("#paint-mask")
        page.locator("#mask-dialog").wait_for()
        assert pages.overflow(page) <= 0
        box = page.locator("#mask-sheet").bounding_box()
        assert box["width"] > 200
        assert box["y"] + box["height"] < 740
        page.touchscreen.tap(box["x"] + 100, box["y"] + 100)
        page.tap("#mask-done")
        page.locator("#remove-mask").wait_for()


@in_browser
def test_dark_and_light(house):
    """As the system says, or as the person says; the choice stays."""
    bright = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0)"
    )
    with opened(house.url, color_scheme="dark") as page:
        connected(page)
        assert page.evaluate(bright) < 150
        page.emulate_media(color_scheme="light")
        assert page.evaluate(bright) > 600
        page.get_by_label("Appearance").select_option("dark")
        assert page.evaluate(bright) < 150
        page.reload()
        connected(page)
        assert page.evaluate(bright) < 150
        assert page.evaluate("getComputedStyle(document.querySelector('.shimmer')).animationName") == "none"
        page.get_by_label("Appearance").select_option("auto")
        assert page.evaluate(bright) > 600
        page.get_by_label("Appearance").select_option("dark")
        page.get_by_label("Language").select_option("de")
        make(page, prompt="a purple heart on a yellow background", seed=6, count=3)
        screenshot(page, "dark")


@pytest.mark.parametrize(("locale", "tag", "make_word"), [("de-AT", "de", "Zeichnen"), ("zh-CN", "zh-Hans", "生成")])
@in_browser
def test_languages(house, locale, tag, make_word):
    """The browser's language, or the chosen one; nothing that is seen is left in English."""
    with opened(house.url, locale=locale) as page:
        connected(page)
        assert page.get_attribute("html", "lang") == tag
        make(page, prompt="a blue ring", seed=8)
        page.locator("#picture-actions [data-word=editThis]").click()
        page.locator("#more summary").click()
        page.locator("#picture-details summary").click()
        assert page.locator("#make").inner_text().startswith(make_word)
        seen = page.evaluate("""() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            const texts = [];
            while (walker.nextNode()) {
                const { data, parentElement } = walker.currentNode;
                const own = parentElement.closest("[lang]:not(html), dd, option, .prompt-text");
                if (data.trim() && parentElement.checkVisibility() && !own) texts.push(data.trim());
            }
            for (const element of document.querySelectorAll("[aria-label], [title], [placeholder]")) {
                for (const name of ["aria-label", "title", "placeholder"]) {
                    if (element.hasAttribute(name)) texts.push(element.getAttribute(name));
                }
            }
            return texts;
        }""")
        english = page.evaluate(
            """async (language) => {
            const { LANGUAGES } = await import("/static/words.js");
            const other = LANGUAGES[language];
            return Object.entries(LANGUAGES.en).filter(([key, text]) => text !== other[key]).map(([, text]) => text);
        }""",
            tag[:2],
        )
        assert [text for text in seen if text in english] == []
        fill(page, prompt="", steps=0)
        page.keyboard.press("Control+Enter")
        page.locator("#error-steps").wait_for()
        assert page.inner_text("#error-prompt") not in english
        page.select_option("#language", "en")
        assert page.inner_text("#error-prompt") == "Say what the picture should show."
        assert page.get_attribute("html", "lang") == "en"
        page.reload()
        connected(page)
        assert page.get_by_role("button", name="Make").is_visible()


@in_browser
def test_mistakes_are_shown_where_they_are(house, tmp_path):
    """Those that the page finds, and those that only the server can find."""
    with opened(house.url) as page:
        connected(page)
        wrong = {
            "prompt": ("  ", "Say what the picture should show."),
            "seed": (str(2**64), "A seed is a whole number from 0 to 2⁶⁴ \u2212 1. Empty means random."),
            "steps": ("0", "A whole number from 1 to 1000, please."),
            "count": ("101", "A whole number from 1 to 100, please."),
            "width": ("130", "The width has to be a multiple of 16 from 64 to 4096."),
            "height": ("32", "The height has to be a multiple of 16 from 64 to 4096."),
        }
        fill(page, prompt="a")
        for name, (value, message) in wrong.items():
            before = page.input_value(f"#{name}")
            fill(page, **{name: value})
            page.keyboard.press("Control+Enter")
            page.get_by_text(message, exact=True).wait_for()
            assert page.locator(".error:visible").count() == 1
            assert page.get_attribute(f"#{name}", "aria-invalid") == "true"
            assert page.evaluate("document.activeElement.id") == name
            fill(page, **{name: before})
        fill(page, width="4096", height="4096")
        page.keyboard.press("Control+Enter")
        page.get_by_text("at most 4.2 megapixels").wait_for()
        page.set_input_files("#input-file", pages.circle(tmp_path / "narrow.png", (1024, 40)))
        page.locator("#input-holder img").wait_for()
        page.get_by_label("Paint over").check()
        page.keyboard.press("Control+Enter")
        page.locator(".error[lang=en]:visible").wait_for()
        assert "1024x40" in page.inner_text(".error[lang=en]:visible")
        assert page.locator("#queue").is_hidden()
        large = tmp_path / "large.png"
        large.write_bytes(b"")
        os.truncate(large, 2**26 + 1)
        page.get_by_role("button", name="Remove the input picture").click()
        page.set_input_files("#input-file", large)
        page.get_by_text("The file is too large: this server takes at most 64 MB.").wait_for()
        page.get_by_role("button", name="Start over").click()
        assert page.locator(".error:visible").count() == 0
        assert page.input_value("#width") == "128"


@in_browser
def test_an_upload_that_the_server_lost(house, tmp_path):
    """The form lets go of pictures that the server no longer has."""
    with opened(house.url) as page:
        connected(page)
        page.set_input_files("#input-file", pages.circle(tmp_path / "circle.png"))
        page.locator("#input-holder img").wait_for()
        upload = page.locator("#input-holder img").get_attribute("src")
        stored = page.evaluate("localStorage.getItem('fluxonnx.form')")
        page.evaluate(
            "(text) => localStorage.setItem('fluxonnx.form', text)", stored.replace(upload.rpartition("/")[2], "u0")
        )
        page.reload()
        connected(page)
        page.locator("#input-add").wait_for()
        assert page.locator("#input-options").is_hidden()


def test_a_key(model, tmp_path):
    """The page asks for it, says when it is wrong, and shows pictures and events after it; it can be forgotten."""
    house = House(model, tmp_path, "--api-key", KEY)
    visit_with_key(house)
    house.end()
    shutil.rmtree(tmp_path)


@in_browser
def visit_with_key(house: House) -> None:
    with opened(house.url) as page:
        page.locator("#key-dialog").wait_for()
        assert pages.faults(page) == []
        page.keyboard.press("Escape")
        page.get_by_role("textbox", name="Key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        page.get_by_role("textbox", name="Key").fill(KEY)
        page.keyboard.press("Enter")
        connected(page)
        make(page, prompt="a red circle", seed=1)
        assert page.locator("#compare img").evaluate(pages.LOADED_WIDTH) == 128
        page.reload()
        connected(page)
        assert page.locator("#pictures li").count() == 1
        page.get_by_role("button", name="Sign out").click()
        page.locator("#key-dialog").wait_for()
        assert page.locator("#pictures li").count() == 0
