"""The page in a real browser, with a real server and the bundled model."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("uvicorn")

import fluxonnx
from fluxonnx.runtime.saving import save_image
from tests.serve import pages
from tests.serve.pages import after, connected, fill, in_browser, make, opened, screenshot, shown

pytestmark = pages.MARKS
PROMPT = "a red circle on a blue background"


@in_browser
def test_a_picture_grows_and_appears(house, model):
    """It is bit for bit the one that the library makes, and says what it was made from."""
    with opened(house.url) as page:
        connected(page)
        assert page.locator("#stage-empty").is_visible()
        page.evaluate("""() => {
            window.seen = new Set();
            new MutationObserver(() => seen.add(preview.src)).observe(preview, { attributeFilter: ["src"] });
        }""")
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        name = make(page, seed=2**64 - 1, steps=8)
        assert page.evaluate("seen.size") >= 2
        assert page.inner_text("#picture-facts") == "128 \u00d7 128 · 8 steps · seed 18446744073709551615"
        assert page.inner_text("#picture-prompt") == PROMPT
        page.get_by_text("Parameters", exact=True).click()
        assert re.search(r"Sampler\s+euler", page.inner_text("#picture-parameters"))
        found = pages.pixels(page, house.url, name)
        with fluxonnx.load(model, provider="cpu") as flux:
            assert (found == np.asarray(flux.generate(PROMPT, 128, 128, 8, 2**64 - 1))).all()

        again = after(page, page.get_by_role("button", name="Again").click)
        assert (pages.pixels(page, house.url, again) == found).all()
        other = after(page, page.get_by_role("button", name="With another seed").click)
        assert (pages.pixels(page, house.url, other) != found).any()
        seed = page.inner_text("#picture-facts").rpartition(" ")[2]
        fill(page, prompt="something else", seed=1, steps=1)
        page.get_by_role("button", name="Use its parameters").click()
        page.get_by_text("The form has this picture's parameters.").wait_for()
        assert [page.input_value(f"#{name}") for name in ("prompt", "seed", "steps")] == [PROMPT, seed, "8"]
        page.get_by_role("button", name="As a reference").click()
        page.locator(f"#references img[src='pictures/{other}']").wait_for()


@in_browser
def test_paints_a_mask_and_edits(house):
    """What the mask leaves out stays as it is, pixel by pixel; the result is compared with the input."""
    with opened(house.url) as page:
        connected(page)
        before = make(page, prompt=PROMPT, seed=3)
        page.get_by_role("button", name="Edit this").click()
        page.get_by_role("button", name="Paint a mask").click()
        assert page.locator("#mask-done").is_disabled()
        box = page.locator("#mask-sheet").bounding_box()

        def stroke(*places: tuple[float, float]) -> None:
            for i, (x, y) in enumerate(places):
                page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
                if i == 0:
                    page.mouse.down()
            page.mouse.up()

        for name, said, empty in (("Invert", "100 % painted", False), ("Clear", "0 % painted", True)):
            page.get_by_role("button", name=name).click()
            assert page.inner_text("#mask-said") == said
            assert page.locator("#mask-done").is_disabled() == empty
        page.fill("#mask-size", "40")
        stroke((0.4, 0.45), (0.6, 0.55))
        page.get_by_role("button", name="Eraser").click()
        stroke((0.15, 0.3), (0.22, 0.38))
        erased = page.inner_text("#mask-said")
        page.get_by_role("button", name="Undo").click()
        assert page.inner_text("#mask-said") != erased
        page.get_by_role("button", name="Redo").click()
        assert page.inner_text("#mask-said") == erased
        screenshot(page, "mask")
        page.get_by_role("button", name="Use this mask").click()
        page.get_by_role("button", name="Change the mask").wait_for()
        edited = make(page, prompt="a yellow star on a blue background", mask_blur=0, seed=5)
        old, new = (pages.pixels(page, house.url, name) for name in (before, edited))
        changed = np.abs(old.astype(int) - new).max(-1) > 0
        assert changed[45:83, 45:83].mean() > 0.5
        assert not changed[:, :20].any()
        assert not changed[:25].any()

        slider = page.get_by_label("Line between before and after")
        screenshot(page, "compare")
        slider.fill("70")
        assert page.locator("#compare .before").evaluate("(image) => image.style.getPropertyValue('--cut')") == "70%"
        page.get_by_role("button", name="Compare with the input").click()
        assert slider.count() == 0
        page.get_by_label("Paint over").check()
        page.get_by_label("Strength").fill("0")
        page.get_by_role("button", name="Remove the mask").click()
        kept = make(page)
        assert np.abs(pages.pixels(page, house.url, kept).astype(int) - old).mean() < 8


@in_browser
def test_everything_is_there_after_a_reload(house, tmp_path):
    """The form from the browser; jobs and pictures from the server."""
    with opened(house.url) as page:
        connected(page)
        made = make(page, prompt="a green heart", seed=1)
        page.set_input_files("#reference-file", pages.circle(tmp_path / "circle.png"))
        page.locator("#references img").wait_for()
        page.select_option("#lora-add", "stripes")
        page.get_by_label("Scale of stripes").fill("0.5")
        page.get_by_label("16:9").check()
        page.get_by_text("More settings").click()
        page.select_option("#sampler", "heun")
        fill(page, prompt="zwei Kreise, 圆", seed=77, steps=900, count=2)
        page.reload()
        connected(page)
        assert shown(page) == made
        values = {name: page.input_value(f"#{name}") for name in ("prompt", "seed", "steps", "count", "sampler")}
        assert values == {"prompt": "zwei Kreise, 圆", "seed": "77", "steps": "900", "count": "2", "sampler": "heun"}
        assert page.get_by_label("16:9").is_checked()
        assert page.get_by_label("Scale of stripes").input_value() == "0.5"
        assert (
            page.locator("#references img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 128
        )

        page.keyboard.press("Control+Enter")
        page.get_by_text(re.compile("Step [0-9]+ of 900")).first.wait_for()
        page.reload()
        page.get_by_text(re.compile("Step [0-9]+ of 900")).first.wait_for()
        page.locator("#preview").wait_for()
        page.keyboard.press("Escape")
        page.locator("#stage-picture").wait_for()
        assert shown(page) == made
        assert page.locator("#queue").is_hidden()


@in_browser
def test_a_killed_server(house):
    """The page says so, comes back by itself, and shows the picture whose job the server takes up again."""
    with opened(house.url) as page:
        connected(page)
        fill(page, prompt="a purple star", seed=11, steps=100)
        with page.expect_response(lambda answer: answer.request.method == "POST") as answer:
            page.keyboard.press("Control+Enter")
        job = f"{house.url}jobs/{answer.value.json()['id']}"
        # Not by what the page shows: a busy browser may paint nothing between the first step and the last.
        while page.request.get(job).json()["state"] == "queued":
            pass
        house.kill()
        page.get_by_text("Reconnecting").wait_for()
        page.get_by_text("The server is gone.").wait_for()
        house.start()
        connected(page)
        page.get_by_text("The server is back.").wait_for()
        page.locator("#stage-picture").wait_for()
        assert page.inner_text("#picture-facts").endswith("100 steps · seed 11")
        assert len(pages.gallery(page)) == len(set(pages.gallery(page)))


@in_browser
def test_a_request_of_the_page_itself_that_fails_with_the_server(house):
    """The gallery is asked for when a picture is done; that nobody answers is no news beside the server's end."""
    held = []
    with opened(house.url) as page:
        connected(page)
        page.route("**/pictures?*", lambda route: held.append(route))
        with page.expect_request("**/pictures?*"):
            fill(page, prompt="a purple star", seed=12, steps=1)
            page.keyboard.press("Control+Enter")
        house.kill()
        page.get_by_text("The server is gone.").wait_for()
        held[0].abort()
        page.unroute("**/pictures?*")
        page.wait_for_timeout(300)
        assert page.get_by_text("The server is gone.").is_visible()
        house.start()
        page.get_by_text("The server is back.").wait_for()


