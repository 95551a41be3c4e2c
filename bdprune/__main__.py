"""``python -m bdprune``, and the console script."""

from __future__ import annotations

import sys


def start() -> None:
    """Runs the command line. Ctrl-C during the imports ends it without a traceback."""
    try:
        from bdprune.cli.main import main
    except KeyboardInterrupt:
        print("bdprune: Interrupted; nothing was left half-written.", file=sys.stderr)
        sys.exit(130)
    main(prog_name="bdprune")


if __name__ == "__main__":
    start()
