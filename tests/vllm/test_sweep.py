"""An engine that is switched gives the floats of unmodified engines on merged folders."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
from tests.vllm import pairs
from tests.vllm.answers import answers

NAMES = ("llama", "tied", "qwen2", "gemma2", "phi3", "demo")
LAMBDAS = ("0", "0.3", "0.7", "1")


@pytest.fixture(scope="session")
def expected(folders: pathlib.Path, fresh: Callable[..., Any]) -> dict[str, Any]:
    """`name λ` → answers on the merge at λ."""
    jobs = {}
    for name in NAMES:
        base, instruct = pairs.made(folders, name)
        for lam in LAMBDAS:
            jobs[f"{name} {lam}"] = str(folders / f"merged {name} {lam}")
            pa_fast.merge(base, instruct, lam, jobs[f"{name} {lam}"])
    found: dict[str, Any] = fresh(jobs)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_fresh_engines(
    name: str, folders: pathlib.Path, expected: dict[str, Any], engine: Callable[..., Any]
) -> None:
    lm = engine(*pairs.made(folders, name))
    sums = {}
    for lam in (*LAMBDAS, "0.3"):
        lm.set_lambda(lam)
        assert lm.weights.verify()
        assert answers(lm.llm) == expected[f"{name} {lam}"], f"λ = {lam}"
        assert sums.setdefault(lam, lm.weights.checksum()) == lm.weights.read_back(True)
    assert expected[f"{name} 0.3"] != expected[f"{name} 0.7"], "the test must be able to fail"
    assert lm.weights.effective_lambda() == pytest.approx(0.3, abs=0.02)


def test_the_protocol_gives_what_vllm_gives(
    pair: tuple[str, str], engine: Callable[..., Any]
) -> None:
    lm = engine(*pair)
    lm.set_lambda(0.3)
    context, continuation = [1, 5, 7, 9], [11, 13]
    (scored,) = lm.loglikelihood([(context, continuation)])
    (output,) = lm._run([context + continuation], temperature=0.0, max_tokens=1, prompt_logprobs=0)
    steps = output.prompt_logprobs[4:]
    assert scored.logprob == sum(step[t].logprob for step, t in zip(steps, continuation))
    spoken = lm.generate([context] * 3, pa_fast.Generation(6))
    assert spoken[0] == spoken[1] == spoken[2] and len(spoken[0]) == 6
    stopped = lm.generate([context], pa_fast.Generation(6, stop=(spoken[0][2],)))
    assert stopped == [spoken[0][: spoken[0].index(spoken[0][2])]]
    several = lm.generate([context], pa_fast.Generation(6, n=3, temperature=1.5, seed=1))
    assert len(several) == 3 and len({tuple(one) for one in several}) > 1
    assert several == lm.generate([context], pa_fast.Generation(6, n=3, temperature=1.5, seed=1))
    # neither seeds nor prompts beside each other draw the same numbers
    others = lm.generate([context] * 2, pa_fast.Generation(6, n=3, temperature=1.5, seed=2))
    assert len({tuple(one) for one in [*several, *others]}) == 9


def test_requests_that_do_not_fit_are_refused(
    pair: tuple[str, str], engine: Callable[..., Any]
) -> None:
    lm = engine(*pair, max_model_len=64)
    assert lm.loglikelihood([([1] * 60, [2, 3, 4])])
    with pytest.raises(
        pa_fast.PaFastError, match="request 0 has 64 tokens, and vLLM takes 1 to 63"
    ):
        lm.loglikelihood([([1] * 61, [2, 3, 4])])
    with pytest.raises(pa_fast.PaFastError, match="request 0 has an empty context"):
        lm.loglikelihood([([], [2])])
    for prompt, message in ((["x"][:0], "has 0 tokens"), ([1] * 64, "has 64"), ([512], "id 512")):
        with pytest.raises(pa_fast.PaFastError, match=message):
            lm.generate([[1], prompt], pa_fast.Generation(2))
    assert lm.generate([[1]], pa_fast.Generation(2))


@pytest.mark.parametrize("store", ["packed", pa_fast.SparseStore()], ids=["packed", "sparse"])
def test_other_stores_switch_to_the_same_bits(
    store: Any, pair: tuple[str, str], engine: Callable[..., Any]
) -> None:
    lm = engine(*pair)
    lm.set_lambda("0.3")
    expected = lm.weights.checksum(), answers(lm.llm)
    lm.close()
    other = engine(*pair, store=store)
    for lam in ("0.3", "1", "0", "0.3"):
        other.set_lambda(lam)
    assert (other.weights.checksum(), answers(other.llm)) == expected


def test_a_folder_belongs_to_one_engine(
    pair: tuple[str, str], engine: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    """Whatever argument of vLLM changes what it computes."""

    def one(lm: pa_fast.Engine) -> float:
        return 1.0

    lm = engine(*pair)
    pa_fast.sweep(lm, "0,1", one, tmp_path / "run")
    lm.close()
    other = engine(*pair, hf_overrides={"rms_norm_eps": 0.5})
    with pytest.raises(pa_fast.PaFastError, match="engine_args"):
        pa_fast.sweep(other, "0,0.5,1", one, tmp_path / "run")


def test_a_sweep_runs(
    pair: tuple[str, str], engine: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(
            f'{{"question": "{a} + {b} =", "choices": ["one", "two"], "answer": "one"}}'
            for a in range(4)
            for b in range(4)
        )
    )
    lm = engine(*pair)
    seen: list[int] = []

    class Counts:
        name, higher_is_better = "seen", True

        def __call__(self, engine: pa_fast.Engine) -> pa_fast.Score:
            seen.append(len(engine.generate([[1, 2, 3]] * 5, pa_fast.Generation(2))))
            return pa_fast.Score(float(seen[-1]), "requests", 1)

    evals = [f"icl:{rows},shots=1", Counts()]
    done = pa_fast.sweep(lm, "0,0.5,1", evals, tmp_path / "run")
    assert not done.failures and len(done.rows) == 6 and seen == [5, 5, 5]
    assert done.rows[0].effective_lambda == 0
