"""The handler for Inference Endpoints, called like an endpoint calls it: from a repository, without the package."""

import base64
import contextlib
import http.server
import importlib.util
import io
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_alone, serve_folder

from flashsloth.cli.export import export

ROOT = Path(__file__).parents[1]
SCENE, SHAPES = (ROOT / "examples" / name for name in ("scene.png", "shapes.png"))
ENDPOINT = """
import importlib.util
import json
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch

torch.set_num_threads(1)
folder, requests, responses = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler, answers = module.EndpointHandler(folder), {}
for name, body in json.load(open(requests)).items():
    try:
        answers[name] = handler(body)
    except ValueError as error:
        answers[name] = str(error)
json.dump(answers, open(responses, "w"))
"""


def encoded(file):
    return base64.b64encode(file.read_bytes()).decode()


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


SCENE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(SCENE)}"}}
FIRST_TURN = [user(SCENE_URL, text("Read the sign.")), {"role": "assistant", "content": "PULL"}]
SIGN = {"image": encoded(SCENE), "text": "Read the sign."}
DESCRIPTION = (
    "a yellow star top left, an orange square top right, a green circle bottom left, a purple cross bottom right"
)
PROGRAM = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n").decode()


def blank(width, height):
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def deep_grey():
    """The scene as a PNG with 16 bits per pixel."""
    buffer = io.BytesIO()
    levels = np.asarray(Image.open(SCENE).convert("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(buffer, "png")
    return buffer.getvalue()


WIDE = blank(10_000, 5_000)
URL_ALPHABET = str.maketrans("+/", "-_")
ANSWERED = {
    "base64": ({"inputs": SIGN}, "PULL"),
    "base64 of URLs": ({"inputs": SIGN | {"image": SIGN["image"].translate(URL_ALPHABET).rstrip("=")}}, "PULL"),
    "base64 in a URL with escapes": (
        {"inputs": SIGN | {"image": f"DATA:image/png;base64,{urllib.parse.quote(SIGN['image'])}"}},
        "PULL",
    ),
    "no base64 in a URL": (
        {"inputs": SIGN | {"image": f"data:image/png,{urllib.parse.quote(SCENE.read_bytes())}"}},
        "PULL",
    ),
    "list of images": ({"inputs": {"images": [encoded(SHAPES)], "text": "Describe the picture."}}, DESCRIPTION),
    "url": ({"inputs": {"image": "http://SERVER/scene.png", "text": "Read the sign."}}, "PULL"),
    "OpenAI's messages": ({"messages": FIRST_TURN[:1]}, "PULL"),
    "second turn": ({"inputs": {"messages": [*FIRST_TURN, user(text("Which colour is the star?"))]}}, "green"),
    "list of messages": (
        {"inputs": [user({"type": "image", "base64": encoded(SCENE)}, text("Read the sign."))]},
        "PULL",
    ),
    "16 bits": ({"inputs": {"image": base64.b64encode(deep_grey()).decode(), "text": "Read the sign."}}, "PULL"),
    "short": (
        {"inputs": {"image": encoded(SHAPES), "text": "Describe the picture."}, "parameters": {"max_new_tokens": 3}},
        "a yellow star",
    ),
    "whole numbers": ({"inputs": SIGN, "parameters": {"repetition_penalty": 1, "temperature": 2}}, "PULL"),
    "parameters": ({"inputs": SIGN, "parameters": {"num_beams": 2, "max_new_tokens": 20, "top_k": None}}, "PULL"),
}
REFUSED = {
    "nothing": ({}, "there is no `text`"),
    "wrong text": ({"inputs": {"text": 3}}, "`text` is 3"),
    "no messages": ({"inputs": {"messages": []}}, "should be a list of messages, but is []"),
    "no role": ({"messages": [{"content": "Hello"}]}, "a message should have a `role`"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "Hello"}]}, "wizard"),
    "unknown part": ({"messages": [user({"type": "audio", "audio": "x"})]}, "a part of a message should be"),
    "broken base64": ({"inputs": {"image": "no image", "text": "?"}}, "the image 'no image' is neither"),
    "half an image": ({"inputs": {"image": encoded(SCENE)[:200], "text": "?"}}, "an image that can be read"),
    "a file of the server": ({"inputs": {"image": str(SCENE), "text": "?"}}, "neither base64 nor the URL"),
    "a number": ({"inputs": {"image": 5, "text": "?"}}, "should be a base64 string or a URL, but is 5"),
    "no such url": ({"inputs": {"image": "http://SERVER/nothing.png", "text": "?"}}, "answers 404"),
    "no image at a url": ({"inputs": {"image": "http://SERVER/finetune.py", "text": "?"}}, "an image that can be read"),
    "another scheme": ({"inputs": {"image": f"file://{SCENE}", "text": "?"}}, "neither base64 nor the URL"),
    "no host": ({"inputs": {"image": "http:///scene.png", "text": "?"}}, "should be http://HOST"),
    "a program": ({"inputs": {"image": PROGRAM, "text": "?"}}, "is a program in EPS"),
    "too many beams": ({"inputs": SIGN, "parameters": {"num_beams": 9}}, "may have 8 `num_beams`, but has 9"),
    "too long an answer": (
        {"inputs": SIGN, "parameters": {"max_new_tokens": 10**6}},
        "may have 2048 `max_new_tokens`, but has 1000000",
    ),
    "too long a least answer": ({"inputs": SIGN, "parameters": {"min_new_tokens": 2049}}, "2048 `min_new_tokens`"),
    "too large a number": (
        {"inputs": SIGN, "parameters": {"temperature": 10**400}},
        "should be a number of at least 0",
    ),
    "too many images": ({"inputs": {"images": [encoded(SCENE)] * 17, "text": "?"}}, "16 images, but has 17"),
    "too many messages": ({"messages": [user(text("Hi"))] * 65}, "may have 64 messages, but has 65"),
    "too long a text": ({"messages": [user(text("a" * 60_000), text("a" * 60_000))]}, "100000 characters of text"),
    "too large an image": ({"inputs": {"image": "A" * 2**26, "text": "?"}}, "33554432 bytes of images"),
    "too many pixels": ({"inputs": {"images": [WIDE] * 3, "text": "?"}}, "134217728 pixels of images"),
    "too long for the model": ({"inputs": "star " * 5_000}, "but the model was made for 1024"),
    "unknown parameter": ({"inputs": "Hi", "parameters": {"max_tokens": 5}}, "unknown names: max_tokens"),
    "wrong parameter": (
        {"inputs": SIGN, "parameters": {"max_new_tokens": "many"}},
        "`max_new_tokens` should be a whole number",
    ),
    "half a beam": ({"inputs": SIGN, "parameters": {"num_beams": 1.5}}, "`num_beams` should be a whole number"),
    "no beams": ({"inputs": SIGN, "parameters": {"num_beams": 0}}, "the request cannot be answered"),
    "no flag": ({"inputs": SIGN, "parameters": {"do_image_splitting": 1}}, "should be true or false, but is 1"),
    "endless": (
        {"inputs": SIGN, "parameters": {"temperature": 1e999}},
        "`temperature` should be a number of at least 0",
    ),
    "too cold": (
        {"inputs": SIGN, "parameters": {"do_sample": True, "temperature": 1e-40}},
        "the request cannot be answered",
    ),
    "list of requests": ([{"inputs": SIGN}], "a request should be an object with `inputs`"),
    "wrong parameters": ({"inputs": SIGN, "parameters": [1]}, "should be an object, but is [1]"),
    "no tokens": ({"inputs": SIGN, "parameters": {"max_new_tokens": -1}}, "`max_new_tokens` should be a whole number"),
}


