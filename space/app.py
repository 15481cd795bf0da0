"""The app of a Space: the chat of `flashsloth demo`, with a checkpoint from the Hub.

The Space's variable `MODEL` chooses another FlashSloth.
"""

import os
import sys

from flashsloth.cli import main

MODEL = "USER/tiny-sloth"

if __name__ == "__main__":
    sys.exit(main(["demo", "--model", os.environ.get("MODEL") or MODEL]))
