"""``ftcli chat``."""

from __future__ import annotations

from typing import Annotated

import typer

from ftcli.cli import console, dialogue
from ftcli.cli.line import LineReader
from ftcli.cli.option import Json, Quiet, Verbose
from ftcli.events import Notice, Progress
from ftcli.store.cache import find_cache


def chat(
    target: Annotated[
        str | None,
        typer.Argument(help="A run, adapter or model; none: the newest finished run.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask once, print the answer, exit.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep this many tokens; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1, words come back less.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="For sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Also let the base model answer.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a run, an adapter or a model."""
    if prompt is None and json:
        raise typer.BadParameter("needs --prompt", param_hint="--json")
    with console.reporting(quiet=quiet or json, verbose=verbose) as report:
        report(Progress(f"loading {target or 'the newest finished run'} …", 0, 0))
        from ftcli.evaluate.generate import Sampling
        from ftcli.evaluate.subject import open_subject
        from ftcli.jobs.chat import COMMANDS, Conversation
        from ftcli.jobs.parameter import check_sampling, describe_idle

        sampling = Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        check_sampling(sampling)
        model = open_subject(target, with_base=compare_base, on_event=report)
        conversation = Conversation(model, sampling, system=system, compares=compare_base)
        if idle := describe_idle(sampling):
            report(Notice(idle))
    if target is None and not quiet:
        console.print_talk(f"newest finished run: {model.name}")
    if prompt is not None:
        dialogue.ask_once(conversation, prompt, as_json=json, quiet=quiet)
        return
    reader = LineReader(list(COMMANDS), find_cache("chat_history"), console.print_marker)
    if code := dialogue.converse(conversation, reader, quiet=quiet):
        raise typer.Exit(code)
