"""Pairs made to mislead, crash or exhaust whoever pairs them: configurations, tokenizers, links,
sizes and values."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast.checkpoint.inspect import inspect
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.writer import OutputFolder
from pa_fast.errors import OutputError, PaFastError
from pa_fast.foreign import one_line
from tests.attacks.test_hostile_headers import entry, json_values, packed
from tests.checkpoint.pairs import CONFIG, load_folder, write_checkpoint, write_pair

TOKENIZER: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}


def replaced(file: Path, target: str) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def vocabulary(folder: Path, text: str | bytes) -> None:
    """A tokenizer.json of `text` in instruct, beside a good one in base."""
    (folder.parent / "base" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def deep(levels: int) -> str:
    return '{"x":' * levels + "1" + "}" * levels


ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights that link to themselves": (
        lambda f: replaced(f / "model.safetensors", "model.safetensors"),
        "cannot be opened",
    ),
    "an index that links to itself": (
        lambda f: replaced(f / "model.safetensors.index.json", "model.safetensors.index.json"),
        "cannot be opened",
    ),
    "a config that links in a circle": (
        lambda f: (replaced(f / "config.json", "again"), (f / "again").symlink_to("config.json")),
        "cannot be opened",
    ),
    "a tokenizer that links to itself": (
        lambda f: (vocabulary(f, "{}"), replaced(f / "tokenizer.json", "tokenizer.json")),
        "cannot be opened",
    ),
    "a config that is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "not a regular file",
    ),
    "a config of 100 MB": (
        lambda f: os.truncate(f / "config.json", 100_000_001),
        "100000001 bytes, expected at most 100000000",
    ),
    "a config as deep as the parser goes": (
        lambda f: (f / "config.json").write_text(deep(900)),
        "nested too deep",
    ),
    "a config deeper than the parser goes": (
        lambda f: (f / "config.json").write_text(deep(100_000)),
        "nested too deep",
    ),
    "a config with a key twice": (
        lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'),
        "appears twice",
    ),
    "a config of another layer count": (
        lambda f: edit(f, num_hidden_layers=10**15),
        "`num_hidden_layers` is",
    ),
    "a number of 5000 digits": (
        lambda f: (f / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}"),
        "config.json: not JSON",
    ),
    "terminal codes in a value": (lambda f: edit(f, hidden_act="\x1b[2J"), r"\x1b[2J"),
    "a flood in a value": (lambda f: edit(f, hidden_act="x" * 10**6), "..."),
    "tokens that are numbers": (
        lambda f: vocabulary(f, '{"model": {"vocab": [[1, 2]]}}'),
        "no vocabulary of tokens",
    ),
    "ids that are text": (
        lambda f: vocabulary(f, '{"model": {"vocab": {"a": "0"}}}'),
        "no vocabulary of tokens",
    ),
    "a tokenizer with a token twice": (
        lambda f: vocabulary(f, '{"model": {"vocab": {"a": 0, "a": 1}}}'),
        "the name `a` appears twice",
    ),
    "a tokenizer that is not UTF-8": (
        lambda f: vocabulary(f, b'{"model": {"vocab": {"\xff": 0}}}'),
        "not UTF-8 at byte",
    ),
    "a tokenizer that is a bomb": (lambda f: vocabulary(f, "[" * 200_000), "nested too deep"),
    "added tokens of another kind": (
        lambda f: vocabulary(f, '{"model": {"vocab": {}}, "added_tokens": {"a": 1}}'),
        "no vocabulary of tokens",
    ),
    "two tokens swapped": (
        lambda f: vocabulary(f, '{"model": {"vocab": {"a": 1, "b": 0}}}'),
        "2 tokens have different ids",
    ),
    "a name that only looks alike": (
        lambda f: (f / "model.safetensors").write_bytes(packed({"а.odd": entry()})),
        "lacks",
    ),
    "a vocabulary that its config does not state": (lambda f: edit(f, vocab_size=-40), ""),
    "a tie that its files deny": (
        lambda f: edit(f, tie_word_embeddings=True),
        "`tie_word_embeddings` is",
    ),
    "weights of size zero alone": (
        lambda f: (f / "model.safetensors").write_bytes(packed({"w": entry(0, 0, shape=[0])}, b"")),
        "lacks",
    ),
    "weights without a tensor": (
        lambda f: (f / "model.safetensors").write_bytes(packed({}, b"")),
        "hold no tensor",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_or_handled(tmp_path: Path, attack: str) -> None:
    base, instruct = write_pair(tmp_path)
    change, expected = ATTACKS[attack]
    change(instruct)
    if not expected:
        assert inspect(base, instruct).tensors == 5
        return
    with pytest.raises(PaFastError) as error:
        inspect(base, instruct)
    assert expected in error.value.message and error.value.hint and len(error.value.message) < 1500
    assert error.value.message.isprintable()
    with pytest.raises(type(error.value)):
        merge(base, instruct, 0.5, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "instruct"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["base", "instruct"])
def test_one_value_that_is_no_number(tmp_path: Path, side: str, value: float) -> None:
    both = {s: {"w": torch.ones(70_000), "v": torch.ones(3)} for s in ("base", "instruct")}
    both[side]["w"][69_999] = value
    pair = [write_checkpoint(tmp_path / s, tensors) for s, tensors in both.items()]
    for run in (lambda: merge(*pair, 0.5, tmp_path / "out"), lambda: inspect(*pair, full=True)):
        with pytest.raises(PaFastError, match=f"tensor `w` of {side} has non-finite weights"):
            run()
    assert not (tmp_path / "out").exists()


def test_tensors_of_size_zero_and_without_dimensions_are_handled(tmp_path: Path) -> None:
    tensors = {
        "none": torch.zeros(0),
        "rows": torch.zeros(0, 7),
        "columns": torch.zeros(7, 0),
        "one": torch.ones(()),
    }
    pair = [write_checkpoint(tmp_path / side, tensors) for side in ("base", "instruct")]
    merge(*pair, 0.5, tmp_path / "out")
    assert {name: tuple(t.shape) for name, t in load_folder(tmp_path / "out").items()} == {
        name: tuple(t.shape) for name, t in tensors.items()
    }
    found = inspect(*pair, full=True, fidelity=(0.5,)).measured
    assert found and [part.name for part in found.tensors] == ["one"]


def test_a_second_writer_is_refused_and_spoils_nothing(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    with (
        OutputFolder(tmp_path / "out", 0) as first,
        pytest.raises(OutputError, match="another process is writing it"),
    ):
        first.write("mine", b"")
        merge(*pair, 0.5, tmp_path / "out")


def test_a_side_that_is_the_other(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path)
    report = inspect(base, base, full=True)
    assert report.measured and report.measured.total.unchanged == 1.0
    merge(base, base, 0.5, tmp_path / "out")
    assert all(
        torch.equal(w, load_folder(base)[name]) for name, w in load_folder(tmp_path / "out").items()
    )


configs = st.dictionaries(
    st.sampled_from(
        [
            "vocab_size",
            "tie_word_embeddings",
            "text_config",
            "model_type",
            "rope_scaling",
            "quantization_config",
            "num_hidden_layers",
            "eos_token_id",
            "architectures",
            "x",
        ]
    ),
    json_values,
    max_size=4,
)
tokenizers = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({"vocab": json_values}) | json_values,
        "added_tokens": json_values,
    },
)


def inspect_or_refuse(files: dict[str, bytes]) -> None:
    """The whole promise on arbitrary files of one side: a report, or a PaFastError that can be
    printed."""
    with tempfile.TemporaryDirectory() as root:
        for side in ("base", "instruct"):
            folder = Path(root) / side
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(
                packed({"model.embed_tokens.weight": entry()})
            )
            (folder / "config.json").write_text('{"vocab_size": 2, "model_type": "unheard-of"}')
            (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        for name, data in files.items():
            (Path(root) / "instruct" / name).write_bytes(data)
        try:
            inspect(Path(root) / "base", Path(root) / "instruct", sample=True)
        except PaFastError as error:
            assert (
                one_line(error.message) == error.message
                and error.hint
                and len(error.message) < 2000
            )


@settings(max_examples=150)
@given(configs, tokenizers, st.dictionaries(st.text(max_size=8), json_values, max_size=3))
def test_any_companions(
    config: dict[str, Any], tokenizer: dict[str, Any], chat: dict[str, Any]
) -> None:
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": chat,
        "generation_config.json": config,
    }
    inspect_or_refuse({name: json.dumps(value).encode() for name, value in files.items()})


@settings(max_examples=100)
@given(
    st.sampled_from(
        ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"]
    ),
    st.binary(max_size=60),
)
def test_any_bytes_in_any_file(name: str, data: bytes) -> None:
    inspect_or_refuse({name: data})


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12) | json_values, max_size=3))
def test_any_index(weight_map: dict[str, Any]) -> None:
    inspect_or_refuse(
        {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    )
