"""Live weights under a λ rule: each tensor at its own λ, with one proof for all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pa_kernels import reference

import pa_fast
from pa_fast import LambdaRule, LiveWeights
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.live.encoding import encode
from pa_fast.stores.sparse import SparseStore

Tensors = dict[str, torch.Tensor]
NAMES = ("embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "layers.1.norm.weight")
RULE = LambdaRule([{"group": "norms", "lambda": 1}, {"group": "mlp", "times": {0: 0.5, 1: 1}}])


def three(names: tuple[str, ...] = NAMES) -> tuple[Tensors, Tensors, Tensors]:
    g = torch.Generator().manual_seed(0)
    b = {name: torch.randn(3000, generator=g).bfloat16() for name in names}
    i = {
        name: (t.float() + 0.05 * torch.randn(t.shape, generator=g)).bfloat16()
        for name, t in b.items()
    }
    return {name: torch.empty_like(t) for name, t in b.items()}, b, i


def assert_holds(w: Tensors, b: Tensors, i: Tensors, lams: dict[str, float]) -> None:
    for name in w:
        assert torch.equal(
            as_integers(w[name]), as_integers(reference.lerp(b[name], i[name], lams[name]))
        ), name


@pytest.mark.parametrize("store", ["dense", SparseStore()], ids=str)
def test_every_tensor_has_its_own_lambda_after_any_history(store: object) -> None:
    w, b, i = three()
    weights = pa_fast.LiveWeights.bind(w, b, i, store)  # type: ignore[arg-type]
    for lam in (0.7, RULE.at(0.2), 1.5, RULE.at(-1), RULE.at(0.6)):
        weights.set_lambda(lam)
    assert_holds(w, b, i, dict(zip(NAMES, (0.6, 0.3, 0.6, 1.0))))
    assert weights.lam == 0.6 and weights.rule == RULE.at(0.6) and weights.verify()
    assert "by a rule" in repr(weights)
    weights.set_lambda(0.6)
    assert_holds(w, b, i, dict.fromkeys(NAMES, 0.6))
    assert weights.rule is None and weights.verify()


def test_a_rule_that_is_followed_spreads_every_lambda() -> None:
    w, b, i = three()
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.set_lambda(0.4)
    weights.follow(RULE)
    assert_holds(w, b, i, dict(zip(NAMES, (0.4, 0.2, 0.4, 1.0))))
    weights.set_lambda("0.8")  # type: ignore[arg-type]
    assert_holds(w, b, i, dict(zip(NAMES, (0.8, 0.4, 0.8, 1.0))))
    weights.set_lambda(LambdaRule([{"match": "*", "lambda": 0}]))
    assert_holds(w, b, i, dict.fromkeys(NAMES, 0.0))
    with pytest.raises(UsageError, match="no tensor has a name"):
        weights.follow(LambdaRule([{"match": "head", "lambda": 0}]))
    weights.set_lambda(0.2)
    assert weights.rule == RULE.at(0.2)
    weights.follow(None)
    assert_holds(w, b, i, dict.fromkeys(NAMES, 0.2))


def test_a_refused_rule_leaves_everything_as_it_was() -> None:
    w, b, i = three()
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.set_lambda(RULE.at(0.3))
    with pytest.raises(UsageError, match="no tensor has a name"):
        weights.set_lambda(LambdaRule([{"match": "head", "lambda": 0}]))
    assert weights.lam == 0.3 and weights.rule == RULE.at(0.3) and weights.verify()


def test_the_sum_belongs_to_every_tensors_lambda() -> None:
    w, b, i = three()
    weights = pa_fast.LiveWeights.bind(w, b, i, SparseStore())
    sums = {}
    for lam in (
        0.6,
        RULE.at(0.6),
        0.6,
        RULE.at(0.6),
        LambdaRule([{"match": "*", "times": 1}]).at(0.6),
    ):
        weights.set_lambda(lam)
        held = None if weights.rule is None else tuple(weights.rule.resolve(NAMES).values())
        assert (
            sums.setdefault(held or (0.6,) * len(NAMES), weights.checksum()) == weights.checksum()
        )
        assert not weights.changed()
    assert len(set(sums.values())) == len(sums) == 2
    w["layers.1.norm.weight"][7] += 1
    weights.checksum()
    with pytest.raises(WeightsError, match=r"layers\.1\.norm"):
        weights.verify()
    weights.set_lambda(RULE.at(0.6))
    assert weights.verify()


def test_effective_lambda_is_the_weighted_mean_of_the_tensors() -> None:
    w, b, i = three()
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.set_lambda(RULE.at(0.6))
    squares = {n: float((i[n].double() - b[n].double()).square().sum()) for n in NAMES}
    mean = sum(lam * squares[n] for n, lam in zip(NAMES, (0.6, 0.3, 0.6, 1.0))) / sum(
        squares.values()
    )
    assert weights.intended_lambda() == pytest.approx(mean, rel=1e-5)
    assert weights.effective_lambda() == pytest.approx(mean, abs=0.01)
    weights.set_lambda(0.3)
    assert weights.intended_lambda() == 0.3
    same = pa_fast.LiveWeights.bind(w, b, {n: t.clone() for n, t in b.items()})
    same.set_lambda(RULE.at(0.5))
    assert math.isnan(same.intended_lambda()) and math.isnan(same.effective_lambda())


def test_a_packed_range_is_that_of_each_tensors_lambda_and_asking_writes_nothing() -> None:
    w, b, i = three()
    weights = pa_fast.LiveWeights.bind(w, b, i, "packed")
    rule = LambdaRule([{"match": "*", "times": 0.5}])
    weights.set_lambda(rule.at(1.5))
    weights.follow(rule)
    before = weights.checksum()
    for lam in (0, 1.5, 2, rule.at(0.7), RULE.at(1)):
        weights.check_lambda(lam)
    with pytest.raises(
        UsageError, match=r"^at λ = 2\.5 of the rule, λ = 1\.25 is outside \[0, 1\]"
    ):
        weights.check_lambda("2.5")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"at λ = -0\.2 of the rule, λ = -0\.1 is outside"):
        weights.check_lambda(rule.at(-0.2))
    assert weights.lam == 1.5 and weights.checksum() == before
    assert_holds(w, b, i, dict.fromkeys(NAMES, 0.75))


def test_names_are_those_of_the_checkpoint() -> None:
    w, b, i = three(("up", "down"))
    origins = {"up": ["layers.0.mlp.a", "layers.0.mlp.b"], "down": ["layers.0.mlp.c"]}
    weights = pa_fast.LiveWeights.bind(w, b, i, checkpoint_names=origins)
    weights.set_lambda(LambdaRule([{"match": ["*.a", "*.b"], "lambda": 0.25}]).at(0.5))
    assert_holds(w, b, i, {"up": 0.25, "down": 0.5})
    with pytest.raises(
        UsageError,
        match=r"`layers.0.mlp.a` has λ = 0.25 and `layers.0.mlp.b` λ = 0.5.*live tensor `up`",
    ):
        weights.set_lambda(LambdaRule([{"match": "*.a", "lambda": 0.25}]).at(0.5))
    with pytest.raises(UsageError, match="no tensor has a name like `up`"):
        weights.set_lambda(LambdaRule([{"match": "up", "lambda": 0.25}]))


def test_a_tied_tensor_cannot_have_two() -> None:
    w, b, i = three(("embed.weight",))
    for side in (w, b, i):
        side["lm_head.weight"] = side["embed.weight"]
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.set_lambda(LambdaRule([{"group": "embeddings", "lambda": 0.25}]))
    assert weights.verify() and weights.lam == 1
    with pytest.raises(UsageError, match=r"but both are in the one live tensor `embed\.weight`"):
        weights.set_lambda(LambdaRule([{"match": "lm_head.*", "lambda": 0.25}]))
    known = pa_fast.LiveWeights.bind(w, b, i, checkpoint_names={"embed.weight": ["embed.weight"]})
    known.set_lambda(LambdaRule([{"match": "embed.*", "lambda": 0.25}]))
    assert_holds(w, b, i, dict.fromkeys(w, 0.25))


def test_a_delta_file_goes_by_checkpoint_names_too(tmp_path: Path) -> None:
    base = {"w": torch.randn(64), "v": torch.randn(64)}
    instruct = {name: value + 1 for name, value in base.items()}
    live = {name: torch.empty_like(value) for name, value in base.items()}
    encode(tmp_path / "delta", live, base, instruct, "sparse")
    with LiveWeights.open(
        live, base, tmp_path / "delta", checkpoint_names={"w": ("model.w",)}
    ) as weights:
        weights.set_lambda(LambdaRule([{"match": "model.w", "lambda": 1}], 0))
        assert torch.equal(live["w"], instruct["w"]) and torch.equal(live["v"], base["v"])
