"""Two checkpoint folders loaded as one module whose tensors can follow λ, with the sources of each
tensor.

Names on disk are not names in the model: transformers renames, fuses and transposes while it loads.
So both sides are loaded through it, and tensors are paired by the names that the two modules then
have. The conversions only move elements, so merging converted tensors equals converting merged
ones, bit for bit.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.config import model_class_name
from pa_fast.checkpoint.names import Skeleton
from pa_fast.checkpoint.pair import is_attribute, listed_names, stripped
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import FLOATS, torch_dtype
from pa_fast.checkpoint.vocabulary import may_be_extended, vocabulary_sizes
from pa_fast.engines import layout, own_code
from pa_fast.engines.content import Content, trace
from pa_fast.engines.model import tensors_and_modules
from pa_fast.errors import EngineError, PairError, first_line
from pa_fast.live.memory import empty_live

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_MOST_PLANNED = 1000
"""Most tensors whose dtypes are given to transformers by name: it searches all of these names for
each of its own."""


@dataclass(frozen=True)
class Reading:
    """Options by which transformers reads both sides.

    Attributes:
        kind: the model class; None: the one for causal language models of that kind.
        strip_prefix: prefixes to remove from tensor names, in this order.
        unused: tensors that may be in the files though the model does not use them.
    """

    kind: str | None = None
    strip_prefix: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        instruct: Checkpoint,
        strip_prefix: tuple[str, ...] = (),
        unused: Iterable[str] = (),
    ) -> Reading:
        """Return the options for a pair. A side that does not name its class has the other's; the
        model need not use tensors that both sides store."""
        both = frozenset(base.tensors.keys() & instruct.tensors.keys())
        return cls(model_class_name(instruct.config, base.config), strip_prefix, both.union(unused))


@dataclass
class Loaded:
    """Both sides in memory, not yet bound.

    Attributes:
        module: instruct's module at the live dtype; its parameters are the live tensors once
            `allocate` ran.
        reference: base's module at the live dtype.
        live: name → parameter or persistent buffer of `module`, every name of a tied tensor
            included; of a DTensor the shard of this process.
        base, instruct: name → source at the dtype of its file, or an exact upcast of it.
        intermediate_dtype: name → the dtype that a saved merge would have, where the live tensor
            is another.
        endpoints: side → name → tensor as transformers made it, before any pairing, for the
            endpoint check.
        contents: side → the content of its files, which checks that the sources are made of it.
        notes: what a user should know: converted tensors, untied heads.
    """

    module: PreTrainedModel
    reference: PreTrainedModel
    live: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    instruct: dict[str, torch.Tensor]
    intermediate_dtype: dict[str, torch.dtype]
    endpoints: dict[str, dict[str, torch.Tensor]]
    contents: dict[str, Content]
    notes: list[str] = field(default_factory=list)


def load_pair(
    base: Checkpoint,
    instruct: Checkpoint,
    dtype: torch.dtype | None,
    sharding: Mapping[str, Any] | None = None,
    apart: Container[str] = (),
    *,
    extra_rows: bool = False,
    reading: Reading | None = None,
) -> Loaded:
    """Load both sides through transformers and pair them by the names of the modules.

    Args:
        base, instruct: opened checkpoints whose configurations are known to fit each other.
        dtype: live dtype of all float tensors; None: the dtype that each has in the instruct files.
        sharding: arguments of `from_pretrained` that split a model over processes.
        apart: names that need storage of their own, however the models tie them.
        extra_rows: keep vocabulary rows that one side alone has, as they are; else they are
            refused.
        reading: how the files are read; by default as they are.

    Raises:
        EngineError: transformers cannot load a side completely, does not know the architecture, or
            cannot split it.
        PairError: the two modules have different tensors, or split them differently.

    Cost: see `Loaded`; tensors with extra rows cost a copy of the shorter side.
    """
    import torch

    files = {
        side: _file_dtypes(checkpoint)
        for side, checkpoint in (("base", base), ("instruct", instruct))
    }
    reading = reading or Reading.of(base, instruct)
    source_b, source_i = _as_filed(base, sharding, reading), _as_filed(instruct, sharding, reading)
    contents = {"base": Content(base, source_b), "instruct": Content(instruct, source_i)}
    wanted = dtype or (_exact(files["instruct"]) if len(files["instruct"]) == 1 else None)
    one_b, one_i = (len(files[side]) == 1 for side in ("base", "instruct"))
    module = (
        source_i
        if one_i and wanted == source_i.dtype
        else _from_pretrained(instruct, wanted, sharding, reading)
    )
    reference = (
        source_b
        if one_b and source_b.dtype == module.dtype
        else _from_pretrained(base, module.dtype, sharding, reading)
    )
    tensors_of = {"base": _tensors(source_b), "instruct": _tensors(source_i)}
    if tensors_of["base"].keys() != tensors_of["instruct"].keys():
        odd = sorted(tensors_of["base"].keys() ^ tensors_of["instruct"].keys())
        side = "base" if odd[0] in tensors_of["base"] else "instruct"
        raise PairError(
            f"`{odd[0]}` exists only in the {side} model",
            "the two checkpoints must be of one architecture",
        )
    if sharding:
        layout.check_split(source_b, source_i)
    _check_derived(reference, module)
    # `module` may be the model that holds the sources: keep their memory, since its parameters will
    # point elsewhere
    endpoints = {
        side: {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        for side, tensors in tensors_of.items()
    }
    sources = {side: dict(tensors) for side, tensors in endpoints.items()}
    _grow(module, sources, (base.config, instruct.config), extra_rows and not sharding)
    untied = _untie(module, tensors_of, apart)
    live = _tensors(module)
    saved = _saved_dtypes(live, dtype, instruct, module, files["instruct"])
    return Loaded(
        module,
        reference,
        live,
        sources["base"],
        sources["instruct"],
        # fp32 rounds nothing: the merge is computed in it
        {n: d for n, d in saved.items() if d not in (live[n].dtype, torch.float32)},
        endpoints,
        contents,
        [
            *_unplaced(base, instruct, module),
            *_narrower(live, saved),
            *(
                f"`{name}` is tied on one side only: the merged model has a head of its own"
                for name in untied
            ),
        ],
    )


def _unplaced(base: Checkpoint, instruct: Checkpoint, module: PreTrainedModel) -> list[str]:
    """Return a note on tensors that both sides store and the model does not use, apart from those
    that its class is known to ignore."""
    skeleton = Skeleton(module)
    names = [
        name
        for name in skeleton.trace(instruct.tensors).unplaced
        if name in base.tensors and not skeleton.is_ignored(name)
    ]
    if not names:
        return []
    return [
        f"{listed_names(names)}: {type(module).__name__} has no place for what both sides store"
        " there: merged on disk, and no part of the live model"
    ]


def one_side(checkpoint: Checkpoint, reading: Reading | None = None) -> PreTrainedModel:
    """Return the model of one checkpoint, at the dtypes of its files; on a CPU its tensors stay
    memory maps.

    Raises:
        EngineError: transformers cannot load it completely, or from these files.
    """
    module = _as_filed(checkpoint, None, reading or Reading.of(checkpoint, checkpoint))
    content = Content(checkpoint, module)
    content.check_source()
    content.close()
    return module


def base_tensors(
    base: Path, instruct: Path, live: Mapping[str, torch.Tensor], reading: Reading
) -> dict[str, torch.Tensor]:
    """Return the base tensors of `live`, read again from the checkpoints; rows that base lacks are
    instruct's."""
    with Checkpoint.open(base) as opened_b, Checkpoint.open(instruct) as opened_i:
        b, i = (stripped(one, reading.strip_prefix) for one in (opened_b, opened_i))
        named = {
            name: tensor.detach().contiguous()
            for name, tensor in _tensors(one_side(b, reading)).items()
        }
        if all(named[name].shape == tensor.shape for name, tensor in live.items()):
            return named
        longer = _tensors(one_side(i, reading))
        return {
            name: (
                named[name]
                if named[name].shape == w.shape
                else _with_rows(named[name], longer[name])
            )
            for name, w in live.items()
        }


