"""Is this checkpoint that merge? The answer must be no whenever a bit says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.verify import verify
from pa_fast.cli import app
from pa_fast.errors import CheckpointError, DataError, UsageError
from tests.checkpoint.pairs import load_folder, random_tensors, write_checkpoint, write_pair


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path, Path]:
    pair = write_pair(tmp_path, shards=(1, 2))
    merge(*pair, "0.3", tmp_path / "out")
    return tmp_path / "out", *pair


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_wrong_bit_is_found_and_named(merged: tuple[Path, Path, Path]) -> None:
    tensors = load_folder(merged[0])
    tensors["a.odd"].view(torch.int16)[2, 3, 1] ^= 1
    rewrite(merged[0], tensors)
    report = verify(*merged)
    assert not report.ok
    (found,) = report.differences
    assert (found.name, found.reason, found.differing, found.count) == (
        "a.odd",
        "bits differ",
        1,
        7 * 11 * 3,
    )


def test_minus_zero_is_not_zero_and_a_nan_is_itself(tmp_path: Path) -> None:
    weights = torch.tensor([0.0, float("nan"), 1.0]).bfloat16()
    pair = (
        write_checkpoint(tmp_path / "base", {"w": weights}),
        write_checkpoint(tmp_path / "instruct", {"w": weights}),
    )
    merge(*pair, 0.5, tmp_path / "out", allow_nonfinite=True)
    assert verify(tmp_path / "out", *pair).ok
    weights[0] = -0.0
    rewrite(tmp_path / "out", {"w": weights})
    assert verify(tmp_path / "out", *pair).differences[0].differing == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_nan_carries_is_open_and_that_it_is_one_is_not(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = torch.tensor([1.0, float("nan"), 2.0], dtype=dtype)
    pair = (
        write_checkpoint(tmp_path / "base", {"w": weights}),
        write_checkpoint(tmp_path / "instruct", {"w": weights}),
    )
    merge(*pair, 0.5, tmp_path / "out", allow_nonfinite=True)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    weights.view(bits)[1] ^= 1  # another payload
    rewrite(tmp_path / "out", {"w": weights})
    assert verify(tmp_path / "out", *pair).ok
    weights[1] = float("inf")
    rewrite(tmp_path / "out", {"w": weights})
    assert verify(tmp_path / "out", *pair).differences[0].differing == 1


def test_another_lambda_is_another_merge(merged: tuple[Path, Path, Path]) -> None:
    report = verify(*merged, lam="0.4")
    assert not report.ok and report.lam == "0.4"
    assert "says λ = 0.3, compared with λ = 0.4" in report.notes[0]


def test_missing_and_extra_tensors(merged: tuple[Path, Path, Path]) -> None:
    tensors = load_folder(merged[0])
    del tensors["a.odd"]
    rewrite(merged[0], tensors | {"more": torch.zeros(2)})
    assert {(d.name, d.reason) for d in verify(*merged).differences} == {
        ("a.odd", "missing"),
        ("more", "not in the pair"),
    }


def test_dtype_and_shape(merged: tuple[Path, Path, Path]) -> None:
    tensors = load_folder(merged[0])
    tensors["a.odd"] = tensors["a.odd"].float()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(4, 4)
    rewrite(merged[0], tensors)
    reasons = {d.name: d.reason for d in verify(*merged).differences}
    assert reasons == {
        "a.odd": "dtype F32, expected BF16",
        "model.norm.weight": "shape [4, 4], expected [16]",
    }


def test_a_folder_without_provenance_needs_lambda(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, torch.float32, torch.bfloat16)
    merge(*pair, "0.3", tmp_path / "out", dtype="float16")
    (tmp_path / "out" / "pa_fast.json").unlink()
    with pytest.raises(UsageError, match=r"no pa_fast.json says which λ") as error:
        verify(tmp_path / "out", *pair)
    assert "--lambda" in str(error.value.hint)
    report = verify(tmp_path / "out", *pair, lam=0.3)
    assert report.ok and "compared in the dtypes" in report.notes[0]


def test_other_sources_are_noted(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", random_tensors(torch.bfloat16, seed=9))
    report = verify(merged[0], other, merged[2])
    assert not report.ok and "base is not the checkpoint that was merged" in report.notes[0]


EDITS: list[dict[str, object]] = [
    {"format": 99},
    {"rounding": "upwards"},
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "seed": -1},
    {"seed": 3},
    {"rule": {}},
    {"rule": [{"match": "*"}]},
    {"lambda": 0.3},
    {"lambda": "x"},
    {"base": {}},
]


@pytest.mark.parametrize("edit", EDITS)
def test_provenance_of_another_kind_is_refused(
    merged: tuple[Path, Path, Path], edit: dict[str, object]
) -> None:
    file = merged[0] / "pa_fast.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    with pytest.raises(
        CheckpointError, match=r"pa_fast.json: (expected format 1|rounding|seed|rule: |λ)"
    ):
        verify(*merged)


def test_progress(merged: tuple[Path, Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    verify(*merged, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


def test_swapped_sides_are_named(merged: tuple[Path, Path, Path]) -> None:
    out, base, instruct = merged
    report = verify(out, instruct, base)
    assert not report.ok and "base and instruct are swapped" in report.notes[0]
    assert not [note for note in verify(*merged).notes if "are swapped" in note]
    (instruct / "chat_template.jinja").write_text("{{ m }}")
    assert any(
        "only the base has a chat template" in note for note in verify(out, instruct, base).notes
    )


def test_the_command_says_swapped_sides_where_it_fails(merged: tuple[Path, Path, Path]) -> None:
    out, base, instruct = map(str, merged)
    result = CliRunner().invoke(app, ["verify", out, instruct, base])
    assert isinstance(result.exception, DataError)
    assert "note: base and instruct are swapped" in result.output
