"""λ rules: which λ each tensor has, by ordered rows of name patterns, groups and depth schedules.

    - {group: norms, lambda: 1}                    # as in instruct, whatever λ is swept
    - {match: "*.layers.0.*", times: 0.5}          # half of the swept λ
    - {group: mlp, times: {0: 0.2, 1: 1}}          # first layer to last, linear in between

The first row that matches a tensor's name decides. A tensor that no row matches has the swept λ.
"""

from __future__ import annotations

from pa_fast.rules.rule import LambdaRule, RuleLike, Touch

__all__ = ["LambdaRule", "RuleLike", "Touch"]