def allocate(loaded: Loaded, device: torch.device) -> None:
    """Give `loaded.module` new memory on `device`: one aligned tensor per storage, which stays."""
    live = list({id(tensor): tensor for tensor in loaded.live.values()}.values())
    for tensor, own in zip(live, empty_live(live, device)):
        tensor.data = own
    for module in (loaded.module, loaded.reference):
        for name, buffer in module.named_buffers():
            if not (module is loaded.module and name in loaded.live):
                buffer.data = buffer.data.to(device)


def _as_filed(
    checkpoint: Checkpoint, sharding: Mapping[str, Any] | None, reading: Reading
) -> PreTrainedModel:
    """Return the model of `checkpoint`, each tensor at the dtype of its file, so that maps of files
    stay maps. Where the files have several dtypes, tensors that are not of the most common one are
    in fp32, which holds every other dtype."""
    import torch

    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOATS:
            sizes[info.dtype] += info.nbytes
    most = sizes.most_common(1)[0][0] if sizes else "F32"
    with _in_fp32(
        {
            name
            for name, info in checkpoint.tensors.items()
            if info.dtype in FLOATS and info.dtype != most
        }
    ) as able:
        return _from_pretrained(
            checkpoint, torch_dtype(most) if able else torch.float32, sharding, reading
        )


