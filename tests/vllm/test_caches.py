"""No answer comes from key-value blocks of another λ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
from pa_fast.errors import EngineError

PROMPT = [1, *[(7 * k) % 50 + 3 for k in range(140)]]


def spoken(lm: Any, salt: str | None = None) -> tuple[list[Any], int]:
    from vllm import SamplingParams

    request = {"prompt_token_ids": PROMPT, **({"cache_salt": salt} if salt else {})}
    chosen = SamplingParams(
        temperature=0.0, max_tokens=4, logprobs=0, ignore_eos=True, detokenize=False
    )
    (output,) = lm.llm.generate([request], chosen, use_tqdm=False)
    one = output.outputs[0]
    return [step[t].logprob for t, step in zip(one.token_ids, one.logprobs)], (
        output.num_cached_tokens or 0
    )


def test_blocks_of_the_last_lambda_are_dropped(
    pair: tuple[str, str], engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = engine(*pair, block_size=32)
    clean = {}
    for lam in (0.0, 1.0):
        lm.set_lambda(lam)
        clean[lam], cached = spoken(lm)
        assert not cached
    assert clean[0.0] != clean[1.0]
    # without the reset the test fails: blocks of λ = 1 answer at λ = 0
    lm.weights.set_lambda(0.0)
    stale, cached = spoken(lm)
    assert cached and stale != clean[0.0]
    lm.on_weights_changed()
    assert spoken(lm) == (clean[0.0], 0)


def test_requests_of_the_engine_have_a_salt_per_switch(
    pair: tuple[str, str], engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that even a reset that does nothing leaves no stale answer."""
    lm = engine(*pair, block_size=32)
    monkeypatch.setattr(lm.llm, "reset_prefix_cache", lambda: True)
    said = {}
    for lam in (0.0, 1.0, 0.0):
        lm.set_lambda(lam)
        (output,) = lm._run([PROMPT], temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
        assert not output.num_cached_tokens
        one = output.outputs[0]
        values = [step[t].logprob for t, step in zip(one.token_ids, one.logprobs)]
        assert said.setdefault(lam, values) == values


def test_unfinished_requests_refuse_a_switch(
    pair: tuple[str, str], engine: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    lm = engine(*pair)
    lm.set_lambda(0.3)
    core = lm.llm.llm_engine
    core.add_request(
        "one",
        {"prompt_token_ids": PROMPT},
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False),
    )
    core.step()
    with pytest.raises(EngineError, match="while vLLM computes requests"):
        lm.set_lambda(0.6)
    assert lm.lam == 0.3 and lm.weights.verify()
    while core.has_unfinished_requests():
        core.step()
    lm.set_lambda(0.6)


def test_a_reset_that_fails_is_an_error(
    pair: tuple[str, str], engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = engine(*pair)
    monkeypatch.setattr(lm.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="key-value blocks"):
        lm.set_lambda(0.6)
    with pytest.raises(EngineError, match="key-value blocks"):
        lm.generate([PROMPT], pa_fast.Generation(1))


def test_a_foreign_write_is_seen(pair: tuple[str, str], engine: Callable[..., Any]) -> None:
    lm = engine(*pair)
    lm.set_lambda(0.3)

    def write(model: Any) -> str:
        name, parameter = next(iter(model.named_parameters()))
        parameter.data.view(-1)[7] += 1
        return str(name)

    (name,) = lm.llm.apply_model(write)
    assert lm.weights.changed() == [name]
    lm.set_lambda(0.3)
    assert lm.weights.verify()

    def replace(model: Any) -> None:
        import torch

        head = model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)

    lm.llm.apply_model(replace)
    with pytest.raises(EngineError, match="lm_head"):
        lm.set_lambda(0.6)
