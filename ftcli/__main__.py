"""``python -m ftcli`` is ``ftcli``: streams and signals first, then the command line."""

import json
import os
import sys

from ftcli.errors import explain_stop
from ftcli.train.stop import stop_at_once


def main() -> None:
    """Nothing: runs the command line and exits."""
    open_streams()
    stop_at_once()
    try:
        from ftcli.cli.app import main as run

        run()
    except KeyboardInterrupt as error:  # while the command line was imported
        stop = explain_stop(error)
        if "--json" in sys.argv:
            details = {"code": stop.code, "exit": stop.exit_code, "message": stop.what, "where": None, "hint": None}
            sys.stdout.write(json.dumps({"schema": 1, "error": details}) + "\n")
        sys.stderr.write(f"error: {stop}\n")
        sys.exit(stop.exit_code)


def open_streams() -> None:
    """Nothing; what was closed of stdin, stdout and stderr (``>&-``) is the null device.

    Else a file of weights would get its number, and what a library writes to stderr would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
