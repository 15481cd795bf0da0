"""The page of web/ in Chromium: visitors show it pictures, draw, ask, and get the answers that Python gives."""

import base64
import copy
import functools
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

pytest.importorskip("selenium", reason="driving a browser needs selenium")
pytest.importorskip("onnxruntime", reason="the graphs need onnxruntime")
pytest.importorskip("onnxscript", reason="the graphs need onnxscript")
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from web_page import (
    BROWSER,
    DRIVER,
    ISOLATION,
    NARROW,
    NPM,
    SOFTWARE_GPU,
    WEB,
    WIDE,
    Page,
    Site,
    build,
    npm,
    open_browser,
)
from web_reference import answer, write_reference

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.onnx import export_onnx

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium: install chromium and chromium-driver"),
    pytest.mark.skipif(
        not (NPM and (WEB / "node_modules").is_dir()), reason="the page is not installed: run `npm ci` in web/"
    ),
]
MAX_WEIGHTS = 15e6  # bytes


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What `write_reference` writes, or wrote earlier into the folder that an environment variable names."""
    written = os.environ.get("FLASHSLOTH_REFERENCE")
    return Path(written) if written else write_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def expected(reference):
    return json.loads((reference / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def python():
    """Answers of PyTorch in float32, with the arguments of `answer` after the processor."""
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    return functools.partial(answer, model, FlashSlothProcessor.from_pretrained(ROOT))


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The built page with the graphs of the shipped checkpoint in int8, and other models beside it."""
    built = tmp_path_factory.mktemp("web") / "page"
    build(built)
    shutil.copytree(reference / "int8", built / "model")
    shutil.copytree(reference / "float32", built / "float32")
    shutil.copytree(reference / "float32", built / "endless")
    settings = json.loads((built / "endless" / "generation_config.json").read_text())
    settings["suppress_tokens"] = [*settings["suppress_tokens"], settings["eos_token_id"]]
    (built / "endless" / "generation_config.json").write_text(json.dumps(settings))
    (built / "other").mkdir()
    (built / "other" / "config.json").write_text('{"model_type": "llama"}')
    return built


@pytest.fixture(scope="module")
def site(folder):
    site = Site(folder, ISOLATION)
    yield site
    site.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, site):
    return Page(browser, site.url)


def test_the_modules_of_the_page_do_what_python_does(reference):
    npm("test", FLASHSLOTH_REFERENCE=str(reference))


def test_the_weights_are_small(folder):
    sizes = {file.name: file.stat().st_size for file in (folder / "model").glob("*.onnx*")}
    assert len(sizes) == 5
    assert sum(sizes.values()) < MAX_WEIGHTS


def test_the_built_folder_is_a_space(folder):
    card = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "sdk: static" in card
    assert "models:" in card
    assert all(name.lower() in card for name in ISOLATION)
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?:https?:|/)", text)  # works at any address


def answer_in_page(page, folder, questions):
    shown, found = None, []
    for row in questions:
        if row["file"] != shown:
            shown = row["file"]
            page.show(folder / shown)
        else:
            page.forget()
        found.append(page.ask(row["question"]))
    return found


def test_answers_are_pythons(browser, site, reference, expected):
    page = Page(browser, f"{site.url}?model=./float32/")
    questions = expected["questions"]
    assert len(questions) == 100
    assert answer_in_page(page, reference, questions) == [row["answer"] for row in questions]


def test_answers_in_8_bits_are_nearly_all_pythons(page, reference, expected):
    questions = expected["questions"][:40]
    found = answer_in_page(page, reference, questions)
    assert sum(text == row["answer"] for text, row in zip(found, questions, strict=True)) >= 38


