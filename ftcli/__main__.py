"""``python -m ftcli`` is ``ftcli``: signals first, then the command line."""

import sys

from ftcli.errors import explain_stop
from ftcli.train.stop import stop_at_once


def main() -> None:
    """Nothing: runs the command line and exits."""
    stop_at_once()
    try:
        from ftcli.cli.app import main as run

        run()
    except KeyboardInterrupt as error:  # while the command line was imported
        stop = explain_stop(error)
        sys.stderr.write(f"error: {stop}\n")
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
