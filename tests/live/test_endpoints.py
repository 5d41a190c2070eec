"""The ends that live weights are held against: both ways of writing them first, and every way to be
wrong."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.errors import DataError, UsageError, WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.live.endpoints import FirstRows
from tests.live.test_weights import DTYPES, LAMBDAS, Tensors, bits, three

STORES = ["dense", "packed", "sparse"]
"""Dense is proven piece by piece in one pass, the others by two switches."""


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("base", "instruct", "live"), list(itertools.product(DTYPES, repeat=3)))
def test_proven_weights_are_those_that_were_not(
    base: torch.dtype, instruct: torch.dtype, live: torch.dtype, store: str
) -> None:
    w, b, i = three(base, instruct, live)
    proven = pa_fast.LiveWeights.bind(w, b, i, store, endpoints={0.0: b, 1.0: i})
    plain, *_ = three(base, instruct, live)
    other = pa_fast.LiveWeights.bind(plain, b, i, store)
    assert proven.lam == 0 and proven.verify()
    for lam in LAMBDAS if store != "packed" else LAMBDAS[:6]:
        for weights in (proven, other):
            weights.set_lambda(lam)
        for name in w:
            assert torch.equal(bits(w[name]), bits(plain[name])), (name, lam)
        assert proven.checksum() == other.checksum()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("name", ["embed", "head", "layer.weight", "norm", "one", "steps"])
def test_one_other_bit_is_refused_by_name(name: str, lam: float, store: str) -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    ends: dict[float, Tensors] = {0.0: dict(b), 1.0: dict(i)}
    ends[lam][name] = ends[lam][name].clone()
    as_integers(ends[lam][name])[-1] ^= 1
    with pytest.raises(
        WeightsError, match=f"at λ = {lam:g} live tensor `{name}` is not, bit for bit"
    ):
        pa_fast.LiveWeights.bind(w, b, i, store, endpoints=ends)


def broken(kind: str, w: Tensors, b: Tensors) -> Any:
    """Ends of which one cannot be compared."""
    others: dict[str, Any] = {
        "empty": {"layer.weight": torch.empty(0, 33)},
        "one row": {"layer.weight": b["layer.weight"][:1]},
        "turned": {"layer.weight": b["layer.weight"].T},
        "rows too many": {"layer.weight": torch.cat([b["layer.weight"], b["layer.weight"][:1]])},
        "no rows": {"layer.weight": FirstRows(torch.empty(0, 33))},
        "fraction": {"steps": torch.arange(5) + 0.5},
        "numpy": {"norm": b["norm"].float().numpy()},
        "live": {"norm": w["norm"]},
        "more": {"zzz": b["norm"]},
    }
    if kind == "fewer":
        return {0.0: {name: b[name] for name in b if name != "norm"}}
    return (
        {0.0: b | others[kind]}
        if kind in others
        else {"list": [(0.0, b)], "nan": {float("nan"): b}, "flat": b}[kind]
    )


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "empty",
            r"the endpoint of `layer.weight` at λ = 0 is \[0, 33\], the live tensor \[129, 33\]",
        ),
        ("one row", r"\[1, 33\]"),
        ("turned", r"\[33, 129\]"),
        ("rows too many", r"\[130, 33\]"),
        ("no rows", r"\[0, 33\]"),
        (
            "fraction",
            "the endpoint of `steps` at λ = 0 is torch.float32, the live tensor torch.int64",
        ),
        ("numpy", "the endpoint of `norm` at λ = 0 is a ndarray"),
        ("live", "the endpoint of `norm` at λ = 0 lies in live memory"),
        ("more", "`zzz` has an endpoint, but is not live"),
        ("fewer", "`norm` is live, but has no endpoint at λ = 0"),
        ("list", "endpoints are a list"),
        ("nan", "λ `nan` is not a finite number"),
        ("flat", "endpoints are a dict"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_write(
    kind: str, said: str, store: str
) -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    for tensor in w.values():
        tensor.fill_(7)
    with pytest.raises((WeightsError, UsageError), match=said):
        pa_fast.LiveWeights.bind(
            w, b, i | {"steps": b["steps"]}, store, endpoints=broken(kind, w, b)
        )
    assert all(bool((tensor == 7).all()) for tensor in w.values())
    weights = pa_fast.LiveWeights.bind(w, b, i, store)
    with pytest.raises((WeightsError, UsageError), match=said):
        weights.check_endpoints(broken(kind, w, b))


@pytest.mark.parametrize("store", STORES)
def test_an_end_with_fewer_rows_speaks_for_those_where_it_says_so(store: str) -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    short: dict[str, Any] = {
        n: FirstRows(tensor[:30]) if n in ("embed", "head") else tensor for n, tensor in b.items()
    }
    assert pa_fast.LiveWeights.bind(w, b, i, store, endpoints={0.0: short, 1.0: i}).verify()
    short["embed"] = short["head"] = FirstRows(b["embed"][1:31])
    with pytest.raises(WeightsError, match="embed"):
        pa_fast.LiveWeights.bind(w, b, i, store, endpoints={0.0: short})


def test_ends_are_proven_without_a_rule() -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.follow(pa_fast.LambdaRule.of([{"match": "norm", "lambda": 1}]))
    with pytest.raises(UsageError, match="while a rule is followed"):
        weights.check_endpoints({0.0: b})
    weights.follow(None)
    weights.set_lambda(0.3)
    weights.check_endpoints({1.0: i})
    assert weights.lam == 0
    weights.close()
    with pytest.raises(WeightsError, match="closed"):
        weights.check_endpoints({})


@pytest.mark.parametrize("side", ["base", "instruct"])
@pytest.mark.parametrize("ends", [None, {}])
def test_non_finite_sources_are_refused_by_either_way(side: str, ends: Any) -> None:
    w, b, i = three(*[torch.float16] * 3)
    {"base": b, "instruct": i}[side]["layer.weight"][128, 3] = float("inf")
    with pytest.raises(
        DataError, match=f"{side} tensor `layer.weight` has 1 non-finite weights of 4257"
    ):
        pa_fast.LiveWeights.bind(w, b, i, endpoints=ends)


def test_nan_that_may_pass_is_no_difference() -> None:
    w, b, i = three(torch.float32, torch.bfloat16, torch.float16)
    b["norm"][0], i["norm"][2] = float("nan"), float("-inf")
    weights = pa_fast.LiveWeights.bind(w, b, i, allow_nonfinite=True, endpoints={0.0: b, 1.0: i})
    assert w["norm"].isnan().tolist() == [True, *[False] * 6] and weights.verify()


def test_what_an_error_leaves_of_weights_that_hold_something() -> None:
    """Without `ends` nothing is written before every source is known to be finite."""
    w, b, i = three(*[torch.bfloat16] * 3)
    for tensor in w.values():
        tensor.fill_(7)
    i["one"][0] = float("nan")
    with pytest.raises(DataError):
        pa_fast.LiveWeights.bind(w, b, i)
    assert all(bool((tensor == 7).all()) for tensor in w.values())
