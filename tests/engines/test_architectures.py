"""Every architecture: load, endpoint check, and a sweep that equals saved-and-loaded merges bit for
bit."""

from __future__ import annotations

import pathlib

import pytest
import torch

import pa_fast
from tests.engines.architectures import ARCHITECTURES, write_pair


def reload(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(found[name].view(width), tensor.contiguous().view(width)), name


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "lambdas", [(0.3, -0.2), pytest.param((1 / 3, 1.5), marks=pytest.mark.slow)], ids=str
)
def test_sweep_equals_saved_and_loaded_merges(
    name: str, lambdas: tuple[float, ...], tmp_path: pathlib.Path
) -> None:
    base, instruct = write_pair(tmp_path, name)
    lm = pa_fast.load(base, instruct)
    assert lm.lam == 0
    assert_same_bits(lm.model.state_dict(), reload(base))
    lm.set_lambda(1.0)
    assert_same_bits(lm.model.state_dict(), reload(instruct))
    for lam in lambdas:
        lm.set_lambda(lam)
        assert lm.weights.verify()
        merged = tmp_path / f"merged-{lam}"
        pa_fast.merge(base, instruct, lam=lam, out=merged)
        assert_same_bits(lm.model.state_dict(), reload(merged))
