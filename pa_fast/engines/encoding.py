"""Two checkpoint folders → a delta file for the model that transformers builds of them."""

from __future__ import annotations

from pathlib import Path

from pa_fast.checkpoint.folder import resolve
from pa_fast.checkpoint.pair import DEFAULTS, PairOptions, align, check_configs, stripped
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.streaming import DTYPES, check_dtype
from pa_fast.checkpoint.vocabulary import compare_vocabularies
from pa_fast.delta import writer
from pa_fast.engines.loading import Reading, load_pair
from pa_fast.live import encoding
from pa_fast.live.opening import Description
from pa_fast.live.planner import Store


def encode(
    base: str | Path,
    instruct: str | Path,
    out: str | Path,
    store: str | Store = "sparse",
    dtype: str = "auto",
    *,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    options: PairOptions = DEFAULTS,
) -> Description:
    """Write the delta between two checkpoints to the file `out`; with it `pa_fast.load` needs base
    alone.

    Names and shapes in the file are those of the model, after whatever transformers converts while
    it loads.

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

    check_dtype(dtype)
    writer.place(out, overwrite)
    with Checkpoint.open(resolve(base)) as b, Checkpoint.open(resolve(instruct)) as i:
        writer.place(out, overwrite, (b.folder, i.folder))
        check_configs(b, i, tying=False, ignored=options.ignore_config)
        compare_vocabularies(b.folder, i.folder)
        b, i = stripped(b, options.strip_prefix), stripped(i, options.strip_prefix)
        aligned = align(b, i, options.one_sided)
        reading = Reading.of(b, i, options.strip_prefix, aligned.apart)
        loaded = load_pair(
            b, i, getattr(torch, dtype) if dtype in DTYPES else None, reading=reading
        )
        for content in loaded.contents.values():
            content.prove()
        return encoding.encode(
            out,
            {name: tensor.detach() for name, tensor in loaded.live.items()},
            loaded.base,
            loaded.instruct,
            store,
            via=loaded.via,
            quick=(b.quick_fingerprint(), i.quick_fingerprint()),
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
        )
