"""The ``ftcli`` command: its subcommands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

from ftcli import __version__
from ftcli.cli import (
    chat,
    console,
    env,
    export,
    generate,
    inspect,
    merge,
    push,
    quantize,
    recipe,
    runs,
    tokenize,
    train,
)
from ftcli.cli.eval import evaluate
from ftcli.errors import (
    DiskError,
    FtcliError,
    Interrupted,
    MemoryExhausted,
    Stopped,
    UsageError,
    explain_stop,
    is_memory_error,
)
from ftcli.train.stop import received


class ErrorGroup(TyperGroup):
    """Shows what went wrong once, the same way for every command, and exits with its code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        words = list(sys.argv[1:] if args is None else args)
        as_json, is_told = "--json" in words and console.is_main_process(), False
        try:
            code = super().main(words, *rest, **extra)
        except FtcliError as error:
            code = console.show_error(error, as_json=as_json)
            is_told = True
        except (KeyboardInterrupt, Abort):
            code = 130
        except TyperException as error:
            code, is_told = self._show_usage(error, words), True
        if code == 130 and not is_told:  # typer's word for a signal
            stop = Stopped(received[0]) if received else KeyboardInterrupt()
            code = console.show_error(explain_stop(stop), as_json=as_json)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """What the command returns; what typer would turn into an exit code of its own is dealt with here."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            raise explain_stop(error) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output is gone
            return 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer is lost too
            raise DiskError("the output cannot be written: the disk is full") from error
        except Exception as error:
            if received and not isinstance(error, Interrupted):  # a library's word for our Stopped
                raise explain_stop(Stopped(received[0])) from None
            if is_memory_error(error):
                raise _explain_memory(error) from error
            raise
        return result

    def _show_usage(self, error: Any, words: Sequence[str]) -> int:
        context: Any = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            console.print_text(context.get_help())
            return 2
        command = context.command_path if context else "ftcli"
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        text = text[:1].lower() + text[1:].rstrip(".")
        return console.show_error(UsageError(text, hint=f"see {command} --help"), as_json="--json" in words)


def _explain_memory(error: Exception) -> MemoryExhausted:
    return MemoryExhausted(
        "out of memory",
        why=str(error).partition("\n")[0],
        hint="raise the limit (ulimit -v, the container's), or end what else runs here",
    )


def show_version(wanted: bool) -> None:
    if wanted:
        console.print_text(f"ftcli {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=ErrorGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune large language models from one recipe, and see what is learned.",
)
app.command("tokenize")(tokenize.tokenize)
app.command("inspect")(inspect.inspect)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("eval")(evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(recipe.app, name="recipe")
app.command("push")(push.push)
app.add_typer(runs.app, name="runs")
app.command("env")(env.env)


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=show_version, is_eager=True
    ),
) -> None:
    """Fine-tune large language models from one recipe, and see what is learned."""


def main() -> None:
    """Nothing: runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):  # a file name may hold bytes that are no text
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
