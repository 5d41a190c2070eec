"""LiveWeights: the contract in place, whatever came before, and every refusal of `bind`."""

from __future__ import annotations

import itertools
import random
import weakref

import pytest
import torch
from pa_kernels import reference

import pa_fast
from pa_fast.errors import DataError, PairError, UsageError, WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.stores.composite import CompositeStore
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.sparse import SparseStore
from tests.stores import pairs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAMBDAS = [0, 0.05, 0.3, 0.5, 1 / 3, 0.999, 1, -0.2, 1.5]

Tensors = dict[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return as_integers(tensor.clone())


def three(
    base: torch.dtype, instruct: torch.dtype, live: torch.dtype, seed: int = 0
) -> tuple[Tensors, Tensors, Tensors]:
    """Live, base and instruct dicts with odd sizes, an empty tensor, a tied head, shared −0 and an
    integer tensor."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (37, 16),
        "layer.weight": (129, 33),
        "norm": (7,),
        "one": (1,),
        "none": (0, 4),
    }
    b = {name: torch.randn(shape, generator=g).to(base) for name, shape in shapes.items()}
    i = {
        name: (t.float() + 0.02 * torch.randn(t.shape, generator=g)).to(instruct)
        for name, t in b.items()
    }
    b["norm"][3] = i["norm"][3] = -0.0
    w = {name: torch.empty(t.shape, dtype=live) for name, t in b.items()}
    for side in (b, i, w):
        side["head"] = side["embed"]
        side["steps"] = torch.arange(5)
    return w, b, i


@pytest.mark.parametrize(("base", "instruct", "live"), list(itertools.product(DTYPES, repeat=3)))
def test_every_lambda_is_the_contract_after_any_history(
    base: torch.dtype, instruct: torch.dtype, live: torch.dtype
) -> None:
    w, b, i = three(base, instruct, live)
    weights = pa_fast.LiveWeights.bind(w, b, i)
    assert weights.lam == 0
    pointers = {name: tensor.data_ptr() for name, tensor in w.items()}
    draw = random.Random(0)
    for _ in range(200):
        weights.set_lambda(draw.uniform(-2, 3))
    for lam in LAMBDAS:
        weights.set_lambda(lam)
        for name in b:
            if name != "steps":
                assert torch.equal(
                    bits(w[name]), bits(reference.lerp(b[name], i[name], lam, live))
                ), (name, lam)
            if base == instruct == live and name != "steps":
                assert torch.equal(w[name], torch.lerp(b[name], i[name], lam))
        assert torch.equal(w["steps"], torch.arange(5))
        assert weights.verify()
    assert {name: tensor.data_ptr() for name, tensor in w.items()} == pointers


def test_versions_rise_with_every_switch() -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    parameter = torch.nn.Parameter(w["norm"].clone())
    weights = pa_fast.LiveWeights.bind(
        {"norm": parameter}, {"norm": b["norm"]}, {"norm": i["norm"]}
    )
    before = parameter._version
    weights.set_lambda(0.5)
    assert parameter._version > before


def test_inference_tensors_can_be_live() -> None:
    w, b, i = three(*[torch.float32] * 3)
    with torch.inference_mode():
        w = {name: tensor.clone() for name, tensor in w.items()}
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.set_lambda(0.3)
    assert torch.equal(w["norm"], torch.lerp(b["norm"], i["norm"], 0.3))


def test_via_rounds_to_the_dtype_of_the_file_first() -> None:
    w, b, i = three(torch.float32, torch.bfloat16, torch.float32)
    weights = pa_fast.LiveWeights.bind(w, b, i, intermediate_dtype={"norm": torch.bfloat16})
    weights.set_lambda(0.3)
    assert torch.equal(w["norm"], reference.lerp(b["norm"], i["norm"], 0.3, torch.bfloat16).float())
    assert not torch.equal(w["norm"], reference.lerp(b["norm"], i["norm"], 0.3, torch.float32))
    assert weights.verify()


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), 1e39, "x", None])
def test_lambda_must_be_a_finite_number(lam: object) -> None:
    weights = pa_fast.LiveWeights.bind(*three(*[torch.bfloat16] * 3))
    weights.set_lambda(0.25)
    with pytest.raises(UsageError, match="λ"):
        weights.set_lambda(lam)  # type: ignore[arg-type]
    assert weights.lam == 0.25
    assert weights.verify()


def test_a_foreign_write_is_found_by_name_and_mended_by_the_next_switch() -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    weights = pa_fast.LiveWeights.bind(w, b, i)
    weights.set_lambda(0.3)
    before = weights.checksum()
    w["layer.weight"][128, 32] += 1
    w["steps"][2] = 7
    assert weights.checksum() != before
    assert weights.changed() == ["layer.weight", "steps"]
    with pytest.raises(WeightsError, match=r"`layer\.weight` and 1 more"):
        weights.verify()
    weights.set_lambda(0.3)
    assert weights.verify()
    assert weights.checksum() == before


def test_checksum_follows_content_and_names_alone() -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    weights = pa_fast.LiveWeights.bind(w, b, i)
    seen = {}
    for lam in (0, 0.25, 0.5, 1, 0.25, 0):
        weights.set_lambda(lam)
        assert seen.setdefault(lam, weights.checksum()) == weights.checksum()
    assert len(set(seen.values())) == len(seen)
    swapped = {**w, "embed2": w["norm"], "norm": torch.empty_like(w["norm"])}
    other = pa_fast.LiveWeights.bind(
        swapped, {**b, "embed2": b["norm"]}, {**i, "embed2": i["norm"]}
    )
    assert other.checksum() != weights.checksum()


def test_effective_lambda_shows_what_the_grid_swallows() -> None:
    g = torch.Generator().manual_seed(0)
    b = torch.randn(200_000, generator=g).mul(0.02)
    i = b + 0.02 * 0.02 * torch.randn(b.shape, generator=g)
    b16, i16 = b.bfloat16(), i.bfloat16()
    weights = pa_fast.LiveWeights.bind({"w": torch.empty_like(b16)}, {"w": b16}, {"w": i16})
    weights.set_lambda(0.05)
    by_hand = (
        (weights_of := torch.lerp(b16, i16, 0.05))
        .double()
        .sub(b16.double())
        .dot(i16.double() - b16.double())
    )
    by_hand = float(by_hand / (i16.double() - b16.double()).square().sum())
    assert weights.effective_lambda() == pytest.approx(by_hand, rel=1e-5)
    assert weights.effective_lambda() < 0.04 and weights_of.dtype == torch.bfloat16
    exact = pa_fast.LiveWeights.bind({"w": torch.empty_like(b)}, {"w": b}, {"w": i})
    exact.set_lambda(0.05)
    assert exact.effective_lambda() == pytest.approx(0.05, abs=1e-4)


def test_memory_counts_each_storage_once() -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    memory = pa_fast.LiveWeights.bind(w, b, i).memory()
    one = sum(t.numel() * t.element_size() for name, t in w.items() if name != "head")
    assert memory.live_bytes == one
    assert memory["host_bytes"] == 2 * one
    assert memory.device_bytes == memory.mapped_bytes == 0
    assert memory.total_bytes == 3 * one == dict(memory)["total_bytes"]


def test_a_moved_tensor_is_noticed_before_anything_is_written() -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    weights = pa_fast.LiveWeights.bind(w, b, i)
    w["norm"].data = w["norm"].clone()
    with pytest.raises(WeightsError, match="`norm` has moved"):
        weights.set_lambda(0.5)


def test_closed_weights_say_so() -> None:
    with pa_fast.LiveWeights.bind(*three(*[torch.bfloat16] * 3)) as weights:
        pass
    for ask in (weights.checksum, weights.verify, weights.memory, lambda: weights.set_lambda(0)):
        with pytest.raises(WeightsError, match="closed"):
            ask()


def _break(change: str) -> tuple[Tensors, Tensors, Tensors]:
    w, b, i = three(*[torch.bfloat16] * 3)
    if change == "missing":
        del i["norm"]
    elif change == "extra":
        b["more"] = b["norm"]
    elif change == "shape":
        i["norm"] = i["norm"][:5].clone()
    elif change == "strided":
        w["layer.weight"] = torch.zeros(33, 129, dtype=torch.bfloat16).t()
    elif change == "overlap":
        flat = torch.zeros(30, dtype=torch.bfloat16)
        w["norm"], w["one"] = flat[:7], flat[6:7]
    elif change == "alias":
        w["norm"] = b["norm"]
    elif change == "tied":
        b["head"] = b["head"] + 1
    elif change == "integers":
        i["steps"] = i["steps"] + 1
    elif change == "kinds":
        i["steps"] = i["steps"].float()
    elif change == "meta":
        w["norm"] = torch.zeros(7, dtype=torch.bfloat16, device="meta")
    elif change == "nan":
        b["norm"][2] = float("nan")
    elif change == "inf":
        i["layer.weight"][0, 0] = float("-inf")
    return w, b, i


REFUSALS = {
    "missing": (PairError, r"`norm`.*instruct has no tensor"),
    "extra": (PairError, r"`more`.*no live tensor"),
    "shape": (PairError, r"`norm`: instruct is \[5\], live is \[7\]"),
    "strided": (WeightsError, r"`layer.weight`: live is not contiguous"),
    "overlap": (WeightsError, r"overlaps live tensor"),
    "alias": (WeightsError, r"aliases .*`norm`"),
    "tied": (PairError, r"`head` and `embed` share live storage, but their base"),
    "integers": (DataError, r"`steps`.*differs between base and instruct"),
    "kinds": (PairError, r"`steps`: live torch.int64, base torch.int64, instruct torch.float32"),
    "meta": (WeightsError, r"`norm`: live is on the meta device"),
    "nan": (DataError, r"base tensor `norm` has 1 non-finite weights of 7"),
    "inf": (DataError, r"instruct tensor `layer.weight` has 1 non-finite"),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_what_cannot_be_bound_is_refused_by_name(change: str) -> None:
    kind, message = REFUSALS[change]
    with pytest.raises(kind, match=message) as caught:
        pa_fast.LiveWeights.bind(*_break(change))
    assert caught.value.hint


NAMELESS = {
    "list": lambda side: list(side.values()),
    "tuple": lambda side: tuple(side.items()),
    "generator": lambda side: iter(side.items()),
    "module": lambda side: torch.nn.Linear(2, 3),
    "empty module": lambda side: torch.nn.ModuleList(),
    "tensor": lambda side: side["norm"],
    "empty list": lambda side: [],
    "text": lambda side: "norm",
}


@pytest.mark.parametrize("kind", NAMELESS)
@pytest.mark.parametrize("side", ["live", "base", "instruct"])
def test_tensors_without_names_are_refused_with_a_hint(side: str, kind: str) -> None:
    sides = dict(zip(("live", "base", "instruct"), three(*[torch.bfloat16] * 3)))
    given = {**sides, side: NAMELESS[kind](sides[side])}
    said = rf"cannot bind: `{side}` is a {type(given[side]).__name__}, and a dict is expected"
    with pytest.raises(WeightsError, match=said) as caught:
        pa_fast.LiveWeights.bind(**given)  # type: ignore[arg-type]
    assert "dict(model.named_parameters())" in str(caught.value.hint)
    with pytest.raises(WeightsError, match="cannot bind: `base` is a") as caught:
        pa_fast.LiveWeights.bind(*sides.values()).resync(NAMELESS[kind](sides["base"]))  # type: ignore[arg-type]
    assert "dict(model.named_parameters())" in str(caught.value.hint)


def test_non_finite_weights_pass_when_allowed() -> None:
    w, b, i = _break("nan")
    weights = pa_fast.LiveWeights.bind(w, b, i, allow_nonfinite=True)
    weights.set_lambda(0.5)
    assert weights.verify()
    assert w["norm"][2].isnan() and w["norm"].isnan().sum() == 1


def with_nan(dtype: torch.dtype, size: int) -> tuple[Tensors, Tensors]:
    """A pair in which one weight in seven is NaN on either side or on both, with payloads and signs
    of all kinds."""
    g = torch.Generator().manual_seed(size)
    base, instruct = pairs.pair(dtype, changed=1.0, rel=0.02, shapes={"w": (size,)})
    for side in (base["w"], instruct["w"]):
        places = torch.randperm(size, generator=g)[: size // 7]
        infinity = int(bits(torch.tensor([float("inf")]).to(dtype)))
        payload = torch.randint(1, infinity & -infinity, places.shape, generator=g)
        sign = (
            torch.randint(0, 2, places.shape, generator=g) * torch.iinfo(reference.BITS[dtype]).min
        )
        side.view(reference.BITS[dtype])[places] = (sign + infinity + payload).to(
            reference.BITS[dtype]
        )
    return base, instruct


@pytest.mark.parametrize("store", ["dense", "packed", SparseStore()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_compared_as_nan_whatever_it_carries(
    dtype: torch.dtype, store: str | SparseStore
) -> None:
    for size in (2_003, 70_011):
        base, instruct = with_nan(dtype, size)
        w = pairs.live_like(base)
        weights = pa_fast.LiveWeights.bind(w, base, instruct, store, allow_nonfinite=True)
        for lam in (0.3, 0.7, 1.0, 0.3):
            weights.set_lambda(lam)
            assert weights.verify(), lam
        live = w["w"]
        live[live.isnan()] = float("nan")
        assert weights.verify()
        nan = live.isnan().nonzero().view(-1)
        kept = live.clone()
        for at, value in ((int(nan[0]), 1.0), (int((~live.isnan()).nonzero()[0]), float("nan"))):
            live.copy_(kept)
            live[at] = value
            assert weights.changed() == ["w"]


@pytest.mark.parametrize(("option", "value"), [("store", "zipped"), ("rounding", "upwards")])
def test_what_is_not_there_is_refused(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{option} `{value}` is not available"):
        pa_fast.LiveWeights.bind(*three(*[torch.bfloat16] * 3), **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_a_process_rounds_no_lambda(default: torch.dtype) -> None:
    w, b, i = three(*[torch.bfloat16] * 3)
    torch.set_default_dtype(default)
    try:
        weights = pa_fast.LiveWeights.bind(w, b, i)
        weights.set_lambda(0.3)
        assert weights.verify()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bits(w["embed"]), bits(reference.lerp(b["embed"], i["embed"], 0.3)))


def test_what_is_no_tensor_and_nothing_at_all_are_refused() -> None:
    with pytest.raises(WeightsError, match="`x`: base is a list"):
        pa_fast.LiveWeights.bind({"x": torch.zeros(1)}, {"x": [1.0]}, {"x": torch.zeros(1)})  # type: ignore[dict-item]
    with pytest.raises(WeightsError, match="nothing to bind"):
        pa_fast.LiveWeights.bind({}, {}, {})


def test_a_sparse_store_costs_positions_and_values_and_lets_go_of_instruct() -> None:
    b, i = pairs.pair(shapes={"w": (500, 1000)}, changed=0.01)
    held = [weakref.ref(tensor) for tensor in i.values()]
    weights = pa_fast.LiveWeights.bind(pairs.live_like(b), b, i, "sparse")
    moved = int((as_integers(b["w"]) != as_integers(i["w"])).sum())
    assert weights.memory().host_bytes - b["w"].nbytes == pytest.approx(6 * moved, rel=0.05)
    del i
    assert all(tensor() is None for tensor in held)
    weights.set_lambda(0.5)
    assert weights.verify()


@pytest.mark.parametrize("seen_by", ["checksum", "verify"])
def test_a_write_where_a_sparse_delta_never_writes_is_mended_once_it_was_seen(seen_by: str) -> None:
    b, i = pairs.pair(shapes={"w": (500, 1000)}, changed=0.01)
    w = pairs.live_like(b)
    weights = pa_fast.LiveWeights.bind(w, b, i, "sparse")
    weights.set_lambda(0.5)
    before = weights.checksum()
    still = int((as_integers(b["w"]) == as_integers(i["w"])).nonzero()[0])
    w["w"].view(-1)[still] += 1
    if seen_by == "checksum":
        assert weights.checksum() != before
    else:
        assert weights.changed() == ["w"]
    weights.set_lambda(0.5)
    assert weights.checksum() == before and weights.verify()


def test_a_mended_lambda_is_measured_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    b, i = pairs.pair(shapes={"w": (500, 1000)}, changed=0.01)
    w = pairs.live_like(b)
    weights = pa_fast.LiveWeights.bind(w, b, i, "sparse")
    still = int((as_integers(b["w"]) == as_integers(i["w"])).nonzero()[0])
    w["w"].view(-1)[still] += 1
    wrong = weights.checksum()  # the first sum of this λ is that of a foreign write
    assert weights.changed() == ["w"]
    weights.set_lambda(0.0)
    right = weights.checksum()
    assert right != wrong and weights.verify()
    monkeypatch.setattr(
        CompositeStore, "restore_", lambda *_: pytest.fail("written again as a whole for no reason")
    )
    weights.set_lambda(0.0)
    assert weights.checksum() == right


@pytest.mark.parametrize(
    "store", ["sparse", "lowrank", SparseStore("topk", 0.5), LowRankStore(rank=16)]
)
def test_every_store_keeps_ties_integers_via_and_default_dtypes(
    store: str | SparseStore | LowRankStore,
) -> None:
    b, i = pairs.pair(
        torch.float32, torch.bfloat16, shapes={"embed": (64, 48), "norm": (7,)}, changed=0.1
    )
    w = pairs.live_like(b)
    for side in (w, b, i):
        side["head"], side["steps"] = side["embed"], torch.arange(5)
    torch.set_default_dtype(torch.float64)
    try:
        weights = pa_fast.LiveWeights.bind(
            w, b, i, store, intermediate_dtype={"embed": torch.bfloat16, "norm": torch.bfloat16}
        )
        for lam in (0.3, 1.5, 1.0, 0.0):
            weights.set_lambda(lam)
            assert weights.verify()
            assert torch.equal(w["embed"], w["embed"].bfloat16().float()) and torch.equal(
                w["steps"], torch.arange(5)
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(w["norm"], b["norm"].bfloat16().float())


def test_lossy_stores_say_so() -> None:
    b, i = pairs.pair()
    for store, exact, lossless in (
        ("dense", True, True),
        ("sparse", True, True),
        ("lowrank", False, False),
    ):
        weights = pa_fast.LiveWeights.bind(pairs.live_like(b), b, i, store)
        assert (weights.exact, weights.lossless) == (exact, lossless) and store in repr(weights)
    topk = pa_fast.LiveWeights.bind(pairs.live_like(b), b, i, SparseStore("topk", 0.1))
    assert (topk.exact, topk.lossless, topk.store) == (
        True,
        False,
        "sparse topk, density 0.1 tensor",
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.complex32, torch.complex64, torch.complex128, torch.float64, torch.float8_e4m3fn],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_dtypes_that_follow_no_lambda_are_compared_by_bytes(dtype: torch.dtype) -> None:
    def side(value: int) -> Tensors:
        return {
            "odd": torch.tensor([value, 2, 3], dtype=torch.uint8).float().to(dtype),
            "weight": torch.ones(4).bfloat16(),
        }

    w = pa_fast.LiveWeights.bind(side(1), side(1), side(1))
    w.set_lambda(0.5)
    assert w.verify()
    with pytest.raises(DataError, match=r"`odd` .* differs between base and instruct"):
        pa_fast.LiveWeights.bind(side(1), side(1), side(5))
