"""``ftcli tokenize`` as a user and a script meet it: what is printed equals what training is given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import build_model, build_tokenizer, save_model
from typer.testing import CliRunner

from ftcli.cli.app import app
from ftcli.data.batch import build_batch, list_labels
from ftcli.recipe import load_recipe
from ftcli.train.loop import plan_steps
from ftcli.train.prepare import prepare_run


def call(*arguments: Any, columns: int = 80) -> Any:
    return CliRunner().invoke(app, ["tokenize", *map(str, arguments)], env={"COLUMNS": str(columns)})


def call_json(*arguments: Any, exit_code: int = 0) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "rows.jsonl", [ask("the fox", "a dog"), ask("how many", "1 2 3"), ask("é 😀", "ok 👩‍👧")]
    )


@pytest.mark.parametrize("packing", [False, True])
def test_labels_are_those_that_training_is_given(write_recipe: Any, packing: bool) -> None:
    path = write_recipe(data={"max_length": 128, "packing": packing})
    result = call(path, "--show-labels", "--format", "jsonl")
    assert result.exit_code == 0, result.output
    sequences = [json.loads(line) for line in result.stdout.splitlines()]
    prepared = prepare_run(load_recipe(path))
    documents = prepared.split.train.documents
    if not packing:
        assert [s["input_ids"] for s in sequences] == [document.ids for document in documents]
        assert [s["labels"] for s in sequences] == [list_labels(document) for document in documents]
        assert [s["sources"][0]["line"] for s in sequences] == list(range(1, 13))
        return
    packs = sorted(s["input_ids"] for s in sequences)
    recipe = prepared.recipe.model_copy(
        update={"train": prepared.recipe.train.model_copy(update={"per_device_train_batch_size": 1})}
    )
    batches = [build_batch([documents[i] for i in b]) for step in plan_steps(recipe, documents, epoch=0) for b in step]
    assert packs == sorted(batch.input_ids[0].tolist() for batch in batches)
    for s in sequences:
        starts = [i for i, position in enumerate(s["position_ids"]) if position == 0]
        assert len(starts) == len(s["sources"]) == s["document_ids"][-1] + 1
        assert all(s["labels"][start] == -100 for start in starts)
        assert len({len(s[key]) for key in ("input_ids", "labels", "position_ids", "document_ids")}) == 1
    assert sorted(source["line"] for s in sequences for source in s["sources"]) == list(range(1, 13))


def test_the_report_adds_up(rows: Path, tiny_model: Path) -> None:
    report = call_json(rows, "-m", tiny_model)
    lines = call(rows, "-m", tiny_model, "--show-labels").stdout.splitlines()
    sequences = [json.loads(line) for line in lines]
    (part,) = report["parts"]
    lengths = sorted(len(s["input_ids"]) for s in sequences)
    assert (part["n_rows"], part["n_turns"], part["n_documents"]) == (3, 6, 3)
    assert part["n_tokens"] == sum(lengths)
    assert part["n_target_tokens"] == sum(label != -100 for s in sequences for label in s["labels"])
    assert part["n_stop_tokens"] == 3
    assert (part["shortest"], part["longest"], part["percentiles"]["p50"]) == (lengths[0], lengths[-1], lengths[1])
    assert sum(entry["n_documents"] for entry in part["histogram"]) == 3
    assert part["files"] == [{"name": str(rows), "format": "messages", "n_rows": 3}]
    texts = ["the fox", "a dog", "how many", "1 2 3", "é 😀", "ok 👩‍👧"]
    n_text_tokens = sum(len(build_tokenizer()(text).input_ids) for text in texts)
    assert part["tokens_per_word"] == pytest.approx(n_text_tokens / sum(len(t.split()) for t in texts), abs=1e-3)


def test_costs_of_a_shorter_max_length_are_counted_on_the_cut_rows(tmp_path: Path, tiny_model: Path) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [ask("q", "fox " * n) for n in (10, 150, 300)])
    sequences = [json.loads(line) for line in call(data, "-m", tiny_model, "--show-labels").stdout.splitlines()]
    report = call_json(data, "-m", tiny_model)
    longest = max(len(s["input_ids"]) for s in sequences)
    stop = build_tokenizer().eos_token_id
    assert [cost["max_length"] for cost in report["costs"]][-1] >= longest
    for cost in report["costs"]:
        lost = [s["labels"][cost["max_length"] :] for s in sequences]
        assert cost["rows_lost"] == sum(bool(labels) for labels in lost)
        assert cost["target_tokens_lost"] == sum(label != -100 for labels in lost for label in labels)
        assert cost["stop_tokens_lost"] == sum(label == stop for labels in lost for label in labels)
        assert cost["is_recommended"] == (cost["max_length"] == report["costs"][-1]["max_length"])


def test_flops_are_those_of_the_trained_matrices(write_recipe: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Against torch's own counter over one training step in plain PyTorch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "base", build_model(tied=False, vocab_size=384), tiny_tokenizer)
    data = write_jsonl(tmp_path / "train.jsonl", [ask("the quick brown fox", "jumps over " * 30)])
    path = write_recipe(model={"name_or_path": str(folder), "dtype": "float32"})
    write_jsonl(data, [ask("the quick brown fox", "jumps over " * 30)])  # write_recipe wrote rows of its own
    flops = call_json(path, "--set", "train.num_train_epochs=1", "--set", "train.max_steps=null")["training"]["flops"]
    (sequence,) = [json.loads(line) for line in call(path, "--show-labels").stdout.splitlines()]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        LoraConfig(r=4, target_modules="all-linear"),
    )
    targets = torch.tensor([i - 1 for i, label in enumerate(sequence["labels"]) if label != -100])
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.tensor([sequence["input_ids"]]), logits_to_keep=targets, use_cache=False).logits
        logits.sum().backward()
    # eager attention computes the whole square, twice what causal attention needs, and no second forward
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_training_cost_follows_the_steps_of_the_recipe(write_recipe: Any) -> None:
    def count(*overrides: str) -> tuple[float, int]:
        training = call_json(write_recipe(), *(word for text in overrides for word in ("--set", text)))["training"]
        return training["epochs"], training["n_tokens"]

    _, n_tokens = count("train.max_steps=null", "train.num_train_epochs=1")  # 12 rows, 4 a step
    assert count("train.max_steps=null", "train.num_train_epochs=2.5") == (2.5, round(2.5 * n_tokens))
    assert count("train.max_steps=6") == (2.0, 2 * n_tokens)
    seconds = call_json(write_recipe(), "--tokens-per-second", 100)["training"]["seconds"]
    assert seconds == pytest.approx(2 * n_tokens / 100)


@pytest.mark.parametrize("columns", [80, 120])
def test_everything_fits_the_terminal(tmp_path: Path, tiny_model: Path, columns: int) -> None:
    folder = tmp_path / "a folder with a long name" / ("x" * 60)
    folder.mkdir(parents=True)
    data = [
        ask("日本語 " * 30 + "x" * 200, "fox\t\u202e\u0007 " * 30),
        ask("a", "b"),
        ask("a", "b"),
        ask("", "<|im_end|>"),
    ]
    path = write_jsonl(folder / "rows.jsonl", data)
    result = call(path, "-m", tiny_model, "--show", 4, "--words", columns=columns)
    assert result.exit_code == 0
    from rich.cells import cell_len

    too_long = [line for line in result.stdout.splitlines() if cell_len(line) > columns and "x" * 60 not in line]
    assert not too_long
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    assert "\x07" not in result.stdout


def test_marks_tell_trained_from_context_and_cut_without_colour(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(data={"max_length": 28, "overflow": "truncate", "packing": False})
    write_jsonl(tmp_path / "train.jsonl", [ask("fox", "the lazy dog jumps over the quick brown fox")])
    shown = call(path, "--row", 1).stdout.partition("train.jsonl:1  ")[2]
    marks = {line[2] for line in shown.splitlines()[1:] if line.startswith("  ")}
    assert marks == {".", "#", "x"}
    document = call_json(path, "--row", 1)["rows"][0]["documents"][0]
    states = [state for _, _, state, _ in document]
    assert states == [*["context"] * states.count("context"), *["trained"] * states.count("trained"), *states[28:]]
    assert set(states[28:]) == {"truncated"}
    assert "".join(piece for _, piece, _, _ in document) == (
        "<|im_start|>user⏎fox<|im_end|>⏎<|im_start|>assistant⏎the lazy dog jumps over the quick brown fox<|im_end|>⏎"
    )
    assert [piece for _, piece, _, is_special in document if is_special][:2] == ["<|im_start|>", "<|im_end|>"]


def test_worst_rows_come_with_their_reason(tmp_path: Path, tiny_model: Path) -> None:
    data = [ask("q", "a b c d e f"), ask("q" * 90, "a"), ask("q", "fox " * 99)]
    rows = call_json(write_jsonl(tmp_path / "rows.jsonl", data), "-m", tiny_model, "--worst", 2)["rows"]
    assert [row["place"].rpartition(":")[2] for row in rows] == ["3", "2"]
    assert "tokens long" in rows[0]["why"]
    assert "not trained" in rows[1]["why"]


def test_errors_end_with_exit_code_3_and_the_report(write_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(data={"max_length": 16, "packing": False})
    write_jsonl(tmp_path / "train.jsonl", [ask("q", "fox " * 40), ask("q", "a")])
    report = call_json(path, exit_code=3)
    assert [f["severity"] for f in report["findings"]].count("error") == 1
    assert "train.jsonl:1" in report["findings"][0]["what"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rows.jsonl"], 2, "which model's tokenizer"),
        ([], 2, "is missing"),
        (["rows.jsonl", "-m", "MODEL", "--row", "9"], 2, "no row begins at line 9"),
        (["rows.jsonl", "-m", "MODEL", "--set", "a.b=1"], 2, "--set changes a recipe"),
        (["nothing.jsonl", "-m", "MODEL"], 2, "no such file"),
        (["rows.jsonl", "-m", "nothing/at/all.gguf"], 2, "no such file"),
        (["rows.jsonl", "-m", "EMPTY"], 3, "holds no tokenizer"),
        (["rows.jsonl", "-m", "MODEL", "--html", "EMPTY"], 2, "a folder, where a page"),
        (["rows.jsonl", "-m", "MODEL", "--html", "EMPTY/no/page.html"], 6, ""),
        (["--text", "a"], 2, "which model's tokenizer"),
        (["rows.jsonl", "--text", "a", "-m", "MODEL"], 2, "takes the place of the data"),
    ],
)
def test_nonsense_is_one_clear_error(
    tmp_path: Path, tiny_model: Path, rows: Path, monkeypatch: Any, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    given = [argument.replace("MODEL", str(tiny_model)) for argument in arguments]
    result = call(*given)
    assert result.exit_code == code, result.output
    assert result.stderr.count("error:") == 1
    assert words in result.stderr
    assert "Traceback" not in result.output
    document = json.loads(call(*given, "--json").stdout)
    assert document["error"]["exit"] == code


def test_skip_bad_counts_what_it_leaves_out(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ask("a", "b"), {"messages": []}, ask("c", "d")])
    with path.open("a") as file:
        file.write('{"messages": [')
    assert call(path, "-m", tiny_model).exit_code == 3
    report = call_json(path, "-m", tiny_model, "--skip-bad")
    assert report["parts"][0]["n_rows"] == 2
    assert [problem["where"].rpartition("rows.jsonl")[2] for problem in report["skipped"]] == [":4:15", ":2"]
    assert "skipped    2 bad rows" in call(path, "-m", tiny_model, "--skip-bad").stdout
    nothing = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}, {"messages": 3}])
    assert call(nothing, "-m", tiny_model, "--skip-bad").exit_code == 3


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("llama-3.1", [128000, 64816, 2442, 38302, 374, 8147]),
        ("mistral-7b-v0.3", [1, 24873, 29501, 29475, 26290, 1117, 7555]),
        ("qwen3", [63716, 2385, 37202, 374, 7988]),
        ("phi-3", [28896, 29899, 29873, 27964, 338, 13988]),
    ],
)
def test_text_is_tokenised_as_published(name: str, ids: list[int]) -> None:
    from conftest import find_tokenizer

    report = call_json("--text", "Fine-tuning is powerful", "-m", find_tokenizer(name))
    assert report["ids"] == ids
    spelled = bytes.fromhex("".join(piece["data"] for piece in report["pieces"] if not piece["is_special"]))
    assert spelled.decode().strip() == "Fine-tuning is powerful"


def test_pieces_of_a_text_are_its_bytes(tiny_model: Path) -> None:
    text = "fox é 😀 <|im_end|>"
    report = call_json("--text", text, "-m", tiny_model)
    assert b"".join(bytes.fromhex(piece["data"]) for piece in report["pieces"]).decode() == text
    assert report["n_bytes"] == len(text.encode())
    assert report["pieces"][-1]["is_special"]


class PageReader(HTMLParser):
    """Collects the texts of tokens, and every reference to something outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[str] = []
        self.outside: list[str] = []
        self.is_token = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.is_token = "title" in given
        if tag in ("script", "link", "img", "iframe") or {"src", "href", "onclick"} & given.keys():
            self.outside.append(tag)
        if self.is_token:
            self.tokens.append("")

    def handle_data(self, data: str) -> None:
        if self.is_token:
            self.tokens[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.is_token = False


def test_the_page_shows_the_rows_and_needs_nothing_else(tmp_path: Path, tiny_model: Path) -> None:
    nasty = "</span><script>alert(1)</script>&amp; <|im_end|> \u202e"
    data = write_jsonl(tmp_path / "rows.jsonl", [ask(nasty, "fox"), ask("a", "b")])
    page = tmp_path / "page.html"
    result = call(data, "-m", tiny_model, "--html", page, "--words")
    assert result.exit_code == 0
    text = page.read_text(encoding="utf-8")
    reader = PageReader()
    reader.feed(text)
    assert not reader.outside
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    shown = "".join(reader.tokens)
    assert shown.count("<|im_start|>assistant⏎fox<|im_end|>⏎") == 1
    assert "</span><script>alert(1)</script>&amp; <|im_end|> " in shown
    assert "\u202e" not in text
    assert text.count("<details") == 2


def test_words_are_candidates_that_save_what_they_say(tmp_path: Path, tiny_tokenizer: Any, tiny_model: Path) -> None:
    texts = ["zyxwvu qrstuv zyxwvu", "zyxwvu 12345 fox", "qrstuv zyxwvu 12345"]
    data = write_jsonl(tmp_path / "rows.jsonl", [ask(text, text) for text in texts])
    report = call_json(data, "-m", tiny_model, "--words")["words"]
    words = [word["word"] for word in report["words"]]
    assert words == ["zyxwvu", "qrstuv"]
    assert [word["count"] for word in report["words"]] == [8, 4]
    before = sum(len(tiny_tokenizer(text).input_ids) for text in texts) * 2
    larger = build_tokenizer()
    larger.add_tokens(words)
    assert (report["n_tokens"], report["tokens_saved"]) == (
        before,
        before - 2 * sum(len(larger(text).input_ids) for text in texts),
    )
    recipe = tmp_path / "recipe.yaml"
    section = {"model": str(tiny_model), "datasets": [{"path": str(data)}], "tokenizer": {"add_tokens": words}}
    section["data"] = {"max_length": 128}
    recipe.write_text(yaml.safe_dump({**section, "output_dir": str(tmp_path / "run")}))
    assert call_json(recipe, "--words")["words"]["words"] == []


def test_a_chosen_template_stands_beside_the_models_own(write_recipe: Any) -> None:
    path = write_recipe(tokenizer={"chat_template": "llama3"})
    refused = call(path)
    assert refused.exit_code == 3
    assert 'tokenizer.add_tokens: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]' in refused.stderr
    added = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    path = write_recipe(tokenizer={"chat_template": "llama3", "add_tokens": added})
    report = call_json(path)
    assert report["template"]["end_of_turn"] == ["<|eot_id|>"]
    assert report["template"]["own_text"].startswith("<|im_start|>system\nRules.<|im_end|>")
    assert "<|start_header_id|>user<|end_header_id|>\n\nQuestion?<|eot_id|>" in report["template"]["text"]
    assert "the model's own" in call(path).stdout
    write_jsonl(path.parent / "train.jsonl", [ask("say <|eot_id|>", "a")])
    (sequence,) = [json.loads(line) for line in call(path, "--show-labels").stdout.splitlines()]
    tokenizer = build_tokenizer()
    assert sequence["input_ids"].count(len(tokenizer) + 2) == 2  # one for each turn, none for the typed one


def test_a_pipe_that_closes_early_is_no_error(tmp_path: Path, tiny_model: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [ask("fox " * 50, "dog " * 50)] * 500)
    command = f"{sys.executable} -m ftcli tokenize {data} -m {tiny_model} --show-labels | head -c 100"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.stdout.startswith('{"input_ids"')
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--show", "3"], *(pytest.param([option], marks=pytest.mark.slow) for option in ("--show-labels", "--json"))],
)
def test_a_full_disk_behind_stdout_is_one_error(rows: Path, tiny_model: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ftcli", "tokenize", str(rows), "-m", str(tiny_model), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert "error: the output cannot be written: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_that_it_stopped(tmp_path: Path, tiny_model: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [ask(f"fox {i} " * 50, "dog " * 50) for i in range(30_000)])
    command = [sys.executable, "-m", "ftcli", "tokenize", str(data), "-m", str(tiny_model)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job of a shell ignores it
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("data"):
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "error: stopped by SIGINT" in err


@pytest.mark.parametrize("name", ["pipe", "x" * 300])
def test_the_page_is_written_to_files_alone(rows: Path, tiny_model: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = call(rows, "-m", tiny_model, "--html", tmp_path / name)
    assert result.exit_code == 2
    assert (tmp_path / "pipe").is_fifo()


def test_control_characters_of_the_data_do_not_reach_the_terminal(tmp_path: Path, tiny_model: Path) -> None:
    data = write_jsonl(tmp_path / "a\x1b[31mb.jsonl", [{"mess\x1b[31mages": []}])
    result = call(data, "-m", tiny_model)
    assert result.exit_code == 3
    assert "\x1b" not in result.stderr
    assert "mess\\x1b[31mages" in result.stderr


def test_a_folder_with_one_bad_file_is_read_with_skip_bad(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [ask("a", "b")])
    (folder / "b.jsonl").write_text("garbage\n")
    report = call_json(folder, "-m", tiny_model, "--skip-bad")
    assert (report["parts"][0]["n_rows"], len(report["skipped"])) == (1, 1)


def test_a_role_that_no_message_has_is_named(write_recipe: Any) -> None:
    path = write_recipe(datasets=[{"path": "train.jsonl", "train_on": ["assistent", "user"]}])
    result = call(path)
    assert result.exit_code == 2
    assert "assistent is no role" in result.stderr
    assert "did you mean assistant?" in result.stderr


def test_blank_tokens_are_refused(write_recipe: Any) -> None:
    for token in (" ", "\n", " foo"):
        result = call(write_recipe(tokenizer={"add_tokens": [token]}))
        assert result.exit_code == 2, token
        assert "tokenizer.add_tokens" in result.stderr
