"""The transformers engine: a model pair as one live transformers model.

Has been run for real on CPU. The code for one GPU is the same and has not been run on one yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.content import FileWatcher
from pa_fast.checkpoint.folder import check_companions, located, resolve
from pa_fast.checkpoint.pair import PairOptions, align, check_configs, config_notes, stripped
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.vocabulary import check_vocabulary, extended, swapped_sides, untrained_rows
from pa_fast.device import device_of
from pa_fast.engines.asked import Asked, asked
from pa_fast.engines.attached_weights import attached, divertible
from pa_fast.engines.endpoints import Proof
from pa_fast.engines.identity import identity
from pa_fast.engines.loading import Loaded, Reading, allocate, base_tensors, load_pair
from pa_fast.engines.model import LambdaModel
from pa_fast.engines.origins import of_pair
from pa_fast.engines.past import obstacle
from pa_fast.engines.ranks import ALONE, Alone, Ranks
from pa_fast.engines.tokenizer import stop_tokens, tokenizer_of
from pa_fast.live import opening, planner
from pa_fast.live.memory import Memory
from pa_fast.live.planner import Store
from pa_fast.live.room import Room
from pa_fast.live.weights import LiveWeights
from pa_fast.rounding import Rounding
from pa_fast.rules import RuleLike
from pa_fast.units import format_bytes

if TYPE_CHECKING:
    import torch


def load(
    base: str | Path,
    instruct: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    store: str | Store = "auto",
    residency: str = "auto",
    *,
    delta: str | Path | None = None,
    rounding: str = "nearest",
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
    strip_prefix: str = "",
    ranks: Ranks | Alone = ALONE,
) -> LambdaModel:
    """Load two checkpoints as one transformers model at λ = 0.

    Args:
        base, instruct: local folders, or hub ids (`org/name@revision`).
        device: `cpu`, `cuda`, `cuda:1`, …; `auto` takes the first GPU if there is one.
        dtype: live dtype of every float tensor; `auto`: the dtype that each has in the instruct
            files.
        store: how the delta is held, see `LiveWeights.bind`; `auto` is `dense` where it fits the
            device, else `packed`, else `dense` on the host. `attached` is `lowrank` with the
            factors left beside linear and embedding layers, where λ is a scalar of the forward
            pass; it may stand beside a delta.
        residency: where what is kept beside the live copy lies: `device`, `host` (pinned memory
            that a GPU reads at every switch), or `auto`: on the device as far as it fits. On a CPU
            it is where it is.
        delta: a file that `encode` wrote, instead of instruct; it says store and dtype.
        rounding, seed: see `LiveWeights.bind`; stochastic rounding needs a model whose tensors
            transformers loads as they are.
        rule: by which a plain λ spreads over the tensors, by their names in the checkpoint: a
            `LambdaRule`, its rows, or a YAML file of them.
        tokenizer: folder or hub id of the tokenizer for all λ; instruct's if not given, base's
            beside a delta.
        batch_size: requests per forward pass; fixed, because batch composition changes rounding.
        endpoint_check: prove that λ = 0 and 1, without the rule, give every tensor of the two
            models as loaded, bit for bit; of a lossy store, and of a delta, λ = 0 alone, with
            attached factors its logits; of a side that is rounded stochastically, neither.
        allow_nonfinite: let NaN and infinity in the weights pass.
        shared_prefix: compute tokens that requests begin alike with once per call, where the
            architecture allows it.
        extra_rows, one_sided, ignore_config, strip_prefix: how the sides are paired, see
            `PairOptions`.
        ranks: the processes to split the model over; for `pa_fast.engines.tensor_parallel.load`,
            which sees to the rest.

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
    options = PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix)
    want = asked(
        device_of(device),
        dtype,
        store,
        residency,
        Rounding(rounding, seed),
        rule,
        instruct,
        delta,
        ranks.sharding(),
    )
    # base stands on both sides where a delta does for instruct
    other = base if instruct is None else instruct
    with (
        ranks.step("loading"),
        Checkpoint.open(resolve(base)) as b,
        Checkpoint.open(resolve(other)) as i,
    ):
        check_companions(i.folder)
        differences = check_configs(b, i, tying=False, ignored=options.ignore_config)
        b, i = stripped(b, strip_prefix), stripped(i, strip_prefix)
        aligned = align(b, i, one_sided)
        reading = Reading.of(b, i, strip_prefix, aligned.apart)
        rows = extended(aligned.base.tensors, i.tensors, b.config, i.config)
        notes = [
            *check_vocabulary(b, i, rows, extra_rows),
            *(untrained_rows(b, i) if want.about is None else ()),
        ]
        notes += [
            *config_notes(differences),
            *aligned.notes,
            *(swapped_sides(b, i) if want.about is None else ()),
        ]
        apart = () if want.about is None else want.about.tensors
        loaded = load_pair(
            b, i, want.live_dtype(), want.sharding, apart, extra_rows=bool(rows), reading=reading
        )
        contents = loaded.contents
        if want.about is not None:
            contents.pop("instruct").close()  # it is the base's once more
        traced = of_pair(loaded.module, b.tensors, i.tensors)
        plan = _planned(want, loaded)
        said = want.described if plan is None else plan.store.describe()
        guard = FileWatcher(b, i)
        guard.check_names()
        chosen = tokenizer_of(resolve(tokenizer) if tokenizer is not None else i.folder)
        same = identity(want, b, i, said, chosen)
    for content in contents.values():
        content.prove(ranks)
    with ranks.step("allocating"):
        allocate(loaded, want.device)
        guard.check()
    if want.rounding.drawn:
        traced.check_elementwise(
            {name: tensor for name, tensor in loaded.live.items() if tensor.is_floating_point()}
        )
    proof = Proof.of(loaded, want) if endpoint_check else Proof({})
    stops = stop_tokens(chosen, loaded.reference, loaded.module)
    del loaded.reference

    def on_read(tensor: torch.Tensor, start: int, piece: torch.Tensor) -> None:
        for content in contents.values():
            content.on_read(tensor, start, piece)

    with ranks.step("binding"):
        guard.check()
        weights: Any
        diverted = divertible(want.store, loaded.module) if want.attached else None
        if want.delta is None:
            weights = LiveWeights.bind(
                loaded.live,
                loaded.base,
                loaded.instruct,
                diverted or plan or want.store,
                want.rounding.mode,
                seed=want.rounding.seed,
                via=loaded.via,
                allow_nonfinite=allow_nonfinite,
                origins=traced.names,
                reread=lambda: base_tensors(resolve(base), resolve(other), loaded.live, reading),
                ends=proof.ends,
                on_read=on_read,
            )
        else:
            with opening.again(want.delta, want.about) as file:
                guard.add(file.file)
                weights = LiveWeights.open(
                    loaded.live,
                    loaded.base,
                    file,
                    allow_nonfinite=allow_nonfinite,
                    divert=diverted.put_aside if diverted else None,
                    origins=traced.names,
                    on_read=on_read,
                )
            weights.prove(proof.ends or {})
        if weights.memory().mapped_bytes:
            weights.before_reading = guard.check
        if diverted is not None:
            weights = attached(loaded.module, weights, diverted.factors)
    with ranks.step("fingerprinting"):
        for side, content in contents.items():
            same[f"{side}_content"] = content.finish()
            guard.know(content.checkpoint, content.sums)
            content.close()
    proof.check_logits(loaded.module)
    loaded.ends.clear()
    notes += [] if plan is None else [f"the delta is held {plan.describe()}"]
    notes += [*loaded.notes, *proof.notes]
    if not weights.lossless:
        notes.append(
            f"λ = 1 is not the instruct model: the delta is held as {said}, which loses some of it"
        )
    if want.rule is not None:
        with ranks.step("following the rule"):
            weights.follow(want.rule)
        notes += weights.touched(want.rule)
    notes += _of_memory(weights.memory(), said, want)
    why_not = obstacle(loaded.module) if shared_prefix else None
    if why_not:
        why_not = (
            f"of {type(loaded.module).__name__}, {why_not} (transformers {version('transformers')})"
        )
        notes.append(f"shared prefixes are computed for every request again: {why_not}")
    configuration = {
        "base": located(base),
        "instruct": located(other if delta is None else delta),
        "tokenizer": located(other if tokenizer is None else tokenizer),
        "device": str(want.device),
        "live_dtypes": sorted(
            {str(tensor.dtype).removeprefix("torch.") for tensor in loaded.live.values()}
        ),
        "attention": str(loaded.module.config._attn_implementation),
    }
    same["lossless"] = weights.lossless
    pair = None
    if want.delta is None and not want.attached and not want.sharding:
        how = {
            "rounding": want.rounding.mode,
            "seed": want.rounding.seed if want.rounding.drawn else None,
        }
        pair = (
            {
                "base": base,
                "instruct": other,
                "dtype": dtype,
                "allow_nonfinite": allow_nonfinite,
            }
            | how
            | vars(options)
        )
    shared = shared_prefix and not why_not
    return LambdaModel(
        loaded.module,
        chosen,
        weights,
        same,
        configuration,
        batch_size,
        notes,
        stops,
        shared,
        why_not,
        pair,
    )


