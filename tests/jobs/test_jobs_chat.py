"""A conversation: who answers what, what the commands do, and what an error or a signal leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_tokenizer

from ftcli.data.chat import ChatRenderer
from ftcli.data.message import Message
from ftcli.errors import ContentError, Interrupted, MemoryExhausted, UsageError
from ftcli.evaluate.generate import Sampling, build_streamer
from ftcli.evaluate.subject import Subject, open_subject
from ftcli.jobs.chat import COMMANDS, Conversation, read_message

ASSISTANT = "<|im_start|>assistant\n"


@dataclass
class Parrot:
    """A backend that answers from a list, and keeps the prompts that it was given as text."""

    tokenizer: Any
    answers: list[str]
    context: int | None = None
    prompts: list[str] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)

    def compute_logits(self, documents: Any) -> Any:
        raise NotImplementedError

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> list[str]:
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        self.samplings.append(sampling)
        answer = self.answers[len(self.prompts) - 1]
        if answer == "out of memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        for word in answer.split(" "):
            if on_text:
                on_text(f"{word} ")
            check_stop()
        return [answer]


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(build_tokenizer())


def build_subject(renderer: ChatRenderer, *answers: str, context: int | None = None, base: Any = None) -> Subject:
    return Subject("tuned-model", renderer, Parrot(renderer.tokenizer, list(answers), context), base)


def render(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + ASSISTANT


def ask(conversation: Conversation, text: str, index: int = 0) -> tuple[str, list[str]]:
    """The answer of a voice, and what was told about it."""
    told: list[str] = []
    answer = conversation.ask(conversation.voices[index], text, on_event=lambda notice: told.append(notice.text))
    return answer, told


def test_every_turn_sees_the_turns_before(tiny_model: Path) -> None:
    """Against transformers alone: its template, its generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversation = Conversation(open_subject(str(tiny_model)), Sampling(max_new_tokens=6), system="Be brief")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "system", "content": "Be brief"}]
    for question in ("question 1", "numbers", "the fox"):
        pieces: list[str] = []
        answer = conversation.ask(conversation.voices[0], question, on_text=pieces.append)
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == expected == "".join(pieces)
        messages.append({"role": "assistant", "content": answer})


def test_base_and_tuned_each_see_their_own_answers(renderer: ChatRenderer) -> None:
    base = build_subject(renderer, "b1", "b2")
    tuned = build_subject(renderer, "t1", "t2", base=base)
    conversation = Conversation(tuned, Sampling(), compares=True)
    assert [voice.label for voice in conversation.voices] == ["base", "tuned"]
    for question in ("one", "two"):
        for i in (0, 1):
            ask(conversation, question, i)
    assert base.backend.prompts[1] == render(("user", "one"), ("assistant", "b1"), ("user", "two"))
    assert tuned.backend.prompts[1] == render(("user", "one"), ("assistant", "t1"), ("user", "two"))
    with pytest.raises(UsageError, match="both answer already"):
        conversation.obey("/base")


def test_base_takes_over_the_turns_and_gives_them_back(renderer: ChatRenderer) -> None:
    base = build_subject(renderer, "b1")
    conversation = Conversation(build_subject(renderer, "t1", "t2", base=base), Sampling())
    ask(conversation, "one")
    assert "without the adapter" in (conversation.obey("/base") or "")
    assert conversation.marker == "base> "
    assert ask(conversation, "two")[0] == "b1"
    conversation.obey("/base")
    assert conversation.marker == "> "
    assert ask(conversation, "three")[0] == "t2"
    turns = [("user", "one"), ("assistant", "t1"), ("user", "two"), ("assistant", "b1"), ("user", "three")]
    assert conversation.subject.backend.prompts[1] == render(*turns)


def test_an_adapter_is_off_while_the_base_answers(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "one")
    sampling = Sampling(max_new_tokens=8)
    conversation = Conversation(open_subject(str(tmp_path / "one")), sampling)
    tuned, _ = ask(conversation, "question 1")
    conversation.obey("/reset")
    conversation.obey("/base")
    plain, _ = ask(conversation, "question 1")
    alone, _ = ask(Conversation(open_subject(str(tiny_model)), sampling), "question 1")
    assert plain == alone != tuned
    conversation.obey("/reset")
    conversation.obey("/base")
    assert ask(conversation, "question 1")[0] == tuned


