"""A conversation with a model, or with it and its base side by side; nothing here prints.

line ─▶ /command ─▶ what to tell about it               Conversation.obey
     └▶ message ─▶ each voice, with its own turns ─▶ an answer      Conversation.ask
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ftcli.data.message import Message
from ftcli.errors import ContentError, Interrupted, MemoryExhausted, UsageError, is_memory_error
from ftcli.evaluate.generate import Sampling
from ftcli.evaluate.subject import Subject, require_base
from ftcli.events import Notice
from ftcli.jobs.parameter import check_sampling, describe_params, read_params, suggest
from ftcli.train.stop import StopRequest

COMMANDS = {
    "/system": "TEXT sets the system message, - removes it; alone it is shown",
    "/params": "NAME=VALUE … sets how tokens are chosen; alone it is shown",
    "/reset": "forgets the turns; system message and parameters stay",
    "/base": "lets the base model answer, and the fine-tuned one again",
    "/help": "shows this",
    "/exit": "ends the conversation, as Ctrl-D does",
}
_LEAVING = ("/exit", "/quit", "/bye")


@dataclass
class Voice:
    """One who answers, with the turns that it has seen: a question and an answer in turn."""

    label: str
    subject: Subject
    turns: list[Message] = field(default_factory=list)
    n_left_out: int = 0  # questions with their answers, the oldest, that were no longer in the last prompt


class Conversation:
    """Who answers, how tokens are chosen, the system message, and the turns so far.

    An error leaves all of it as it was. Side by side (``compares``), base and model each see their own answers only;
    otherwise whoever answers sees all turns.

    Raises:
        ContentError: the model has no chat template, or one that takes no system message.
        UsageError: there is no base to compare with, or a parameter is out of its range.
    """

    def __init__(
        self, subject: Subject, sampling: Sampling, *, system: str | None = None, compares: bool = False
    ) -> None:
        check_sampling(sampling)
        self.subject = subject
        self.sampling = sampling
        self.system: str | None = None
        self.compares = compares
        self.is_over = False
        self.voices = [Voice("", subject)]
        if compares:
            self.voices = [Voice("base", require_base(subject)), Voice("tuned", subject)]
        subject.renderer.render_prompt([Message("user", "?")])
        self.set_system(system)

    @property
    def marker(self) -> str:
        """What stands before the next message, so that it is seen who will answer."""
        return "> " if self.compares or self.voices[0].subject is self.subject else "base> "

    def set_system(self, text: str | None) -> None:
        """Nothing; ``text`` leads the messages from now on, none if it is blank.

        Raises:
            ContentError: the chat template refuses a system message, or leaves it out.
        """
        if text and text.strip():
            _check_text(text)
            render, question = self.subject.renderer.render_prompt, Message("user", "?")
            try:
                prompts = [render([Message("system", words), question]) for words in (text, f"{text}.")]
            except ContentError as error:
                raise ContentError("the chat template takes no system message", why=error.what) from error
            if prompts[0] == prompts[1]:
                raise ContentError("the chat template leaves the system message out, so it would have no effect")
        self.system = text if text and text.strip() else None

    def obey(self, line: str) -> str | None:
        """What to tell about the command that ``line`` gives, now that it is done; None if it is a message.

        Raises:
            UsageError, ContentError: an unknown command or parameter, or one that is impossible here.
        """
        if not line.startswith("/") or line.startswith("//"):
            return None
        name, rest = (*line.split(maxsplit=1), "")[:2]
        rest = rest.strip()
        if name == "/system":
            return self._obey_system(rest)
        if name == "/params":
            self.sampling = read_params(rest, self.sampling)
            return describe_params(self.sampling)
        if name not in COMMANDS and name not in _LEAVING:
            hint = f"{suggest(name, COMMANDS) or '/help lists the commands'}; to send it as a message, write /{name}"
            raise UsageError(f"unknown command {name}", hint=hint)
        if rest:
            raise UsageError(f"{name} takes nothing after it")
        if name == "/reset":
            for voice in self.voices:
                voice.turns, voice.n_left_out = [], 0
            return "the turns are forgotten" + ("; the system message stays" if self.system else "")
        if name == "/base":
            return self._toggle_base()
        self.is_over = name in _LEAVING
        return "" if self.is_over else describe_commands()

    def ask(
        self,
        voice: Voice,
        text: str,
        *,
        on_text: Callable[[str], None] = lambda piece: None,
        on_event: Callable[[Notice], None] = lambda notice: None,
    ) -> str:
        """The answer of ``voice`` to ``text``, handed to ``on_text`` as it comes; both are turns from now on.

        Raises:
            UsageError: the message alone is too long for the context, or no text.
            MemoryExhausted: the answer needs more than there is.
            Interrupted: a signal came; what was answered until then, if anything, is the turn.
        """
        _check_text(text)
        question = Message("user", text)
        prompt, n_left_out = self._fit(voice, question)
        context = voice.subject.backend.context
        if n_left_out and n_left_out != voice.n_left_out:
            oldest = "oldest question is" if n_left_out == 1 else f"{n_left_out} oldest questions are"
            on_event(Notice(f"the context of {context} tokens is full: the {oldest} left out, with what was answered"))
        wanted = self.sampling.max_new_tokens
        most = min(wanted, context - len(prompt)) if context else wanted
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            answer, n_tokens = _generate(voice.subject, prompt, replace(self.sampling, max_new_tokens=most), take)
        except Interrupted:
            if pieces:
                _keep(voice, question, "".join(pieces), n_left_out)
            raise
        _keep(voice, question, answer, n_left_out)
        if n_tokens >= most:
            why = f"max_new_tokens={wanted}" if most == wanted else f"the end of the context of {context} tokens"
            on_event(Notice(f"the answer was ended by {why}"))
        elif not answer:
            on_event(Notice("the answer is empty"))
        return answer

    def _fit(self, voice: Voice, question: Message) -> tuple[list[int], int]:
        """The prompt (ids), and how many of the oldest questions it leaves out so that an answer has room.

        The room for an answer is ``max_new_tokens``, but never more than half of the context.
        """
        system = [Message("system", self.system)] if self.system else []

        def render(n_left_out: int) -> list[int]:
            messages = [*system, *voice.turns[2 * n_left_out :], question]
            return voice.subject.renderer.render_prompt(messages)

        prompt, context = render(0), voice.subject.backend.context
        most = context - min(self.sampling.max_new_tokens, context // 2) if context else len(prompt)
        if len(prompt) <= most:
            return prompt, 0
        n_questions = len(voice.turns) // 2
        n_left_out = bisect_left(range(n_questions + 1), True, key=lambda n: len(render(n)) <= most)
        if n_left_out <= n_questions:
            return render(n_left_out), n_left_out
        alone, left = len(render(n_questions)), (context or 0) - len(render(n_questions))
        raise UsageError(
            f"the message is too long: a prompt of {alone} tokens, and the context of {context} has room for {most} "
            "beside an answer",
            hint=f"shorten it, or set max_new_tokens to at most {left}" if left > 0 else "shorten it",
        )

    def _obey_system(self, rest: str) -> str:
        if rest:
            self.set_system(None if rest == "-" else rest)
            return "the system message is set" if self.system else "there is no system message now"
        return self.system or "there is no system message; the chat template may have one of its own"

    def _toggle_base(self) -> str:
        if self.compares:
            raise UsageError("both answer already", hint="without --compare-base, /base chooses who does")
        base, voice = self.subject.base, self.voices[0]
        if base is None:
            raise UsageError(
                f"there is no base at hand for {self.subject.name}",
                hint="an adapter has one; for a run of full fine-tuning, start with --compare-base",
            )
        voice.subject = base if voice.subject is self.subject else self.subject
        return f"from now on {voice.subject.name} answers" + (", without the adapter" if voice.subject is base else "")


def _generate(
    subject: Subject, prompt: list[int], sampling: Sampling, on_text: Callable[[str], None]
) -> tuple[str, int]:
    """The answer and its number of tokens; a signal is heeded after each of them, a second Ctrl-C at once."""
    n_tokens = 0

    def poll() -> None:
        nonlocal n_tokens
        n_tokens += 1
        stop.check()

    try:
        with StopRequest() as stop:
            stop.hold()
            return subject.backend.generate([prompt], sampling, on_text=on_text, check_stop=poll)[0], n_tokens
    except Exception as error:
        if is_memory_error(error):
            hint = "/reset forgets the turns, a smaller max_new_tokens needs less"
            raise MemoryExhausted("the answer does not fit the memory", hint=hint) from error
        raise


def _keep(voice: Voice, question: Message, answer: str, n_left_out: int) -> None:
    voice.turns += [question, Message("assistant", answer)]
    voice.n_left_out = n_left_out


def read_message(line: str) -> str:
    """The message that a line is which gives no command: ``//text`` says ``/text``."""
    return line.removeprefix("/") if line.startswith("//") else line


def describe_commands() -> str:
    """A line for each command, and how to write messages that are not just one line."""
    lines = [f"{name:<8} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "//text   sends /text; a line that ends with \\ goes on in the next"])


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!a} is no text: it holds bytes that are no UTF-8") from error
