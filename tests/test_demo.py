"""The demo in a browser: a picture goes in, answers and what the model looked at come out."""

import base64
import io
import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageChops

pytest.importorskip("gradio", reason='the demo needs Gradio: pip install "flashsloth[demo]"')
webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser needs selenium")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor  # noqa: E402

ROOT = Path(__file__).parents[1]
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium: install the packages chromium and chromium-driver"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --force-device-scale-factor=1 "
    "--use-fake-ui-for-media-stream --use-fake-device-for-media-stream"  # a camera, which needs no permission
)
WIDE, NARROW = (1280, 1000), (400, 900)
TIMEOUT = 120  # seconds; a machine that also runs other tests may stand still for a while


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import demo
    finally:
        sys.path.remove(str(ROOT / "examples"))
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


def film(picture, file):
    """Write what a camera sees that points at a picture, as uncompressed video (YUV4MPEG2)."""
    frame = Image.open(picture).convert("YCbCr").resize((480, 480))
    luma, *chroma = frame.split()
    planes = luma.tobytes() + b"".join(plane.reduce(2).tobytes() for plane in chroma)
    file.write_bytes(b"YUV4MPEG2 W480 H480 F10:1 Ip A1:1 C420jpeg\n" + (b"FRAME\n" + planes) * 2)


class Page:
    """The demo as a visitor uses it."""

    def __init__(self, browser, url):
        self.browser = browser
        self.wait = WebDriverWait(browser, TIMEOUT, 0.1, ignored_exceptions=[StaleElementReferenceException])
        browser.get(url)
        self.wait.until(lambda _: self.all("#picture input[type=file]"))

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def upload(self, path):
        self.all("#picture input[type=file]")[0].send_keys(str(path))

    def show(self, name):
        self.upload(ROOT / "examples" / name)
        self.wait.until(lambda _: self.all("#picture img"))
        time.sleep(0.5)  # the page tells the server, which empties the chat

    def ask(self, question):
        self.all("#question textarea")[0].send_keys(question)
        self.all("#send")[0].click()

    def answers(self):
        return [message.text.strip() for message in self.all("#chat .bot.message")]

    def views(self):
        """The heat maps that are shown, by their addresses."""
        return [image.get_attribute("src") for i in range(3) for image in self.all(f"#view{i} img")]

    def wait_for_views(self, others=()):
        self.wait.until(lambda _: len(self.views()) == 3 and self.views()[0] not in others)
        return self.views()

    def warning(self):
        texts = self.wait.until(lambda _: list(filter(None, (toast.text for toast in self.all(".toast-body")))))
        return texts[0]  # what fades in has a text in one moment, and none in the next


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


def test_a_visitor_uploads_asks_and_sees_what_was_looked_at(page, encodings):
    page.show("scene.png")
    page.ask("Read the sign.")
    first = page.wait_for_views()
    assert page.answers() == ["PULL"]
    page.ask("Which colour is the star?")
    page.wait_for_views(first)
    assert page.answers() == ["PULL", "green"]
    assert sum(encodings) == 1  # one tile, once
    hosts = set()
    for entry in page.browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith(("http", "ws")):
                hosts.add(url.split("/")[2].split(":")[0])
    assert hosts == {"127.0.0.1"}


def test_a_visitor_takes_a_picture_with_the_camera(page):
    page.all("#picture button[aria-label='Capture from camera']")[0].click()
    page.wait.until(lambda _: [button for button in page.all("#picture button") if "Webcam" in button.text])[0].click()
    page.wait.until(lambda _: page.all("#picture button[aria-label='capture photo']"))
    page.wait.until(lambda _: page.browser.execute_script("return document.querySelector('#picture video').videoWidth"))
    page.all("#picture button[aria-label='capture photo']")[0].click()
    page.wait.until(lambda _: page.all("#picture img"))
    time.sleep(0.5)
    page.ask("Read the sign.")
    page.wait_for_views()
    assert page.answers() == ["PULL"]  # so it is not mirrored


def test_high_definition_reads_five_tiles_once(page, encodings):
    page.all("#high input")[0].click()
    page.show("shapes.png")
    page.ask("Which colour is the star?")
    first = page.wait_for_views()
    page.ask("Which colour is the circle?")
    page.wait_for_views(first)
    assert encodings == [5]


def test_a_map_is_drawn_over_the_picture(page):
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
    picture = Image.open(ROOT / "examples" / "scene.png").convert("L")
    assert drawn.size == picture.size
    brighter = ImageChops.subtract(drawn, picture)
    _, _, right, bottom = brighter.point(lambda level: 255 * (level > 40)).getbbox()
    assert right < 200  # the green star stands top left
    assert bottom < 200


def test_the_stop_button_ends_an_answer(page, demo):
    demo.model.generation_config.min_new_tokens = 400  # it would go on and on
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


def test_a_new_chat_begins_while_an_answer_is_being_given(page, demo):
    demo.model.generation_config.min_new_tokens = 400
    try:
        for leave in (lambda: page.all("#clear")[0].click(), lambda: page.show("scene.png")):
            page.show("shapes.png")
            page.ask("Describe the picture.")
            page.wait.until(lambda _: page.answers() and len(page.answers()[0]) > 30)
            leave()
            page.wait.until(lambda _: not demo.answering)
            page.wait.until(lambda _: not page.answers())
            time.sleep(1)  # nothing of the old answer comes after
            assert (page.answers(), page.views()) == ([], [])
            page.browser.refresh()
            page.wait.until(lambda _: page.all("#picture input[type=file]"))
    finally:
        demo.model.generation_config.min_new_tokens = None


def test_what_is_typed_during_an_answer_stays(page, demo):
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


def test_a_picture_that_the_model_refuses_is_explained(page, tmp_path):
    Image.new("RGB", (70000, 4)).save(tmp_path / "long.png")
    page.upload(tmp_path / "long.png")
    page.wait.until(lambda _: page.all("#picture img"))
    time.sleep(0.5)
    page.ask("What is it?")
    assert "70000" in page.warning()


def test_what_is_missing_is_said(page, tmp_path):
    page.ask("Read the sign.")
    assert "choose a picture first" in page.warning()
    page.browser.refresh()
    page.wait.until(lambda _: page.all("#picture input[type=file]"))
    page.show("scene.png")
    page.ask("   ")
    assert "type a question first" in page.warning()
    page.browser.refresh()
    page.wait.until(lambda _: page.all("#picture input[type=file]"))
    broken = tmp_path / "broken.png"
    broken.write_bytes((ROOT / "examples" / "scene.png").read_bytes()[:300])
    page.upload(broken)
    assert "not a picture that can be read" in page.warning()


def test_an_earlier_question_can_be_looked_at_again(page):
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


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser, demo, theme):
    browser.set_window_size(*NARROW)
    try:
        page = Page(browser, f"{demo.url}?__theme={theme}")
        page.show("scene.png")
        page.ask("Read the sign.")
        page.wait_for_views()
        width = browser.execute_script("return document.documentElement.clientWidth")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for selector in ("#picture", "#chat", "#question", "#send", "#stop", "#view0", "#view1", "#view2"):
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
