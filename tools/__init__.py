"""Command lines that run from the repository root (`python -m tools.NAME`), installed or not.

While a tool's imports are under way nothing has been begun that would have to be undone, so Ctrl-C ends it
with one line; `command_line.run` lets it raise KeyboardInterrupt from there on.
"""

import os
import signal
import sys
from pathlib import Path

_SOURCE = str(Path(__file__).resolve().parent.parent / "src")
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)


def end_at_once(number, frame):
    os.write(2, b"interrupted\n")
    os._exit(130)  # an exception could become another one in the half-imported module that it meets


# Python's name for the program while it looks for the module of `-m`: whoever imports a tool is left alone,
# and so is a job in the background of a shell, for which Ctrl-C is ignored.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
