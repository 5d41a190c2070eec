"""Factors beside the weights: the logits of the merged model, for any λ, and nothing rewritten."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch

import pa_fast
from pa_fast.engines.attached import attach, attachable
from pa_fast.engines.encoding import encode
from pa_fast.errors import EngineError, UsageError, WeightsError
from tests.engines.architectures import config, write_pair

RANK = 4


def model_of(architecture: str, **changes: object) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config(architecture, **changes), dtype=torch.float32
    ).eval()


def factors_for(
    model: torch.nn.Module, names: list[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: (
            torch.randn(weights[name].shape[0], RANK, generator=generator) * 0.05,
            torch.randn(RANK, weights[name].shape[1], generator=generator) * 0.05,
        )
        for name in names
    }


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "gemma-2", "mixtral", "gpt-neox", "phi-3"]
)
def test_logits_are_those_of_the_merged_weights(architecture: str) -> None:
    model = model_of(architecture)
    names = list(attachable(model))
    assert names, "nothing to attach to"
    factors = factors_for(model, names)
    merged = copy.deepcopy(model)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    keys = model.state_dict().keys()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits
        lam = attach(model, factors)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, base), (
            "λ = 0 is the base model"
        )
        for value in (0.3, 1.0, -0.5, 0.3):
            lam.fill_(value)
            for name, tensor in merged.named_parameters():
                if name in factors:
                    tensor.copy_(before[name][1] + value * (factors[name][0] @ factors[name][1]))
            expected = merged(input_ids=ids, use_cache=False).logits
            assert torch.allclose(
                model(input_ids=ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4
            )
            assert not torch.allclose(expected, base, atol=1e-3)
    assert model.state_dict().keys() == keys
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(
            parameter, before[name][1]
        ), name


def test_a_tied_head_is_attached_on_both_its_sides() -> None:
    model = model_of("qwen2")
    assert attachable(model)["model.embed_tokens.weight"] == ["model.embed_tokens", "lm_head"]


def test_weights_that_are_used_otherwise_cannot_be_attached() -> None:
    model = model_of("mixtral")
    names = [name for name, p in model.named_parameters() if "experts" in name or "norm" in name]
    assert names and not set(names) & attachable(model).keys()
    with pytest.raises(EngineError, match="experts"):
        attach(
            model,
            (
                {names[0]: (torch.zeros(1, 1), torch.zeros(1, 1))}
                if "experts" in names[0]
                else {
                    next(name for name in names if "experts" in name): (
                        torch.zeros(1, 1),
                        torch.zeros(1, 1),
                    )
                }
            ),
        )


def test_a_compiled_model_sees_every_lambda_without_a_second_compilation() -> None:
    model = model_of("llama")
    lam = attach(model, factors_for(model, list(attachable(model))))
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compiled
        compiled += 1
        return graph

    layer = model.get_submodule("model.layers.0.mlp")
    fast = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        for value in (0.0, 0.5, 1.0):
            lam.fill_(value)
            assert torch.equal(fast(x), layer(x))
    assert compiled == 1


def test_lambda_keeps_its_precision_in_bf16() -> None:
    linear = torch.nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight.zero_()
    holder = torch.nn.Sequential(linear)
    u, v = torch.eye(64).bfloat16(), torch.eye(64).bfloat16()
    lam = attach(holder, {"0.weight": (u, v)})
    lam.fill_(0.3)
    x = torch.arange(1, 65, dtype=torch.bfloat16)[None]
    with torch.no_grad():
        assert torch.equal(holder(x), (x.float() * 0.3).bfloat16())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
def test_a_loaded_pair_follows_lambda_beside_its_weights(
    architecture: str, tmp_path: pathlib.Path
) -> None:
    base, instruct = write_pair(tmp_path, architecture)
    store = pa_fast.LowRankStore(rank=16, attached=True)
    lm = pa_fast.load(base, instruct, store=store, dtype="float32", device="cpu")
    merged = pa_fast.load(
        base, instruct, store=pa_fast.LowRankStore(rank=16), dtype="float32", device="cpu"
    )
    ids = torch.arange(3, 27).view(2, 12)
    beside = {f"{path}.weight" for path, module in lm.model.named_modules() if hasattr(module, "u")}
    bits = {name: p.clone() for name, p in lm.model.named_parameters() if name in beside}
    sums = set()
    for lam in (0.0, 0.3, 1.0, 0.3):
        lm.set_lambda(lam)
        merged.set_lambda(lam)
        with torch.no_grad():
            found, expected = (
                one.model(input_ids=ids, use_cache=False).logits for one in (lm, merged)
            )
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
        assert lm.weights.verify() and lm.weights.effective_lambda() == pytest.approx(lam, abs=1e-5)
        sums.add(lm.weights.checksum())
    assert (
        len(sums) == 3
        and bits
        and all(torch.equal(p, bits[n]) for n, p in lm.model.named_parameters() if n in bits)
    )
    assert not lm.weights.lossless and "attached" in lm.identity["store"]
    assert (
        lm.weights.memory().total_bytes
        < merged.weights.memory().total_bytes + merged.weights.memory().mapped_bytes
    )


def test_writes_to_what_is_attached_are_seen(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(
        *write_pair(tmp_path, "llama"), store=pa_fast.LowRankStore(rank=16, attached=True)
    )
    lm.set_lambda(0.5)
    before = lm.weights.checksum()
    layer = lm.model.model.layers[0].mlp.up_proj
    for tensor, what in ((layer.lam, "the attached λ"), (layer.u, "the attached factors")):
        kept = tensor.clone()
        tensor.add_(1)
        assert lm.weights.checksum() != before and lm.weights.changed() == [what]
        with pytest.raises(WeightsError, match=what):
            lm.weights.verify()
        tensor.copy_(kept)
    assert lm.weights.checksum() == before and lm.weights.verify()


def test_a_delta_file_may_be_attached(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    encode(base, instruct, tmp_path / "delta", pa_fast.LowRankStore(rank=16))
    opened = pa_fast.load(base, delta=tmp_path / "delta", store="attached", device="cpu")
    bound = pa_fast.load(
        base, instruct, store=pa_fast.LowRankStore(rank=16, attached=True), device="cpu"
    )
    ids = torch.arange(3, 27).view(2, 12)
    for lam in (0.0, 0.7):
        opened.set_lambda(lam)
        bound.set_lambda(lam)
        with torch.no_grad():
            assert torch.equal(
                opened.model(input_ids=ids).logits, bound.model(input_ids=ids).logits
            )


def test_tensors_alone_have_no_layers_to_attach_to() -> None:
    with pytest.raises(UsageError, match="factors attach to layers"):
        pa_fast.LiveWeights.bind(*({"a": torch.ones(32, 32)} for _ in range(3)), store="attached")