@pytest.fixture(scope="module")
def server():
    with serve_folder(SCENE.parent) as address:
        yield address


@pytest.fixture(scope="module")
def responses(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("endpoint")
    export(ROOT, folder / "repository")
    requests = {name: body for name, (body, _) in (ANSWERED | REFUSED).items()}
    (folder / "requests.json").write_text(json.dumps(requests).replace("http://SERVER", server))
    (folder / "script.py").write_text(ENDPOINT)
    files = [folder / name for name in ("repository", "requests.json", "responses.json")]
    run_alone(folder / "script.py", *files, folder=folder, FLASHSLOTH_ALLOW_PRIVATE_URLS="1")
    return json.loads((folder / "responses.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERED)
def test_requests_are_answered(responses, name):
    assert responses[name] == [{"generated_text": ANSWERED[name][1]}]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_with_the_reason(responses, name):
    assert isinstance(responses[name], str), responses[name]
    assert REFUSED[name][1] in responses[name]
    assert len(responses[name]) < 400


ADDRESSES = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "localhost",
    "user@127.0.0.1",
    "user:word@localhost",
    "\uff11\uff12\uff17.0.0.1",  # full-width digits
    "\u2460\u2461\u2466.0.0.1",  # digits in circles
    "127\u30020\u30020\u30021",  # ideographic full stops
    "0",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "192.0.0.192",
    "168.63.129.16",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[2001:db8::1]",
    "[fe80::1]",
    "[fe80::1%1]",
    "[fec0::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
]
PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"  # the first one takes the role of a public address


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("handler", ROOT / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def endpoint(module):
    return module.EndpointHandler(str(ROOT))


@pytest.fixture
def public(module, monkeypatch):
    """Makes `PUBLIC` count as a public address. All other addresses of this machine are still refused."""
    is_public = module._is_public
    monkeypatch.setattr(module, "_is_public", lambda address: address == PUBLIC or is_public(address))


def read_sign(endpoint, *urls):
    return endpoint({"inputs": {"images": list(urls), "text": "Read the sign."}})[0]["generated_text"]


@contextlib.contextmanager
def website(respond, address=PUBLIC, port=0, context=None):
    """Serve `respond(request, path)`; yields the address, and a list of (host, path) of the requests so far."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.headers["Host"], self.path))
            with contextlib.suppress(OSError):  # the client hung up
                respond(self, self.path)

        def log_message(self, *args):
            """Log nothing."""

    server = http.server.ThreadingHTTPServer((address, port), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{'http' if context is None else 'https'}://{address}:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def send(request, content=None, status=200, **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(SCENE.read_bytes() if content is None else content)


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_spelling_of_a_private_address_is_requested(endpoint, monkeypatch, address):
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    with pytest.raises(ValueError, match=r"has no public address|cannot be resolved") as refusal:
        read_sign(endpoint, f"http://{address}/scene.png")
    assert not asked
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("address", ["8.8.8.8", "192.0.1.1", "168.63.129.17", "2606:4700:4700::1111", "2a00:1450::8"])
def test_addresses_of_the_open_internet_are_public(module, address):
    assert module._is_public(address)


def test_a_server_on_this_machine_is_not_requested(endpoint):
    with website(lambda request, _: send(request), PRIVATE) as (url, asked):
        with pytest.raises(ValueError, match="FLASHSLOTH_ALLOW_PRIVATE_URLS"):
            read_sign(endpoint, f"{url}/scene.png")
        assert not asked


@pytest.mark.usefixtures("public")
def test_redirects_of_a_public_server_are_followed(endpoint):
    def respond(request, path):
        if path == "/here%20and%C3%A9?a=b%2Fc":
            send(request)
        else:
            send(request, b"", 302, Location="/here and\u00e9?a=b%2Fc#part".encode().decode("latin-1"))

    with website(respond) as (url, asked):
        assert read_sign(endpoint, f"{url.replace('http', 'HTTP')}/there") == "PULL"
        assert [path for _, path in asked] == ["/there", "/here%20and%C3%A9?a=b%2Fc"]
        assert {f"http://{host}" for host, _ in asked} == {url}


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_this_machine_is_refused(endpoint, status):
    with website(lambda request, _: send(request), PRIVATE) as (private, asked):
        for target in (private, private.replace("127.0.0.1", "2130706433"), private.replace("http:", "")):
            with (
                website(lambda request, _, to=target: send(request, b"", status, Location=to)) as (url, _),
                pytest.raises(ValueError, match="has no public address"),
            ):
                read_sign(endpoint, url)
        assert not asked


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/again", "more than 5 redirects"),
        (f"file://{SCENE}", "should be http://HOST"),
        ("ftp://127.0.0.2/", "should be http://HOST"),
        ("http://[::1", "which is not a URL"),
    ],
)
def test_a_redirect_without_a_usable_target_is_refused(endpoint, location, reason):
    with (
        website(lambda request, _: send(request, b"", 302, Location=location)) as (url, asked),
        pytest.raises(ValueError, match=reason),
    ):
        read_sign(endpoint, url)
    assert len(asked) <= 6


@pytest.mark.usefixtures("public")
def test_a_host_name_is_resolved_once(endpoint, monkeypatch):
    """DNS rebinding: the name resolves to a public address at first, and to this machine afterwards."""
    look_up, found = socket.getaddrinfo, []

    def rebind(host, port, *args, **kwargs):
        if host == "rebinding.test":
            found.append(PRIVATE if found else PUBLIC)
            host = found[-1]
        return look_up(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    with website(lambda request, _: send(request)) as (url, asked):
        port = url.rpartition(":")[2]
        with website(lambda request, _: send(request, b"secret"), PRIVATE, int(port)) as (_, asked_here):
            assert read_sign(endpoint, f"http://rebinding.test:{port}/scene.png") == "PULL"
        assert (found, asked, asked_here) == ([PUBLIC], [(f"rebinding.test:{port}", "/scene.png")], [])


@pytest.mark.usefixtures("public")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_must_be_for_the_host_of_the_url(endpoint, monkeypatch, tmp_path):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out certificate.pem -subj /CN=images"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:images.test"], cwd=tmp_path, check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    look_up = socket.getaddrinfo
    names = ("images.test", "other.test")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *args, **kwargs: look_up(PUBLIC if host in names else host, *args, **kwargs)
    )
    with website(lambda request, _: send(request), context=context) as (url, _):
        port = url.rpartition(":")[2]
        assert read_sign(endpoint, f"https://images.test:{port}/scene.png") == "PULL"
        with pytest.raises(ValueError, match="SSLCertVerificationError"):
            read_sign(endpoint, f"https://other.test:{port}/scene.png")


@pytest.mark.usefixtures("public")
def test_a_download_ends_at_the_limit_of_bytes(endpoint):
    sent = []

    def endless(request, path):
        send(request, b"", **({"Content_Length": str(10**12)} if path == "/said" else {}))
        for _ in range(10_000):
            request.wfile.write(bytes(2**16))
            sent.append(2**16)

    with website(endless) as (url, _):
        for path in ("/said", "/unsaid"):
            with pytest.raises(ValueError, match=r"bytes; a request may have 33554432 bytes of images"):
                read_sign(endpoint, url + path)
        assert sum(sent) < 2**27


@pytest.mark.usefixtures("public")
def test_the_limit_of_bytes_is_for_all_images_of_a_request(endpoint):
    with website(lambda request, _: send(request, bytes(2**24) if request.path == "/large" else None)) as (url, _):
        image = base64.b64encode(SCENE.read_bytes() + bytes(2**24)).decode()
        with pytest.raises(ValueError, match="bytes of images"):
            read_sign(endpoint, image, image)
        with pytest.raises(ValueError, match="bytes of images"):
            read_sign(endpoint, image, f"{url}/large")


def drip(request, _):
    """Sends a byte from time to time, forever."""
    while True:
        request.wfile.write(b"a")
        time.sleep(0.05)


def drip_content(request, path):
    send(request, b"", Content_Length="100000")
    drip(request, path)


def say_nothing(request, path):
    time.sleep(5)


def redirect_slowly(request, path):
    time.sleep(0.6)
    send(request, b"", 302, Location="/again")


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("respond", [drip, drip_content, say_nothing, redirect_slowly])
def test_a_slow_download_ends_at_the_limit_of_seconds(endpoint, monkeypatch, respond):
    """Otherwise it would never end, or end with another error."""
    monkeypatch.setitem(endpoint.limits, "max_seconds", 1)
    with (
        website(respond) as (url, _),
        pytest.raises(ValueError, match=r"takes too long; a request may have .* take 1 seconds"),
    ):
        read_sign(endpoint, url)


@pytest.mark.usefixtures("public")
def test_the_limit_of_seconds_is_for_all_images_of_a_request(endpoint, monkeypatch):
    monkeypatch.setitem(endpoint.limits, "max_seconds", 1)

    def slow(request, _):
        time.sleep(0.4)
        send(request)

    with website(slow) as (url, _):
        assert read_sign(endpoint, url) == "PULL"
        with pytest.raises(ValueError, match="takes too long"):
            read_sign(endpoint, *[url] * 10)


@pytest.mark.usefixtures("public")
def test_a_download_that_breaks_off_is_refused(endpoint):
    with (
        website(lambda request, _: send(request, Content_Length="100000")) as (url, _),
        pytest.raises(ValueError, match="cannot be downloaded: IncompleteRead"),
    ):
        read_sign(endpoint, url)


@pytest.mark.usefixtures("public")
def test_a_16_bit_image_is_read_from_a_url_as_from_base64(endpoint):
    with website(lambda request, _: send(request, deep_grey())) as (url, _):
        assert read_sign(endpoint, url) == "PULL"


def test_limits_are_set_by_environment_variables(module, monkeypatch):
    monkeypatch.setenv("FLASHSLOTH_MAX_IMAGES", "1")
    endpoint = module.EndpointHandler(str(ROOT))
    assert read_sign(endpoint, encoded(SCENE)) == "PULL"
    with pytest.raises(ValueError, match=r"may have 1 images, but has 2; .* FLASHSLOTH_MAX_IMAGES"):
        read_sign(endpoint, encoded(SCENE), encoded(SCENE))
    monkeypatch.setenv("FLASHSLOTH_MAX_IMAGES", "many")
    with pytest.raises(ValueError, match="FLASHSLOTH_MAX_IMAGES should be a whole number, but is 'many'"):
        module.EndpointHandler(str(ROOT))


@pytest.mark.slow
def test_an_answer_ends_at_the_models_last_position(endpoint, monkeypatch):
    outputs, generate = [], endpoint.model.generate
    monkeypatch.setattr(endpoint.model, "generate", lambda **kwargs: outputs.append(generate(**kwargs)) or outputs[-1])
    endpoint({"inputs": "star " * 180, "parameters": {"max_new_tokens": 2048, "min_new_tokens": 1023}})
    assert outputs[0].shape[1] == 1024
