"""The conformance table: what every store and every engine must do. Adding one means adding a
row."""

from __future__ import annotations

import os
import pathlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch

import pa_fast
from pa_fast.errors import WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.sparse import SparseStore
from pa_fast.stores.store import Store
from tests.engines.architectures import ARCHITECTURES, write_pair
from tests.engines.test_architectures import reload
from tests.engines.test_loading import edit
from tests.remote import Actor, Ranks
from tests.stores import pairs
from tests.subjects import Live, Product, Subject


def plain(dtype: torch.dtype, device: str = "cpu") -> Callable[[pathlib.Path], Subject]:
    def make(folder: pathlib.Path) -> Subject:
        g = torch.Generator().manual_seed(3)
        base = {
            name: torch.randn(shape, generator=g).to(dtype)
            for name, shape in (("a", (65, 31)), ("b", (1000,)), ("c", (3,)))
        }
        instruct = {
            n: (t.float() + 0.05 * torch.randn(t.shape, generator=g)).to(dtype)
            for n, t in base.items()
        }
        live = {name: torch.empty_like(tensor, device=device) for name, tensor in base.items()}
        weights = pa_fast.LiveWeights.bind(live, base, instruct)
        return Live(weights, weights.set_lambda, live, base, instruct)

    return make


def inside(make: Callable[[pathlib.Path], Subject]) -> Callable[[pathlib.Path], Subject]:
    """A subject that is only asked for λ in [0, 1]."""

    def made(folder: pathlib.Path) -> Subject:
        subject = make(folder)
        subject.span = (0.0, 1.0)
        return subject

    return made


def delta(
    store: Store, device: str = "cpu", *, file: bool = False
) -> Callable[[pathlib.Path], Subject]:
    """A plain pair of which 3 % changed, held by `store` or opened from a file of it."""

    def make(folder: pathlib.Path) -> Subject:
        base, instruct = pairs.pair(changed=0.03)
        ends, factors = pairs.ends(store, base, instruct)
        live = pairs.live_like(base, device=device)
        if file:
            weights = pa_fast.LiveWeights.open(
                live, base, pairs.saved(folder / "delta", base, instruct, store)
            )
        else:
            weights = pa_fast.LiveWeights.bind(live, base, instruct, store)
        return (Product if factors else Live)(
            weights,
            weights.set_lambda,
            live,
            base,
            ends,
            **({"factors": factors} if factors else {}),
        )

    return make


def transformers(
    architecture: str,
    device: str = "cpu",
    *,
    store: str | Store = "auto",
    changed: float = 1.0,
    rel: float | None = None,
) -> Callable[[pathlib.Path], Subject]:
    """A model pair, of which only a share has changed where `changed` says so; with `rel` by such a
    share of the weights."""

    def make(folder: pathlib.Path) -> Subject:
        base, instruct = write_pair(folder, architecture)
        if changed < 1:
            edit(base, lambda tensors: kept.update(tensors))
            edit(
                instruct,
                lambda tensors: tensors.update(
                    {n: partly(kept[n], t, changed) for n, t in tensors.items()}
                ),
            )
        if rel is not None:
            edit(base, lambda tensors: kept.update(tensors))
            edit(
                instruct,
                lambda tensors: tensors.update({n: stepped(kept[n], rel) for n in tensors}),
            )
        lm = pa_fast.load(base, instruct, device=device, store=store)
        if store == "packed":
            assert lm.weights.memory().host_bytes < 0.8 * lm.weights.memory().live_bytes
        return Live(
            lm.weights,
            lm.set_lambda,
            dict(lm.model.named_parameters()),
            reload(base),
            reload(instruct),
        )

    kept: dict[str, torch.Tensor] = {}
    return make


def stepped(base: torch.Tensor, rel: float) -> torch.Tensor:
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(base.numel()))
    return (base.float() + base.float().std(correction=0) * rel * noise).to(base.dtype)


def partly(base: torch.Tensor, instruct: torch.Tensor, share: float) -> torch.Tensor:
    moved = torch.rand(base.shape, generator=torch.Generator().manual_seed(base.numel())) < share
    return torch.where(moved, instruct, base)


def tensor_parallel(architecture: str, world: int) -> Callable[[pathlib.Path], Subject]:
    return lambda folder: Ranks(folder, architecture, world)


def on_ray(architecture: str) -> Callable[[pathlib.Path], Subject]:
    def make(folder: pathlib.Path) -> Subject:
        pytest.importorskip("ray")
        return Actor(folder, architecture)

    return make


