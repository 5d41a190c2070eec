"""Code inside a checkpoint: no way of naming it gets it run, and nobody is asked."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pathlib
import shutil
from typing import Any

import pytest

import pa_fast
from pa_fast.errors import EngineError
from tests import patience, programs
from tests.engines.architectures import write_pair

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "demo" / "pair" / "instruct"
MODULE = (
    "import pathlib; pathlib.Path(__file__).with_name('RAN').touch(); open({mark!r},"
    " 'w').close()\nclass Evil: pass\n"
)
NAMED = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}
ATTACKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a tokenizer's auto_map": (
        {"model_type": "evil"},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
        "tokenizer_config.json: `auto_map` names code of its own, `evil.Evil` as AutoTokenizer",
    ),
    "an Auto class as architecture": (
        {"model_type": "evil", "architectures": ["AutoModelForCausalLM"], "auto_map": NAMED},
        {},
        "has no model class `AutoModelForCausalLM`",
    ),
    "a class of its own": (
        {"model_type": "evil", "architectures": ["EvilForCausalLM"], "auto_map": NAMED},
        {},
        "`auto_map` there names code of its own, such as `evil.Evil`",
    ),
    "no architecture": (
        {"model_type": "evil", "architectures": None, "auto_map": NAMED},
        {},
        "config.json: `auto_map` names code of its own, `evil.Evil`",
    ),
    "a function as architecture": (
        {"architectures": ["pipeline"]},
        {},
        "has no model class `pipeline`",
    ),
    "a number as architecture": ({"architectures": [5]}, {}, "has no model class `5`"),
    "kernels of the hub": (
        {"attn_implementation": "evil/kernels"},
        {},
        "asks for kernels of the hub, `evil/kernels`",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("good")
    for folder in write_pair(root, "llama"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, folder)
    return root


def planted(good: pathlib.Path, root: pathlib.Path, attack: str) -> pathlib.Path:
    """A pair at `root` whose sides name a module that leaves `root`/RAN behind when it runs."""
    config, tokenizer, _ = ATTACKS[attack]
    shutil.copytree(good, root)
    for side in ("base", "instruct"):
        (root / side / "evil.py").write_text(MODULE.format(mark=str(root / "RAN")))
        for file, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            path = root / side / file
            path.write_text(
                json.dumps(
                    {
                        k: v
                        for k, v in {**json.loads(path.read_text()), **changes}.items()
                        if v is not None
                    }
                )
            )
    return root


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_refused_by_the_file_that_names_it(
    attack: str, good: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    root = planted(good, tmp_path / "pair", attack)
    with pytest.raises(EngineError) as error:
        pa_fast.load(root / "base", root / "instruct")
    assert (
        ATTACKS[attack][2] in error.value.message
        and str(root) in error.value.message
        and error.value.hint
    )
    assert not asked and not (root / "RAN").exists()


def answering(answers: str, roots: list[pathlib.Path]) -> None:
    """Load the pairs of `roots` with `answers` on standard input."""
    os.dup2(os.open(answers, os.O_RDONLY), 0)
    for root in roots:
        try:
            pa_fast.load(root / "base", root / "instruct")
        except EngineError as error:
            print("refused:", error.message)


def test_a_yes_on_stdin_runs_nothing(good: pathlib.Path, tmp_path: pathlib.Path) -> None:
    roots = [planted(good, tmp_path / str(at), attack) for at, attack in enumerate(ATTACKS)]
    (tmp_path / "answers").write_text("y\n" * 50)
    process = programs.Program(answering, str(tmp_path / "answers"), roots, folder=tmp_path)
    out, errors = patience.communicate(process)
    assert out.count("refused:") == len(roots), out + errors
    assert "Do you wish to run" not in out + errors
    assert not list(tmp_path.rglob("RAN"))


def test_every_call_says_that_no_code_is_trusted() -> None:
    calls = []
    for path in sorted(
        p for part in ("pa_fast", "bench", "examples") for p in (ROOT / part).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "from_pretrained",
                "from_config",
            ):
                said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                calls.append(
                    (
                        f"{path.relative_to(ROOT)}:{node.lineno}",
                        isinstance(said, ast.Constant) and said.value is False,
                    )
                )
    assert len(calls) >= 8
    assert [where for where, right in calls if not right] == []


def test_every_call_that_is_made_trusts_no_code(
    good: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    said: list[Any] = []

    def count(kind: Any, method: str) -> None:
        call = getattr(kind, method).__func__

        def counted(cls: Any, *args: Any, **options: Any) -> Any:
            said.append(options.get("trust_remote_code"))
            return call(cls, *args, **options)

        monkeypatch.setattr(kind, method, classmethod(counted))

    for name in (
        "AutoConfig",
        "AutoTokenizer",
        "AutoProcessor",
        "AutoModelForCausalLM",
        "PreTrainedModel",
    ):
        for method in ("from_pretrained", "from_config"):
            if hasattr(getattr(transformers, name), method):
                count(getattr(transformers, name), method)
    lm = pa_fast.load(good / "base", good / "instruct")
    assert len(said) >= 3
    if importlib.util.find_spec("lm_eval"):
        from pa_fast.evals.lm_eval import PaFastLM

        PaFastLM(lm, bars=False)
    assert set(said) == {False}
