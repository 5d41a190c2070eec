"""The conformance table: what every store and every engine must do. Adding one means adding a row."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from pa_kernels import reference

import pa_fast
from pa_fast.errors import WeightsError
from pa_fast.live.binding import as_integers
from tests.engines.architectures import write_pair
from tests.engines.test_architectures import reload
from tests.remote import Actor, Ranks
from tests.subjects import Live, Subject


def plain(dtype: torch.dtype, device: str = "cpu") -> Callable[[pathlib.Path], Subject]:
    def make(folder: pathlib.Path) -> Subject:
        g = torch.Generator().manual_seed(3)
        base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in (("a", (65, 31)), ("b", (1000,)), ("c", (3,)))}
        instruct = {n: (t.float() + 0.05 * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()}
        live = {name: torch.empty_like(tensor, device=device) for name, tensor in base.items()}
        weights = pa_fast.LiveWeights.bind(live, base, instruct)
        return Live(weights, weights.set_lambda, live, base, instruct)

    return make


def transformers(architecture: str, device: str = "cpu") -> Callable[[pathlib.Path], Subject]:
    def make(folder: pathlib.Path) -> Subject:
        base, instruct = write_pair(folder, architecture)
        lm = pa_fast.load(base, instruct, device=device)
        return Live(lm.weights, lm.set_lambda, dict(lm.model.named_parameters()), reload(base), reload(instruct))

    return make


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
    "transformers-dense-llama": transformers("llama"),
    "transformers-dense-tied": transformers("qwen2"),
    "transformers-dense-experts": transformers("mixtral"),
    "tensor-parallel-dense-experts": tensor_parallel("mixtral", 2),
    "ray-dense-llama": on_ray("llama"),
}
ON_GPU = {
    "plain-dense-bf16-cuda": plain(torch.bfloat16, "cuda"),
    "plain-dense-fp32-cuda": plain(torch.float32, "cuda"),
    "transformers-dense-llama-cuda": transformers("llama", "cuda"),
    "transformers-dense-experts-cuda": transformers("mixtral", "cuda"),
}


@pytest.fixture(scope="module", params=[*SUBJECTS, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    made = {**SUBJECTS, **ON_GPU}[request.param](tmp_path_factory.mktemp("subject"))
    yield made
    made.close()


def assert_holds(subject: Subject, lam: float) -> None:
    for name, tensor in subject.bits().items():
        expected = reference.lerp(subject.base[name], subject.instruct[name], lam, tensor.dtype)
        assert torch.equal(as_integers(tensor), as_integers(expected)), (name, lam)


def test_order_never_matters(subject: Subject) -> None:
    draw = random.Random(1)
    for _ in range(200):
        subject.set_lambda(draw.choice([draw.uniform(-0.5, 1.5), draw.uniform(0, 1), 0.0, 1.0]))
    for lam in (0, 0.05, 0.3, 0.5, 1 / 3, 0.999, 1, -0.2, 1.5):
        subject.set_lambda(lam)
        assert_holds(subject, lam)


def test_endpoints_are_the_bits_of_the_sources(subject: Subject) -> None:
    for lam, source in ((0.0, subject.base), (1.0, subject.instruct)):
        subject.set_lambda(0.37)
        subject.set_lambda(lam)
        for name, tensor in subject.bits().items():
            assert torch.equal(as_integers(tensor), as_integers(source[name])), name


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