SUBJECTS = {
    "plain-dense-bf16": plain(torch.bfloat16),
    "plain-dense-fp16": plain(torch.float16),
    "plain-dense-fp32": plain(torch.float32),
    "plain-sparse-exact": delta(SparseStore()),
    "plain-sparse-topk": delta(SparseStore("topk", density=0.01)),
    "plain-sparse-dare": delta(SparseStore("dare", density=0.5)),
    "plain-lowrank": delta(LowRankStore(rank=16)),
    "plain-packed": inside(delta(PackedStore())),
    "plain-packed-wide": delta(PackedStore(-0.5, 1.5)),
    "opened-packed": inside(delta(PackedStore(), file=True)),
    "opened-sparse-exact": delta(SparseStore(), file=True),
    **{
        f"transformers-packed-{name}": inside(transformers(name, store="packed", rel=0.02))
        for name in ARCHITECTURES
    },
    "opened-lowrank": delta(LowRankStore(rank=16), file=True),
    "transformers-sparse-experts": transformers("mixtral", store="sparse", changed=0.1),
    "transformers-sparse-tied": transformers("qwen2", store="sparse", changed=0.1),
    "transformers-dense-llama": transformers("llama"),
    "transformers-dense-tied": transformers("qwen2"),
    "transformers-dense-experts": transformers("mixtral"),
    "tensor-parallel-dense-experts": tensor_parallel("mixtral", 2),
    "ray-dense-llama": on_ray("llama"),
}
ON_GPU = {
    "plain-dense-bf16-cuda": plain(torch.bfloat16, "cuda"),
    "plain-dense-fp32-cuda": plain(torch.float32, "cuda"),
    "plain-sparse-exact-cuda": delta(SparseStore(), "cuda"),
    "plain-lowrank-cuda": delta(LowRankStore(rank=16), "cuda"),
    "plain-packed-cuda": inside(delta(PackedStore(), "cuda")),
    "plain-packed-wide-cuda": delta(PackedStore(-0.5, 1.5), "cuda"),
    "opened-sparse-exact-cuda": delta(SparseStore(), "cuda", file=True),
    "transformers-dense-llama-cuda": transformers("llama", "cuda"),
    "transformers-dense-experts-cuda": transformers("mixtral", "cuda"),
}


QUICK = ("llama", "qwen2", "mixtral", "phi-3")  # plain, tied, converted experts, fused
SLOW = {
    "ray-dense-llama",
    *(f"transformers-packed-{name}" for name in ARCHITECTURES if name not in QUICK),
}
"""More of what others are asked: architectures, and the weights of `transformers-dense-llama` in a
Ray actor."""


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SUBJECTS),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU),
    ],
)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    made = {**SUBJECTS, **ON_GPU}[request.param](tmp_path_factory.mktemp("subject"))
    yield made
    made.close()


def assert_holds(subject: Subject, lam: float) -> None:
    for name, tensor in subject.bits().items():
        assert_same(tensor, subject.expected(name, lam, tensor.dtype), subject.ulps, (name, lam))


def assert_same(found: torch.Tensor, expected: torch.Tensor, ulps: int, where: object) -> None:
    if ulps == 0:
        assert torch.equal(as_integers(found), as_integers(expected)), where
    else:
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        assert not found.numel() or int((ordered(found) - ordered(expected)).abs().max()) <= ulps, (
            where
        )


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that follow the values: neighbours in the dtype are 1 apart, and 0 and −0 the
    same."""
    bits = as_integers(tensor)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits.long(), bits.long())


@pytest.mark.parametrize("switches", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_order_never_matters(subject: Subject, switches: int) -> None:
    draw = random.Random(1)
    # an interpreter takes a tenth of a second for a switch
    for _ in range(10 if os.environ.get("TRITON_INTERPRET") == "1" else switches):
        subject.set_lambda(draw.choice([draw.uniform(*subject.span), draw.uniform(0, 1), 0.0, 1.0]))
    for lam in (0, 0.05, 0.3, 0.5, 1 / 3, 0.999, 1, -0.2, 1.5):
        if not subject.span[0] <= lam <= subject.span[1]:
            continue
        subject.set_lambda(lam)
        assert_holds(subject, lam)


def test_endpoints_are_the_bits_of_the_sources(subject: Subject) -> None:
    for lam, source, ulps in ((0.0, subject.base, 0), (1.0, subject.instruct, subject.ulps)):
        subject.set_lambda(0.37)
        subject.set_lambda(lam)
        for name, tensor in subject.bits().items():
            assert_same(tensor, source[name].to(tensor.dtype), ulps, name)


def test_nothing_moves_and_versions_rise(subject: Subject) -> None:
    pointers, versions = subject.pointers(), subject.versions()
    subject.set_lambda(0.42)
    assert subject.pointers() == pointers
    assert all(version > versions[name] for name, version in subject.versions().items())


def test_the_checksum_is_a_function_of_lambda(subject: Subject) -> None:
    seen: dict[float, int] = {}
    for lam in (0.1, 0.9, 0.1, 0.5, 0.9):
        subject.set_lambda(lam)
        assert seen.setdefault(lam, subject.checksum()) == subject.checksum()
    assert len(set(seen.values())) == 3


def test_a_foreign_write_is_detected_and_healed(subject: Subject) -> None:
    subject.set_lambda(0.5)
    before = subject.checksum()
    name = subject.poke()
    assert subject.checksum() != before
    assert subject.changed() == [name]
    with pytest.raises(WeightsError, match=name):
        subject.verify()
    subject.set_lambda(0.5)
    assert subject.checksum() == before
    assert_holds(subject, 0.5)


def test_looking_at_weights_changes_nothing(subject: Subject) -> None:
    for lam in (0.3, 1.0):
        subject.set_lambda(lam)
        before = subject.checksum()
        first = subject.effective_lambda()
        assert subject.verify() and subject.total_bytes() and repr(subject)
        assert subject.effective_lambda() == first == pytest.approx(lam, abs=0.05)
        assert subject.checksum() == before
        assert_holds(subject, lam)
    subject.set_lambda(1.0)
    assert_holds(subject, 1.0)