@contextlib.contextmanager
def _in_fp32(keys: set[str]) -> Iterator[bool]:
    """Make transformers load what it makes of the checkpoint tensors `keys` in fp32, whatever dtype
    it is given. Yields whether it will: nothing changes where this release has no plan of dtypes by
    name, or `keys` are too many for one.

    Without it one small fp32 tensor would put the whole model in fp32: copies of twice the size
    instead of maps.
    """
    import torch
    from transformers import PreTrainedModel

    original = getattr(PreTrainedModel, "_get_dtype_plan", None)
    if not keys or original is None or len(keys) > _MOST_PLANNED:
        yield not keys
        return
    loader = threading.get_ident()

    def planned(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
        plan = dict(original(model, dtype))
        if threading.get_ident() == loader:
            # tensors of other keys keep the dtype of the call; transformers searches for these
            # patterns, hence `^` and `$`
            plan |= {
                f"^{re.escape(name)}$": torch.float32 for name in trace(model, sorted(keys)).names
            }
        return plan

    PreTrainedModel._get_dtype_plan = planned
    try:
        yield True
    finally:
        PreTrainedModel._get_dtype_plan = original


def _from_pretrained(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    sharding: Mapping[str, Any] | None,
    reading: Reading,
) -> PreTrainedModel:
    named = checkpoint.config.get("architectures") or (
        [] if reading.kind is None else [reading.kind]
    )
    kind = own_code.model_class(checkpoint.folder, {**checkpoint.config, "architectures": named})
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                str(checkpoint.folder),
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **_key_mapping(reading.strip_prefix),
                **(sharding or {}),
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        for auto_class in ("AutoModelForCausalLM", "AutoConfig"):
            refused = own_code.refused(checkpoint.folder, "config.json", auto_class, error)
            if refused is not None:
                raise refused from error
        if sharding and "has no `tp_plan`" in str(error):
            # since transformers 5.24; `layout.check_split` raises it before
            raise layout.no_plan(kind.__name__) from error
        raise EngineError(
            f"transformers cannot load {checkpoint.folder}: {first_line(error)}",
            (
                "load it with from_pretrained to see the whole report"
                if not sharding
                else (
                    "start another number of ranks; it must divide the heads, and the vocabulary of"
                    " an own head"
                )
            ),
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted({str(key) for key in info.get(problem) or ()} - reading.unused)
        if keys:
            raise EngineError(
                f"transformers loads {checkpoint.folder} with {len(keys)}"
                f" {problem.replace('_', ' ')}, such as `{keys[0]}`",
                "the files and config.json do not describe the same model",
            )
    model.eval()
    model.requires_grad_(False)
    return model


def _key_mapping(prefixes: Iterable[str]) -> dict[str, Any]:
    """Return the argument that makes `from_pretrained` read names without `prefixes`, as
    `pair.stripped` does."""
    patterns = {
        re.escape(prefix) if is_attribute(prefix) else f"^{re.escape(prefix)}": ""
        for prefix in prefixes
    }
    return {"key_mapping": patterns} if patterns else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and reports on stderr: this library has its own bar, and
    refuses incomplete models."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _file_dtypes(checkpoint: Checkpoint) -> set[str]:
    return {info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOATS}


def _exact(dtypes: set[str]) -> torch.dtype:
    """Return the narrowest dtype that holds every one of `dtypes` exactly."""
    import torch

    return torch_dtype(next(iter(dtypes))) if len(dtypes) == 1 else torch.float32


def _tensors(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers, or their shards in this process, by name, every
    name of a tied one included."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: tensor for name, tensor in layout.named_tensors(module) if name in kept}


def _check_derived(reference: PreTrainedModel, module: PreTrainedModel) -> None:
    """Raise PairError if a tensor that no file holds differs between the sides.

    Such tensors are computed from the configuration. Where they are equal, the configurations agree
    on them, and none was computed from weights, which would not follow λ.
    """
    import torch

    ours, theirs = _derived(module), _derived(reference)
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or not torch.equal(a, b):
            raise PairError(
                f"derived tensor `{name}` differs between the base and the instruct model",
                "a configuration value that shapes the function differs; compare the two"
                " config.json",
            )


def _derived(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return tensors among the buffers and plain attributes of `module` that no file holds, by
    name."""
    import torch

    kept = module.state_dict(keep_vars=True)
    weights = {id(layout.local(parameter)) for parameter in module.parameters()}
    return {
        name: thing
        for name, thing in tensors_and_modules(module)
        if isinstance(thing, torch.Tensor) and name not in kept and id(thing) not in weights
    }


def _grow(
    module: PreTrainedModel,
    sources: dict[str, dict[str, torch.Tensor]],
    configs: tuple[Any, Any],
    allowed: bool,
) -> None:
    """Give both sides and `module` every vocabulary row that either side has; a row that a side
    lacks is the other's.

    Raises:
        PairError: shapes differ in anything else, or such rows are not `allowed`.
    """
    import torch

    sizes = vocabulary_sizes(configs[0]), vocabulary_sizes(configs[1])
    joined: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.nn.Parameter]] = {}
    for name, b in sources["base"].items():
        i = sources["instruct"][name]
        if b.shape == i.shape:
            continue
        if not allowed or not may_be_extended(tuple(b.shape), tuple(i.shape), sizes):
            raise PairError(
                f"`{name}` has shape {list(b.shape)} in the base and {list(i.shape)} in the"
                " instruct model",
                "vocabulary rows of one side are kept by merge, and by load and sweep on one"
                " process; not in deltas",
            )
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        key = (b.data_ptr(), i.data_ptr())  # tied tensors stay tied
        if key not in joined:
            longer = b if len(b) > len(i) else i
            fresh = torch.nn.Parameter(
                torch.empty(longer.shape, dtype=getattr(owner, leaf).dtype), requires_grad=False
            )
            joined[key] = _with_rows(b, longer), _with_rows(i, longer), fresh
        sources["base"][name], sources["instruct"][name], fresh = joined[key]
        setattr(owner, leaf, fresh)
        for count in ("num_embeddings", "out_features"):
            if getattr(owner, count, None) == len(i):
                setattr(owner, count, len(fresh))
        for config in (module.config, module.config.get_text_config()):
            if getattr(config, "vocab_size", None) == len(i):
                config.vocab_size = len(fresh)


def _with_rows(own: torch.Tensor, longer: torch.Tensor) -> torch.Tensor:
    """Return `own` with the rows of `longer` that it lacks; where the two dtypes differ in fp32,
    which holds both."""
    import torch

    if own is longer:
        return own
    dtype = own.dtype if own.dtype == longer.dtype else torch.float32
    return torch.cat([own.to(dtype), longer[len(own) :].to(dtype)])


def _untie(
    module: PreTrainedModel, named: dict[str, dict[str, torch.Tensor]], apart: Container[str]
) -> list[str]:
    """Give tensors of `module` that are tied on one side only, or are in `apart`, storage of their
    own; return their names."""
    import torch

    tied_on = {side: _tied(tensors) for side, tensors in named.items()}
    both = {
        (n, first)
        for n, first in tied_on["base"].items() & tied_on["instruct"].items()
        if n not in apart or first not in apart
    }
    single = sorted(
        name for name, _ in (tied_on["base"].items() | tied_on["instruct"].items()) - both
    )
    for name in single:
        owner, _, leaf = name.rpartition(".")
        old = getattr(module.get_submodule(owner), leaf)
        setattr(
            module.get_submodule(owner),
            leaf,
            torch.nn.Parameter(old.data.clone(), requires_grad=False),
        )
    if not both:
        # A later bare `tie_weights()`, which some harnesses call, would tie by configuration alone.
        for config in {id(c): c for c in (module.config, module.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}
    return single


def _tied(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return name → the first name of the same tensor, for names that are not first."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in tensors.items()
        if first.setdefault(id(tensor), name) != name
    }


def _saved_dtypes(
    live: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    instruct: Checkpoint,
    module: Any,
    dtypes: set[str],
) -> dict[str, torch.dtype]:
    """Return the dtype that each float tensor has in a saved merge."""
    names = [name for name, tensor in live.items() if tensor.dtype.is_floating_point]
    if dtype is not None or len(dtypes) == 1:
        return dict.fromkeys(names, dtype or _exact(dtypes))
    return _traced(names, instruct, module)


def _narrower(live: dict[str, torch.Tensor], saved: Mapping[str, torch.dtype]) -> list[str]:
    """Return a note on tensors that the live model has in a narrower dtype than their files."""
    names = [name for name, dtype in saved.items() if dtype.itemsize > live[name].dtype.itemsize]
    if not names:
        return []
    held, stored = live[names[0]].dtype, saved[names[0]]
    return [
        f"{listed_names(names)}: {_spelled(held)} in the live model, as transformers loads them by"
        f" config.json, and {_spelled(stored)} in the files and in a merge"
    ]


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _traced(names: list[str], instruct: Checkpoint, module: Any) -> dict[str, torch.dtype]:
    """Return the file dtype of each of `names`, tensors of the module, for files of mixed
    dtypes."""
    dtypes: dict[str, set[str]] = {}
    for name, keys in trace(module, instruct.tensors).names.items():
        dtypes[name] = {instruct.tensors[key].dtype for key in keys}
    for tied, first in _tied(_tensors(module)).items():
        dtypes.setdefault(tied, dtypes.get(first, set()))
        dtypes.setdefault(first, dtypes.get(tied, set()))
    for name in names:
        if len(dtypes.get(name, ())) != 1:
            raise EngineError(
                f"cannot tell which file dtype feeds `{name}`: the instruct files mix"
                f" {sorted(dtypes.get(name, ()))}",
                "pass a dtype for all tensors (dtype=, --dtype)",
            )
    return {name: torch_dtype(next(iter(dtypes[name]))) for name in names}
