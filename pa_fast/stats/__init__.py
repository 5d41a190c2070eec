"""Statistics of a sweep: bands, the set of λ that may be best, the choice, its unbiased gain.

Everything is a function of the items' scores, and so of the journal alone; random draws have fixed
seeds. `analyse` answers from results in memory; `SweepResult.answer()` from a run folder.

    evaluation = Evaluation.of("icl", {Lambda(0): score_0, Lambda("0.5"): …, Lambda(1): score_1})
    print(analyse([evaluation]).sentence)
"""

from __future__ import annotations

from pa_fast.stats.answer import Answer, analyse
from pa_fast.stats.finding import Evaluation, Finding, Interval

__all__ = ["Answer", "Evaluation", "Finding", "Interval", "analyse"]