def test_any_other_flashsloth_can_be_chosen(browser, site, folder, model, processor, images, tmp_path):
    export_onnx(copy.deepcopy(model), processor, folder / "phi")
    images[0].save(tmp_path / "noise.png")
    page = Page(browser, f"{site.url}?model=./phi/")
    assert not page.one("#note").is_displayed()  # it is about the model beside the page
    page.show(tmp_path / "noise.png")
    page.script("document.querySelector('#length').value = 8")
    said = []
    for question in ("What is it?", "Why?"):
        said.append(question)
        content = [[{"type": "text", "text": text}] for text in said]
        content[0].insert(0, {"type": "image", "image": images[0]})
        messages = [{"role": ("user", "assistant")[turn % 2], "content": parts} for turn, parts in enumerate(content)]
        inputs = processor.encode_conversations(messages)
        output = model.generate(**inputs, max_new_tokens=8)
        (expected,) = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
        page.ask(question)
        assert page.script("return [...document.querySelectorAll('.answer')].at(-1).textContent") == expected
        said.append(expected)


def test_a_visitor_draws_and_asks(browser, site, python):
    page = Page(browser, f"{site.url}?model=./float32/")
    page.draw("red", "star", -0.2, -0.2)
    first = page.drawing()
    assert first.getpixel((115, 115))[0] > 200
    question = "Describe the picture."
    assert page.ask(question) == python(first, [question])[0]
    page.draw("blue", "circle", 0.25, 0.25)
    second = page.drawing()
    assert second.getpixel((288, 288))[2] > 180
    assert page.ask(question) == python(second, [question])[0]
    assert len(page.answers()) == 1  # another drawing is another picture
    page.one("#undo").click()
    assert page.drawing().tobytes() == first.tobytes()
    page.one("#erase").click()
    page.send(question)
    assert "Draw something first" in page.wait_for_error()


def test_a_filled_pen_fills_what_it_surrounds(page):
    page.one("#tab-draw").click()
    page.choose("#colours [value=green]")
    page.choose("#tools [value=outline]")
    stroke = ActionChains(page.browser).move_to_element_with_offset(page.one("#drawing"), -60, -60).click_and_hold()
    for x, y in ((120, 0), (0, 120), (-120, 0)):
        stroke = stroke.move_by_offset(x, y)
    stroke.release().perform()
    assert page.drawing().getpixel((192, 192))[1] > 140


def test_a_visitor_draws_with_the_keyboard(page):
    page.one("#tab-draw").click()
    page.choose("#colours [value=purple]")
    page.choose("#tools [value=square]")
    keys = ActionChains(page.browser).send_keys_to_element(page.one("#drawing"), Keys.ARROW_LEFT * 5, " ")
    keys.send_keys(Keys.ARROW_RIGHT).perform()
    assert page.one("#cursor").is_displayed()
    assert page.drawing().getpixel((132, 192)) == (132, 44, 164)
    page.one("#question").send_keys("Which shape is purple?", Keys.ENTER)
    page.wait.until(lambda _: page.timings())


def test_tabs_are_reached_by_arrow_keys(page):
    page.one("#tab-picture").send_keys(Keys.ARROW_RIGHT)
    assert page.one("#tab-draw").get_attribute("aria-selected") == "true"
    assert page.browser.switch_to.active_element.get_attribute("id") == "tab-draw"
    assert page.one("#source-draw").is_displayed()
    assert not page.one("#source-picture").is_displayed()


def test_further_questions_use_the_cache_and_are_answered_as_in_python(browser, site, reference, expected):
    page = Page(browser, f"{site.url}?model=./float32/")
    chat = expected["chats"][0]
    page.show(reference / chat["file"])
    for index, turn in enumerate(chat["turns"]):
        assert page.ask(turn["question"]) == turn["answer"]
        assert (page.timings()["numCached"] > 0) == (index > 0)
    assert page.answers() == [turn["answer"] for turn in chat["turns"]]
    assert "First token after" in page.one("#timings").text
    assert "tokens per second" in page.one("#timings").text


