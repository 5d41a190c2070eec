"""Likelihoods and greedy text of the transformers engine against the plainest possible
computation."""

from __future__ import annotations

import json
import pathlib
import random

import pytest
import torch

import pa_fast
from pa_fast import Generation
from pa_fast.engines.scoring import batches
from pa_fast.errors import EngineError
from tests.engines.architectures import write_pair
from tests.engines.test_loading import edit_config


@pytest.fixture(scope="module", params=["llama", "gemma-2", "gpt-2", "qwen2"])
def lm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> pa_fast.LambdaModel:
    folder: pathlib.Path = tmp_path_factory.mktemp(request.param)
    # fp32: in 16 bits the batch's composition alone moves scores by more than any mistake that is
    # looked for
    return pa_fast.load(*write_pair(folder, request.param), dtype="float32", batch_size=4)


def requests(count: int) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(0)

    def ids(most: int) -> list[int]:
        return [draw.randrange(3, 128) for _ in range(draw.randint(1, most))]

    return [(ids(20), ids(6)) for _ in range(count)]


def test_batched_likelihoods_are_those_of_single_requests(lm: pa_fast.LambdaModel) -> None:
    lm.set_lambda(0.4)
    pairs = requests(23)
    for (context, continuation), found in zip(pairs, lm.loglikelihood(pairs)):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([context + continuation])).logits[0]
        scores = torch.log_softmax(logits.double(), -1)[len(context) - 1 : -1]
        expected = sum(float(scores[k, token]) for k, token in enumerate(continuation))
        assert found.logprob == pytest.approx(expected, abs=1e-3)
        assert found.is_greedy == (scores.argmax(-1).tolist() == continuation)


def test_the_greedy_continuation_is_called_greedy(lm: pa_fast.LambdaModel) -> None:
    lm.set_lambda(0.4)
    prompts = [context for context, _ in requests(9)]
    said = lm.generate(prompts, Generation(max_new_tokens=5))
    assert [len(tokens) for tokens in said] == [5] * 9
    assert all(found.is_greedy for found in lm.loglikelihood(list(zip(prompts, said))))


def test_generation_ends_at_a_stop_token_and_leaves_it_out(lm: pa_fast.LambdaModel) -> None:
    lm.set_lambda(0.4)
    prompts = [context for context, _ in requests(9)]
    free = lm.generate(prompts, Generation(max_new_tokens=8))
    stop = free[0][2]
    for before, after in zip(
        free, lm.generate(prompts, Generation(max_new_tokens=8, stop=(stop,)))
    ):
        assert after == (before[: before.index(stop)] if stop in before else before)


def test_the_first_of_several_stop_tokens_ends_a_text(lm: pa_fast.LambdaModel) -> None:
    lm.set_lambda(0.4)
    prompts = [context for context, _ in requests(9)]
    free = lm.generate(prompts, Generation(max_new_tokens=8))
    stops = (free[0][5], free[0][2], free[1][4])
    for before, after in zip(free, lm.generate(prompts, Generation(max_new_tokens=8, stop=stops))):
        ends = [before.index(stop) for stop in stops if stop in before]
        assert after == before[: min(ends, default=8)]


def test_texts_follow_our_configuration_and_nothing_that_a_model_brings(
    lm: pa_fast.LambdaModel,
) -> None:
    from transformers import GenerationConfig

    lm.set_lambda(0.4)
    prompts, asked = [context for context, _ in requests(9)], Generation(max_new_tokens=6)
    expected = lm.generate(prompts, asked)
    own = lm.model.generation_config
    said = sorted({token for text in expected for token in text})
    lm.model.generation_config = brought = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        num_beams=3,
        repetition_penalty=5.0,
        max_length=21,
        forced_eos_token_id=7,
        suppress_tokens=said,
        eos_token_id=expected[0][1],
        cache_implementation="static",
    )
    try:
        assert lm.generate(prompts, asked) == expected
        assert lm.model.generation_config is brought
    finally:
        lm.model.generation_config = own


def test_a_text_ends_where_either_model_would_end_it(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    (instruct / "generation_config.json").write_text(json.dumps({"eos_token_id": [90, 7]}))
    edit_config(base, eos_token_id=5)
    (base / "generation_config.json").unlink()
    lm = pa_fast.load(base, instruct)
    assert lm.stop_tokens == (2, 5, 7, 90)
    assert lm.identity["stop_tokens"] == [2, 5, 7, 90]


def test_scores_repeat_to_the_last_bit_when_a_lambda_returns(lm: pa_fast.LambdaModel) -> None:
    pairs = requests(11)
    lm.set_lambda(0.7)
    first = lm.loglikelihood(pairs)
    lm.set_lambda(-1.0)
    assert lm.loglikelihood(pairs) != first
    lm.set_lambda(0.7)
    assert lm.loglikelihood(pairs) == first


def test_what_cannot_be_scored_is_refused(lm: pa_fast.LambdaModel) -> None:
    for pairs, message in (
        ([([], [5])], "request 0 has an empty context"),
        ([([5], [6]), ([5], [])], "request 1 has an empty continuation"),
        ([([5] * 64, [6, 7])], "request 0 has 65 tokens; the model has positions for 64"),
    ):
        with pytest.raises(EngineError, match=message):
            lm.loglikelihood(pairs)
    with pytest.raises(EngineError, match="prompt 0 is empty"):
        lm.generate([[]], Generation(3))
    with pytest.raises(EngineError, match="prompt 0 with 10 new tokens has 70 tokens"):
        lm.generate([[5] * 60], Generation(10))


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_sampling_is_refused_before_anything_else(
    lm: pa_fast.LambdaModel, shared_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lm.identity, "shared_prefix", shared_prefix)
    said = r"the transformers engine cannot sample: found temperature = 0\.7, n = 4"
    with pytest.raises(EngineError, match=said) as refused:
        lm.generate([[]], Generation(3, temperature=0.7, n=4))
    assert "leave temperature at 0" in str(refused.value.hint)


def test_batches_are_sorted_by_length_and_complete() -> None:
    assert list(batches([3, 9, 3, 5], 2)) == [[1, 3], [0, 2]]
    assert list(batches([], 2)) == []


def test_requests_done_are_told_in_order_up_to_all(lm: pa_fast.LambdaModel) -> None:
    asked, told = requests(11), []
    quiet = lm.loglikelihood(asked)
    lm.on_progress = lambda done, total: told.append((done, total))
    try:
        assert lm.loglikelihood(asked) == quiet
        assert told == [(n, 11) for n in range(1, 12)]
        told.clear()
        lm.generate([context for context, _ in asked], Generation(max_new_tokens=2))
        assert told == sorted(told) and told[-1] == (11, 11) and len(told) > 1
    finally:
        lm.on_progress = None
