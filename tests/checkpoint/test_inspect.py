"""The report on a pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pa_fast.checkpoint.inspect import inspect
from pa_fast.checkpoint.safetensors import WeightFile
from pa_fast.errors import CheckpointError
from tests.checkpoint.pairs import CONFIG, SHAPES, random_tensors, write_checkpoint, write_pair


def test_report(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path, torch.float32, torch.bfloat16, shards=(2, 3))
    found = inspect(base, instruct)
    parameters = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert (found.tensors, found.parameters, found.model_type, found.tied) == (
        len(SHAPES),
        parameters,
        "llama",
        False,
    )
    assert (found.base.bytes, found.instruct.bytes) == (4 * parameters, 2 * parameters)
    assert (found.base.shards, found.instruct.shards) == (2, 3)
    assert found.base.dtypes == {"F32": len(SHAPES)} and found.live_dtypes == {"BF16": len(SHAPES)}
    assert found.base.quick_fingerprint is None and found.measured is None, (
        "those cost reads of weights"
    )
    assert "token ids were not compared" in found.notes[-1]
    assert json.loads(found.to_json())["instruct"]["bytes"] == 2 * parameters


def test_json_tells_what_is_harmless_from_what_was_ignored_on_request(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    base = write_checkpoint(tmp_path / "b", tensors, config=CONFIG)
    other = {**CONFIG, "rms_norm_eps": 0.5, "use_cache": True}
    instruct = write_checkpoint(tmp_path / "i", tensors, config=other)
    found = json.loads(inspect(base, instruct, ignore_config=["rms_norm_eps"]).to_json())
    told = {one["key"]: (one["harmless"], one["ignored"]) for one in found["differences"]}
    assert told == {"rms_norm_eps": (False, True), "use_cache": (True, False)}


def test_it_loads_no_torch(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path)
    code = (
        f"import sys; from pa_fast.checkpoint.inspect import inspect; inspect({str(base)!r},"
        f" {str(instruct)!r}); "
    )
    code += "print({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "set()", done.stderr


def test_it_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path)

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(WeightFile, "sample", read)
    monkeypatch.setattr(WeightFile, "view", read)
    assert inspect(*pair).tensors == len(SHAPES)
    with pytest.raises(AssertionError, match="weights were read"):
        inspect(*pair, sample=True)


def test_a_head_tied_on_one_side_and_extra_rows(tmp_path: Path) -> None:
    base, instruct = random_tensors(torch.bfloat16), random_tensors(torch.bfloat16)
    instruct["model.embed_tokens.weight"] = torch.ones(48, 16).bfloat16()
    instruct["lm_head.weight"] = torch.ones(48, 16).bfloat16()
    tokenizer = {"model": {"vocab": {"a": 0}}}
    left = write_checkpoint(
        tmp_path / "b", base, config={**CONFIG, "tie_word_embeddings": True}, tokenizer=tokenizer
    )
    right = write_checkpoint(
        tmp_path / "i", instruct, config={**CONFIG, "vocab_size": 48}, tokenizer=tokenizer
    )
    found = inspect(left, right, full=True)
    assert found.tied is False and found.tensors == len(SHAPES) + 1
    assert found.parameters == sum(t.numel() for t in instruct.values())
    assert (
        found.measured
        and {p.name: p.parameters for p in found.measured.tensors}["lm_head.weight"] == 640
    ), "common rows"
    assert [note for note in found.notes if "rows 40 to 47" in note and "lm_head.weight" in note]


def test_a_path_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="neither a local folder nor a hub id"):
        inspect(tmp_path / "nothing", tmp_path)


def test_a_hub_id_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = {}

    def refuse(name: str, **options: object) -> str:
        asked.update(options, name=name)
        raise OSError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        CheckpointError, match=r"org/model@main: cannot be fetched from the hub: offline"
    ) as error:
        inspect("org/model@main", tmp_path)
    assert "HF_HUB_OFFLINE" in str(error.value.hint)
    assert (asked["name"], asked["revision"]) == ("org/model", "main") and "*.bin" not in str(
        asked["allow_patterns"]
    )


def test_a_hub_id_is_read_from_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    base, instruct = write_pair(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(base))
    assert inspect("org/model", instruct).base.folder == str(base)


@pytest.mark.parametrize(
    "place",
    ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"],
)
def test_a_template_of_the_base_alone_means_swapped_sides(place: str, tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path)
    assert not [note for note in inspect(base, instruct).notes if "sides swapped" in note]
    (instruct / place).parent.mkdir(exist_ok=True)
    (instruct / place).write_text(json.dumps({"chat_template": "{{ m }}"}))
    assert not [note for note in inspect(base, instruct).notes if "sides swapped" in note]
    (note,) = [note for note in inspect(instruct, base).notes if "sides swapped" in note]
    assert note.startswith("only the base has a chat template") and f"λ = 0 is {instruct}" in note
