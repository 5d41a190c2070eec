"""Where the elements of a checkpoint lie in an engine's model: learned through the engine's own
loading, with no table of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.pair import Pair
from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.checkpoint.streaming import MergeSpec, live_dtype, merge_chunk_
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch

NamedTensors = Iterator[tuple[str, "torch.Tensor"]]
"""(name in the checkpoint, tensor), as models of vLLM and SGLang load them."""

_DIGIT = 255
"""Labels are written in digits of 1 to 255, which bf16 and fp16 hold exactly; 0 is padding."""


def tensors_of(pair: Pair, side: str) -> NamedTensors:
    """Yield the tensors of `side` under the names and in the shapes of a merge: a tied head and
    extra vocabulary rows are those that `pa_fast.merge` would write."""
    for name in pair.names:
        yield name, pair.chunk(side, name, 0, pair.count(name)).view(pair.shapes[name])
        pair.check_unchanged(name)
        pair.release(name)


def merged_tensors(pair: Pair, spec: MergeSpec) -> NamedTensors:
    """Yield the tensors of the merge `spec`, as a saved one would hold them."""
    import torch

    merges = spec.tensor_merges(pair)
    for name in pair.names:
        base, instruct = (pair.chunk(s, name, 0, pair.count(name)) for s in ("base", "instruct"))
        out = torch.empty(base.numel(), dtype=torch_dtype(live_dtype(pair, name, "auto")))
        merge_chunk_(out, base, instruct, merges.get(name))
        yield name, out.view(pair.shapes[name])
        pair.check_unchanged(name)
        pair.release(name)


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return name → parameter, one that is shared once."""
    return dict(model.named_parameters())


def others(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the tensors of `model` that are no parameters, by name: buffers and plain
    attributes of its modules, without the key-value cache of a running engine."""
    import torch

    return {
        f"{path}.{key}": value.detach().clone()
        for path, module in model.named_modules()
        for key, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, torch.Tensor) and key != "kv_cache"
    }


# --- origins


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of parameter `name`, which hold elements of the checkpoint tensor
    `origin` alone."""

    name: str
    start: int
    stop: int
    origin: str


@dataclass(frozen=True)
class TensorParts:
    """The checkpoint tensors that the parameters are made of.

    Attributes:
        parts: each parameter as blocks of rows of one checkpoint tensor each; rows of padding are
            in none.
        mixed: name → checkpoint tensors, of parameters whose rows are of several.
    """

    parts: tuple[Part, ...]
    mixed: Mapping[str, tuple[str, ...]]

    @classmethod
    def traced(cls, model: Any, load: Callable[[NamedTensors], object], pair: Pair) -> TensorParts:
        """Learn the origins: load the number of each checkpoint tensor in place of its elements.

        The parameters of `model` hold numbers afterwards, and have to be loaded again.

        Args:
            load: loads tensors into `model` as the engine does.

        Cost: two loads of the model, which read no file.
        """
        names = list(pair.names)
        if len(names) > _DIGIT * _DIGIT:
            raise EngineError(
                f"a λ rule or stochastic rounding over {len(names):,} tensors in one engine",
                f"at most {_DIGIT * _DIGIT:,} can be told apart: use one λ for all tensors",
            )
        digits = []
        for digit in (1, _DIGIT):
            load(_labels(pair, names, digit))
            digits.append({name: p.detach().clone() for name, p in parameters(model).items()})
        parts: list[Part] = []
        mixed: dict[str, tuple[str, ...]] = {}
        for name, low in digits[0].items():
            rows = _numbers(low, digits[1][name])
            if rows is None:
                every = (low.double() - 1 + (digits[1][name].double() - 1) * _DIGIT).unique()
                mixed[name] = tuple(names[int(k)] for k in every.tolist() if 0 <= k < len(names))
                continue
            values, counts = rows.unique_consecutive(return_counts=True)
            start = 0
            for value, count in zip(values.tolist(), counts.tolist()):
                if value >= 0:
                    parts.append(Part(name, start, start + count, names[value]))
                start += count
        return cls(tuple(parts), mixed)

    def names(self) -> dict[str, list[str]]:
        """Return the name of a live tensor for each part → the checkpoint tensor in it: that
        tensor's own name, where no other part has it."""
        count: dict[str, int] = {}
        for part in self.parts:
            count[part.origin] = count.get(part.origin, 0) + 1
        return {
            (part.origin if count[part.origin] == 1 else f"{part.origin} in {part.name}"): [
                part.origin
            ]
            for part in self.parts
        }

    def split(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the parts of `tensors` (parameters, or copies of them) as views, under the names
        of `names`, and tensors that are mixed whole."""
        own = {
            live: tensors[part.name][part.start : part.stop]
            for live, part in zip(self.names(), self.parts)
        }
        return own | {name: tensors[name] for name in self.mixed}

    def checkpoint_names(self) -> dict[str, list[str]]:
        """Return live name → names in the checkpoint, of parts and mixed tensors."""
        return self.names() | {name: list(sources) for name, sources in self.mixed.items()}


def _labels(pair: Pair, names: list[str], digit: int) -> NamedTensors:
    import torch

    for number, name in enumerate(names):
        dtype = torch_dtype(live_dtype(pair, name, "auto"))
        yield name, torch.full(pair.shapes[name], number // digit % _DIGIT + 1, dtype=dtype)


def _numbers(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor | None:
    """Return the number of the checkpoint tensor in each row, −1 for padding; None where the
    elements of a row have several."""
    flat = [side.reshape(side.shape[0] if side.ndim else 1, -1) for side in (low, high)]
    if any(bool((side != side[:, :1]).any()) for side in flat):
        return None
    first, second = (side[:, 0].long() for side in flat)
    numbers = (first - 1) + (second - 1) * _DIGIT
    numbers[(first == 0) | (second == 0)] = -1
    return numbers


def unlike(these: Mapping[str, torch.Tensor], those: Mapping[str, torch.Tensor]) -> Iterable[str]:
    """Yield the names that are in one alone, or whose tensors differ in form or bits."""
    from pa_fast.live.binding import equal_bits

    for name in {**these, **those}:
        one, other = these.get(name), those.get(name)
        if (
            one is None
            or other is None
            or one.shape != other.shape
            or not equal_bits(one.contiguous(), other.to(one.device).contiguous())
        ):
            yield name
