"""A recipe from a file: what YAML means here, where paths point, and every error with its place."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcli.errors import FtcliError, RecipeError, UsageError
from ftcli.recipe import LoadedRecipe, load_recipe
from ftcli.recipe.document import read_document, read_scalar

MINIMAL = "model: m\ndatasets: [{path: d.jsonl}]\n"


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str | bytes, *overrides: str, name: str = "recipe.yaml") -> LoadedRecipe:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path, overrides=overrides)


def read_problems(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return [re.sub(r"^recipe\.yaml:(?=[0-9])", "", str(problem)) for problem in caught.value.problems]


BROKEN = {
    "unknown key": ("peft: {lora_rank: 8}", ["3:8: peft.lora_rank: unknown key; did you mean peft.r?"]),
    "key of another section": ("r: 8", ["3:1: r: unknown key; did you mean peft.r?"]),
    "slip of the pen": (
        "train:\n  learning_rat: 1e-4",
        ["4:3: train.learning_rat: unknown key; did you mean train.learning_rate?"],
    ),
    "section misspelt": ("trian: {seed: 1}", ["3:1: trian: unknown key; did you mean train?"]),
    "nothing like it": ("qqqq: 1", ["3:1: qqqq: unknown key"]),
    "key twice": ("train:\n  seed: 1\n  seed: 2", ["5:3: train.seed: given twice, first on line 4"]),
    "text for a number": (
        "train: {learning_rate: fast}",
        ['3:24: train.learning_rate: expected a number greater than 0, got "fast"'],
    ),
    "zero": ("train: {learning_rate: 0}", ["3:24: train.learning_rate: expected a number greater than 0, got 0"]),
    "infinity": (
        "train: {learning_rate: .inf}",
        ['3:24: train.learning_rate: expected a number greater than 0, got ".inf"'],
    ),
    "quoted number": ('peft: {r: "8"}', ['3:11: peft.r: expected an integer of at least 1, got "8"; write 8']),
    "octal": ("peft: {r: 010}", ['3:11: peft.r: expected an integer of at least 1, got "010"; write 10']),
    "underscore": (
        "data: {max_length: 4_096}",
        ['3:20: data.max_length: expected an integer of at least 8, got "4_096"; write 4096'],
    ),
    "sexagesimal": (
        "train: {seed: 12:30:45}",
        ['3:15: train.seed: expected an integer of at least 0, got "12:30:45"'],
    ),
    "integer as a float": (
        "train: {max_steps: 1e3}",
        ["3:20: train.max_steps: expected an integer of at least 1 or null, got 1e3; write 1000"],
    ),
    "fraction": ("peft: {r: 1.5}", ["3:11: peft.r: expected an integer of at least 1, got 1.5"]),
    "choice": (
        "train: {lr_scheduler_type: cosin}",
        ['3:28: train.lr_scheduler_type: expected one of linear, cosine, constant, got "cosin"; did you mean cosine?'],
    ),
    "yes": ("data: {packing: yes}", ['3:17: data.packing: expected true or false, got "yes"; write true']),
    "no as text": (
        "tokenizer: {chat_template_kwargs: {think: no}}",
        [
            "3:43: tokenizer.chat_template_kwargs.think: YAML 1.1 reads no as false; "
            'write false, or quote it ("no") if text is meant'
        ],
    ),
    "true as text": (
        "output_dir: true",
        ['3:13: output_dir: expected text, got true; quote it ("true") if text is meant'],
    ),
    "number as text": (
        "output_dir: 5",
        ['3:13: output_dir: expected text, got 5; quote it ("5") if text is meant'],
    ),
    "on as text": (
        "output_dir: On",
        ['3:13: output_dir: YAML 1.1 reads On as true; quote it ("On") if text is meant'],
    ),
    "item of another type": (
        "peft: {target_modules: [q_proj, 5]}",
        ['3:33: peft.target_modules.1: expected text, got 5; quote it ("5") if text is meant'],
    ),
    "neither text nor list": (
        "peft: {target_modules: {a: 1}}",
        ["3:24: peft.target_modules: expected text or a list of distinct names, got a mapping"],
    ),
    "name twice": ("peft: {target_modules: [q, v, q]}", ["3:24: peft.target_modules: q is given twice"]),
    "layers backwards": (
        "peft: {layers_to_transform: 9-3}",
        ["3:29: peft.layers_to_transform: the range 9-3 is empty; write 3-9"],
    ),
    "template by name": (
        "tokenizer: {chat_template: llama4}",
        [
            "3:28: tokenizer.chat_template: expected auto, llama3, chatml, mistral, or a path to a .jinja file, "
            'got "llama4"'
        ],
    ),
    "empty text": ("output_dir: ''", ["3:13: output_dir: must not be empty"]),
    "empty section": ("data:", ["3:6: data: expected a section, got nothing; leave the key out for its defaults"]),
    "empty section that may be null": (
        "peft:",
        ["3:6: peft: nothing stands here; write null, or leave the key out for its default"],
    ),
    "scalar for a section": ("train: fast", ['3:8: train: expected a section, got "fast"']),
    "exclusive steps": (
        "train: {max_steps: 5, num_train_epochs: 1}",
        ["3:9: train.max_steps: excludes num_train_epochs; give one of them"],
    ),
    "exclusive warm-up": (
        "train: {warmup_ratio: 0.0, warmup_steps: 0}",
        ["3:28: train.warmup_steps: excludes warmup_ratio; give one of them"],
    ),
    "adapter and more": (
        "peft: {adapter: a, r: 8, use_dora: true}",
        ["3:8: peft.adapter: the adapter brings its own r, use_dora; drop these keys, or drop adapter"],
    ),
    "full fine-tuning without a rate": (
        "peft: null",
        ["3:1: train.learning_rate: full fine-tuning has no safe default learning rate; 1e-5 is usual"],
    ),
    "4-bit full fine-tuning": (
        "quantization: {}\npeft: null\ntrain: {learning_rate: 1e-5}",
        ["3:1: quantization: 4-bit weights cannot be trained; use peft or drop quantization"],
    ),
    "pissa on 4 bits": (
        "quantization: {}\npeft: {init_lora_weights: pissa_niter_4}",
        [
            "4:8: peft.init_lora_weights: pissa_niter_4 rewrites the base weights, which 4-bit weights "
            "do not allow; drop it, or drop quantization"
        ],
    ),
    "evaluation on nothing": (
        "eval: {eval_steps: 5}",
        ["3:1: eval: nothing to evaluate on; give eval.datasets, data.val_set_size or eval.sample_prompts"],
    ),
    "two held-out sets": (
        "eval: {datasets: [{path: h}]}\ndata: {val_set_size: 0.1}",
        ["4:8: data.val_set_size: excludes eval.datasets; give one of them"],
    ),
    "another schema": (
        "schema: 2\nnew_key: 5",
        ["3:9: schema: 2 is not read by this ftcli, which reads recipes of schema 1"],
    ),
    "schema as text": ("schema: one", ['3:9: schema: expected 1, got "one"']),
    "merge of a scalar": ("train: {<<: 5}", ["3:13: << merges mappings only"]),
    "tag": (
        "train: !!python/object:os.system {}",
        ["3:8: the tag !!python/object:os.system has no place in a recipe"],
    ),
    "key that is a list": ("? [a]\n: 1", ["3:3: a key must be text"]),
    "half a surrogate pair": ('output_dir: "\\ud800"', ["3:13: half a surrogate pair is no text"]),
    "no character": ('output_dir: "\\UFFFFFFFF"', None),
    "unknown alias": ("train: *none", ["3:8: broken YAML: found undefined alias 'none'"]),
    "alias in itself": ("train: &t {x: *t}", ["3:8: an alias inside of what it stands for"]),
    "tab": ("train:\n\tseed: 1", ["4:1: broken YAML: a tab; YAML is indented with spaces"]),
    "open bracket": (
        "peft: {target_modules: [q",
        ["4:1: broken YAML while parsing a flow sequence that starts on line 3: expected ',' or ']', but got the end"],
    ),
    "second colon": ("output_dir: a: b", ['3:14: broken YAML: a second colon; put text that holds ": " in quotes']),
    "at sign": ("output_dir: @home", ["3:13: broken YAML: text cannot start with @; put it in quotes"]),
    "two documents": ("---\nmodel: x", ["3:1: a second document starts here; a recipe is one document"]),
    "NUL": ("output_dir: a\0b", ["3:14: the character U+0000 is not allowed in YAML"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_recipes_are_told_with_their_place(case: str, in_folder: Path) -> None:
    text, expected = BROKEN[case]
    problems = read_problems(f"{MINIMAL}{text}\n")
    if expected is None:
        assert len(problems) == 1
    else:
        assert problems == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["recipe.yaml: the file is empty; a recipe needs at least model and datasets"]),
        ("# nothing\n---\n", ["recipe.yaml: the file is empty; a recipe needs at least model and datasets"]),
        ("- model: m\n", ["1:1: expected a mapping of keys at the top"]),
        ("just text", ["1:1: expected a mapping of keys at the top"]),
        ("null", ["1:1: expected a mapping of keys at the top"]),
        ("peft: {r: 8}\n", ["1:1: model: missing required key", "1:1: datasets: missing required key"]),
        (
            "model: {}\ndatasets: []\n",
            ["1:8: model.name_or_path: missing required key", "2:11: datasets: must not be empty"],
        ),
        (
            "model: 5\ndatasets:\n  - type: text\n  - 5\n",
            [
                "1:8: model: expected a model's name or a section, got 5",
                "3:5: datasets.0.path: missing required key",
                "4:5: datasets.1: expected a section, got 5",
            ],
        ),
        (
            "model: m\ndatasets:\n  - d.jsonl\n",
            ['3:5: datasets.0: expected a section, got "d.jsonl"; write path: d.jsonl'],
        ),
        (b"model: m\n# caf\xe9\ndatasets: []\n", ["2:6: not UTF-8; save the file as UTF-8"]),
        ("[" * 5000, ["1:41: nested more than 40 deep"]),
        ("a: " + "{a: " * 5000, ["1:157: nested more than 40 deep"]),
    ],
)
def test_broken_files(text: str | bytes, expected: list[str], in_folder: Path) -> None:
    assert read_problems(text) == expected


def test_an_alias_bomb_is_refused(in_folder: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (problem,) = read_problems("\n".join(rows))
    assert problem.endswith("aliases expand to more than 10000 values")


def test_everything_is_told_at_once_in_the_order_of_the_file(in_folder: Path) -> None:
    text = """\
