"""Every refusal that the interface promises, met on the command line: one message, a hint, the exit
code, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pa_fast import cli
from pa_fast.checkpoint.writer import OutputFolder
from tests.checkpoint.pairs import CONFIG, random_tensors, write_checkpoint

ONE, TWO, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)
TOKENS = {"<unk>": 0, "<s>": 1, "a": 2, "b": 3}
HEADERS = ("inspect", "merge", "sweep")  # verbs that read headers and configurations in one way
NAMES = ("inspect", "merge", "verify")  # a sweep pairs by the names that the models have


@dataclass(frozen=True)
class Row:
    """One promise: how `break_` a pair below a folder, for which verbs, and what is said then."""

    break_: Callable[[Path], Any]
    message: str
    hint: str
    verbs: tuple[str, ...] = HEADERS
    options: tuple[str, ...] = ()


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file after `change` on its entries."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a checkpoint as one file after `change` on its tensors."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def tokenizer(folder: Path, tokens: dict[str, int]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    found = json.loads((folder / INDEX).read_text())
    change(found["weight_map"])
    (folder / INDEX).write_text(json.dumps(found))


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in entries.items() if name != "__metadata__")


def grow(folder: Path) -> None:
    tensors(
        folder, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(48, 16).bfloat16()})
    )
    config(folder, vocab_size=48)


def pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def during(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A change that happens while a merge is under way: after headers were read, before tensors
    are."""

    def arrange(root: Path) -> Callable[[], Any]:
        return lambda: change(root)

    return arrange


def quantised(method: str) -> Row:
    said = (
        f"config.json has `quantization_config` of kind `{method}`, but the weights are not"
        " quantised"
    )
    return Row(
        lambda r: config(r / "base", quantization_config={"quant_method": method}),
        said,
        "remove `quantization_config`",
    )


def changes_the_function(said: str, **changes: Any) -> Row:
    return Row(
        lambda r: config(r / "instruct", **changes),
        f"config.json changes the model: `{said}` is",
        "of one model",
    )


