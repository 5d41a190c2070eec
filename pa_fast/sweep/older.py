"""Runs of versions that recorded a sample of the checkpoints where content sums stand now: may a
sweep go on in one?

The sample misses changes between two runs. What the finished points need is that the weights at
their λ are what they were, and the journal has the checksum of these.
"""

from __future__ import annotations

import pathlib

from pa_fast.base import CompleteEngine, Lambda
from pa_fast.sweep import journal, manifest
from pa_fast.sweep.manifest import Manifest
from pa_fast.sweep.point import check_recorded
from pa_fast.sweep.progress import Progress


def proven(engine: CompleteEngine, folder: pathlib.Path, now: Manifest, progress: Progress) -> bool:
    """Whether `folder` holds such a run of this engine, whose every finished λ has its recorded
    checksum again.

    Cost: a switch and a checksum for each finished λ of such a run; else the read of one file.

    Raises:
        RunError: a finished λ has other weights now.
    """
    if not (folder / manifest.NAME).exists() or not manifest.is_sampled(manifest.load(folder), now):
        return False
    sums = {
        entry.lam: entry.checksum
        for entry in journal.read(folder)
        if entry.finished and entry.checksum is not None
    }
    for lam, recorded in sums.items():
        check_recorded(engine, Lambda(lam), recorded)
    progress.noted(
        f"{folder} was recorded without the content of the checkpoints: the weights at its"
        f" {len(sums)} finished λ were set again and have their recorded checksums, and the content"
        " is recorded from now on"
    )
    return True
