"""Two checkpoints of one model, tensor by tensor, however each is cut into shards."""

from __future__ import annotations

from dataclasses import dataclass

from pa_fast.checkpoint.config import Difference, differences, tied
from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.header import FLOATS, TensorInfo
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import PairError


@dataclass(frozen=True)
class Pair:
    """A base and an instruct checkpoint that describe the same model.

    `names` has every tensor in instruct's order on disk; `differences` are configuration keys that differ without
    changing the model; `notes` are sentences worth telling the user.
    """

    base: Checkpoint
    instruct: Checkpoint
    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def is_lerped(self, name: str) -> bool:
        """True for tensors that follow λ; the others (integers, bool, F64) must be equal on both sides."""
        return self.instruct.tensors[name].dtype in FLOATS


def pair(base: Checkpoint, instruct: Checkpoint) -> Pair:
    """Pair two open checkpoints by tensor name, from headers and config.json alone.

    Raises:
        PairError: the configurations describe different functions, a name is on one side only, shapes differ, or a
            dtype cannot be interpolated; each message names the key or tensor and both values.
    """
    found = check_configs(base, instruct)
    _check_names(base, instruct)
    for name, info in instruct.tensors.items():
        _check_tensor(base.tensors[name], info)
    kept = tuple(n for n, info in instruct.tensors.items() if info.dtype not in FLOATS)
    notes = (f"{len(kept)} tensors are not of a merged dtype and must be equal on both sides",) if kept else ()
    return Pair(base, instruct, tuple(instruct.tensors), tuple(found), notes)


def check_configs(base: Checkpoint, instruct: Checkpoint, *, tying: bool = True) -> list[Difference]:
    """The differences between two config.json that leave the model's function alone.

    Args:
        tying: whether a head that is tied on one side only counts as another function.

    Raises:
        PairError: a key that changes the function differs; the message names it and both values.
    """
    found = differences(base.config, instruct.config)
    serious = [d for d in found if not d.harmless and (tying or not d.key.endswith("tie_word_embeddings"))]
    if serious:
        more = f" (and {len(serious) - 5} more keys)" if len(serious) > 5 else ""
        hint = "these are not base and instruct of one model"
        if any(difference.key.endswith("tie_word_embeddings") for difference in serious):
            hint = "an output head that is tied on one side only is not supported"
        raise PairError(f"config.json changes the model: {'; '.join(map(str, serious[:5]))}{more}", hint)
    return found


def _check_names(base: Checkpoint, instruct: Checkpoint) -> None:
    for side, own, other in (("base", base, instruct), ("instruct", instruct, base)):
        only = [name for name in own.tensors if name not in other.tensors]
        if only:
            shown = ", ".join(quoted(name) for name in only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
            hint = "these are not base and instruct of one model"
            if all(name.endswith(("lm_head.weight", "embed_out.weight")) for name in only):
                hint = f"the output head is stored on one side only (tie_word_embeddings: {tied(own.config)}): not supported"
            raise PairError(f"{other.folder}: lacks {shown}, which only {side} ({own.folder}) has", hint)


def _check_tensor(base: TensorInfo, instruct: TensorInfo) -> None:
    where = f"tensor {quoted(instruct.name)}"
    if base.shape != instruct.shape:
        hint = "these are not base and instruct of one model"
        if len(base.shape) == len(instruct.shape) == 2 and base.shape[1:] == instruct.shape[1:]:
            hint = "if these are vocabulary rows: rows that one side alone has are not supported"
        raise PairError(f"{where}: shape {list(base.shape)} in base and {list(instruct.shape)} in instruct", hint)
    if base.dtype != instruct.dtype and not {base.dtype, instruct.dtype} <= FLOATS:
        merged = ", ".join(sorted(FLOATS))
        found = f"dtype {base.dtype} in base and {instruct.dtype} in instruct"
        raise PairError(f"{where}: {found}, expected equal dtypes or any of {merged}", "convert one side to the other's dtype")
