"""Shared prefixes: what is computed once, and that no score can tell."""

from __future__ import annotations

import gc
import inspect
import logging
import pathlib
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pa_fast
from pa_fast.base import Continuation
from pa_fast.engines import scoring
from pa_fast.engines.prefix import LEVELS, Past, Segment, cache_argument, forest, obstacle
from pa_fast.errors import EngineError
from pa_fast.evals.spec import build
from tests.engines.architectures import ARCHITECTURES, config, write_pair

ROOT = pathlib.Path(__file__).parents[2]
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8},
    "gemma-2": {"sliding_window": 8},
    "gemma-3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi-3": {"sliding_window": 8},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products are not worth a second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ends(
    segments: Sequence[Segment], above: tuple[Segment, ...] = ()
) -> Iterator[tuple[Segment, ...]]:
    """The way down to each end, from the top."""
    for segment in segments:
        yield from ends(segment.under, (*above, segment)) if segment.under else [(*above, segment)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    token = st.integers(0, 2)  # so few that beginnings are shared at every depth
    beginnings = draw(st.lists(st.lists(token, max_size=12), min_size=1, max_size=4))
    rows = draw(
        st.lists(
            st.tuples(st.sampled_from(beginnings), st.lists(token, min_size=1, max_size=6)),
            max_size=14,
        )
    )
    made = [beginning + rest for beginning, rest in rows]
    return made, [draw(st.integers(0, len(row) - 1)) for row in made]


@given(requests())
@settings(max_examples=200)
def test_every_request_is_put_together_once_and_ends_in_tokens_of_its_own(
    found: tuple[list[list[int]], list[int]],
) -> None:
    rows, most = found
    ways = list(ends(forest(rows, most)))
    assert sorted(way[-1].row for way in ways) == list(range(len(rows)))
    for way in ways:
        own = way[-1].row
        assert [segment.start for segment in way] == [0, *(segment.stop for segment in way[:-1])]
        assert list(chain.from_iterable(rows[s.row][s.start : s.stop] for s in way)) == rows[own]
        assert way[-1].start <= most[own] and len(way) <= LEVELS + 1
        assert all(len(segment) > 0 for segment in way)


@given(requests())
@settings(max_examples=50)
def test_sharing_computes_no_token_more_and_follows_from_the_requests_alone(
    found: tuple[list[list[int]], list[int]],
) -> None:
    rows, most = found
    segments = forest(rows, most)
    computed = {segment for way in ends(segments) for segment in way}
    assert sum(map(len, computed)) <= sum(map(len, rows))
    assert segments == forest([list(row) for row in rows], list(most))


def test_common_examples_and_each_prompt_are_computed_once() -> None:
    shots = list(range(100, 160))
    prompts = [[*shots, k, *range(200, 220)] for k in range(5)]
    rows = [[*prompt, answer] for prompt in prompts for answer in range(4)]
    (top,) = forest(rows, [len(prompts[0]) - 1] * 20)
    assert (top.start, top.stop) == (0, 60)
    assert [(s.start, s.stop, len(s.under)) for s in top.under] == [(60, 80, 4)] * 5
    assert {end.start for item in top.under for end in item.under} == {80}


def test_little_in_common_is_not_worth_a_pass() -> None:
    rows = [[1, 2, *range(10 * k, 10 * k + 30)] for k in range(3, 9)]
    assert all(not segment.under for segment in forest(rows, [20] * 6))
    assert forest([], []) == []


def test_thousands_of_nested_requests_need_no_deep_stack() -> None:
    rows = [[1] * n for n in range(1, 3000)]
    assert len(list(ends(forest(rows, [len(row) - 1 for row in rows])))) == len(rows)


def make_model(name: str, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def tree(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Items behind two blocks of common examples, items of their own, and single requests,
    shuffled; up to 64 tokens."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 128) for _ in range(draw.randint(low, high))]

    blocks = [ids(40, 40), ids(26, 26)]
    prompts = [block + ids(2, 18) for block in blocks for _ in range(4)] + [
        ids(8, 30) for _ in range(3)
    ]
    pairs = [(prompt, ids(1, 6)) for prompt in prompts for _ in range(draw.randint(2, 4))]
    pairs += [(ids(1, 20), ids(1, 4)) for _ in range(3)]
    # One that fills all 64 positions, beside shorter ones in the same batch
    full = ids(58, 58)
    pairs += [(full, ids(size, size)) for size in (7, 1, 3)]
    draw.shuffle(pairs)
    return pairs


def assert_same(found: list[Continuation], expected: list[Continuation], within: float) -> None:
    assert [x.is_greedy for x in found] == [x.is_greedy for x in expected]
    assert max(abs(x.logprob - y.logprob) for x, y in zip(found, expected, strict=True)) < within


@pytest.mark.parametrize(("name", "changes"), [*((n, {}) for n in ARCHITECTURES), *WINDOWS.items()])
def test_scores_are_those_of_the_plain_path(name: str, changes: dict[str, Any]) -> None:
    model, pairs = make_model(name, **changes), tree()
    assert obstacle(model) is None
    # As the last answer of some: what the model itself would say
    pairs += [(context, [greedy(model, context)]) for context, _ in pairs[:3]]
    plain = scoring.loglikelihood(model, pairs, 4)
    shared = scoring.loglikelihood(model, pairs, 4, shared_prefix=True)
    assert_same(shared, plain, within=1e-4)
    assert shared != plain, "bits that agree everywhere would mean that nothing was shared"
    assert sum(x.is_greedy for x in shared) >= 3
    if changes:
        wide = scoring.loglikelihood(
            make_model(name, **{**changes, "sliding_window": 64}), pairs, 4
        )
        assert max(abs(x.logprob - y.logprob) for x, y in zip(shared, wide)) > 0.01, (
            "the window must cut something"
        )


def greedy(model: Any, context: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([context])).logits[0, -1].argmax())


def test_tokens_that_requests_share_pass_through_the_model_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompt, passes = make_model("llama"), list(range(10, 50)), []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", counted)
    scoring.loglikelihood(model, [(prompt, [60 + k, 61]) for k in range(4)], 8, shared_prefix=True)
    assert passes == [(1, 39), (4, 2)]


@pytest.mark.parametrize(
    ("name", "annotation"),
    [
        ("cache", "Cache | None"),
        ("past_key_values", "Optional[Cache]"),
        ("memory", "Cache"),
        ("past_key_values", None),
        ("cache", None),
    ],
)
def test_the_cache_goes_in_by_the_name_that_a_model_has_for_it(
    name: str, annotation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = make_model("llama"), tree()
    expected = scoring.loglikelihood(model, pairs, 4, shared_prefix=True)
    forward, own = model.forward, str(cache_argument(model))

    def renamed(**kwargs: Any) -> Any:
        return forward(**{own if key == name else key: value for key, value in kwargs.items()})

    parameters = [
        p
        for p in inspect.signature(forward).parameters.values()
        if p.name != own and p.kind is not p.VAR_KEYWORD
    ]
    typed = inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation or inspect.Parameter.empty
    )
    renamed.__signature__ = inspect.Signature([*parameters, typed])  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", renamed)
    assert cache_argument(model) == name and obstacle(model) is None
    assert scoring.loglikelihood(model, pairs, 4, shared_prefix=True) == expected


def test_a_model_of_today_passes_its_cache_without_a_deprecation(
    recwarn: pytest.WarningsRecorder,
) -> None:
    scoring.loglikelihood(make_model("llama"), tree(), 4, shared_prefix=True)
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]


def test_sharing_that_is_lost_is_warned_of_once_with_its_cost(
    tmp_path: pathlib.Path, logged: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pa_fast.engines import transformers as engine

    folders = write_pair(tmp_path, "llama")
    prompt, lone = list(range(10, 50)), [([5, 6, 7], [8]), ([9, 6, 7], [8])]
    asked = [(prompt, [60 + k, 61]) for k in range(4)]
    for options in ({}, {"shared_prefix": False}):
        pa_fast.load(*folders, **options).loglikelihood(asked)
    assert not logged, "nothing is lost where it is shared, or where it was not wanted"
    monkeypatch.setattr(engine, "obstacle", lambda model: "its forward pass takes no cache")
    lm = pa_fast.load(*folders)
    lm.loglikelihood(lone)
    assert not logged, "nothing is lost by requests that begin differently"
    for _ in range(3):
        lm.loglikelihood(asked)
    (record,) = logged
    assert record.levelname == "WARNING" and record.name == "pa_fast"
    # 4 requests of 41 tokens; shared, 39 once and 2 each
    assert "164 tokens through the model where 47 would do (3.5 ×)" in record.getMessage()
    assert (
        "of LlamaForCausalLM, its forward pass takes no cache (transformers " in record.getMessage()
    )


@pytest.mark.parametrize("name", ["_supports_default_dynamic_cache", "_is_stateful"])
def test_a_release_that_drops_what_sharing_asks_of_it_loses_sharing_alone(name: str) -> None:
    model = make_model("llama")

    class Without:
        def __getattr__(self, asked: str) -> Any:
            if asked == name:
                raise AttributeError(asked)
            return getattr(model, asked)

    assert f"has no `{name}`" in (obstacle(Without()) or "")  # type: ignore[arg-type]


def test_no_keys_and_values_outlive_the_call() -> None:
    from transformers import Cache

    model = make_model("gemma-3")
    scoring.loglikelihood(model, tree(), 4, shared_prefix=True)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if issubclass(type(thing), Cache)]


@pytest.mark.slow
def test_answers_of_100_million_parameters_agree() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=16000, max_position_embeddings=256)
    ).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) > 100e6
    draw = random.Random(1)
    prompts = [[draw.randrange(16000) for _ in range(size)] for size in (40, 50)]
    pairs = [
        (prompt, [draw.randrange(16000) for _ in range(k + 1)])
        for prompt in prompts
        for k in range(4)
    ]
    plain = scoring.loglikelihood(model, pairs, 8)
    shared = scoring.loglikelihood(model, pairs, 8, shared_prefix=True)
    assert_same(shared, plain, within=1e-4)


