"""Runs Python in other processes, and serves a folder to them over HTTP."""

import functools
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


def run_alone(*arguments, folder, **variables):
    """Run Python in a folder with an empty Hugging Face cache and only the given environment variables.

    Returns:
        What the process printed.
    """
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": os.environ["PATH"], **variables}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_processes(script, *arguments, number=2):
    """Run a script in several processes with torchrun.

    Returns:
        What they wrote to standard output and standard error.
    """
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number, script, *arguments]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


class QuietHandler(SimpleHTTPRequestHandler):
    """Does not log requests."""

    def log_message(self, *args):
        """Log nothing."""


@contextmanager
def serve_folder(folder):
    """Serve the files of a folder; yields the server's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
