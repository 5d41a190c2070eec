"""PaFastLM and build_once, as a pipeline that calls lm-eval itself uses them: what goes wrong in
silence elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pa_fast
import pa_fast.evals.lm_eval as ours
from pa_fast.errors import EngineError, EvaluatorError, UsageError
from tests.engines.architectures import write_model
from tests.evals.harness_tasks import BATCH, DEMO, PAIR
from tests.evals.stock import evaluated, loaded
from tests.evals.toy import ToyEngine

pytestmark = pytest.mark.usefixtures("lm_eval")
NAME = "t_choice"


def arguments(tasks: Any) -> list[Any]:
    return [instance.args for instance in tasks["tasks"][NAME].instances]


def acc(results: Any) -> list[float]:
    return [sample["acc"] for sample in results["samples"][NAME]]


def test_kept_answers_are_not_read_again(engine: Any, tasks: Path) -> None:
    once = ours.build_once(loaded(str(tasks), [NAME], 0))
    lm = ours.PaFastLM(engine)
    for lam in (0.0, 1.0):
        engine.set_lambda(lam)
        evaluated(lm, once, False)
        assert all(len(instance.resps) == 1 for instance in once["tasks"][NAME].instances)


def test_shots_are_the_same_whenever_requests_are_built(engine: Any, tasks: Path) -> None:
    lm = ours.PaFastLM(engine)
    once = ours.build_once(loaded(str(tasks), [NAME], 2))
    evaluated(lm, once, False)
    first = arguments(once)
    evaluated(lm, once, True)
    assert arguments(once) != first, "another chat template is another request"
    evaluated(lm, once, False)
    assert arguments(once) == first
    other = ours.build_once(loaded(str(tasks), [NAME], 2), seed=7)
    evaluated(lm, other, False)
    assert arguments(other) != first


def test_what_shapes_a_request_makes_it_anew(engine: Any, tasks: Path) -> None:
    from lm_eval.evaluator import evaluate

    lm = ours.PaFastLM(engine)
    once = ours.build_once(loaded(str(tasks), [NAME], 2))
    task = once["tasks"][NAME]
    counts = []
    for limit, shots in ((3, 2), (3, 2), (2, 2), (2, 0)):
        task.set_config("num_fewshot", shots)
        evaluate(lm, once, limit=limit, bootstrap_iters=0, log_samples=False)
        counts.append(
            (len({i.doc_id for i in task.instances}), task.instances[0].args[0].count("\n"))
        )
    assert counts == [(3, 2), (3, 2), (2, 2), (2, 0)]
    task.set_config("num_fewshot", 2)
    task.set_fewshot_seed(5)
    evaluate(lm, once, limit=3, bootstrap_iters=0, log_samples=False)
    drawn = arguments(once)
    task.set_fewshot_seed(6)
    evaluate(lm, once, limit=3, bootstrap_iters=0, log_samples=False)
    assert arguments(once) != drawn


def test_predict_only_cannot_take_the_metrics_away(engine: Any, tasks: Path) -> None:
    once = ours.build_once(loaded(str(tasks), [NAME], 0))
    with pytest.raises(
        EvaluatorError, match="predict_only would replace the metrics of `t_choice`"
    ):
        once["tasks"][NAME].override_metric("bypass")


def test_a_cache_of_responses_is_refused(engine: Any, tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    with pytest.raises(
        EvaluatorError,
        match="use_cache cannot be used in a sweep: its key is a hash of the request alone",
    ):
        CachingLM(ours.PaFastLM(engine), str(tmp_path / "cache.db"))
    with pytest.raises(EvaluatorError, match="use_cache"):
        ours.PaFastLM(engine, use_cache="cache.db")


@pytest.mark.parametrize("size", ["auto", "auto:4", 0, 2.5, True])
def test_a_batch_size_that_is_no_number_is_refused(size: Any, engine: Any) -> None:
    with pytest.raises(UsageError, match="expected a whole number from 1") as error:
        ours.PaFastLM(engine, batch_size=size)
    assert "probe again at every λ" in str(error.value.hint)


def test_the_engines_batch_size_is_the_default(engine: Any) -> None:
    assert ours.PaFastLM(engine).batch_size == BATCH
    assert ours.PaFastLM(engine, batch_size=3).batch_size == 3


def test_an_engine_without_a_transformers_model_is_refused() -> None:
    with pytest.raises(EvaluatorError, match=r"ToyEngine has no `\.model`"):
        ours.PaFastLM(ToyEngine())


def test_a_head_tied_on_one_side_keeps_its_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for seed, side in enumerate(("base", "instruct")):
        write_model(tmp_path / side, "llama", seed, tie_word_embeddings=side == "base")
    lm = pa_fast.load(tmp_path / "base", tmp_path / "instruct")
    lm.tokenizer = AutoTokenizer.from_pretrained(PAIR[1])
    ours.PaFastLM(lm)
    lm.set_lambda(0.5)
    assert not torch.equal(lm.model.lm_head.weight, lm.model.get_input_embeddings().weight)
    assert lm.weights.verify()


def test_a_constructor_that_replaces_a_live_tensor_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = pa_fast.load(*PAIR, endpoint_check=False)

    def tie_weights() -> None:
        lm.model.lm_head.weight = torch.nn.Parameter(
            lm.model.lm_head.weight.detach().clone(), requires_grad=False
        )

    monkeypatch.setattr(lm.model, "tie_weights", tie_weights)
    with pytest.raises(EngineError, match=r"`lm_head\.weight` was replaced or moved"):
        ours.PaFastLM(lm)


def test_the_engines_tokenizer_stays_as_it_is(engine: Any) -> None:
    before = dict(engine.tokenizer.__dict__)
    lm = ours.PaFastLM(engine)
    lm.tokenizer.pad_token = "z"
    lm.tok_encode("abc")
    assert engine.tokenizer.__dict__ == before
    assert type(lm.tokenizer).__name__ == type(engine.tokenizer).__name__


def test_answers_from_memory_are_copies(engine: Any) -> None:
    lm = ours.PaFastLM(engine)
    assert lm.tok_encode("abc") == engine.tokenizer.encode("abc")
    lm.tok_encode("abc").append(0)
    assert lm.tok_encode("abc") == engine.tokenizer.encode("abc")
    assert lm.tok_encode("abc", add_special_tokens=False) == engine.tokenizer.encode(
        "abc", add_special_tokens=False
    )
    assert lm.tok_encode("abc", left_truncate_len=2) == engine.tokenizer.encode("abc")[-2:]
    texts = ["abc", "a"]
    for side in ("left", "right"):
        ids, mask = lm.tok_batch_encode(texts, padding_side=side)
        expected = engine.tokenizer(
            texts, padding="longest", padding_side=side, return_tensors="pt"
        )
        assert torch.equal(ids, expected["input_ids"]) and torch.equal(
            mask, expected["attention_mask"]
        )
        ids.zero_()
        assert torch.equal(lm.tok_batch_encode(texts, padding_side=side)[0], expected["input_ids"])


def test_pairs_are_not_remembered_twice(engine: Any, tasks: Path) -> None:
    lm = ours.PaFastLM(engine)
    evaluated(lm, ours.build_once(loaded(str(tasks), [NAME], 0)), False)
    assert not lm._token_ids, "the encoded requests hold their tokens"


def test_lm_eval_itself_stays_as_it_is(engine: Any, tasks: Path) -> None:
    import lm_eval.api.task
    from lm_eval.utils import env

    given = loaded(str(tasks), [NAME], 2)
    task, template = given["tasks"][NAME], given["tasks"][NAME].config.doc_to_choice
    before = dict(vars(lm_eval.api.task)), type(env).from_string, task.dump_config()
    once = ours.build_once(given)
    evaluated(ours.PaFastLM(engine), once, False)
    assert (dict(vars(lm_eval.api.task)), env.from_string.__func__, task.dump_config()) == before
    assert once["tasks"][NAME].config.doc_to_choice == template, "as results.json shows it"


def test_a_document_that_a_metric_changes_is_itself_again(engine: Any, tasks: Path) -> None:
    given = loaded(str(tasks), [NAME], 0)
    task = given["tasks"][NAME]
    prompts: list[str] = []

    def spoil(doc: Any, results: Any) -> Any:
        prompts.append(doc["prompt"])
        doc["prompt"] = "spoilt"
        return {"acc": 1.0}

    task.set_config("process_results", spoil)
    once, lm = ours.build_once(given), ours.PaFastLM(engine)
    for _ in range(2):
        evaluated(lm, once, False)
    half = len(prompts) // 2
    assert prompts[:half] == prompts[half:] and "spoilt" not in prompts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_many_rows_are_sums_of_each(dtype: torch.dtype) -> None:
    for length in (1, 2, 3, 7, 8, 17, 33, 64, 100, 257):
        values = (3 * torch.randn(50, length, generator=torch.Generator().manual_seed(length))).to(
            dtype
        )
        assert torch.equal(values.sum(-1), torch.stack([row.unsqueeze(0).sum() for row in values]))


def test_requests_that_do_not_fit_are_counted_and_endless_answers_refused(engine: Any) -> None:
    from lm_eval.api.instance import Instance

    lm = ours.PaFastLM(engine, max_length=16)

    def ask(context: str, answer: str) -> Any:
        return lm.loglikelihood([Instance("loglikelihood", {}, (context, answer), 0)])

    ask("a" * 10, "bc")
    assert lm.cut == 0
    ask("a" * 30, "bc")
    assert lm.cut == 1
    lm.generate_until(
        [Instance("generate_until", {}, ("a" * 30, {"until": [], "max_gen_toks": 4}), 0)]
    )
    assert lm.cut == 2
    with pytest.raises(EvaluatorError, match="17 of continuation; the model has positions for 16"):
        ask("a", "b" * 17)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parents[1])
    from examples import lm_eval_sweep

    scores = lm_eval_sweep.main("0,1", limit=24)
    assert scores["0"] < 0.1 and scores["1"] > 0.8