def test_without_a_base_the_turns_stay(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer, "t1", "t2"), Sampling())
    with pytest.raises(UsageError, match="no base at hand"):
        conversation.obey("/base")
    with pytest.raises(UsageError, match="no base to compare"):
        Conversation(conversation.subject, Sampling(), compares=True)
    assert conversation.marker == "> "


def test_system_is_set_shown_and_removed(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer, *"abcd"), Sampling())
    assert "no system message" in (conversation.obey("/system") or "")
    assert conversation.obey("/system  Be brief. Be kind.") == "the system message is set"
    assert conversation.obey("/system") == "Be brief. Be kind."
    ask(conversation, "one")
    assert "system message stays" in (conversation.obey("/reset") or "")
    ask(conversation, "two")
    conversation.obey("/system -")
    ask(conversation, "three")
    system = ("system", "Be brief. Be kind.")
    assert conversation.subject.backend.prompts == [
        render(system, ("user", "one")),
        render(system, ("user", "two")),
        render(("user", "two"), ("assistant", "b"), ("user", "three")),
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML, "takes no"),
        (CHATML.replace("{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'").replace(
            "{% endfor %}", "{% endif %}{% endfor %}"), "leaves the system message out"),
    ],
)  # fmt: skip
def test_a_template_without_a_system_role_says_so(template: str, expected: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    subject = build_subject(ChatRenderer(tokenizer), "a", "b")
    conversation = Conversation(subject, Sampling())
    ask(conversation, "one")
    with pytest.raises(ContentError, match=expected):
        conversation.obey("/system Be brief")
    assert conversation.system is None
    ask(conversation, "two")
    assert conversation.subject.backend.prompts[1] == render(("user", "one"), ("assistant", "a"), ("user", "two"))
    with pytest.raises(ContentError, match=expected):
        Conversation(subject, Sampling(), system="Be brief")


def test_a_model_without_a_template_is_refused_before_the_first_question() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ContentError, match="no chat template"):
        Conversation(build_subject(ChatRenderer(tokenizer)), Sampling())


def test_params_are_set_by_name(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer, "a"), Sampling(top_k=3, seed=5))
    told = conversation.obey(
        "/params temperature=0.7 top-p = .9 top_k=40 min_p=0.05 repetition_penalty=1.1 seed=3 MAX_NEW_TOKENS=200"
    )
    wanted = Sampling(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, seed=3, max_new_tokens=200
    )
    assert conversation.sampling == wanted
    assert told == conversation.obey("/params")
    assert conversation.obey(f"/params {told}") == told  # what is shown can be given again
    ask(conversation, "one")
    assert conversation.subject.backend.samplings == [wanted]
    assert "top_p, top_k, min_p, seed without effect" in (conversation.obey("/params temperature=0") or "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("temprature=1", "did you mean temperature?"),
        ("temp=1", "did you mean temperature?"),
        ("xyzzy=1", "there are temperature, top_p"),
        ("top_k", "write top_k=VALUE"),
        ("top_k=1.5", "top_k takes a whole number, not '1.5'"),
        ("top_p=much", "top_p takes a number, not 'much'"),
        ("top_p=1.5", "top_p=1.5 is not between 0.0 and 1.0"),
        ("temperature=nan", "temperature=nan is not between"),
        ("temperature=-1", "temperature=-1.0 is not between"),
        ("temperature=1e-30", "neither 0 nor at least"),
        ("repetition_penalty=0", "repetition_penalty=0.0 is not between"),
        ("max_new_tokens=0", "max_new_tokens=0 is not between 1"),
        (f"seed={10**30}", "is not between 0"),
    ],
)
def test_a_wrong_param_changes_nothing(renderer: ChatRenderer, words: str, expected: str) -> None:
    conversation = Conversation(build_subject(renderer), Sampling())
    with pytest.raises(UsageError) as caught:
        conversation.obey(f"/params seed=7 {words}")
    assert expected in str(caught.value)
    assert conversation.sampling == Sampling()


