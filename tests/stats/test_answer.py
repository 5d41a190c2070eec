"""Findings and answers: in the evaluator's own direction, and in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pa_fast.base import Item, Lambda, Score
from pa_fast.errors import StatisticsError, UsageError
from pa_fast.stats import Answer, Evaluation, analyse
from pa_fast.stats.finding import MOST_LAMBDAS, find
from tests.stats.simulate import SHAPES, Sweeps

LAMS = [Lambda(f"{k}/10") for k in range(11)]


def evaluation(
    name: str = "icl",
    shape: Callable[[np.ndarray], np.ndarray] = SHAPES["peak +5"],
    n: int = 2000,
    *,
    seed: int = 0,
    cost: bool = False,
    lams: list[Lambda] = LAMS,
    tasks: int = 1,
) -> Evaluation:
    """Right or wrong; a cost counts 0.1 for what is wrong and adds 3."""
    y = Sweeps(np.array(lams, float), shape).draw(np.random.default_rng(seed), n).y
    y = 3 + 0.1 * (1 - y) if cost else y
    scores = {}
    for lam, column in zip(lams, y.T):
        items = [Item(str(k), f"t{k % tasks}", float(v)) for k, v in enumerate(column)]
        scores[lam] = Score(float(column.mean()), "nats" if cost else "accuracy", n, items)
    return Evaluation.of(name, scores, not cost)


def test_a_gain_that_is_told_is_the_first_sentence() -> None:
    answer = analyse([evaluation(), evaluation("follow", SHAPES["monotone"], seed=1)])
    one = answer.objective
    held = one.difference(answer.chosen)
    assert answer.gain is not None and held.low > 0 and held.p < 0.05
    low, high = one.range
    other = answer.others[0].difference(answer.chosen)
    assert answer.sentence.replace("−", "-") == (
        f"λ = {answer.chosen.key} scores {100 * answer.gain:.1f} points above instruct "
        f"(cross-fitted; simultaneous 95 % band {100 * held.low:+.1f} to {100 * held.high:+.1f}; "
        f"2,000 items); the best λ lies in {low.key}–{high.key}; follow changes by "
        f"{100 * other.value:+.1f} points ({100 * other.low:+.1f} to {100 * other.high:+.1f})."
    )


def test_a_cost_says_that_less_is_better() -> None:
    answer, mirrored = analyse([evaluation(cost=True)]), analyse([evaluation()])
    assert answer.chosen == mirrored.chosen
    assert answer.gain is not None and mirrored.gain is not None
    assert answer.gain == pytest.approx(-0.1 * mirrored.gain)
    held, other = (a.objective.difference(a.chosen) for a in (answer, mirrored))
    assert (held.value, held.low) == pytest.approx((-0.1 * other.value, -0.1 * other.high))
    assert held.low < held.value < held.high < 0
    assert "below instruct (less is better)" in answer.sentence and "points" not in answer.sentence


def test_few_items_tell_nothing_and_say_what_they_exclude() -> None:
    answer = analyse([evaluation(n=100, shape=SHAPES["flat"])])
    band = answer.objective.bands[Lambda(1)]
    assert answer.chosen != 1
    assert answer.sentence.startswith("No λ can be told from λ = 1 with 100 items: gains above ")
    assert f"{100 * band.high.max():.1f} points are excluded" in answer.sentence
    worse = analyse([evaluation(n=300, shape=lambda x: np.where(x < 0.25, 0.3, 0.7))])
    assert worse.chosen != 1 and "can be told to be better than λ = 1" in worse.sentence


def test_instruct_is_best_or_tied() -> None:
    answer = analyse([evaluation(shape=SHAPES["monotone"])])
    assert answer.chosen == 1 and answer.gain is not None
    assert answer.sentence == "Instruct is best, or tied with the best."


def test_without_λ_1_there_is_no_gain() -> None:
    answer = analyse([evaluation(lams=LAMS[:-1])])
    assert answer.gain is None and "λ = 1 was not evaluated" in answer.sentence
    assert set(answer.objective.bands) == {Lambda(0)}
    with pytest.raises(UsageError, match="`icl` has no score at λ = 1"):
        answer.objective.difference(Lambda("0.5"))


def test_λ_that_do_not_keep_enough_are_not_chosen() -> None:
    both = [evaluation(), evaluation("follow", SHAPES["monotone"], seed=1)]
    free, bound = analyse(both), analyse(both, keep={"follow": 0.99})
    assert bound.allowed is not None and 1 < len(bound.allowed) < 11
    assert free.chosen not in bound.allowed and bound.chosen in bound.allowed
    assert bound.gain is not None and free.gain is not None and bound.gain < free.gain
    assert bound.sentence.endswith(", of the λ that keep 99 % of follow.")
    assert analyse(both, keep={"follow": 1.0}).chosen == 1


def test_what_cannot_be_answered_is_named() -> None:
    both = [evaluation(), evaluation("follow", seed=1)]
    with pytest.raises(UsageError, match="no evaluator `icls`"):
        analyse(both, objective="icls")
    with pytest.raises(UsageError, match="no evaluator `x`"):
        analyse(both, keep={"x": 0.9})
    with pytest.raises(UsageError, match=r"`follow` is to keep 98 of its score"):
        analyse(both, keep={"follow": 98})
    with pytest.raises(UsageError, match="no score at λ = 1"):
        analyse([both[0], evaluation("follow", lams=LAMS[:-1])], keep={"follow": 0.9})
    plain = Evaluation.of("plain", {lam: Score(0.5, "u", 1) for lam in LAMS})
    with pytest.raises(StatisticsError, match="no items"):
        analyse([both[0], plain], keep={"plain": 0.9})
    assert "plain" not in analyse([both[0], plain]).sentence
    with pytest.raises(UsageError, match="no evaluator to answer from"):
        analyse([])


def test_percentages_of_λ_1() -> None:
    finding = find(evaluation())
    share = finding.percent(Lambda("0.5"))
    ratio = finding.scores[5] / finding.scores[10]
    assert share.value == pytest.approx(ratio) and share.low < ratio < share.high
    assert finding.percent(Lambda(1)).value == 1
    cost = find(evaluation(cost=True))
    assert cost.percent(Lambda("0.5")).value == pytest.approx(cost.scores[5] / cost.scores[10])


def test_the_frontier_of_two_evaluators() -> None:
    rising = evaluation("follow", lambda x: 0.3 + 0.6 * x, n=4000, seed=1)
    answer = analyse(
        [evaluation(n=4000), replace(rising, values=dict([*rising.values.items()][2:]))]
    )
    frontier = answer.frontier("follow")
    assert list(frontier) == LAMS[2:], "the λ at which both were evaluated"
    assert frontier[Lambda(1)] and not all(frontier.values())


def test_tasks_are_findings_of_their_own() -> None:
    finding = find(evaluation(tasks=3, n=900))
    tasks = finding.tasks()
    assert [task.name for task in tasks] == ["t0", "t1", "t2"]
    assert [task.n for task in tasks] == [300] * 3
    assert np.mean([task.scores for task in tasks], 0) == pytest.approx(finding.scores)
    y = tasks[0].measured()[0].y
    change = y[:, 5] - y[:, 10]
    assert tasks[0].wins(Lambda("0.5")) == ((change > 0).sum(), (change < 0).sum())
    # a task of one item is there, without intervals
    scores = {
        lam: Score(
            0.5,
            "u",
            3,
            [Item(i, g, s) for i, g, s in (("0", "a", 0), ("1", "a", 1), ("2", "b", 0.5))],
        )
        for lam in LAMS
    }
    single = find(Evaluation.of("x", scores)).tasks()[1]
    assert single.name == "b" and single.refused is not None
    with pytest.raises(StatisticsError, match="task `b` has 1 item"):
        single.difference(Lambda(0))


def test_rows_are_tidy() -> None:
    answer = analyse([evaluation(tasks=2), evaluation("ppl", cost=True)])
    rows = list(answer.rows())
    assert len(rows) == 11 * 2 * (1 + 2) + 11 * 2
    header = "lambda,evaluator,task,metric,score,se,n,ref,diff,low,high,p_adj,in_set"
    assert ",".join(rows[0]) == header
    row = next(r for r in rows if (r["evaluator"], r["lambda"], r["ref"]) == ("ppl", "0.5", "1"))
    held = answer.others[0].difference(Lambda("0.5"))
    assert (row["diff"], row["low"], row["high"], row["p_adj"]) == (
        held.value,
        held.low,
        held.high,
        held.p,
    )
    assert row["metric"] == "nats" and row["task"] == ""


def test_of_very_many_λ_some_are_looked_at() -> None:
    lams = [Lambda(f"{k}/1000") for k in range(1001)]
    y = np.zeros((50, 1001))
    y[:, 333] = y[:25, :] = 1
    scores = {
        lam: Score(
            float(column.mean()), "u", 50, [Item(str(k), "g", v) for k, v in enumerate(column)]
        )
        for lam, column in zip(lams, y.T)
    }
    finding = find(Evaluation.of("x", scores))
    assert len(finding.lams) <= MOST_LAMBDAS and finding.left_out == 1001 - len(finding.lams)
    assert {Lambda(0), Lambda("0.333"), Lambda(1)} <= set(finding.lams)


def same(one: Answer, other: Answer) -> bool:
    return one.sentence == other.sentence and list(one.rows()) == list(other.rows())


def test_equal_sweeps_have_equal_answers() -> None:
    assert same(analyse([evaluation()]), analyse([evaluation()]))
    assert not same(analyse([evaluation()]), analyse([evaluation(seed=1)]))