def _planned(want: Asked, loaded: Loaded) -> planner.Plan | None:
    """Store and residency for a pair that is about to be allocated; None where a file or the layers
    decide."""
    if want.about is not None or want.attached:
        return None
    drawn = want.auto and want.rounding.drawn
    store = want.store if drawn or not want.auto else "auto"
    reason = {"reason": "stochastic rounding is of dense deltas alone"} if drawn else {}
    return planner.plan(
        _sizes(loaded), store, want.residency, Room.of(want.device), allocated=False, **reason
    )


def _of_memory(memory: Memory, said: str, want: Asked) -> list[str]:
    """What the loaded pair takes, in words."""
    notes = []
    if want.device.type == "cpu":
        mapped = (
            f", beside {format_bytes(memory.mapped_bytes)} of mapped files (page cache)"
            if memory.mapped_bytes
            else ""
        )
        notes.append(f"memory: {format_bytes(memory.live_bytes)} for the live copy{mapped}")
    if memory.host_bytes and not want.sharding:
        what = (
            "tensors converted while loading"
            if said == "dense"
            else f"deltas ({said}) and tensors converted while loading"
        )
        notes.append(
            f"{what} cost {format_bytes(memory.host_bytes)} of memory beside the file maps"
        )
    return notes


def _sizes(loaded: Loaded) -> list[planner.Size]:
    """What each live float tensor takes, by its first name, and a dense delta beside it."""
    first = {
        id(tensor): name
        for name, tensor in reversed(loaded.live.items())
        if tensor.is_floating_point()
    }
    return [
        planner.Size(
            n,
            loaded.live[n].nbytes,
            loaded.base[n].nbytes + loaded.instruct[n].nbytes,
            (loaded.base[n], loaded.instruct[n]),
        )
        for n in first.values()
    ]
