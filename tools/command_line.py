"""How every tool ends: the user's mistakes as one message on stderr and their exit code, no traceback."""

from __future__ import annotations

import argparse
import sys
from typing import Callable

from strop.errors import StorageError, UserError


def run(main: Callable[[], None]) -> None:
    """Call `main` and leave the process with its exit code (0, the error's own, 130 for Ctrl-C)."""
    try:
        main()
    except (UserError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the tool's module docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
