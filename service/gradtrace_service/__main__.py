"""The program `gradtrace`, also `python -m gradtrace_service`."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line. Ctrl-C while the libraries are read, which takes seconds, ends it as quietly as later."""
    gc.disable()  # a fifth of the time of the imports was spent on looking for garbage in them, of which there is none
    try:
        from gradtrace_service.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
