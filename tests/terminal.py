"""Runs a program in a real pseudo-terminal."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time


class Terminal:
    """A program in a terminal of its own, where Ctrl-C sends SIGINT and Ctrl-D ends the input.

    Args:
        command: The program and its arguments.
        environment: Environment variables in addition to this process's.
    """

    SIZE = 24, 100  # rows, columns
    CTRL_C, CTRL_D = "\x03", "\x04"

    def __init__(self, command, **environment):
        self.screen, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *self.SIZE, 0, 0))
        self.seen, self.read_up_to = "", 0
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def type(self, text):
        """Press keys."""
        os.write(self.screen, text.encode())

    def wait_for(self, text, seconds=120):
        """Read until a text appears; return what came before it since the last call."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self.read_up_to)) < 0:
            self._read(deadline - time.monotonic(), text)
        before, self.read_up_to = self.seen[self.read_up_to : found], found + len(text)
        return before

    def press_until(self, key, text, times=12):
        """Press a key until a text appears, as readline misses a Ctrl-C while it prepares the terminal."""
        for _ in range(times - 1):
            self.type(key)
            with contextlib.suppress(TimeoutError):
                return self.wait_for(text, seconds=10)
        self.type(key)
        return self.wait_for(text)

    def wait_for_exit(self, seconds=120):
        """Read until the program ends; return its exit code."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(EOFError):
            while True:
                self._read(deadline - time.monotonic(), "the end")
        return self.process.wait(timeout=seconds)

    def _read(self, seconds, text):
        if seconds <= 0 or not select.select([self.screen], [], [], seconds)[0]:
            raise TimeoutError(f"{text!r} did not appear in {self.seen!r}")
        try:
            content = os.read(self.screen, 65536)
        except OSError:  # as Linux reports the end of a terminal
            content = b""
        if not content:
            raise EOFError(f"the program ended before {text!r} appeared in {self.seen!r}")
        self.seen += content.decode(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)
