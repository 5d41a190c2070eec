"""`lm-eval:…` as an EVAL: which tasks it means, what it records, and what it refuses before a model
is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pa_fast.errors import EvaluatorError, MissingExtra, UsageError
from pa_fast.evals import build, parse
from pa_fast.evals.lm_eval import tasks as loading
from tests.evals.harness_tasks import write_tasks

pytestmark = pytest.mark.usefixtures("lm_eval")


def figure(score: Any, key: str) -> float:
    return float(score.details[key])


def test_tasks_count_the_same_or_their_documents_do(engine: Any, tasks: Path) -> None:
    engine.set_lambda(0.4)
    group = build(f"lm-eval:t_group,include_path={tasks},metric=acc,average=micro")(engine)
    weighted = 12 * figure(group, "t_choice/acc") + 7 * figure(group, "t_likelihood/acc")
    assert (
        group.value == pytest.approx(weighted / 19) == pytest.approx(figure(group, "t_group/acc"))
    )
    assert group.unit == "acc, micro"
    assert group.value == pytest.approx(sum(item.score for item in group.items) / group.n)
    for name in ("t_tag", "t_group"):
        tag = build(f"lm-eval:{name},include_path={tasks},metric=acc")(engine)
        assert (
            tag.value
            == (figure(tag, "t_choice/acc") + figure(tag, "t_likelihood/acc")) / 2
            != group.value
        )
        assert tag.unit == "acc, macro"
        assert {item.group for item in tag.items} == {"t_choice", "t_likelihood"}
    mixed = build(f"lm-eval:t_group,t_answer,include_path={tasks}")(engine)
    # the group does not aggregate acc_norm, the metric of its first task
    each = (
        figure(mixed, "t_choice/acc_norm"),
        figure(mixed, "t_likelihood/acc"),
        figure(mixed, "t_answer/exact_match,strict"),
    )
    assert mixed.value == pytest.approx(sum(each) / 3)
    assert mixed.unit == "acc_norm and acc and exact_match,strict, macro"


def test_a_metric_and_a_filter_can_be_chosen(engine: Any, tasks: Path) -> None:
    engine.set_lambda(1.0)
    score = build(f"lm-eval:t_answer,include_path={tasks},metric=exact_match\\,lower")(engine)
    assert (score.unit, score.value) == (
        "exact_match,lower",
        figure(score, "t_answer/exact_match,lower"),
    )


def test_a_limit_is_that_many_documents_in_all(engine: Any, tasks: Path) -> None:
    engine.set_lambda(1.0)
    whole = {
        (item.group, item.id): item.score
        for item in build(f"lm-eval:t_choice,t_answer,include_path={tasks}")(engine).items
    }
    evaluator = build(f"lm-eval:t_choice,t_answer,include_path={tasks}", limit=5)
    assert evaluator.check(engine) == []  # type: ignore[attr-defined]
    score = evaluator(engine)
    assert sorted(item.group for item in score.items) == ["t_answer"] * 3 + ["t_choice"] * 2
    assert all(whole[item.group, item.id] == item.score for item in score.items), (
        "the ids are those of all documents"
    )
    other = build(f"lm-eval:t_choice,t_answer,include_path={tasks}", limit=5, seed=1)(engine)
    assert [item.id for item in other.items] != [item.id for item in score.items]
    assert {
        item.group
        for item in build(f"lm-eval:t_group,t_answer,include_path={tasks}", limit=1)(engine).items
    } == {"t_answer"}


def test_requests_are_built_and_encoded_before_the_first_lambda(
    engine: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedTokenizerFast

    evaluator: Any = build(f"lm-eval:t_choice,t_answer,include_path={tasks},shots=1", limit=6)
    calls = []
    for kind, name in ((PreTrainedTokenizerFast, "encode"), (ConfigurableTask, "fewshot_context")):
        own = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
        )
    assert evaluator.check(engine) == []
    assert {"encode", "fewshot_context"} <= set(calls)
    calls.clear()
    first = evaluator(engine)
    assert "fewshot_context" not in calls
    fresh = build(f"lm-eval:t_choice,t_answer,include_path={tasks},shots=1", limit=6)(engine)
    assert undated(first) == undated(fresh), "asked beforehand or not"


def test_requests_that_do_not_fit_are_told_before_the_first_lambda(
    engine: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pa_fast.evals.lm_eval as ours

    def of(text: str, positions: int) -> Any:
        monkeypatch.setattr(ours.PaFastLM, "max_length", positions)
        return build(text)

    text = f"lm-eval:t_choice,include_path={tasks},shots=2"
    [note] = of(text, 16).check(engine)
    assert (
        "requests are too long for the model, which has positions for 16 tokens: they lose the"
        " beginning" in note
    )
    for shots in (2, 0):
        with pytest.raises(EvaluatorError, match=r"\d+ of \d+ requests are too long") as said:
            few = text.replace("shots=2", f"shots={shots},overflow=refuse")
            of(few, 16 if shots else 8).check(engine)
        assert ("fewer shots=" in (said.value.hint or "")) == (shots > 0)
        assert "overflow=truncate cuts them" in (said.value.hint or "")
    with pytest.raises(
        EvaluatorError,
        match=r"12 of 12 prompts ask for up to 9 new tokens, and the model has positions for 9",
    ):
        of(f"lm-eval:t_answer,include_path={tasks}", 9).check(engine)


def test_ties_are_counted_in_the_metric_that_scores(
    engine: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = build(f"lm-eval:t_choice,include_path={tasks}")
    assert evaluator(engine).details["t_choice/ties"] == 0
    from pa_fast.evals.lm_eval.model import EncodedRequests

    monkeypatch.setattr(
        EncodedRequests, "score", lambda requests, *_: [(-1.0, False)] * requests.count
    )
    assert (
        build(f"lm-eval:t_choice,include_path={tasks},metric=acc")(engine).details["t_choice/ties"]
        == 12
    )


def test_the_softmax_is_taken_in_fp32(engine: Any) -> None:
    import torch

    import pa_fast.evals.lm_eval as ours

    assert ours.PaFastLM(engine).softmax_dtype == torch.float32
    assert ours.PaFastLM(engine, softmax_dtype="bfloat16").softmax_dtype == torch.bfloat16


def of_kind(files: Mapping[str, str], kind: str) -> dict[str, Any]:
    """Contents of an evaluator's files whose names begin with `kind`, without what differs between
    equal runs; samples by the task that lm-eval finds in their names."""
    from lm_eval.utils import get_file_task_name

    read = {name: text for name, text in files.items() if name.startswith(kind)}
    if kind == "samples":
        return {
            get_file_task_name(name): [json.loads(line) for line in text.splitlines()]
            for name, text in read.items()
        }
    (text,) = read.values()
    results = json.loads(text)
    assert results.pop("date") == 0 and "total_evaluation_time_seconds" not in results
    return dict(results)


def undated(score: Any) -> tuple[Any, ...]:
    """A score without what differs between equal runs."""
    kinds = (of_kind(score.files, kind) for kind in ("results", "samples"))
    return (replace(score, files={}), *kinds)


def test_results_are_lm_evals_own_form(engine: Any, tasks: Path) -> None:
    from lm_eval.utils import make_table

    engine.set_lambda(0.3)
    one = build(f"lm-eval:t_group,t_answer,include_path={tasks},shots=1,chat=true", limit=3)
    state = random.getstate()
    score = one(engine)
    assert random.getstate() == state
    results = of_kind(score.files, "results")
    assert {
        "results",
        "groups",
        "configs",
        "versions",
        "n-shot",
        "n-samples",
        "higher_is_better",
        "task_hashes",
        "chat_template_sha",
    } <= results.keys()
    assert "acc_norm" in make_table(results) and "t_group" in make_table(results, "groups")
    assert results["n-shot"] == {"t_answer": 1, "t_choice": 1, "t_group": 1, "t_likelihood": 1}
    assert results["fewshot_as_multiturn"] is True and "message.role" in results["chat_template"]
    assert results["model_name"] == f"lambda=0.3.{one.name}"
    ours = results["config"]["pa_fast"]
    assert (ours["lambda"], ours["checksum"]) == ("0.3", f"{engine.weights.checksum():016x}")
    assert (ours["base"], ours["instruct"], ours["dtype"]) == tuple(
        engine.identity[key] for key in ("base", "instruct", "dtype")
    )
    assert undated(one(engine)) == undated(score), "no other times, no addresses"
    assert of_kind(score.files, "samples").keys() == {"t_answer", "t_choice", "t_likelihood"}


def test_samples_may_be_left_out(engine: Any, tasks: Path) -> None:
    one = build(f"lm-eval:t_choice,include_path={tasks},log_samples=false", limit=3)
    (name,) = one(engine).files
    assert name.startswith("results_") and one.identity == (
        build(f"lm-eval:t_choice,include_path={tasks}", limit=3).identity
    )


def test_files_that_lm_eval_cannot_write_are_an_error(
    engine: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.loggers import EvaluationTracker

    def full(*arguments: Any, **options: Any) -> None:
        """As where the disk is full: lm-eval says so in its log alone."""

    one = build(f"lm-eval:t_choice,include_path={tasks}", limit=3)
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", full)
    with pytest.raises(EvaluatorError, match="0 of 3 samples, and 1 of 2 files"):
        one(engine)


def test_nothing_is_said_on_stderr(
    engine: Any, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build(f"lm-eval:t_choice,t_answer,include_path={tasks},shots=1", limit=2)(engine)
    build(f"lm-eval:t_rolling,include_path={tasks}", limit=2)(engine)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_chat_needs_a_template(engine: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(EvaluatorError, match="the tokenizer has no chat template"):
        build(f"lm-eval:t_answer,include_path={tasks},chat=true")(engine)


def test_identity_is_what_is_asked(tasks: Path, tmp_path: Path) -> None:
    def of(folder: Path, names: str = "t_choice", options: str = "shots=2", **more: int) -> Any:
        return build(f"lm-eval:{names},include_path={folder},{options}", **more).identity

    moved = write_tasks(tmp_path / "moved")
    first = of(tasks)
    assert of(moved) == first, "a folder may move"
    assert json.loads(json.dumps(first)) == first
    assert (first["lm_eval"], first["versions"]) == (
        importlib.metadata.version("lm_eval"),
        {"t_choice": "1.0"},
    )
    variants = [
        of(tasks, options="shots=1"),
        of(tasks, options="shots=2,chat=true"),
        of(tasks, options="shots=2,metric=acc"),
    ]
    variants += [
        of(tasks, options="shots=2,average=micro"),
        of(tasks, options="shots=2,overflow=refuse"),
    ]
    variants += [of(tasks, limit=3), of(tasks, seed=1), of(tasks, names="t_choice,t_answer")]
    for file, change in (
        ("t_choice.yaml", ("{{prompt}}", "{{prompt}} ")),
        ("t_choice.jsonl", (">", "]")),
        ("documents.py", ("upper()", "lower()")),
    ):
        changed = write_tasks(tmp_path / f"changed-{file}")
        path = changed / file
        path.write_text(path.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
        variants.append(of(changed))
    shown = write_tasks(tmp_path / "shown")
    with (shown / "t_choice-pool.jsonl").open("a", encoding="utf-8") as pool:
        pool.write('{"prompt": "ab>", "answer": "ba", "choices": ["ba", "x"]}\n')
    variants.append(of(shown))
    assert all(variant != first for variant in variants)


def test_lm_evals_own_tasks_are_looked_at_only_for_names_not_found(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def registered() -> Any:
        raise LookupError("14,000 files")

    monkeypatch.setattr(loading, "registered_tasks", registered)
    build(f"lm-eval:t_answer,t_group,include_path={tasks}")
    (tasks / "t_other.yaml").write_text(
        "group: t_other\ntask: [t_choice, arc_easy]\n", encoding="utf-8"
    )
    try:
        for name in ("arc_easy", "t_other"):
            with pytest.raises(LookupError):
                build(f"lm-eval:{name},include_path={tasks}")
    finally:
        (tasks / "t_other.yaml").unlink()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """lm-eval's own tasks, as if they were one."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.yaml").write_text(
        "task: arc_easy\ndataset_path: allenai/ai2_arc\n", encoding="utf-8"
    )
    manager = TaskManager(include_path=str(tmp_path / "own"), include_defaults=False)
    monkeypatch.setattr(loading, "registered_tasks", lambda: manager)
    return manager


