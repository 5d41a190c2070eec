"""Names of the checkpoint tensors that each live tensor is made of. λ rules and the noise of
stochastic rounding use these names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pa_fast.errors import UsageError
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule


class CheckpointNames:
    """The checkpoint's names for T live tensors.

    Args:
        names: the names of each live tensor; several where it is tied.
        checkpoint_names: live name → names in the checkpoint. A tensor with no name in it, and
            every tensor where it is None, keeps its live names.
    """

    def __init__(
        self,
        names: Sequence[Sequence[str]],
        checkpoint_names: Mapping[str, Sequence[str]] | None = None,
    ):
        self._live = [own[0] for own in names]
        known = {} if checkpoint_names is None else checkpoint_names
        traced = [tuple(dict.fromkeys(o for n in own for o in known.get(n, ()))) for own in names]
        self._names = [given or tuple(own) for given, own in zip(traced, names)]
        self._all = tuple(dict.fromkeys(name for given in self._names for name in given))

    def lams(self, rule: LambdaRule) -> tuple[float, ...]:
        """Return the λ of each live tensor under `rule`.

        Raises:
            UsageError: the rule does not fit the names, or gives different λ to checkpoint tensors
                that are one live tensor.
        """
        lams = rule.resolve(self._all)
        for live, names in zip(self._live, self._names):
            other = next((name for name in names if lams[name] != lams[names[0]]), None)
            if other is not None:
                raise UsageError(
                    f"{rule.where}: `{names[0]}` has λ = {lams[names[0]].key} and `{other}` λ ="
                    f" {lams[other].key}, but both are in the one live tensor `{live}`",
                    "give them the same λ, or merge to disk, where they are apart",
                )
        return tuple(float(lams[names[0]]) for names in self._names)

    def touched(self, rule: LambdaRule) -> list[str]:
        """Return one line for each row of `rule`: the tensors whose λ it sets."""
        return [str(touch) for touch in rule.touched(self._all)]

    def keys(self, rounding: Rounding) -> list[int]:
        """Return the key of each live tensor's noise under stochastic rounding.

        Raises:
            UsageError: a live tensor has several names in the checkpoint, each with its own noise.
        """
        keys = []
        for live, names in zip(self._live, self._names):
            if len(names) > 1:
                raise UsageError(
                    f"stochastic rounding of `{live}`: it is `{names[0]}` and `{names[1]}` in the"
                    " checkpoint, with noise each",
                    "use rounding nearest; where a checkpoint holds only one of them, name it in"
                    " checkpoint_names=",
                )
            key = rounding.key(names[0])
            assert key is not None
            keys.append(key)
        return keys
