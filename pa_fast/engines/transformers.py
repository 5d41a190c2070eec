"""The transformers engine: a model pair as one live transformers model.

Tested on CPU. The code for one GPU is the same and has not been run on one yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.folder import located
from pa_fast.engines.model import LambdaModel
from pa_fast.engines.options import LoadOptions
from pa_fast.engines.prefix import obstacle
from pa_fast.engines.ranks import ALONE, Alone, Ranks
from pa_fast.engines.sources import FolderSources
from pa_fast.errors import UsageError
from pa_fast.live.memory import Memory
from pa_fast.rounding import Rounding
from pa_fast.rules import RuleLike
from pa_fast.stores.store import Store
from pa_fast.units import format_bytes

if TYPE_CHECKING:
    import torch


def load(
    base: str | Path,
    instruct: str | Path | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    store: str | Store = "auto",
    residency: str = "auto",
    *,
    delta: str | Path | None = None,
    rounding: str | Rounding = "nearest",
    seed: int | None = None,
    rule: RuleLike | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 8,
    endpoint_check: bool = True,
    allow_nonfinite: bool = False,
    shared_prefix: bool = True,
    extra_rows: str = "instruct",
    one_sided: str | None = None,
    ignore_config: Iterable[str] = (),
    strip_prefix: str | Iterable[str] = (),
    ranks: Ranks | Alone = ALONE,
) -> LambdaModel:
    """Load two checkpoints as one transformers model at λ = 0.

    Args:
        base, instruct: local folders, or hub ids (`org/name@revision`).
        device: `cpu`, `cuda`, `cuda:1`, …; `auto` takes the first GPU if there is one.
        dtype: live dtype of every float tensor; `auto`: that of the instruct files, and where they
            mix several the one by which transformers loads them, that of config.json.
        store: how the delta is held, see `LiveWeights.bind`; `auto` is `dense` where it fits the
            device, else `packed`, else `dense` on the host. `attached` is `lowrank` with the
            factors left beside linear and embedding layers, where λ is a scalar of the forward
            pass; it may stand beside a delta.
        residency: where what is kept beside the live copy lies: `device`, `host` (pinned memory
            that a GPU reads at every switch), or `auto`: on the device as far as it fits. On a CPU
            it is where it is.
        delta: a file that `encode` wrote, instead of instruct; it has its own store and dtype.
        rounding, seed: see `LiveWeights.bind`; stochastic rounding needs a model whose tensors
            transformers loads as they are.
        rule: gives each tensor its λ from a plain λ, by its name in the checkpoint: a `LambdaRule`,
            its rows, or a YAML file of them.
        tokenizer: folder or hub id of the tokenizer for all λ; instruct's if not given, base's
            beside a delta.
        batch_size: requests per forward pass; fixed, because batch composition changes rounding.
        endpoint_check: check that λ = 0 and 1, without the rule, give every tensor of the two
            models as loaded, bit for bit. For a lossy store and for a delta file λ = 0 alone is
            checked, with attached factors by its logits; a side that is rounded stochastically is
            not.
        allow_nonfinite: let NaN and infinity in the weights pass.
        shared_prefix: compute prefixes that requests have in common once per call, where the
            architecture allows it.
        extra_rows, one_sided, ignore_config, strip_prefix: how the sides are paired, see
            `PairOptions`.
        ranks: the processes to split the model over; `pa_fast.engines.tensor_parallel.load` passes
            them.

    Example:
        lm = pa_fast.load("base", "instruct")
        lm.set_lambda(0.6)
        ids = lm.model.generate(**lm.tokenizer("1 + 1 =", return_tensors="pt"))

    Cost: on CPU the sources stay memory maps of the files, so memory is one live copy and page
    cache; tensors that transformers converts while loading (fused experts) cost copies. The dense
    store on a CPU reads each byte of the files once, piece by piece: checked, written and compared
    while it is in cache. Other stores read them as `LiveWeights.bind` says, and both once more for
    the check.

    Raises:
        CheckpointError, PairError, DataError: the folders cannot be read or do not pair, or a file
            changes meanwhile; a later switch raises DataError where a file that is still mapped
            changed since.
        EngineError: transformers cannot load a side, or the endpoint check failed.
        UsageError: unknown device, dtype, store, rounding, residency or policy of extra rows,
            stochastic rounding of tensors that are converted or split, or a rule that does not fit
            the checkpoint's names.
    """
    if instruct is None and delta is None:
        raise UsageError(
            "there is neither an instruct model nor a delta file",
            "give the instruct folder, or delta= (--delta)",
        )
    if instruct is not None and delta is not None:
        raise UsageError(
            f"the instruct model {instruct} and the delta file {delta} are given together, and"
            " either is λ = 1",
            "give one of them; tokenizer= takes a tokenizer alone",
        )
    options = LoadOptions.of(
        device,
        dtype,
        store,
        residency,
        delta=delta,
        rounding=rounding,
        seed=seed,
        rule=rule,
        tokenizer=tokenizer,
        batch_size=batch_size,
        endpoint_check=endpoint_check,
        allow_nonfinite=allow_nonfinite,
        shared_prefix=shared_prefix,
        extra_rows=extra_rows,
        one_sided=one_sided,
        ignore_config=ignore_config,
        strip_prefix=strip_prefix,
    )
    if ranks.world > 1:
        options.check_split()
    other = base if instruct is None else instruct
    sources = FolderSources(base, other, options, ranks)
    sources.allocate()
    weights = sources.bind()
    if options.rule is not None:
        with ranks.step("following the rule"):
            weights.follow(options.rule)
    why_not = _not_shared(sources.module) if shared_prefix else None
    return LambdaModel(
        sources.module,
        sources.tokenizer,
        weights,
        {**sources.identity, "lossless": weights.lossless},
        _configuration(base, other, options, sources),
        batch_size,
        [*sources.notes, *_notes(sources, weights, options, why_not, ranks.world > 1)],
        sources.stop_tokens,
        shared_prefix and not why_not,
        why_not,
        _merge_arguments(base, other, options) if ranks.world == 1 else None,
    )


def _not_shared(module: Any) -> str | None:
    """Return the reason why requests to `module` cannot share prefixes; None where they can."""
    why = obstacle(module)
    if why is None:
        return None
    return f"of {type(module).__name__}, {why} (transformers {version('transformers')})"


def _notes(
    sources: FolderSources, weights: Any, options: LoadOptions, why_not: str | None, split: bool
) -> list[str]:
    """Return what a user should know of the live weights."""
    notes = []
    if not weights.lossless:
        notes.append(
            f"λ = 1 is not the instruct model: the delta is held as {sources.store}, which loses"
            " some of it"
        )
    if options.rule is not None:
        notes += weights.touched(options.rule)
    notes += _of_memory(weights.memory(), sources, options, split)
    if why_not:
        notes.append(f"shared prefixes are computed for every request again: {why_not}")
    return notes


def _configuration(
    base: str | Path, other: str | Path, options: LoadOptions, sources: FolderSources
) -> dict[str, Any]:
    """Return folders, device and dtypes of the loaded model, which may differ between parts of one
    sweep."""
    live = {str(tensor.dtype).removeprefix("torch.") for tensor in sources.live.values()}
    return {
        "base": located(base),
        "instruct": located(other if options.delta is None else options.delta),
        "tokenizer": located(other if options.tokenizer is None else options.tokenizer),
        "device": str(options.device),
        "live_dtypes": sorted(live),
        "attention": str(sources.module.config._attn_implementation),
    }


def _merge_arguments(
    base: str | Path, instruct: str | Path, options: LoadOptions
) -> dict[str, Any] | None:
    """Return the arguments of `merge` for the live weights; None where these are no merge of two
    folders."""
    if options.delta is not None or options.attached:
        return None
    return {
        "base": base,
        "instruct": instruct,
        "dtype": options.dtype,
        "rounding": options.rounding,
        "allow_nonfinite": options.allow_nonfinite,
        **vars(options.pairing),
    }


def _of_memory(
    memory: Memory, sources: FolderSources, options: LoadOptions, split: bool
) -> list[str]:
    """Return notes on the memory that the loaded pair takes."""
    notes = []
    if options.device.type == "cpu":
        mapped = (
            f", beside {format_bytes(memory.mapped_bytes)} of mapped files (page cache)"
            if memory.mapped_bytes
            else ""
        )
        notes.append(f"memory: {format_bytes(memory.live_bytes)} for the live copy{mapped}")
    if memory.host_bytes and not split:
        what = (
            "tensors converted while loading"
            if sources.plan is not None and sources.plan.store.keeps_sources
            else f"deltas ({sources.store}) and tensors converted while loading"
        )
        notes.append(
            f"{what} cost {format_bytes(memory.host_bytes)} of memory beside the file maps"
        )
    return notes