_CHOICE = "include: t_choice.yaml\ntask: mine\n"
_NOWHERE = (
    "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
    " nowhere.jsonl}}\ntest_split: test\n"
)


@pytest.mark.parametrize(
    ("yaml", "eval", "message", "hint"),
    [
        ("", "arc_eazy", "no task, group or tag `arc_eazy`, nor in", "did you mean arc_easy?"),
        ("task: [", "mine", "mine.yaml cannot be read: while parsing", "lm-eval ls tasks"),
        ("task: mine\n", "mine", "cannot load mine: ", "YAML file and its data"),
        (_NOWHERE, "mine", "cannot load mine: FileNotFoundError: ", "YAML file and its data"),
        (
            "task: mine\nprocess_docs: !function nowhere.f\n",
            "mine",
            "No module named 'nowhere'|module 'nowhere'",
            "lm-eval[ifeval]",
        ),
        (
            f"{_CHOICE}unsafe_code: true\n",
            "mine",
            "runs code that the model writes",
            "leave it out",
        ),
        (f"{_CHOICE}doc_to_image: prompt\n", "mine", "needs images or sound", "leave it out"),
        (f"{_CHOICE}num_fewshot: 0\n", "mine,shots=3", "fixed at 0 shots", "one --eval for each"),
        (
            f"{_CHOICE}metric_list: [{{metric: bypass}}]\n",
            "mine",
            "measures nothing",
            "leave it out",
        ),
        (
            "",
            "t_choice,t_rolling",
            r"more is better for t_choice \(acc_norm\) and worse for t_rolling \(word_perp",
            "two --eval",
        ),
        ("", "t_choice,metric=f1", "`t_choice` has no metric `f1`, it has acc, acc_norm", "choose"),
        (
            "",
            "t_choice,t_answer,metric=acc",
            "`t_answer` has no metric `acc`, it has exact_match",
            "two --eval",
        ),
        (
            "",
            "t_answer,metric=exact_match\\,upper",
            "`t_answer` applies no filter `upper`, it has .*lower",
            "choose",
        ),
        (
            "",
            "t_choice,use_cache=x.db",
            "use_cache would give every λ the scores of the first",
            "leave it out",
        ),
        ("", "t_choice,shots=some", "expected a whole number from 0", "shots=0"),
        (
            "",
            "t_rolling,shots=2",
            "`t_rolling` has 1 document to draw shots from, expected at least shots=2",
            "take shots=1 or fewer",
        ),
        (
            f"{_CHOICE}fewshot_split: test\n",
            "mine,shots=12",
            "`mine` has 11 documents to draw shots from, expected at least shots=12",
            "take shots=11 or fewer",
        ),
        (
            f"{_CHOICE}fewshot_config: {{sampler: first_n}}\nnum_fewshot: 999\n",
            "mine",
            r"`mine` has \d+ documents to draw shots from, expected at least shots=999",
            " or fewer",
        ),
        (
            "",
            "t_choice,t_group",
            "cannot load t_choice, t_group: ValueError: Duplicate task 't_choice'",
            "check",
        ),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    yaml: str, eval: str, message: str, hint: str, few: Any, tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    if yaml:
        (folder / "mine.yaml").write_text(yaml, encoding="utf-8")
    with pytest.raises((EvaluatorError, UsageError), match=message) as said:
        build(f"lm-eval:{eval},include_path={folder}")
    assert hint in (said.value.hint or "")


def test_as_many_shots_as_there_are_documents_for(engine: Any, tasks: Path, tmp_path: Path) -> None:
    shutil.copytree(tasks, tmp_path / "tasks")
    (tmp_path / "tasks" / "mine.yaml").write_text(f"{_CHOICE}fewshot_split: test\n")
    for eval in ("mine,shots=11", "t_rolling,shots=1"):
        evaluator: Any = build(f"lm-eval:{eval},include_path={tmp_path}/tasks")
        evaluator.check(engine)


@pytest.mark.parametrize(
    "yaml",
    [
        "doc_to_text: !function broken.f\n",
        "num_fewshot: 1\nfewshot_config: {sampler: !function broken.Sampler}\n",
    ],
)
def test_a_task_that_cannot_write_its_requests_is_named(
    engine: Any, tasks: Path, tmp_path: Path, yaml: str
) -> None:
    shutil.copytree(tasks, tmp_path / "tasks")
    (tmp_path / "tasks" / "broken.py").write_text(
        "calls = []\ndef f(document):\n    calls.append(document)\n"
        "    if len(calls) > 3: raise KeyError('column')\n    return 'x'\n"
        "from lm_eval.api.samplers import ContextSampler\n"
        "class Sampler(ContextSampler):\n    def sample(self, n, **_): raise KeyError('column')\n"
    )
    (tmp_path / "tasks" / "mine.yaml").write_text(f"{_CHOICE}{yaml}")
    evaluator: Any = build(f"lm-eval:mine,include_path={tmp_path}/tasks")
    with pytest.raises(
        EvaluatorError, match="`mine` cannot write its requests: KeyError: 'column'"
    ) as said:
        evaluator.check(engine)
    assert "templates" in (said.value.hint or "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluatorError, match=r"include_path .*nowhere is not a folder"):
        build(f"lm-eval:mine,include_path={tmp_path / 'nowhere'}")


def test_a_missing_extra_names_its_install_command(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    for package in ("lm_eval", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, gone=package: None if name == gone else find(name),
            )
            with pytest.raises(MissingExtra, match=f"{package}, which is not installed") as error:
                build(f"lm-eval:t_choice,include_path={tasks}")
            assert error.value.hint == "pip install 'pa_fast[eval]'"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9")
    with pytest.raises(MissingExtra, match=r"found lm_eval 0\.4\.9, expected 0\.4\.13 or later"):
        build(f"lm-eval:t_choice,include_path={tasks}")


def test_columns(tmp_path: Path) -> None:
    assert parse("lm-eval:piqa,arc_easy,shots=5").column == "lm-eval:piqa,arc_easy,shots=5"
    assert (
        parse(f"lm-eval:ifeval,chat=true,include_path={tmp_path}/mine").column
        == "lm-eval:ifeval,chat=true,include_path=mine"
    )
