"""What a merge takes along beside the weights, and what its model card tells the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import pa_fast
from pa_fast.checkpoint.folder import check_companions, resolve
from pa_fast.errors import CheckpointError
from tests.checkpoint.pairs import random_tensors, write_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = random_tensors(torch.bfloat16)
    instruct = random_tensors(torch.bfloat16, 1, base)
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(
        tmp_path / "instruct", instruct
    )


def base_models(card: Path) -> list[str]:
    named = ModelCard.load(card / "README.md").data.to_dict().get("base_model") or []
    return [named] if isinstance(named, str) else list(named)


def test_named_templates_and_every_tokenizer_file_are_kept(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, instruct = pair
    files = {
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
        "chat_template.jinja": "{{ messages }}",
        "vocab.bpe": "a b",
        "source.spm": "s",
        "spiece.model": "m",
    }
    for name, text in files.items():
        (instruct / name).parent.mkdir(exist_ok=True)
        (instruct / name).write_text(text)
    pa_fast.merge(base, instruct, lam=0.5, out=tmp_path / "out")
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert set(files) <= set(json.loads((tmp_path / "out" / "pa_fast.json").read_text())["files"])
    pa_fast.merge(base, instruct, lam=0.4, out=tmp_path / "out", overwrite=True)


def test_a_download_takes_named_templates_too(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fnmatch

    import huggingface_hub

    remote = [
        "config.json",
        "vocab.bpe",
        "x.spm",
        "additional_chat_templates/tool.jinja",
        "onnx/model.json",
        "original/t.model",
    ]
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("1" * 40)
    got: set[str] = set()

    def snapshot_download(
        name: str,
        revision: str | None = None,
        allow_patterns: tuple[str, ...] = (),
        ignore_patterns: tuple[str, ...] = (),
    ) -> str:
        assert revision in (None, "1" * 40)
        for file in remote:
            wanted = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                got.add(file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("acme/tiny") == snapshot
    assert got == set(remote[:4])


def test_files_of_an_adapter_are_never_taken_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, instruct = pair
    (instruct / "adapter_model.safetensors").write_bytes(b"x")
    (instruct / "adapter_notes.txt").write_text("x")
    pa_fast.merge(base, instruct, lam=0.5, out=tmp_path / "out")
    assert not [
        path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("adapter")
    ]


def test_a_tokenizer_file_that_is_a_git_lfs_pointer_is_refused_before_anything_is_written(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, instruct = pair
    (instruct / "spiece.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 500000\n"
    )
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        check_companions(instruct)
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        pa_fast.merge(base, instruct, lam=0.5, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "instruct"]


def test_the_model_card_of_local_folders_names_no_base_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, instruct = pair
    pa_fast.merge(base, instruct, lam=0.5, out=tmp_path / "out")
    assert base_models(tmp_path / "out") == []
    assert str(base) in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_of_hub_models_names_their_ids(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    places = []
    for number, folder in enumerate(pair):
        place = tmp_path / f"models--acme--tiny.{number}-B" / "snapshots" / (str(number) * 40)
        place.parent.mkdir(parents=True)
        shutil.move(folder, place)
        places.append(place)
    pa_fast.merge(*places, lam=0.5, out=tmp_path / "out")
    assert base_models(tmp_path / "out") == ["acme/tiny.0-B", "acme/tiny.1-B"]
    for name in base_models(tmp_path / "out"):
        validate_repo_id(name)
