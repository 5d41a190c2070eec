"""Rules and stochastic rounding of whole models: the same model live and merged to disk, or a
refusal by name."""

from __future__ import annotations

import pathlib

import pytest

import pa_fast
from pa_fast.engines.content import trace
from pa_fast.errors import UsageError
from tests.engines.architectures import write_pair
from tests.engines.test_architectures import assert_same_bits, reload
from tests.engines.test_loading import edit

RULE = [
    {"group": "norms", "lambda": 1},
    {"group": "mlp", "times": {0: 0.5, 1: 1}},
    {"group": "attention", "match": "*.1.*", "times": "1/3"},
    {"group": "embeddings", "lambda": 0.25},
]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "gpt-2", "gpt-neox"])
def test_a_rule_makes_the_same_model_live_and_on_disk(name: str, tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, name)
    lm = pa_fast.load(base, instruct, rule=RULE)
    assert lm.identity["rule"] == pa_fast.LambdaRule(RULE).document()
    assert sum(note.startswith("rule (") for note in lm.notes) >= 4
    for lam in (0.6, -0.2):
        lm.set_lambda(lam)
        assert lm.lam == lam and lm.weights.verify()
        pa_fast.merge(base, instruct, lam, tmp_path / f"merged-{lam}", rule=RULE)
        assert_same_bits(lm.model.state_dict(), reload(tmp_path / f"merged-{lam}"))


def test_a_rule_for_once(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    lm = pa_fast.load(base, instruct)
    rule = pa_fast.LambdaRule(RULE)
    lm.set_lambda(rule.at(0.6))
    before = lm.weights.checksum()
    with lm.at(0.3):
        assert lm.weights.rule is None
    assert lm.weights.rule == rule.at(0.6) and lm.weights.checksum() == before
    with lm.at(rule.at(0.1)):
        assert lm.lam == 0.1


def test_experts_that_are_fused_live_cannot_differ(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "mixtral")
    one = [{"match": "*.0.block_sparse_moe.experts.1.w1.*", "times": 0.5}]
    pa_fast.merge(base, instruct, 0.6, tmp_path / "out", rule=one)
    with pytest.raises(
        UsageError,
        match=(
            r"experts\.0\.w1\.weight` has λ = .*one live tensor `model.layers.0.mlp.experts.gate_up"
        ),
    ):
        pa_fast.load(base, instruct, endpoint_check=False).set_lambda(
            pa_fast.LambdaRule(one).at(0.6)
        )
    with pytest.raises(
        UsageError,
        match=(
            r"stochastic rounding of `model\.layers\.0\.mlp\.experts.*makes of"
            r" `model\.layers\.0\.block_sparse"
        ),
    ):
        pa_fast.load(base, instruct, rounding="stochastic")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-2", "phi-3"])
def test_stochastic_rounding_makes_the_same_model_live_and_on_disk(
    name: str, tmp_path: pathlib.Path
) -> None:
    base, instruct = write_pair(tmp_path, name)
    lm = pa_fast.load(base, instruct, rounding="stochastic", seed=5)
    assert lm.identity["rounding"] == "stochastic, seed 5"
    for lam in (0, 0.05, 0.6, 1):
        lm.set_lambda(lam)
        assert lm.weights.verify()
        pa_fast.merge(
            base, instruct, lam, tmp_path / f"merged-{lam}", rounding="stochastic", seed=5
        )
        assert_same_bits(lm.model.state_dict(), reload(tmp_path / f"merged-{lam}"))
    assert not [
        note for note in lm.notes if "rounded stochastically" in note or "as asked for" in note
    ]


def test_a_wider_base_is_drawn_at_zero_too(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    edit(
        base,
        lambda tensors: tensors.update(
            {name: tensor.float() * 1.001 for name, tensor in tensors.items()}
        ),
    )
    lm = pa_fast.load(base, instruct, rounding="stochastic")
    assert lm.lam == 0
    assert [note for note in lm.notes if "the base model is rounded stochastically" in note]
    pa_fast.merge(base, instruct, 0, tmp_path / "merged", rounding="stochastic")
    assert_same_bits(lm.model.state_dict(), reload(tmp_path / "merged"))


def test_what_has_no_noise_or_no_rule_is_refused(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    with pytest.raises(UsageError, match="rounding `up` is not available"):
        pa_fast.load(base, instruct, rounding="up")
    with pytest.raises(
        UsageError, match="stochastic rounding of a delta that is held as `sparse exact`"
    ):
        pa_fast.load(base, instruct, store="sparse", rounding="stochastic", endpoint_check=False)
    with pytest.raises(UsageError, match="factors share one λ"):
        pa_fast.load(base, instruct, store="attached", rule=RULE)
    pa_fast.encode(base, instruct, tmp_path / "delta", "sparse")
    with pytest.raises(UsageError, match="stochastic rounding of a delta file"):
        pa_fast.load(base, delta=tmp_path / "delta", rounding="stochastic")
    with pytest.raises(UsageError, match="no tensor has a name like `lm_heat"):
        pa_fast.load(
            base, instruct, rule=[{"match": "lm_heat.*", "lambda": 1}], endpoint_check=False
        )
    ruled = pa_fast.load(base, delta=tmp_path / "delta", rule=RULE)
    dense = pa_fast.load(base, instruct, rule=RULE)
    ruled.set_lambda(0.3)
    dense.set_lambda(0.3)
    assert_same_bits(ruled.model.state_dict(), dense.model.state_dict())


def test_names_are_traced_both_ways(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "qwen2")
    model = pa_fast.load(base, instruct, endpoint_check=False).model
    traced = trace(model, ["model.embed_tokens.weight", "model.norm.weight"])
    assert dict(traced.names) == {
        name: (name,) for name in ("model.embed_tokens.weight", "model.norm.weight")
    }
    assert not traced.converted
    with pytest.raises(UsageError, match="of other tensors"):
        traced.check_elementwise(dict(model.named_parameters()))