def test_the_page_shows_where_the_model_looked(page, reference, expected):
    page.show(reference / expected["chats"][0]["file"])
    assert not page.has_overlay()
    page.ask("Describe the picture.")
    assert not page.has_overlay()
    page.all(".looked")[0].click()
    assert page.has_overlay()
    looked = page.script("return document.querySelector('#overlay').toDataURL()")
    page.ask("Which colour is the star?")
    assert page.script("return document.querySelector('#overlay').toDataURL()") != looked
    page.script(
        "const view = document.querySelector('#view'); view.value = 'pooling'; view.dispatchEvent(new Event('change'))"
    )
    assert page.has_overlay()
    page.show(reference / expected["chats"][1]["file"])
    assert not page.has_overlay()


@pytest.mark.parametrize(
    "stop",
    [
        "document.querySelector('#stop').click()",
        "document.querySelector('#question')"
        ".dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))",
    ],
    ids=["button", "Escape"],
)
def test_an_answer_is_streamed_and_can_be_stopped(browser, site, reference, expected, stop):
    page = Page(browser, f"{site.url}?model=./endless/")
    page.show(reference / expected["chats"][0]["file"])
    assert not page.one("#stop").is_enabled()
    page.script("document.querySelector('#length').value = 800")
    # From inside the page: a driver on a busy machine may come when all 800 tokens are there
    page.script(
        """
        const [stop] = arguments;
        const one = (selector) => document.querySelector(selector);
        new MutationObserver((_changes, observer) => {
          const text = one(".answer")?.textContent ?? "";
          if (text.split(" ").length < 4) return;
          observer.disconnect();
          window.whileWriting = [text, one("#timings").dataset.json ?? null, one("#ask").disabled];
          new Function(stop)();
        }).observe(document.body, {childList: true, subtree: true});
        """,
        stop,
    )
    page.send("Describe the picture.")
    page.wait.until(lambda _: page.timings())
    text, timings, is_disabled = page.script("return window.whileWriting")
    assert timings is None
    assert is_disabled
    assert page.answers()[0].startswith(text)
    assert 0 < page.timings()["numTokens"] < 800
    assert not page.one("#stop").is_enabled()
    page.script("document.querySelector('#length').value = 3")
    assert page.ask("Which colour is the star?")
    assert len(page.answers()) == 2


def test_the_longest_answer_can_be_set(browser, site, reference, expected):
    page = Page(browser, f"{site.url}?model=./endless/")
    page.show(reference / expected["chats"][0]["file"])
    page.script("document.querySelector('#length').value = 3")
    page.ask("Describe the picture.")
    assert page.timings()["numTokens"] == 3


def test_temperature_changes_answers(browser, site, reference, expected):
    page = Page(browser, f"{site.url}?model=./endless/")
    page.show(reference / expected["chats"][0]["file"])
    page.script("document.querySelector('#length').value = 12; document.querySelector('#temperature').value = 2;")
    found = set()
    for _ in range(3):
        found.add(page.ask("Describe the picture."))
        page.forget()
    assert len(found) > 1


def paste(page, path, event, target, kind="image/png"):
    page.script(
        """
        const [text, event, target, kind] = arguments;
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "picture", {type: kind}));
        const init = {bubbles: true, cancelable: true};
        const made = event === "paste"
          ? new ClipboardEvent(event, {...init, clipboardData: data})
          : new DragEvent(event, {...init, dataTransfer: data});
        document.querySelector(target).dispatchEvent(made);
        """,
        base64.b64encode(path.read_bytes()).decode(),
        event,
        target,
        kind,
    )


@pytest.mark.parametrize(("event", "target"), [("paste", "#question"), ("drop", "#stage")])
def test_a_picture_can_be_pasted_or_dropped(page, reference, expected, event, target):
    row = expected["questions"][0]
    paste(page, reference / row["file"], event, target)
    page.wait_until_shown()
    assert page.one("#shown").is_displayed()
    assert page.ask(row["question"])


