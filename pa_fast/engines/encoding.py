"""Delta files encoded from two checkpoint folders, for the model that transformers builds of
them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pa_fast.checkpoint.folder import resolve
from pa_fast.checkpoint.pair import DEFAULTS, PairOptions, sides_of_model
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.streaming import DTYPES, dtype_name
from pa_fast.checkpoint.vocabulary import compare_vocabularies
from pa_fast.engines.loading import Reading, load_pair
from pa_fast.live import encoding
from pa_fast.stores import file
from pa_fast.stores.file import Description
from pa_fast.stores.store import Store

if TYPE_CHECKING:
    import torch


def encode(
    base: str | Path,
    instruct: str | Path,
    out: str | Path,
    store: str | Store = "sparse",
    dtype: str | torch.dtype = "auto",
    *,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    options: PairOptions = DEFAULTS,
) -> Description:
    """Write the delta between two checkpoints to the file `out`, so that `pa_fast.load` needs base
    alone.

    Names and shapes in the file are those of the model, after transformers' conversions.

    Args:
        base, instruct: local folders, or hub ids (`org/name@revision`).
        store: what is kept and how, see `LiveWeights.bind`.
        dtype: live dtype of every float tensor; `auto`: the dtype that each has in the instruct
            files.
        allow_nonfinite: let NaN and infinity in the weights pass.
        overwrite: replace a delta file that is there.
        options: how the sides are paired.

    Cost: see the store. The sides stay memory maps of their files, but for tensors that
    transformers converts.

    Raises:
        CheckpointError, PairError, DataError: the folders cannot be read or do not pair.
        EngineError: transformers cannot load a side, or takes it from other files.
        OutputError: the file exists or cannot be written.
        UsageError: unknown dtype or store.
    """
    import torch

    dtype = dtype_name(dtype)
    file.output_path(out, overwrite)
    with Checkpoint.open(resolve(base)) as b, Checkpoint.open(resolve(instruct)) as i:
        file.output_path(out, overwrite, (b.folder, i.folder))
        compare_vocabularies(b.folder, i.folder)
        b, i, aligned, _ = sides_of_model(b, i, options)
        reading = Reading.of(b, i, options.strip_prefix, aligned.apart)
        loaded = load_pair(
            b, i, getattr(torch, dtype) if dtype in DTYPES else None, reading=reading
        )
        for content in loaded.contents.values():
            content.check_source()
        return encoding.encode(
            out,
            {name: tensor.detach() for name, tensor in loaded.live.items()},
            loaded.base,
            loaded.instruct,
            store,
            intermediate_dtype=loaded.intermediate_dtype,
            quick=(b.quick_fingerprint(), i.quick_fingerprint()),
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
        )
