"""What has not been shown to follow λ is refused, by name, before the first λ."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
from pa_fast.errors import EngineError, MissingExtra, PairError, UsageError
from tests.vllm import pairs
from tests.vllm.answers import answers
from tests.vllm.conftest import OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp8"}, "quantised weights"),
        ({"enable_lora": True, "max_lora_rank": 8}, "LoRA"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode=raw_logits"),
        ({"runner": "pooling"}, "another task than generation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_is_refused_before_vllm_starts(
    options: dict[str, Any],
    message: str,
    pair: tuple[str, str],
    engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm

    def start(**_: Any) -> None:
        raise AssertionError("vLLM was started")

    monkeypatch.setattr(vllm, "LLM", start)
    with pytest.raises(EngineError, match=message):
        engine(*pair, **options)


@pytest.mark.parametrize("name", ["mixtral"])
def test_experts_on_a_cpu(name: str, folders: pathlib.Path, engine: Callable[..., Any]) -> None:
    with pytest.raises(EngineError) as refused:
        engine(*pairs.made(folders, name))
    print(refused.value)
    assert "expert" in str(refused.value)


def test_latent_attention(folders: pathlib.Path, engine: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="multi-head latent attention"):
        engine(*pairs.made(folders, "deepseek"))


def test_files_of_another_dtype(folders: pathlib.Path, engine: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="is F32 in its file, and vLLM computes in bfloat16"):
        engine(*pairs.made(folders, "llama", "float32"), dtype="bfloat16")


def test_one_file_of_another_dtype(
    pair: tuple[str, str], tmp_path: pathlib.Path, engine: Callable[..., Any]
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "base"
    shutil.copytree(pair[0], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"`model.norm.weight` of base is F32"):
        engine(str(other), pair[1])


def test_a_head_that_vllm_would_tie_again(
    folders: pathlib.Path, tmp_path: pathlib.Path, engine: Callable[..., Any], fresh: Any
) -> None:
    """A base that says tied and stores an equal head, beside an instruct with another head: right,
    or refused."""
    from safetensors.torch import load_file, save_file

    base, instruct = pairs.made(folders, "llama")
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    try:
        lm = engine(str(other), instruct)
    except (EngineError, PairError) as refused:
        assert "head" in str(refused) or "tie" in str(refused)
        return
    pa_fast.merge(str(other), instruct, 0.3, tmp_path / "merged")
    lm.set_lambda(0.3)
    assert answers(lm.llm) == fresh({"0.3": str(tmp_path / "merged")})["0.3"]


def test_an_engine_without_the_extension(pair: tuple[str, str]) -> None:
    """In a process of its own: vLLM mixes an extension into its worker class for good."""
    code = (
        "import json, sys; import pa_fast.vllm; from vllm import LLM\n"
        "pair, options = json.loads(sys.argv[1])\n"
        "llm = LLM(pair[1], **options)\n"
        "for sides in (pair, pair[::-1]):\n"
        "    try: pa_fast.vllm.attach(llm, *sides)\n"
        "    except pa_fast.PaFastError as error: print('REFUSED', error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([pair, OPTIONS])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 2, done.stderr[-2000:]
    assert "no worker extension" in refused[0] and "was started on" in refused[1]


def test_a_pair_without_a_tokenizer(
    pair: tuple[str, str], tmp_path: pathlib.Path, engine: Callable[..., Any]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pair[1], bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(EngineError, match="bare has no tokenizer files"):
        engine(pair[0], str(bare))


def test_arguments_of_pa_fast(pair: tuple[str, str], engine: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="`load_format` of vLLM is set by pa_fast"):
        engine(*pair, load_format="auto")
    with pytest.raises(UsageError, match="vLLM has no argument `max_modellen`") as raised:
        engine(*pair, max_modellen=1)
    assert raised.value.hint == "did you mean max_model_len?"
    with pytest.raises(UsageError, match="would run code of the checkpoint"):
        engine(*pair, trust_remote_code=True)
    with pytest.raises(UsageError, match="vLLM needs the instruct folder"):
        engine(pair[0], None)
    with pytest.raises(EngineError, match=r"vLLM cannot start: ValidationError: .*99999"):
        engine(*pair, max_model_len=99999)
    with pytest.raises(UsageError, match="lowrank"):
        engine(*pair, store="lowrank")


def test_a_missing_vllm_is_said(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import pa_fast.vllm

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match="vLLM is not installed"):
        pa_fast.vllm.load(*pair)
