"""A visitor of the demo without a browser."""

import json
import re
import urllib.request
import uuid

TIMEOUT = 120  # seconds; enough for a machine that also runs other tests
META = {"_type": "gradio.FileData"}


class Stranger:
    """A client that sends requests without the page."""

    def __init__(self, url):
        self.url, self.visitor = url.rstrip("/"), uuid.uuid4().hex
        dependencies = json.loads(self.get("/config"))["dependencies"]
        self.ask_index = max(dependencies, key=lambda dependency: len(dependency["inputs"]))["id"]
        self.show_index = next(each for each in dependencies if each["targets"][0][1] == "upload")["id"]

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=TIMEOUT) as response:
            return response.read().decode()

    def post(self, path, body, kind="application/json"):
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.loads(response.read())

    def upload(self, content, name="scene.png"):
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        return self.post("/gradio_api/upload", body, f"multipart/form-data; boundary={boundary}")[0]

    def send(self, index, *data):
        """Send an event, and return the whole reply as text."""
        body = {"data": data, "fn_index": index, "session_hash": self.visitor}
        self.post("/gradio_api/queue/join", json.dumps(body).encode())
        return self.get(f"/gradio_api/queue/data?session_hash={self.visitor}")

    def ask(self, image, question="Read the sign."):
        return self.send(self.ask_index, image, question, False, 0, 1, 64, None)


def words(reply):
    """Join the streamed pieces of an answer."""
    return "".join(re.findall(r'\["append",\[\d+,"content",0,"text"\],"(.*?)"\]', reply)).strip()