model: m
peft: {lora_rank: 8, r: 0}
lr_scheduler_type: cosine
datasets:
  - path: d.jsonl
    train_on: asistant
  - pth: x
train:
  max_steps: 5
  num_train_epochs: 2
  seed: 1
  seed: 2
  optim: sgd
tokenizer: {chat_template_kwargs: {a: no}}
eval: {eval_steps: 0}
"""
    problems = read_problems(text, "train.weight_decay=-1", "oops")
    assert [p.partition(": ")[0] for p in problems[:-2]] == [
        "2:8", "2:25", "3:1", "6:15", "7:5", "7:5", "9:3", "12:3", "13:10", "14:39", "15:20",
    ]  # fmt: skip
    assert problems[-2:] == [
        "--set train.weight_decay=-1: train.weight_decay: expected a number of at least 0, got -1",
        "--set oops: expected KEY=VALUE; there is no =",
    ]


def test_nothing_follows_from_a_value_that_is_wrong_itself(in_folder: Path) -> None:
    assert len(read_problems(MINIMAL + "peft: null\ntrain: {learning_rate: fast}\n")) == 1
    assert len(read_problems(MINIMAL + "eval: {datasets: 5}\n")) == 1
    assert len(read_problems(MINIMAL + "peft: null\ntrain: 5\n")) == 1


def test_the_place_is_the_path_as_typed(in_folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(MINIMAL + "r: 1\n", name="sub/r.yaml")
    assert caught.value.problems[0].where == "sub/r.yaml:3:1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1e5", 1e5), ("1E-4", 1e-4), (".5", 0.5), ("5.", 5.0), ("-1", -1), ("+2", 2), ("0", 0),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("off", "off"), ("010", "010"), ("0x10", "0x10"), ("1_000", "1_000"), ("0o7", "0o7"),
        ("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01"), (".inf", ".inf"), (".nan", ".nan"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000), ("1e", "1e"), ("٣", "٣"), ("-", "-"), ("=", "="),
    ],
)  # fmt: skip
def test_plain_scalars(text: str, value: object) -> None:
    found = read_scalar(text)
    assert (found, type(found)) == (value, type(value))


def test_quoted_text_is_text(in_folder: Path) -> None:
    recipe = load(MINIMAL + 'output_dir: "no"\npeft: {target_modules: ["5", \'true\', !!str 010]}\n').recipe
    assert recipe.output_dir == "no"
    assert recipe.peft is not None
    assert recipe.peft.target_modules == ("5", "true", "010")


def test_anchors_aliases_and_merge_keys(in_folder: Path) -> None:
    text = "model: m\ndatasets:\n  - &one {path: a, type: text}\n  - {<<: *one, path: b}\n  - {path: c, <<: [*one]}\n"
    datasets = load(text).recipe.datasets
    assert [(Path(d.path).name, d.type) for d in datasets] == [("a", "text"), ("b", "text"), ("c", "text")]


def test_paths(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        "model: ./models/m\ndatasets: [{path: ../d.jsonl}, {path: ~/d.jsonl}, {path: /abs/d.jsonl}]\n"
        "tokenizer: {chat_template: t.jinja}\neval: {datasets: [{path: h.jsonl}]}\noutput_dir: out\n"
    )
    recipe = load(text, "datasets.2.path=here.jsonl", name="sub/r.yaml").recipe
    folder = in_folder / "sub"
    assert [d.path for d in recipe.datasets] == [
        f"{folder}/../d.jsonl",
        "/home/me/d.jsonl",
        f"{in_folder}/here.jsonl",
    ]
    assert recipe.tokenizer.chat_template == f"{folder}/t.jinja"
    assert recipe.eval is not None
    assert recipe.eval.datasets[0].path == f"{folder}/h.jsonl"
    assert (recipe.model.name_or_path, recipe.output_dir) == ("./models/m", "out")


def test_the_run_is_named_after_the_file(in_folder: Path) -> None:
    assert load(MINIMAL, name="sub/support.v2.yaml").recipe.output_dir == "runs/support.v2"
    assert load(MINIMAL + "output_dir: null\n", name="sub/x.yaml").recipe.output_dir == "runs/x"


def test_sources_name_what_is_no_default(in_folder: Path) -> None:
    text = MINIMAL + "peft:\n  r: 8\n  lora_alpha: 32\nquantization: {load_in_4bit: true}\ntrain: {seed: 7}\n"
    loaded = load(text, "train.max_steps=3", "datasets.0.type=text", name="sub/r.yaml")
    assert loaded.path == Path("sub/r.yaml")
    assert dict(loaded.sources) == {
        "model.name_or_path": "r.yaml:1",
        "quantization": "r.yaml:6",
        "peft.r": "r.yaml:4",
        "datasets.0.path": "r.yaml:2",
        "datasets.0.type": "--set",
        "train.seed": "r.yaml:7",
        "train.max_steps": "--set",
    }
    assert (
        loaded.sources.keys()
        <= dict.fromkeys(load(MINIMAL + "peft: null\ntrain: {learning_rate: 1}").sources) | loaded.sources.keys()
    )


def test_full_fine_tuning_has_a_source(in_folder: Path) -> None:
    assert load(MINIMAL + "peft: null\ntrain: {learning_rate: 1}\n").sources["peft"] == "recipe.yaml:3"


def test_files_that_cannot_be_read(in_folder: Path) -> None:
    load(MINIMAL, name="llama.yaml")
    with pytest.raises(UsageError, match="no such file") as caught:
        load_recipe(Path("lama.yaml"))
    assert (caught.value.where, caught.value.hint) == ("lama.yaml", "did you mean llama.yaml?")
    with pytest.raises(UsageError, match=r"a folder, not a recipe") as caught:
        load_recipe(in_folder)
    assert "llama.yaml" in caught.value.hint
    with pytest.raises(UsageError, match="cannot be read: not a directory"):
        load_recipe(Path("llama.yaml/x.yaml"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(Path("a\0b.yaml"))
    with pytest.raises(RecipeError, match="larger than 1000000 bytes"):
        load(b"#" * 1_000_001)


def test_byte_order_mark_and_windows_lines(in_folder: Path) -> None:
    assert load(b"\xef\xbb\xbfmodel: m\r\ndatasets:\r\n- path: d\r\n").recipe.model.name_or_path == "m"


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,-?&*!|>'\"%@`# \n\tab0<~=", max_size=40))
def test_no_text_brings_it_down(text: str) -> None:
    entry, findings = read_document(text, "x")
    assert entry is not None or findings or not (text.strip() and yaml.compose(text))


@settings(deadline=None)
@given(text=st.text("{}[]:,-&*!'\"# \nmodelnyspath05.", max_size=60))
def test_only_our_own_errors_come_out(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(f"model: m\ndatasets: [{{path: d}}]\ntrain: {{seed: 1}}\n{text}", encoding="utf-8")
    with contextlib.suppress(FtcliError):
        assert load_recipe(path).recipe.model.name_or_path
