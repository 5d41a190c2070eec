"""The other ways in: a running engine, vLLM's weight-transfer calls, and lm-eval."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
import pa_fast.vllm
from tests.vllm.answers import answers
from tests.vllm.conftest import OPTIONS, clean_up


@pytest.fixture(scope="module")
def merged(
    pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory, fresh: Callable[..., Any]
) -> Any:
    folder = tmp_path_factory.mktemp("merged") / "0.3"
    pa_fast.merge(*pair, 0.3, folder)
    return folder, fresh({"0.3": str(folder)})["0.3"]


def test_attach(pair: tuple[str, str], merged: Any) -> None:
    from vllm import LLM

    llm = LLM(pair[1], worker_extension_cls=pa_fast.vllm.EXTENSION, **OPTIONS)
    try:
        lm = pa_fast.vllm.attach(llm, *pair)
        lm.set_lambda(0.3)
        assert answers(llm) == merged[1]
        assert lm.llm is llm
        with pytest.raises(pa_fast.PaFastError, match="follows a pair already"):
            pa_fast.vllm.attach(llm, *pair)
        assert lm.lam == 0.3 and lm.weights.verify() and answers(llm) == merged[1]
    finally:
        llm.llm_engine.engine_core.shutdown()
        clean_up()


def test_weight_transfer(pair: tuple[str, str], merged: Any) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        pair[1],
        worker_extension_cls=pa_fast.vllm.EXTENSION,
        weight_transfer_config={"backend": "pa_fast"},
        **OPTIONS,
    )
    try:
        with pytest.raises(Exception, match="nope"):
            llm.init_weight_transfer_engine({"init_info": {"base": "nope", "instruct": pair[1]}})
        llm.init_weight_transfer_engine({"init_info": {"base": pair[0], "instruct": pair[1]}})
        for lam in ("1", "0.3"):
            llm.start_weight_update()
            llm.update_weights({"update_info": {"lam": lam}})
            llm.finish_weight_update(weight_version=pa_fast.vllm.weight_version(lam))
            llm.reset_prefix_cache()
        assert answers(llm) == merged[1]
        llm.start_weight_update()
        with pytest.raises(Exception, match=r"LambdaInfo.__init__.*lam"):
            llm.update_weights({"update_info": {}})
        assert answers(llm) == merged[1]
        (output,) = llm.generate(
            [{"prompt_token_ids": [1, 2]}], SamplingParams(max_tokens=1), use_tqdm=False
        )
        assert "λ=0.3" in str(vars(output)) + str(vars(output.outputs[0]))
    finally:
        llm.llm_engine.engine_core.shutdown()
        clean_up()


def test_outputs_carry_lambda_and_checksum(
    pair: tuple[str, str], engine: Callable[..., Any]
) -> None:
    lm = engine(*pair)
    lm.set_lambda("1/3")
    version = pa_fast.vllm.weight_version("1/3", lm.weights.checksum())
    assert version.startswith("λ=1/3 checksum=")
    (output,) = lm._run([[1, 2, 3]], temperature=0.0, max_tokens=1)
    assert [span.version for span in output.outputs[0].weight_versions] == [version]


def test_rules_and_noise_by_the_names_of_the_checkpoint(
    pair: tuple[str, str], engine: Callable[..., Any], tmp_path: pathlib.Path, fresh: Any
) -> None:
    rule = [
        {"match": "*q_proj*", "lambda": 1},
        {"match": "*up_proj*", "times": "1/2"},
        {"group": "norms", "lambda": 0},
    ]
    pa_fast.merge(*pair, 0.3, tmp_path / "rule", rule=rule)
    pa_fast.merge(*pair, 0.3, tmp_path / "noise", rounding="stochastic", seed=5)
    expected = fresh({name: str(tmp_path / name) for name in ("rule", "noise")})
    assert expected["rule"] != expected["noise"]
    lm = engine(*pair, rule=rule)
    lm.set_lambda(0.3)
    assert answers(lm.llm) == expected["rule"]
    assert lm.weights.rule is not None and lm.weights.intended_lambda() != 0.3
    lm.close()
    noisy = engine(*pair, rounding=pa_fast.Rounding("stochastic", 5))
    noisy.set_lambda(0.3)
    assert answers(noisy.llm) == expected["noise"]


def test_a_rule_that_splits_a_fused_file(folders: pathlib.Path, engine: Callable[..., Any]) -> None:
    """Phi-3 stores q, k and v as one tensor: it has one λ, as on disk."""
    from tests.vllm import pairs

    lm = engine(*pairs.made(folders, "phi3"), rule=[{"match": "*qkv_proj*", "lambda": 1}])
    lm.set_lambda(0.3)
    assert lm.weights.verify()