def test_the_demo_pair_answers_alike(tmp_path: pathlib.Path) -> None:
    pair = ROOT / "examples" / "demo" / "pair"
    engines = [
        pa_fast.load(pair / "base", pair / "instruct", dtype="float32", shared_prefix=shared)
        for shared in (True, False)
    ]
    assert [engine.identity["shared_prefix"] for engine in engines] == [True, False]
    icl = build(rf"icl:{ROOT}/examples/demo/fewshot.jsonl,shots=5,sep=\n", limit=12)
    for lam in (0.0, 0.6):
        for engine in engines:
            engine.set_lambda(lam)
        shared, plain = (icl(engine) for engine in engines)
        assert shared.items == plain.items and 0 < shared.value < 1


def test_bits_repeat_when_a_lambda_returns(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "gemma-2"), batch_size=4)
    assert lm.shared_prefix
    pairs = tree()
    lm.set_lambda(0.7)
    first = lm.loglikelihood(pairs)
    lm.set_lambda(-1.0)
    assert lm.loglikelihood(pairs) != first
    lm.set_lambda(0.7)
    assert lm.loglikelihood(pairs) == first


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("phi-3", {"rope_parameters": LONGROPE}, "rotary frequencies depend on the length"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary frequencies",
        ),
        ("llama", {"is_causal": False}, "more than keys and values"),
        ("llama", {"attention_chunk_size": 8}, "in chunks"),
    ],
)
def test_where_a_prefix_depends_on_what_follows_nothing_is_shared(
    name: str, changes: dict[str, Any], why: str
) -> None:
    assert why in (obstacle(make_model(name, **changes)) or "")


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        (
            "Qwen3NextConfig",
            {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16},
            "more than keys and values",
        ),
        ("MambaConfig", {"state_size": 4}, "takes no position_ids"),
        ("BloomConfig", {"n_layer": 2, "n_head": 2}, "takes no position_ids"),
    ],
)
def test_models_with_other_memories_than_keys_and_values_score_on_the_plain_path(
    kind: str, changes: dict[str, Any], why: str
) -> None:
    import transformers

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
        "intermediate_size": 32,
    }
    small |= {"num_key_value_heads": 2, **changes}
    model = (
        transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**small))
        .float()
        .eval()
    )
    assert why in (obstacle(model) or "")
    pairs = tree()[:5]
    assert_same(
        scoring.loglikelihood(model, pairs, 4), scoring.loglikelihood(model, pairs, 1), within=1e-4
    )


def test_layers_that_transformers_has_no_cache_for_share_nothing() -> None:
    model = make_model("llama")
    model.config.layer_types = ["of_tomorrow"] * 2
    assert "knows no cache" in (obstacle(model) or "")


def test_loading_says_when_nothing_can_be_shared(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "phi-3", rope_parameters=LONGROPE), dtype="float32")
    assert not lm.shared_prefix and lm.identity["shared_prefix"] is False
    assert any("rotary frequencies" in note for note in lm.notes)
    assert len(lm.loglikelihood(tree())) == len(tree())


def test_a_cache_that_a_model_did_not_fill_is_refused() -> None:
    from transformers import DynamicCache

    batch = [Segment(0, 0, 5, (Segment(0, 5, 6), Segment(1, 5, 6)))]
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    assert Past.of(cache, batch, layers=1).rows == {0: 0, 1: 0}
    for layers, wrong in ((2, batch), (1, [Segment(0, 0, 4, batch[0].under)])):
        with pytest.raises(EngineError, match="did not leave keys and values of every token"):
            Past.of(cache, wrong, layers)
