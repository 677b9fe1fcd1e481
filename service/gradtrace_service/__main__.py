"""The program `gradtrace`, also `python -m gradtrace_service`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C while the libraries are read, which takes seconds, ends it as quietly as later."""
    try:
        from gradtrace_service.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