@in_browser
def test_pictures_that_are_dropped_and_pasted(house, model, tmp_path):
    """One of ours fills in its parameters; others become what they are dropped on; what is no picture is refused."""
    with fluxonnx.load(model, provider="cpu") as flux:
        image = flux.generate("a purple ring", 144, 96, 3, 12345678901234567890)
    fluxonnx_picture = tmp_path / "ours.png"
    save_image(image, fluxonnx_picture, image.info)
    (tmp_path / "text.png").write_text("no picture")
    with opened(house.url) as page:
        connected(page)
        pages.drop(page, fluxonnx_picture, "[data-zone=parameters]")
        page.get_by_text("The form has this picture's parameters.").wait_for()
        values = {name: page.input_value(f"#{name}") for name in ("prompt", "seed", "steps", "width", "height")}
        expected = {"prompt": "a purple ring", "seed": "12345678901234567890", "steps": "3"}
        assert values == {**expected, "width": "144", "height": "96"}
        made = make(page)
        assert (pages.pixels(page, house.url, made) == np.asarray(image)).all()

        other = pages.circle(tmp_path / "other.png")
        pages.drop(page, other, "[data-zone=parameters]")
        page.get_by_text("This picture holds no parameters").wait_for()
        page.get_by_role("button", name="Use it as the input").click()
        page.locator("#input-holder img").wait_for()
        pages.drop(page, other, "[data-zone=reference]")
        page.locator("#references img").wait_for()
        page.get_by_role("button", name="Remove the input picture").click()
        pages.drop(page, other, "[data-zone=input]")
        page.locator("#input-holder img").wait_for()
        pages.drop(page, tmp_path / "text.png", "[data-zone=input]")
        page.locator("#error-input").wait_for()
        assert "PNG" in page.inner_text("#error-input")
        page.get_by_role("button", name="Remove the input picture").click()
        assert page.locator("#error-input").is_hidden()
        page.evaluate(
            """async () => {
                const blob = await (await fetch("static/icon.svg")).blob();
                const sheet = new OffscreenCanvas(96, 64);
                sheet.getContext("2d").fillRect(0, 0, 50, 50);
                const transfer = new DataTransfer();
                transfer.items.add(new File([await sheet.convertToBlob()], "pasted.png", { type: "image/png" }));
                document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
            }"""
        )
        page.locator("#input-holder img").wait_for()
        page.locator("#pictures button").first.drag_to(page.locator("#prompt"))
        page.locator(f"#input-holder img[src='pictures/{made}']").wait_for()
        assert shown(page) == made

        loras = {"lora_files": ["gone.safetensors", "stripes.safetensors"], "lora_scales": [1.0, 0.5]}
        save_image(image, tmp_path / "lora.png", {**image.info, **loras})
        pages.drop(page, tmp_path / "lora.png", "[data-zone=parameters]")
        page.get_by_text("This server lacks LoRAs of the picture: gone.safetensors").wait_for()
        assert page.get_by_label("Scale of stripes").input_value() == "0.5"