CHANGED = "the file changed while it was read"
TABLE = {
    "missing shard": Row(
        lambda r: (r / "base" / TWO).unlink(),
        f"1 of 2 shards are missing: {TWO}",
        "complete the download",
    ),
    "truncated file": Row(
        lambda r: rewrite(r / "base" / ONE, lambda d: d[:-7]), "truncated: ", "damaged"
    ),
    "header that overruns": Row(
        lambda r: rewrite(r / "base" / ONE, lambda d: (10**6).to_bytes(8, "little") + d[8:]),
        "overruns the file of",
        "damaged",
    ),
    "offsets that overrun": Row(
        lambda r: header(
            r / "base" / ONE, lambda e: first(e).update(shape=[4000], data_offsets=[0, 8000])
        ),
        "overlaps",
        "damaged",
    ),
    "offsets that overlap": Row(
        lambda r: header(
            r / "base" / ONE, lambda e: first(e).update(shape=[1], data_offsets=[0, 2])
        ),
        "leaves a gap",
        "damaged",
    ),
    "unknown dtype": Row(
        lambda r: header(r / "base" / ONE, lambda e: first(e).update(dtype="F31")),
        "unknown dtype `F31`, expected one of",
        "dama",
    ),
    "a dtype that safetensors has no code for": Row(
        lambda r: header(r / "base" / ONE, lambda e: first(e).update(dtype="C32")),
        "unknown dtype `C32`, expected one of",
        "dama",
    ),
    "index that lies": Row(
        lambda r: index(r / "base", lambda m: m.update({"b.one": ONE})),
        f"`b.one` should be in {ONE}",
        "fetch both again",
    ),
    "index that leaves the folder": Row(
        lambda r: index(r / "base", lambda m: m.update({"b.one": "../x.safetensors"})),
        "expected the plain name",
        "do not trust",
    ),
    "pickles only": Row(
        lambda r: pickled(r / "base"),
        "weights are pickle files only (pytorch_model.bin)",
        "save_pretrained(",
    ),
    "fp8": quantised("fp8"),
    "GPTQ": quantised("gptq"),
    "AWQ": quantised("awq"),
    "bitsandbytes": quantised("bitsandbytes"),
    "compressed-tensors": quantised("compressed-tensors"),
    "mxfp4": quantised("mxfp4"),
    "rope theta": changes_the_function("rope_parameters.rope_theta", rope_theta=500000.0),
    "head counts": changes_the_function(
        "num_attention_heads", num_attention_heads=4, head_dim=8, num_key_value_heads=2
    ),
    "activation": changes_the_function("hidden_act", hidden_act="gelu"),
    "token ids that mean different tokens": Row(
        lambda r: tokenizer(r / "instruct", {"<unk>": 0, "<s>": 1, "[INST]": 2, "a": 3, "b": 4}),
        "2 tokens have different ids: `a` is id 2 in base and 3 in instruct",
        "share one vocabulary",
    ),
    "a shifted vocabulary with extra rows": Row(
        lambda r: (
            grow(r / "instruct"),
            tokenizer(r / "instruct", {"<unk>": 0, "<s>": 1, "[INST]": 2, "a": 3, "b": 4}),
        ),
        "2 tokens have different ids",
        "share one vocabulary",
    ),
    "extra rows without a tokenizer": Row(
        lambda r: (grow(r / "instruct"), (r / "base" / "tokenizer.json").unlink()),
        "ids cannot be compared",
        "save_pretrained",
    ),
    "extra rows that are refused": Row(
        lambda r: grow(r / "instruct"),
        "40 vocabulary rows in base and 48 in instruct",
        "--extra-rows instruct",
        ("inspect", "merge", "sweep"),
        ("--extra-rows", "refuse"),
    ),
    "name on one side only": Row(
        lambda r: tensors(r / "instruct", lambda t: t.pop("a.odd")),
        "lacks `a.odd`, which only base",
        "--one-sided",
        NAMES,
    ),
    "shape mismatch": Row(
        lambda r: tensors(
            r / "instruct", lambda t: t.update({"a.odd": torch.zeros(7, 33).bfloat16()})
        ),
        "tensor `a.odd`: shape [7, 11, 3] in base and [7, 33] in instruct",
        "not base and",
        NAMES,
    ),
    "head tied against its configuration": Row(
        lambda r: tensors(
            r / "instruct", lambda t: t.update({"lm_head.weight": torch.zeros(40, 16).bfloat16()})
        ),
        "lacks `lm_head.weight`, and its config.json does not tie it",
        "complete the download",
        NAMES,
    ),
    "not enough disk": Row(
        lambda r: None,
        " MB, 1 kB are free on its disk",
        "free some space",
        ("merge on a full disk",),
    ),
    "output folder not empty": Row(
        lambda r: ((r / "out").mkdir(), (r / "out" / "mine").touch()),
        "not empty: found mine",
        "choose another --out",
        ("merge",),
    ),
    "output inside a source": Row(
        lambda r: shutil.move(r / "base", r / "out"),
        "is, holds or lies in the source",
        "choose another --out",
        ("merge moved",),
    ),
    "non-finite weights": Row(
        lambda r: tensors(r / "base", lambda t: t["a.odd"].view(-1)[5].fill_(float("nan"))),
        "tensor `a.odd` of base has non-finite weights",
        "--allow-nonfinite",
        ("merge",),
    ),
    "merged weights that overflow": Row(
        lambda r: tensors(r / "base", lambda t: t["a.odd"].fill_(1e30)),
        "merged weights do not fit into float16",
        "larger range",
        ("merge",),
        ("--dtype", "float16"),
    ),
    "unequal integer tensors": Row(
        lambda r: [
            tensors(r / s, lambda t, n=n: t.update(ids=torch.tensor([n])))
            for n, s in enumerate(("base", "instruct"))
        ],
        "tensor `ids` of I64 differs between base and instruct, expected equal values",
        "a pair that agrees",
        ("merge",),
    ),
    "a file that changes underneath": Row(
        during(lambda r: rewrite(r / "base" / ONE, lambda d: d)),
        f"{CHANGED}: written to",
        "something writes",
        ("merge",),
    ),
    "a file that shrinks underneath": Row(
        during(lambda r: os.truncate(r / "instruct" / "model.safetensors", 100)),
        CHANGED,
        "something writes",
        ("merge",),
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A good pair, base in two files, and a merge of it in `good`."""
    base, instruct = random_tensors(torch.bfloat16, 1), random_tensors(torch.bfloat16, 2)
    vocabulary = {"model": {"vocab": TOKENS}}
    write_checkpoint(tmp_path / "base", base, shards=2, tokenizer=vocabulary)
    write_checkpoint(tmp_path / "instruct", instruct, tokenizer=vocabulary)
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    return tmp_path


def command(verb: str, root: Path) -> list[str]:
    pair, base = [str(root / "base"), str(root / "instruct")], root / "base"
    return {
        "inspect": ["inspect", *pair],
        "merge": ["merge", *pair, "--lambda", "0.3", "--out", str(root / "out")],
        "merge on a full disk": ["merge", *pair, "--lambda", "0.3", "--out", str(root / "out")],
        "merge moved": [
            "merge",
            str(root / "out"),
            pair[1],
            "--lambda",
            "0.3",
            "--out",
            str(root / "out"),
            "--overwrite",
        ],
        "verify": ["verify", str(root / "merged"), *pair, "--lambda", "0.3"],
        "sweep": [
            "sweep",
            *pair,
            "--lambdas",
            "0.3",
            "--eval",
            f"perplexity:{base.parent / 'text.txt'}",
            "--out",
            str(root / "out"),
        ],
    }[verb]


@pytest.mark.parametrize(
    ("case", "verb"), [(case, verb) for case, row in TABLE.items() for verb in row.verbs]
)
def test_refused(
    case: str,
    verb: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = TABLE[case]
    if verb == "verify":
        shutil.copytree(root / "instruct", root / "merged")
    if verb == "merge on a full disk":
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
        )
    later = row.break_(root)
    if callable(later):
        enter = OutputFolder.__enter__
        monkeypatch.setattr(OutputFolder, "__enter__", lambda self: (enter(self), later())[0])
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["pa-fast", *command(verb, root), *row.options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code == 1 and shown.out == ""
    assert (
        shown.err.startswith("error: ")
        and shown.err.count("\n\nhint: ") == 1
        and "Traceback" not in shown.err
    )
    message, hint = shown.err.split("\n\nhint: ")
    assert row.message in message and row.hint in hint
    left = {path for path in root.rglob("*") if path.is_file()} - {root / ".out.pa_fast.lock"}
    assert left == set(before), "nothing half-written is left, and nothing of the user's is gone"


@pytest.mark.parametrize("verb", ["inspect", "merge"])
def test_the_good_pair_that_the_rows_start_from_passes(
    verb: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pa-fast", *command(verb, root)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
