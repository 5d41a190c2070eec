"""Live weights that are rounded stochastically: the reference's bits, the merge's bits, and what is
refused."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest
import torch
from pa_kernels import reference
from pa_kernels.reference import Draw

import pa_fast
from pa_fast import LambdaRule
from pa_fast.errors import UsageError
from pa_fast.live.binding import as_integers
from tests.checkpoint.pairs import load_folder, write_checkpoint

Tensors = dict[str, torch.Tensor]


def two(dtype: torch.dtype = torch.bfloat16, delta: float = 0.02) -> tuple[Tensors, Tensors]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (37, 16),
        "layers.0.mlp.weight": (1300, 333),
        "norm.weight": (7,),
        "none": (0, 4),
    }
    b = {name: torch.randn(shape, generator=g).mul(0.02) for name, shape in shapes.items()}
    i = {
        name: (t + delta * 0.02 * torch.randn(t.shape, generator=g)).to(dtype)
        for name, t in b.items()
    }
    return {name: t.to(dtype) for name, t in b.items()}, i


def bound(b: Tensors, i: Tensors, **options: object) -> tuple[Tensors, pa_fast.LiveWeights]:
    w = {name: torch.empty_like(t) for name, t in i.items()}
    return w, pa_fast.LiveWeights.bind(w, b, i, rounding="stochastic", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_every_lambda_is_the_reference_after_any_history(dtype: torch.dtype) -> None:
    b, i = two(dtype)
    w, weights = bound(b, i, seed=7)
    assert str(weights.rounding) == "stochastic, seed 7"
    draw = random.Random(0)
    for _ in range(5):
        weights.set_lambda(draw.uniform(-2, 3))
    for lam in (0, 0.05, 0.5, 1 / 3, 1, -0.2):
        weights.set_lambda(lam)
        for name in b:
            noise = Draw(zlib.crc32(name.encode()) ^ 7)
            assert torch.equal(
                as_integers(w[name]), as_integers(reference.lerp(b[name], i[name], lam, draw=noise))
            ), (name, lam)
        assert weights.verify()
        if lam in (0, 1):
            assert all(torch.equal(as_integers(w[n]), as_integers((i if lam else b)[n])) for n in w)


def test_effective_lambda_is_lambda() -> None:
    b, i = two()
    _, weights = bound(b, i)
    nearest = pa_fast.LiveWeights.bind({n: torch.empty_like(t) for n, t in i.items()}, b, i)
    for lam in (0.05, 0.9):
        weights.set_lambda(lam)
        nearest.set_lambda(lam)
        assert (
            abs(weights.effective_lambda() - lam)
            <= 0.002
            < 0.01
            < abs(nearest.effective_lambda() - lam)
        )


@pytest.mark.parametrize(
    "rule", [None, LambdaRule([{"group": "mlp", "times": 0.5}])], ids=["scalar", "rule"]
)
def test_live_weights_are_the_merge_bit_for_bit(tmp_path: Path, rule: LambdaRule | None) -> None:
    b, i = two()
    folders = write_checkpoint(tmp_path / "base", b), write_checkpoint(tmp_path / "instruct", i)
    w, weights = bound(b, i, seed=3)
    weights.follow(rule)
    for lam in ("0.05", "0.3"):
        weights.set_lambda(pa_fast.Lambda(lam))
        pa_fast.merge(*folders, lam, tmp_path / lam, rounding="stochastic", seed=3, rule=rule)
        merged = load_folder(tmp_path / lam)
        assert all(torch.equal(as_integers(w[name]), as_integers(merged[name])) for name in w)


def test_a_foreign_write_is_found_and_mended() -> None:
    b, i = two()
    w, weights = bound(b, i)
    weights.set_lambda(0.05)
    before = weights.checksum()
    w["layers.0.mlp.weight"][1299, 332] += 1
    assert weights.changed() == ["layers.0.mlp.weight"]
    weights.set_lambda(0.05)
    assert weights.checksum() == before and weights.verify()


def test_noise_goes_by_seed_and_by_the_checkpoints_name() -> None:
    b, i = two()
    w, weights = bound(b, i, seed=1)
    v, others = bound(b, i, seed=2)
    u, renamed = bound(
        b,
        i,
        seed=1,
        checkpoint_names={"norm.weight": ["embed.weight"], "embed.weight": ["embed.weight"]},
    )
    for each in (weights, others, renamed):
        each.set_lambda(0.3)
    same = {
        name: (torch.equal(w[name], v[name]), torch.equal(w[name], u[name]))
        for name in w
        if w[name].numel()
    }
    assert same == {
        "embed.weight": (False, True),
        "layers.0.mlp.weight": (False, True),
        "norm.weight": (False, False),
    }


def test_what_cannot_be_rounded_so_is_refused() -> None:
    b, i = two()
    w = {name: torch.empty_like(t) for name, t in i.items()}
    for store in ("sparse", "lowrank"):
        with pytest.raises(
            UsageError, match=f"stochastic rounding of a delta that is held as `{store}"
        ):
            pa_fast.LiveWeights.bind(w, b, i, store, "stochastic")
    for seed in (-1, 2**32, 0.5, True):
        with pytest.raises(UsageError, match="seed"):
            pa_fast.LiveWeights.bind(w, b, i, rounding="stochastic", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="seed 3 with rounding `nearest`"):
        pa_fast.LiveWeights.bind(w, b, i, seed=3)
    for side in (w, b, i):
        side["head"] = side["embed.weight"]
    with pytest.raises(UsageError, match=r"`embed\.weight` and `head` in the checkpoint"):
        pa_fast.LiveWeights.bind(w, b, i, rounding="stochastic")
    weights = pa_fast.LiveWeights.bind(
        w, b, i, rounding="stochastic", checkpoint_names={"head": ["embed.weight"]}
    )
    weights.set_lambda(0.4)
    noise = Draw(zlib.crc32(b"embed.weight"))
    assert torch.equal(w["head"], reference.lerp(b["head"], i["head"], 0.4, draw=noise))