@in_browser
def test_with_the_keyboard_alone(house):
    """A prompt, a picture, an edit with a mask, the gallery, and a picture that is cancelled, without a mouse."""
    with opened(house.url) as page:
        connected(page)

        def tab_to(selector: str) -> None:
            for _ in range(80):
                if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                    return
                page.keyboard.press("Tab")
            raise AssertionError(f"Tab does not reach {selector}")

        press, typed = page.keyboard.press, page.keyboard.type
        tab_to("#prompt")
        typed("a blue square on white")
        tab_to("#seed")
        typed("21")
        first = make(page)
        tab_to("#picture-actions [data-word=editThis]")
        press("Enter")
        assert page.evaluate("document.activeElement.id") == "prompt"
        tab_to("#paint-mask")
        press("Enter")
        page.locator("#mask-dialog").wait_for()
        for key in ("]", "]", "Space", "Shift+ArrowRight", "Shift+ArrowRight", "ArrowDown", "e", "Space", "Control+z"):
            press(key)
        assert "from the left" in page.inner_text("#mask-said") or "painted" in page.inner_text("#mask-said")
        tab_to("#mask-done")
        press("Enter")
        page.get_by_role("button", name="Change the mask").wait_for()
        assert page.evaluate("document.activeElement.id") == "paint-mask"
        second = make(page)
        tab_to("#pictures button")
        press("ArrowRight")
        assert shown(page) == first
        press("ArrowLeft")
        assert shown(page) == second
        press("Delete")
        page.locator("#confirm-dialog").wait_for()
        press("Escape")
        assert shown(page) == second
        press("Delete")
        tab_to("#confirm-yes")
        press("Enter")
        page.locator("#confirm-dialog").wait_for(state="hidden")
        page.locator(f"#pictures li[data-id='{second}']").wait_for(state="detached")
        assert shown(page) == first
        fill(page, steps=1000)
        press("Control+Enter")
        page.get_by_text("of 1000").first.wait_for()
        press("Escape")
        page.locator("#stage-picture").wait_for()
        assert shown(page) == first


@in_browser
def test_an_answer_that_comes_late(house):
    """A job can be done before the answer to its request is read: its picture comes on show all the same."""
    with opened(house.url) as page:
        connected(page)
        held = []
        page.route("**/jobs", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
        fill(page, prompt="a white ring", seed=31)
        with page.expect_request(lambda request: request.method == "POST"):
            page.keyboard.press("Control+Enter")
        answer = held[0].fetch()
        picture = f"{answer.json()['id']}-0"
        page.locator(f"#pictures li[data-id='{picture}']").wait_for()
        held[0].fulfill(response=answer)
        page.locator(f"#stage-picture[data-id='{picture}']").wait_for()
        assert page.locator("#queue").is_hidden()


@in_browser
def test_the_queue(house):
    """Positions, the cancelling of a job that waits, and of one that runs."""
    with opened(house.url) as page:
        connected(page)
        for i in range(3):
            fill(page, prompt=f"circle {i}", seed=i, steps=1000, width=512, height=512)
            page.keyboard.press("Control+Enter")
            page.locator(f"#queue-list li:nth-child({i + 1})").wait_for()
        assert page.locator("#queue-list .state").all_inner_texts() == [
            "Running",
            "1 job before it",
            "2 jobs before it",
        ]
        screenshot(page, "queue")
        page.locator("#queue-list li:nth-child(2) .stop").click()
        page.locator("#queue-list li:nth-child(3)").wait_for(state="detached")
        page.get_by_text("1 job before it").wait_for()
        assert "circle 1" not in page.inner_text("#queue-list")
        page.locator("#queue-list .link").last.click()
        assert page.inner_text("#job-prompt") == "circle 2"
        page.locator("#queue-list .stop").last.click()
        page.locator("#queue-list li:nth-child(2)").wait_for(state="detached")
        page.locator("#queue-list .stop").click()
        page.locator("#queue").wait_for(state="hidden")
        page.locator("#stage-job").wait_for(state="hidden")
