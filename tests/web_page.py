"""The page of web/: served, opened in Chromium, and used as visitors use it."""

import base64
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WEB = Path(__file__).parents[1] / "web"
BROWSER, DRIVER, NPM = (shutil.which(name) for name in ("chromium", "chromedriver", "npm"))
FLAGS = (
    "--headless --no-sandbox --disable-quic --no-first-run --disable-dev-shm-usage --disable-background-networking "
    "--disable-component-update --disable-sync --force-device-scale-factor=1 "
    "--use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
)
WITHOUT_GPU = ("--disable-gpu",)
# A GPU that is computed by the CPU
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--use-vulkan=swiftshader",
    "--enable-features=Vulkan,WebGPU",
    "--ignore-gpu-blocklist",
)
WIDE, NARROW = (1280, 1100), (400, 900)
TIMEOUT = 120  # seconds; enough for a machine that also runs other tests
# Headers that let WebAssembly use threads
ISOLATION = {"Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Opener-Policy": "same-origin"}


def npm(*arguments, **variables):
    environment = os.environ | variables
    done = subprocess.run(
        [NPM, *arguments], cwd=WEB, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def build(folder):
    """Build the page into a folder."""
    npm("run", "build", "--", "--outDir", str(folder), "--emptyOutDir")


def open_browser(profile, flags=WITHOUT_GPU):
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS.split(), *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(*WIDE)
    return driver


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the Hub serves a Space."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def end_headers(self):
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self):
        self.server.requests.append(self.path)
        super().do_GET()


class Site:
    """A web server that can disappear and come back at the same address."""

    def __init__(self, folder, headers):
        self.folder, self.headers, self.port = folder, headers, 0
        self.requests = []
        self.start()

    @property
    def url(self):
        return f"http://localhost:{self.port}/"

    def start(self):
        handler = functools.partial(Handler, directory=str(self.folder))
        self.server = http.server.ThreadingHTTPServer(("localhost", self.port), handler)
        self.server.headers, self.server.requests = self.headers, self.requests
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Page:
    """The page as a visitor uses it."""

    def __init__(self, browser, url, *, is_ready=True, timeout=TIMEOUT):
        self.browser = browser
        self.wait = WebDriverWait(browser, timeout, 0.05, ignored_exceptions=[StaleElementReferenceException])
        browser.get(url)
        if is_ready:
            self.wait_until_ready()

    def wait_until_ready(self):
        self.wait.until(lambda _: self.script("return document.body.dataset.ready") or self.error())
        assert not self.error()

    def script(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def error(self):
        return self.one("#error").text

    def wait_for_error(self):
        return self.wait.until(lambda _: self.error())

    def show(self, path):
        self.script("document.querySelector('#timings').textContent = ''")
        self.one("#file").send_keys(str(path))
        self.wait_until_shown()

    def wait_until_shown(self):
        self.wait.until(lambda _: "Picture encoded" in self.one("#timings").text)

    def type(self, text):
        box = self.one("#question")
        self.script("arguments[0].value = arguments[1]", box, text)

    def send(self, question):
        self.script("delete document.querySelector('#timings').dataset.json")
        self.type(question)
        self.one("#ask").click()

    def timings(self):
        found = self.one("#timings").get_attribute("data-json")
        return json.loads(found) if found else None

    def ask(self, question):
        self.send(question)
        self.wait.until(lambda _: self.timings())
        return self.answers()[-1]

    def answers(self):
        return [element.text for element in self.all(".answer")]

    def forget(self):
        self.one("#forget").click()
        self.wait.until(lambda _: not self.answers())

    def choose(self, selector):
        self.script("document.querySelector(arguments[0]).click()", selector)

    def draw(self, colour, shape, x, y):
        """Put a shape onto the canvas; x and y are fractions of its side, from its centre."""
        self.one("#tab-draw").click()
        self.choose(f"#colours [value={colour}]")
        self.choose(f"#tools [value={shape}]")
        canvas = self.one("#drawing")
        side = canvas.size["width"]
        ActionChains(self.browser).move_to_element_with_offset(canvas, int(x * side), int(y * side)).click().perform()

    def pixels(self, canvas):
        data = self.script("return document.getElementById(arguments[0]).toDataURL()", canvas)
        return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")

    def drawing(self):
        return self.pixels("drawing")

    def has_overlay(self):
        return self.one("#overlay").is_displayed()
