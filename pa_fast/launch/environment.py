"""Shard of a sweep for a process that torchrun or SLURM started."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pa_fast.errors import UsageError


def shard(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (rank, world) of this process: those of torchrun, else its index and the size of its
    SLURM job array, else those of its `srun` task.

    A sweep does not call this by itself: SLURM also sets its variables in jobs of which each task
    does a whole sweep.

    Example:
        pa_fast.sweep(lm, "0:1:0.1", evals, "runs/x", shard=environment.shard())

    Raises:
        UsageError: no variable of torchrun or SLURM is set, or the job array has gaps.
    """
    for rank, world in (
        ("RANK", "WORLD_SIZE"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ):
        if rank not in environ or world not in environ:
            continue
        here, count = _number(environ, rank), _number(environ, world)
        if rank != "SLURM_ARRAY_TASK_ID":
            return here, count
        first, last = (
            _number(environ, "SLURM_ARRAY_TASK_MIN"),
            _number(environ, "SLURM_ARRAY_TASK_MAX"),
        )
        if last - first != count - 1:
            raise UsageError(
                f"the job array has {count} tasks from {first} to {last}, and a sweep is cut into"
                " tasks without gaps",
                "submit with --array=0-7, or write --shard I/N yourself",
            )
        return here - first, count
    raise UsageError(
        "nothing in the environment says which shard this is: neither torchrun's RANK nor SLURM's"
        " variables are set",
        "start with torchrun, srun or a job array, or write --shard I/N",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise UsageError(f"{name} is `{text}`, expected a whole number", "write --shard I/N")
    return int(text)