def test_a_picture_can_be_taken(page):
    page.one("#tab-camera").click()
    page.wait.until(lambda _: page.script("return document.querySelector('#video').videoWidth"))
    page.one("#take").click()
    page.wait_until_shown()
    assert page.one("#tab-picture").get_attribute("aria-selected") == "true"
    assert page.one("#shown").is_displayed()
    assert page.script("return document.querySelector('#video').srcObject") is None  # the camera is off again


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_read(page, reference, expected, tmp_path, kind):
    row = expected["questions"][0]
    Image.open(reference / row["file"]).save(tmp_path / "picture", kind)
    page.show(tmp_path / "picture")
    difference = ImageChops.difference(page.pixels("shown"), Image.open(tmp_path / "picture").convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= (2 if kind in ("JPEG", "WEBP") else 0)
    assert page.ask(row["question"])


def test_a_photo_is_shown_upright(page, tmp_path):
    photo = Image.new("RGB", (300, 200))
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera was held upright
    photo.save(tmp_path / "photo.jpg", exif=exif)
    page.show(tmp_path / "photo.jpg")
    canvas = "document.querySelector('#shown')"
    assert page.script(f"return [{canvas}.width, {canvas}.height]") == [200, 300]


def test_an_example_fills_picture_and_question(page):
    page.all("#examples button")[0].click()
    page.wait_until_shown()
    page.one("#ask").click()
    page.wait.until(lambda _: page.timings())
    assert page.answers()[0]


def test_errors_are_explained(page, reference, expected, tmp_path):
    page.send("Read the sign.")
    assert page.wait_for_error() == "Choose, draw or take a picture first."
    page.show(reference / expected["questions"][0]["file"])
    page.send("  ")
    assert page.wait_for_error() == "Type a question first."
    for name, content in (
        ("text.png", b"no picture"),
        ("empty.png", b""),
        ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
    ):
        (tmp_path / name).write_bytes(content)
        page.script("document.querySelector('#error').textContent = ''")
        page.one("#file").send_keys(str(tmp_path / name))
        assert re.search("not a picture that the browser can read|is empty", page.wait_for_error())
    page.send("star " * 3000)
    page.wait.until(lambda _: "too long" in page.error())
    assert re.search(r"has \d+ tokens, and the model can process \d+", page.error())
    assert page.one("#question").get_attribute("value").startswith("star star")  # to be shortened
    assert page.ask(expected["questions"][0]["question"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nothing/", "Model not found: http://localhost"),
        ("./other/", 'is not a FlashSloth: its config.json has the model_type "llama"'),
        ("./index.html", "Model not found"),
        ("https://nowhere.invalid/model", "cannot be reached"),
    ],
)
def test_a_wrong_model_is_explained(browser, site, model, message):
    page = Page(browser, f"{site.url}?model={model}", is_ready=False)
    assert message in page.wait_for_error()


def test_nothing_leaves_the_machine(browser, site, reference, expected):
    browser.get_log("performance")
    page = Page(browser, site.url)
    page.show(reference / expected["questions"][0]["file"])
    page.ask("Read the sign.")
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"]["request"] for event in sent if event["method"] == "Network.requestWillBeSent"]
    assert requests
    assert [request["url"] for request in requests if not request["url"].startswith((site.url, "data:", "blob:"))] == []
    assert {request["method"] for request in requests} <= {"GET", "HEAD"}
    assert "neither pictures nor questions leave it" in " ".join(page.one("header").text.split())


def test_a_second_visit_downloads_no_weights_and_works_offline(browser, folder, reference, expected):
    site = Site(folder, ISOLATION)  # at another port, so with empty caches
    try:
        page = Page(browser, site.url)
        assert any(path.endswith("decoder.onnx.data") for path in site.requests)
        page.wait.until(lambda _: page.script("return navigator.serviceWorker.controller?.state") == "activated")
        site.requests.clear()
        browser.refresh()
        page.wait_until_ready()
        assert [path for path in site.requests if path.endswith((".data", ".onnx", ".wasm"))] == []
        site.stop()
        browser.refresh()
        page.wait_until_ready()
        row = expected["questions"][0]
        page.show(reference / row["file"])
        assert page.ask(row["question"])
        page.all("#examples button")[0].click()
        page.wait_until_shown()
    finally:
        site.server.server_close()


def test_changed_weights_are_downloaded_again(browser, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "page")
    site = Site(tmp_path / "page", {})
    try:
        Page(browser, site.url)
        changed = tmp_path / "page" / "model" / "decoder.onnx.data"
        changed.touch()
        os.utime(changed, (time.time() + 10, time.time() + 10))
        site.requests.clear()
        Page(browser, site.url)
        assert [path for path in site.requests if path.endswith(".data")] == ["/model/decoder.onnx.data"]
    finally:
        site.stop()


def test_threads_are_used_where_the_server_allows(browser, site, folder, reference, expected):
    page = Page(browser, site.url)
    assert re.search(r"WebAssembly(, \d threads|, one thread)\.", page.one("#about").text)
    if os.cpu_count() > 1:
        assert "threads" in page.one("#about").text
    plain = Site(folder, {})
    try:
        page = Page(browser, plain.url)
        assert "WebAssembly, one thread" in page.one("#about").text
        page.show(reference / expected["questions"][0]["file"])
        assert page.ask(expected["questions"][0]["question"])
    finally:
        plain.stop()


def test_a_gpu_is_used_where_the_browser_has_one(site, reference, expected, tmp_path):
    driver = open_browser(tmp_path / "profile", SOFTWARE_GPU)
    try:
        page = Page(driver, f"{site.url}?model=./float32/", timeout=600)
        if "WebGPU" not in page.one("#about").text:
            pytest.skip("this Chromium has no software GPU")
        row = min(expected["questions"], key=lambda row: len(row["answer"]))
        page.show(reference / row["file"])
        assert page.ask(row["question"]) == row["answer"]
        page.script("document.querySelector('#length').value = 2")
        page.send("Describe the picture.")  # continues from a cache in the GPU's memory
        page.wait.until(lambda _: page.timings())
    finally:
        driver.quit()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, site, reference, expected, theme):
    browser.set_window_size(*NARROW)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page = Page(browser, site.url)
        page.show(reference / expected["questions"][0]["file"])
        page.ask("Describe the picture.")
        for tab in ("picture", "draw", "camera"):
            page.one(f"#tab-{tab}").click()
            width = page.script("return document.documentElement.clientWidth")
            assert page.script("return document.documentElement.scrollWidth") <= width
            for element in page.all("button, input:not([type=file], [type=radio]), canvas, video, textarea, select"):
                if element.is_displayed():
                    box = element.rect
                    assert box["x"] >= 0
                    assert box["x"] + box["width"] <= width
        colour = page.script("return getComputedStyle(document.documentElement).backgroundColor")
        level = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
        assert level < 60 if theme == "dark" else level > 200
    finally:
        browser.set_window_size(*WIDE)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name(page):
    nameless = page.script(
        """
        const name = (element) => element.getAttribute("aria-label") || element.labels?.[0]?.textContent.trim()
          || element.textContent.trim();
        return [...document.querySelectorAll("button, input, select, textarea, canvas:not([aria-hidden]), video")]
          .filter((element) => !name(element)).map((element) => element.outerHTML);
        """
    )
    assert nameless == []
    assert page.script("return document.documentElement.lang") == "en"
    assert page.one("#status").get_attribute("role") == "status"
    page.all("#examples button")[0].click()
    page.wait_until_shown()
    text = page.ask("Describe the picture.")
    assert page.script("return document.querySelector('#status').textContent") == f"Answer: {text}"


def test_the_console_stays_silent(browser, site, reference, expected):
    browser.get_log("browser")
    page = Page(browser, site.url)
    page.show(reference / expected["questions"][0]["file"])
    page.ask("Read the sign.")
    entries = [entry["message"] for entry in browser.get_log("browser")]
    assert [text for text in entries if "No available adapters" not in text] == []
