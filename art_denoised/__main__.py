"""``python -m art_denoised`` and the installed program: the command line as a process."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn

from art_denoised.cli import INTERRUPTED, main


def run() -> NoReturn:
    """Run the command line and end this process with its exit code."""
    code = main()
    if code == INTERRUPTED:
        # Python takes torch down object by object, which can take seconds. Nothing waits for that:
        # workers have ended, and rows are on disk. Exit functions run, such as those that remove
        # temporary folders.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
