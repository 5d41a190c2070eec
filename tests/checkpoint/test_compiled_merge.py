"""Merges by compiled loops: the files of torch's way, byte for byte, sums included."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_kernels import compiled, dense
from torch import Tensor

from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.streaming import CHUNK_ELEMENTS
from pa_fast.checkpoint.verify import verify
from pa_fast.errors import DataError
from tests.checkpoint.pairs import write_checkpoint

pytest.importorskip("numba", reason="numba is not installed")

merging = importlib.import_module("pa_fast.checkpoint.merge")


def sides(dtypes: tuple[torch.dtype, torch.dtype]) -> list[dict[str, Tensor]]:
    """Tensors of several chunks, of one, of an odd few, and of none."""
    g = torch.Generator().manual_seed(4)
    shapes = {"a.weight": (CHUNK_ELEMENTS + 16_387,), "b.weight": (64, 33), "c": (3,), "d": (0, 4)}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    near = {name: t + 0.02 * torch.randn(t.shape, generator=g) for name, t in base.items()}
    for tensors in (base, near):
        tensors["b.weight"][0, :4] = torch.tensor([-0.0, 0.0, 1e-40, 3.0])
    return [
        {name: t.to(dtype) for name, t in tensors.items()}
        for tensors, dtype in zip((base, near), dtypes)
    ]


def write(root: Path, tensors: list[dict[str, Tensor]]) -> list[Path]:
    return [
        write_checkpoint(root / name, side, 1) for name, side in zip(("base", "instruct"), tensors)
    ]


BF16 = (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("lam", "dtypes", "options"),
    [
        (0.3, BF16, {}),
        ("2/3", BF16, {}),
        (-0.7, BF16, {}),
        (0, BF16, {}),
        (1, BF16, {}),
        (0.3, (torch.float32, torch.bfloat16), {}),
        (0.3, (torch.float16, torch.float16), {}),
        (0.3, BF16, {"rounding": "stochastic", "seed": 3}),
        (0.3, BF16, {"dtype": "float32"}),
        (0.3, BF16, {"rule": [{"match": "b.*", "lambda": 1}, {"match": "*", "times": 0.5}]}),
    ],
    ids=str,
)
def test_they_write_the_files_of_torchs_way(
    lam: Any,
    dtypes: tuple[torch.dtype, torch.dtype],
    options: dict[str, Any],
    ready: list[compiled.Loops],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = write(tmp_path, sides(dtypes))
    written: list[int] = []
    loop = dense.lerp_summed_

    def counted(*args: Any) -> Any:
        summed = loop(*args)
        written.extend([] if summed is None else [args[0].numel()])
        return summed

    monkeypatch.setattr(dense, "lerp_summed_", counted)
    out = tmp_path / "out"
    merge(*pair, lam, out, **options)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not ready and not written
    monkeypatch.setattr(merging, "_PASSES", 1)
    monkeypatch.setattr(compiled, "WORTH_BYTES", 1)
    merge(*pair, lam, out, overwrite=True, **options)
    assert ready
    plain = dtypes == BF16 and not {"rounding", "dtype"} & options.keys() and lam not in (0, 1)
    # a tensor that the rule leaves at λ = 1 is copied
    expected = {CHUNK_ELEMENTS, 16_387, 3, *([] if "rule" in options else [64 * 33])}
    assert {*written} - {0} == (expected if plain else set())
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    for _ in range(2):
        assert verify(out, *pair).ok
        ready.clear()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_or_written_by_torch(
    value: float, ready: list[compiled.Loops], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, near = sides(BF16)
    near["b.weight"][3, 2] = value
    pair = write(tmp_path, [base, near])
    out = tmp_path / "out"
    merge(*pair, 0.3, out, allow_nonfinite=True)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(merging, "_PASSES", 1)
    monkeypatch.setattr(compiled, "WORTH_BYTES", 1)
    with pytest.raises(DataError, match=r"b\.weight.* of instruct has non-finite weights"):
        merge(*pair, 0.3, tmp_path / "refused")
    merge(*pair, 0.3, out, overwrite=True, allow_nonfinite=True)
    assert ready and files == {path.name: path.read_bytes() for path in out.iterdir()}