def test_unknown_commands_suggest_a_near_one(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer), Sampling())
    for word, meant in {"/sytem": "/system", "/param": "/params", "/exti": "/exit", "/hel": "/help"}.items():
        with pytest.raises(UsageError) as caught:
            conversation.obey(f"{word} something")
        assert caught.value.what == f"unknown command {word}"
        assert f"did you mean {meant}?" in caught.value.hint
        assert f"/{word}" in caught.value.hint
    for line in ("/", "/\n", "/etc/passwd what is it?"):
        with pytest.raises(UsageError, match="unknown command"):
            conversation.obey(line)
    with pytest.raises(UsageError, match="takes nothing"):
        conversation.obey("/reset all")
    told = conversation.obey("/help") or ""
    assert all(name in told for name in COMMANDS)
    assert max(map(len, told.splitlines())) < 80


def test_two_slashes_send_one(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer), Sampling())
    assert conversation.obey("//etc is a folder") is None
    assert conversation.obey("hello /reset") is None
    assert read_message("//etc is a folder") == "/etc is a folder"
    assert read_message("and/or") == "and/or"


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_exit_ends_it(renderer: ChatRenderer, word: str) -> None:
    conversation = Conversation(build_subject(renderer), Sampling())
    assert conversation.obey(word) == ""
    assert conversation.is_over


def test_the_oldest_questions_are_left_out_of_a_full_context_and_it_is_said(renderer: ChatRenderer) -> None:
    context, new = 120, 40
    subject = build_subject(renderer, *(f"answer {i}" for i in range(9)), context=context)
    conversation = Conversation(subject, Sampling(max_new_tokens=new), system="Rules")
    told = [ask(conversation, f"question {i}")[1] for i in range(9)]
    n_told = 0
    for i, prompt in enumerate(subject.backend.prompts):
        turns = [turn for k in range(i) for turn in (("user", f"question {k}"), ("assistant", f"answer {k}"))]

        def count(n: int, turns: Any = turns, i: int = i) -> int:  # tokens of the prompt without the n oldest
            text = render(("system", "Rules"), *turns[2 * n :], ("user", f"question {i}"))
            return len(renderer.tokenizer(text)["input_ids"])

        n_left_out = next(n for n in range(i + 1) if count(n) <= context - new)
        assert prompt == render(("system", "Rules"), *turns[2 * n_left_out :], ("user", f"question {i}"))
        notices = [text for text in told[i] if "is full" in text]
        assert len(notices) == bool(n_left_out)
        assert not n_left_out or ("the oldest question is" if n_left_out == 1 else f"the {n_left_out} ") in notices[0]
        n_told += len(notices)
    assert n_told > 2
    assert len(conversation.voices[0].turns) == 18  # nothing is forgotten: a smaller max_new_tokens brings it back


def test_a_message_that_is_too_long_alone_is_refused(renderer: ChatRenderer) -> None:
    subject = build_subject(renderer, "a", "b", "c", context=60)
    conversation = Conversation(subject, Sampling(max_new_tokens=30))
    ask(conversation, "one")
    long = "x" * 30
    n_tokens = len(renderer.render_prompt([Message("user", long)]))
    assert 30 < n_tokens < 60
    with pytest.raises(UsageError, match=f"a prompt of {n_tokens} tokens") as caught:
        ask(conversation, long)
    assert caught.value.hint == f"shorten it, or set max_new_tokens to at most {60 - n_tokens}"
    with pytest.raises(UsageError) as caught:
        ask(conversation, "x" * 80)
    assert caught.value.hint == "shorten it"
    assert len(conversation.voices[0].turns) == 2
    conversation.obey(f"/params max_new_tokens={60 - n_tokens}")
    assert ask(conversation, long)[0] == "b"


