"""The demo in a browser: visitors upload an image and get answers and heat maps."""

import base64
import io
import json
import re
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageChops

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install gradio")
webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser needs selenium")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from stranger import META, TIMEOUT, Stranger, words  # noqa: E402

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor  # noqa: E402
from flashsloth.cli import SHIPPED_CHECKPOINT_NOTE  # noqa: E402

ROOT = Path(__file__).parents[1]
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no Chromium: install the packages chromium and chromium-driver"
    ),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --force-device-scale-factor=1 "
    "--use-fake-ui-for-media-stream --use-fake-device-for-media-stream"  # a fake camera that needs no permission
)
WIDE, NARROW = (1280, 1000), (400, 900)


@pytest.fixture(scope="module")
def demo():
    from flashsloth.cli import demo

    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
    shown = demo.Demo(model, FlashSlothProcessor.from_pretrained(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = demo.launch(shown, prevent_thread_lock=True, server_port=port, quiet=True)
    shown.url = page.local_url
    yield shown
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    folder = tmp_path_factory.mktemp("browser")
    film(ROOT / "examples" / "scene.png", folder / "camera.y4m")
    for flag in (*FLAGS.split(), f"--user-data-dir={folder}", f"--use-file-for-fake-video-capture={folder}/camera.y4m"):
        options.add_argument(flag)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(*WIDE)
    yield driver
    driver.quit()


def film(image, file):
    """Write an image as uncompressed video (YUV4MPEG2), for the fake camera."""
    frame = Image.open(image).convert("YCbCr").resize((480, 480))
    luma, *chroma = frame.split()
    planes = luma.tobytes() + b"".join(plane.reduce(2).tobytes() for plane in chroma)
    file.write_bytes(b"YUV4MPEG2 W480 H480 F10:1 Ip A1:1 C420jpeg\n" + (b"FRAME\n" + planes) * 2)


class Page:
    """The demo as a visitor uses it."""

    def __init__(self, browser, url):
        self.browser = browser
        self.wait = WebDriverWait(browser, TIMEOUT, 0.1, ignored_exceptions=[StaleElementReferenceException])
        browser.get(url)
        self.wait.until(lambda _: self.all("#image input[type=file]"))

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def upload(self, path):
        self.all("#image input[type=file]")[0].send_keys(str(path))

    def show(self, name):
        self.upload(ROOT / "examples" / name)
        self.wait.until(lambda _: self.all("#image img"))
        time.sleep(0.5)  # until the server has cleared the chat

    def ask(self, question):
        self.all("#question textarea")[0].send_keys(question)
        self.all("#send")[0].click()

    def type(self, text):
        """Put a text in the question's box at once, not key by key."""
        self.browser.execute_script(
            "const [box, text] = arguments;"
            "Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(box, text);"
            "box.dispatchEvent(new Event('input', {bubbles: true}));",
            self.all("#question textarea")[0],
            text,
        )
        time.sleep(0.3)

    def question(self):
        return self.all("#question textarea")[0].get_attribute("value")

    def set(self, selector, number):
        """Enter a number in the box of a slider."""
        (box,) = self.all(f"{selector} input[type=number]")
        box.clear()
        box.send_keys(str(number), Keys.TAB)
        time.sleep(0.3)

    def is_active(self, selector):
        (button,) = self.all(selector)
        return button.is_enabled()

    def answers(self):
        return [message.text.strip() for message in self.all("#chat .bot.message")]

    def views(self):
        """Addresses of the heat maps that are shown."""
        return [image.get_attribute("src") for i in range(3) for image in self.all(f"#view{i} img")]

    def wait_for_views(self, others=()):
        self.wait.until(lambda _: len(self.views()) == 3 and self.views()[0] not in others)
        return self.views()

    def warning(self):
        texts = self.wait.until(lambda _: list(filter(None, (toast.text for toast in self.all(".toast-body")))))
        return texts[0]  # read once: while the warning fades in, its text is not always visible


@pytest.fixture
def page(browser, demo):
    return Page(browser, demo.url)


@pytest.fixture
def encodings(demo):
    """How many tiles the vision tower has encoded, call by call."""
    calls = []
    tower = demo.model.model.vision_tower
    hook = tower.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    yield calls
    hook.remove()


def test_a_visitor_uploads_an_image_asks_and_sees_heat_maps(page, encodings):
    page.show("scene.png")
    page.ask("Read the sign.")
    first = page.wait_for_views()
    assert page.answers() == ["PULL"]
    page.ask("Which colour is the star?")
    page.wait_for_views(first)
    assert page.answers() == ["PULL", "green"]
    assert sum(encodings) == 1  # the image's one tile is encoded once
    hosts = set()
    for entry in page.browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith(("http", "ws")):
                hosts.add(url.split("/")[2].split(":")[0])
    assert hosts == {"127.0.0.1"}


def test_a_visitor_takes_an_image_with_the_camera(page):
    page.all("#image button[aria-label='Capture from camera']")[0].click()
    page.wait.until(lambda _: [button for button in page.all("#image button") if "Webcam" in button.text])[0].click()
    page.wait.until(lambda _: page.all("#image button[aria-label='capture photo']"))
    page.wait.until(lambda _: page.browser.execute_script("return document.querySelector('#image video').videoWidth"))
    page.all("#image button[aria-label='capture photo']")[0].click()
    page.wait.until(lambda _: page.all("#image img"))
    time.sleep(0.5)
    page.ask("Read the sign.")
    page.wait_for_views()
    assert page.answers() == ["PULL"]  # so the image is not mirrored


def test_high_resolution_encodes_five_tiles_once(page, encodings):
    page.all("#splitting input")[0].click()
    page.show("shapes.png")
    page.ask("Which colour is the star?")
    first = page.wait_for_views()
    page.ask("Which colour is the circle?")
    page.wait_for_views(first)
    assert encodings == [5]


def test_a_map_is_drawn_over_the_image(page):
    page.show("scene.png")
    page.ask("Which colour is the star?")
    source = page.wait_for_views()[0]
    script = """
        const [source, done] = arguments;
        fetch(source).then(r => r.blob()).then(blob => {
            const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(blob);
        });"""
    data = page.browser.execute_async_script(script, source)
    drawn = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("L")
    image = Image.open(ROOT / "examples" / "scene.png").convert("L")
    assert drawn.size == image.size
    brighter = ImageChops.subtract(drawn, image)
    _, _, right, bottom = brighter.point(lambda level: 255 * (level > 40)).getbbox()
    assert right < 200  # the green star is at the top left
    assert bottom < 200


def test_the_stop_button_ends_an_answer(page, demo):
    demo.model.generation_config.min_new_tokens = 400  # a long answer
    try:
        page.show("shapes.png")
        page.ask("Describe the picture.")
        page.wait.until(lambda _: page.answers() and len(page.answers()[0]) > 30)
        page.all("#stop")[0].click()
        page.wait_for_views()
        assert 0 < len(demo.processor.tokenizer.encode(page.answers()[0])) < 390
        assert not demo.answering
    finally:
        demo.model.generation_config.min_new_tokens = None


def test_a_new_chat_discards_an_answer_that_is_being_generated(page, demo):
    demo.model.generation_config.min_new_tokens = 400
    try:
        for leave in (lambda: page.all("#clear")[0].click(), lambda: page.show("scene.png")):
            page.show("shapes.png")
            page.ask("Describe the picture.")
            page.wait.until(lambda _: page.answers() and len(page.answers()[0]) > 30)
            leave()
            page.wait.until(lambda _: not demo.answering)
            page.wait.until(lambda _: not page.answers())
            time.sleep(1)  # the rest of the old answer would appear in this time
            assert (page.answers(), page.views()) == ([], [])
            page.browser.refresh()
            page.wait.until(lambda _: page.all("#image input[type=file]"))
    finally:
        demo.model.generation_config.min_new_tokens = None


def test_text_typed_during_an_answer_stays(page, demo):
    demo.model.generation_config.min_new_tokens = 400
    try:
        page.show("shapes.png")
        page.ask("Describe the picture.")
        page.wait.until(lambda _: page.answers() and len(page.answers()[0]) > 30)
        (box,) = page.all("#question textarea")
        box.send_keys("Read the sign.")
        shown = len(page.answers()[0])
        page.wait.until(lambda _: len(page.answers()[0]) > shown + 30)
        page.all("#stop")[0].click()
        page.wait_for_views()
        assert box.get_attribute("value") == "Read the sign."
    finally:
        demo.model.generation_config.min_new_tokens = None


def test_an_image_that_the_model_rejects_is_explained(page, tmp_path):
    Image.new("RGB", (70000, 4)).save(tmp_path / "long.png")
    page.upload(tmp_path / "long.png")
    page.wait.until(lambda _: page.all("#image img"))
    time.sleep(0.5)
    page.ask("What is it?")
    page.wait.until(lambda _: page.answers())
    assert "70000" in page.answers()[0]
    assert "/" not in page.answers()[0]  # no server path
    assert not page.all(".toast-body")


def test_a_missing_image_or_question_is_reported(page, tmp_path):
    page.ask("Read the sign.")
    assert "choose an image first" in page.warning()
    page.browser.refresh()
    page.wait.until(lambda _: page.all("#image input[type=file]"))
    page.show("scene.png")
    page.ask("   ")
    assert "type a question first" in page.warning()
    page.browser.refresh()
    page.wait.until(lambda _: page.all("#image input[type=file]"))
    broken = tmp_path / "broken.png"
    broken.write_bytes((ROOT / "examples" / "scene.png").read_bytes()[:300])
    page.upload(broken)
    assert "cannot be read as an image" in page.warning()


def test_heat_maps_of_an_earlier_question_can_be_shown_again(page):
    page.show("shapes.png")
    page.ask("Which colour is the star?")
    first = page.wait_for_views()
    page.ask("Which colour is the circle?")
    second = page.wait_for_views(first)
    page.all("#choice input")[0].click()
    page.wait.until(lambda _: len(page.all("[role=option]")) == 2)
    page.all("[role=option]")[0].click()
    again = page.wait_for_views(second)
    assert again[0].split("/")[-2:] == first[0].split("/")[-2:]
    page.all("#clear")[0].click()
    page.wait.until(lambda _: not page.views() and not page.answers())


def test_a_question_that_is_too_long_is_explained_and_stays_in_its_box(page, capfd):
    page.show("scene.png")
    page.ask("Read the sign.")
    first = page.wait_for_views()
    page.type("star " * 2000)
    page.all("#send")[0].click()
    page.wait.until(lambda _: len(page.answers()) == 2)
    assert "conversation is too long" in page.answers()[1]
    assert re.search(r"has \d{4} tokens, and the model can process 1024 including the answer", page.answers()[1])
    assert not page.all(".toast-body")
    assert not page.all("#chat .error")
    assert page.question() == ("star " * 2000).strip()  # to be shortened
    assert page.views() == first
    page.type("Which colour is the star?")
    page.all("#send")[0].click()
    page.wait_for_views(first)
    assert page.answers() == ["PULL", "green"]  # the rejected one was not part of the conversation
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_error_of_the_model_is_shown_without_its_message(page, demo, caplog):
    demo.model.generation_config.num_beams = 2  # beam search cannot stream
    try:
        page.show("scene.png")
        page.ask("Read the sign.")
        page.wait.until(lambda _: page.answers())
        assert "The model could not answer" in page.answers()[0]
        assert "streamer" not in page.answers()[0]
        assert "streamer" in caplog.text  # the server's log has it
        assert not page.is_active("#stop")
    finally:
        demo.model.generation_config.num_beams = None


def test_stop_is_active_only_during_an_answer(page, demo):
    assert not page.is_active("#stop")
    demo.model.generation_config.min_new_tokens = 400
    try:
        page.show("shapes.png")
        assert not page.is_active("#stop")
        page.ask("Describe the picture.")
        page.wait.until(lambda _: page.is_active("#stop"))
        page.all("#stop")[0].click()
        page.wait_for_views()
        page.wait.until(lambda _: not page.is_active("#stop"))
        page.ask("Describe the picture.")
        page.wait.until(lambda _: page.is_active("#stop"))
        page.all("#clear")[0].click()
        page.wait.until(lambda _: not page.is_active("#stop"))
    finally:
        demo.model.generation_config.min_new_tokens = None


def test_clear_clears_the_image_and_the_question(page):
    page.show("scene.png")
    page.ask("Read the sign.")
    page.wait_for_views()
    page.type("Which colour is the star?")
    page.all("#clear")[0].click()
    page.wait.until(lambda _: not page.views() and not page.answers() and not page.all("#image img"))
    page.wait.until(lambda _: not page.question())
    page.ask("Read the sign.")
    assert "choose an image first" in page.warning()


def test_an_example_fills_image_and_question(page):
    page.wait.until(lambda _: page.all("#examples tbody tr, #examples .gallery-item"))
    page.all("#examples tbody tr, #examples .gallery-item")[0].click()
    page.wait.until(lambda _: page.all("#image img") and page.question() == "Read the sign.")
    time.sleep(0.5)
    page.all("#send")[0].click()
    page.wait_for_views()
    assert page.answers() == ["PULL"]


def test_the_folded_sampling_settings_change_answers(page):
    assert not page.all("#temperature input[type=number]") or not page.all("#temperature")[0].is_displayed()
    page.show("shapes.png")
    page.ask("Describe the picture.")
    first = page.wait_for_views()
    page.all("#sampling button")[0].click()
    page.wait.until(lambda _: page.all("#temperature") and page.all("#temperature")[0].is_displayed())
    page.set("#length", 5)
    page.ask("Describe the picture.")
    page.wait_for_views(first)
    greedy, short = page.answers()
    assert greedy.startswith(short)
    assert len(short) < len(greedy)
    page.set("#length", 60)
    page.set("#temperature", 2)
    answers = set()
    for number in range(3):
        before = page.views()
        page.ask("Describe the picture.")
        page.wait_for_views(before)
        answers.add(page.answers()[2 + number])
    assert len(answers | {greedy}) > 1


def test_the_page_names_the_model_and_describes_the_shipped_one(page, demo, tmp_path):
    text = page.all("#about")[0].text
    assert SHIPPED_CHECKPOINT_NOTE in text
    assert str(ROOT) not in page.browser.page_source
    (tmp_path / "my-sloth").mkdir()
    for name, shown in ((str(tmp_path / "my-sloth"), "my-sloth"), ("Tongbo/FlashSloth-3.2B", "Tongbo/FlashSloth-3.2B")):
        demo.model.name_or_path, kept = name, demo.model.name_or_path
        try:
            about = demo._about()
        finally:
            demo.model.name_or_path = kept
        assert f"**Model**: {shown}." in about
        assert str(tmp_path) not in about
        assert "demonstration" not in about


@pytest.fixture
def stranger(demo):
    return Stranger(demo.url)


def secrets_of(folder, website):
    """Images in requests that refer to files which the visitor did not upload, by name."""
    secret = folder / "secret.png"
    shutil.copy(ROOT / "examples" / "scene.png", secret)
    upwards = "../" * 20
    paths = {
        "path": str(secret),
        "upwards": f"{tempfile.gettempdir()}/gradio/{upwards}{str(secret).lstrip('/')}",
        "from here": f"{upwards}{str(secret).lstrip('/')}",
        "file URL": f"file://{secret}",
        "web page": f"{website}/gradio_api/file=/etc/passwd",
        "private network": "http://169.254.169.254/latest/meta-data/",
        "zero byte": f"{secret}\0.png",
        "folder": str(folder),
        "nothing": "",
    }
    kinds = {f"{name}, {kind}": {"path": path} | mark for name, path in paths.items() for kind, mark in MARKS.items()}
    kinds["a stream"] = {"path": str(secret), "is_stream": True}
    kinds["a name"] = {"path": str(secret), "orig_name": "secret.svg"}
    kinds["a URL alone"] = {"url": f"file://{secret}"}
    kinds["two"] = {"path": str(secret), "url": f"file://{secret}"}
    kinds["a text"] = str(secret)
    kinds["a list"] = [{"path": str(secret)}]
    return kinds


MARKS = {"no meta": {}, "meta": {"meta": META}, "another meta": {"meta": {"_type": "else"}}}


def test_a_stranger_reads_no_image_of_the_server(stranger, demo, tmp_path, capfd):
    for name, image in secrets_of(tmp_path, demo.url).items():
        for reply in (stranger.ask(image), stranger.send(stranger.show_index, image)):
            assert "assistant" not in reply, name
            assert str(tmp_path) not in reply, name
            assert '"success":true' not in reply or "choose an image" in reply, (name, reply)
    capfd.readouterr()


def test_a_stranger_cannot_have_files_fetched_in_place_of_a_question(stranger, tmp_path):
    secret = tmp_path / "secret.png"
    shutil.copy(ROOT / "examples" / "scene.png", secret)
    image = {"path": stranger.upload((ROOT / "examples" / "scene.png").read_bytes()), "meta": META}
    for path in (str(secret), "http://127.0.0.1:9/nothing.png", "https://example.org/nothing.png"):
        for question in ({"path": path, "meta": META}, [[{"deep": {"path": path, "meta": META}}]]):
            reply = stranger.ask(image, question)
            assert "was not uploaded" in reply
            assert str(tmp_path) not in reply


def test_an_uploaded_image_is_read(stranger):
    path = stranger.upload((ROOT / "examples" / "scene.png").read_bytes())
    assert words(stranger.ask({"path": path, "meta": META})) == "PULL"
    encoded = base64.b64encode((ROOT / "examples" / "scene.png").read_bytes()).decode()
    assert words(stranger.ask({"url": f"data:image/png;base64,{encoded}"})) == "PULL"


def test_a_symbolic_link_in_the_upload_folder_is_not_followed(stranger, tmp_path):
    shutil.copy(ROOT / "examples" / "scene.png", tmp_path / "secret.png")
    link = Path(stranger.upload(b"anything")).with_name("link.png")
    link.symlink_to(tmp_path / "secret.png")
    try:
        for mark in MARKS.values():
            reply = stranger.ask({"path": str(link)} | mark)
            assert "was not uploaded" in reply
            assert str(tmp_path) not in reply
    finally:
        link.unlink()


def test_a_stranger_gets_no_file_of_the_repository(stranger, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for path in (ROOT / "config.json", ROOT / "cli" / "demo.py", tmp_path / "secret.txt", "/etc/passwd"):
        for way in ("file=", "file/", "proxy=", "proxy=file://"):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                stranger.get(f"/gradio_api/{way}{path}")
            assert refusal.value.code in (400, 403, 404), (way, path)
    assert json.loads(stranger.get("/gradio_api/info"))["named_endpoints"] == {}
    assert str(ROOT) not in stranger.get("/config")


def test_uploads_have_a_size_limit(stranger):
    with pytest.raises(urllib.error.URLError):  # status 413, or a connection that is closed early
        stranger.upload(bytes(40 * 2**20))
    assert stranger.upload(bytes(2**20))


def test_no_external_program_renders_an_image(stranger):
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    reply = stranger.ask({"path": stranger.upload(program, "program.png"), "meta": META})
    assert "cannot be read as an image" in reply


def test_the_question_box_is_on_a_phones_first_screen_and_examples_are_above_the_maps(browser, demo):
    browser.set_window_size(*NARROW)
    try:
        page = Page(browser, demo.url)
        for number in range(2):
            box = page.all("#question textarea")[0].rect
            assert box["y"] + box["height"] < 620  # pixels of a small phone, without the browser's bars
            if number == 0:
                page.show("scene.png")
        page.wait.until(lambda _: page.all("#examples"))
        assert page.all("#send")[0].rect["y"] < page.all("#examples")[0].rect["y"] < page.all("#view0")[0].rect["y"]
    finally:
        browser.set_window_size(*WIDE)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, demo, theme):
    browser.set_window_size(*NARROW)
    try:
        page = Page(browser, f"{demo.url}?__theme={theme}")
        page.show("scene.png")
        page.ask("Read the sign.")
        page.wait_for_views()
        width = browser.execute_script("return document.documentElement.clientWidth")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for selector in ("#image", "#chat", "#question", "#send", "#stop", "#view0", "#view1", "#view2"):
            (element,) = page.all(selector)
            box = element.rect
            assert box["x"] >= 0, selector
            assert box["x"] + box["width"] <= width, selector
            assert box["width"] > 60, selector
        colour = browser.execute_script("return getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
        level = sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3
        assert level < 60 if theme == "dark" else level > 200
    finally:
        browser.set_window_size(*WIDE)


def test_two_visitors_get_their_own_answers(demo, browser):
    first = Page(browser, demo.url)
    first.show("scene.png")
    first.ask("Read the sign.")
    browser.switch_to.new_window("tab")
    second = Page(browser, demo.url)
    second.show("shapes.png")
    second.ask("Which colour is the star?")
    second.wait_for_views()
    assert second.answers() == ["yellow"]
    browser.close()
    browser.switch_to.window(browser.window_handles[0])
    first.wait_for_views()
    assert first.answers() == ["PULL"]