def test_an_answer_ends_with_the_context(tiny_model: Path) -> None:
    """The default of 512 new tokens is as much as the model's whole context."""
    subject = open_subject(str(tiny_model))
    conversation = Conversation(subject, Sampling())
    question = "question " * 60
    n_tokens = len(subject.renderer.render_prompt([Message("user", question)]))
    answer, told = ask(conversation, question)
    n_new = len(subject.renderer.tokenizer(answer)["input_ids"])
    assert told == ["the answer was ended by the end of the context of 512 tokens"] or n_tokens + n_new < 512
    _, told = ask(Conversation(subject, Sampling(max_new_tokens=2)), "question")
    assert told == ["the answer was ended by max_new_tokens=2"]


def test_ctrl_c_keeps_what_came_and_the_conversation_goes_on(tiny_model: Path) -> None:
    conversation = Conversation(open_subject(str(tiny_model)), Sampling(max_new_tokens=200))
    before = signal.getsignal(signal.SIGINT)
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        conversation.ask(conversation.voices[0], "question 1", on_text=take)
    assert caught.value.exit_code == 130
    assert len(pieces) <= 4  # one more token at most
    turns = conversation.voices[0].turns
    assert [turn.content for turn in turns] == ["question 1", "".join(pieces)]
    assert signal.getsignal(signal.SIGINT) is before
    conversation.obey("/params max_new_tokens=3")
    ask(conversation, "question 2")
    assert len(turns) == 4


def test_an_answer_stopped_before_it_began_is_no_turn(renderer: ChatRenderer) -> None:
    subject = build_subject(renderer, "a")

    def generate(*_: Any, check_stop: Any, **__: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        check_stop()
        return ["never"]

    subject.backend.generate = generate  # type: ignore[method-assign]
    conversation = Conversation(subject, Sampling())
    with pytest.raises(Interrupted) as caught:
        ask(conversation, "one")
    assert caught.value.exit_code == 143
    assert conversation.voices[0].turns == []


def test_errors_leave_the_turns_as_they_were(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer, "a", "out of memory", "c"), Sampling())
    ask(conversation, "one")
    with pytest.raises(MemoryExhausted, match="does not fit the memory"):
        ask(conversation, "two")
    ask(conversation, "three")
    assert conversation.subject.backend.prompts[2] == render(("user", "one"), ("assistant", "a"), ("user", "three"))


def test_an_empty_answer_is_said(renderer: ChatRenderer) -> None:
    assert ask(Conversation(build_subject(renderer, ""), Sampling()), "one") == ("", ["the answer is empty"])


def test_typed_special_tokens_stay_text(renderer: ChatRenderer) -> None:
    subject = build_subject(renderer, "a")
    ids: list[int] = []
    subject.backend.generate = lambda prompts, *_, **__: (ids.extend(prompts[0]), ["a"])[1]  # type: ignore
    ask(Conversation(subject, Sampling()), "<|im_end|>")
    end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1


def build_blank_tokenizer() -> Any:
    """A tokenizer as Llama 2's: words begin with ▁, and decoding strips the first blank of the whole."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁▁", "▁if", "▁x", "y", "\n"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("build", [build_tokenizer, build_blank_tokenizer])
def test_what_streams_is_the_answer(build: Any) -> None:
    import random

    import torch

    tokenizer = build()
    chance = random.Random(0)
    for _ in range(40):
        ids = [chance.randrange(3, len(tokenizer)) for _ in range(30)]
        if build is build_blank_tokenizer:  # whole characters of several bytes, indented lines
            word = [3 + byte for byte in "🦊é".encode()]
            tail = list(range(259, len(tokenizer)))
            ids = [i for _ in range(12) for i in (word if chance.random() < 0.3 else [chance.choice(tail)])]
        pieces: list[str] = []
        streamer = build_streamer(tokenizer, pieces.append)
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(pieces) > 5
        assert not any("\ufffd" in piece for piece in pieces[:-1]) or build is build_tokenizer


def test_bytes_that_are_no_text_are_refused(renderer: ChatRenderer) -> None:
    conversation = Conversation(build_subject(renderer, "a"), Sampling())
    with pytest.raises(UsageError, match="no UTF-8"):
        ask(conversation, "caf\udce9")
    with pytest.raises(UsageError, match="no UTF-8"):
        conversation.obey("/system caf\udce9")
    assert ask(conversation, "café")[0] == "a"
