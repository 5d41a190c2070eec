"""What is timed, in order of importance, and about how long each takes on an H200."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.gpu import (
    ceilings,
    checksum,
    encode,
    first_switch,
    graph,
    host,
    lerp,
    lowrank,
    packed,
    sparse,
    stochastic,
    sweep,
    tools,
)
from bench.gpu.ledger import Row
from bench.gpu.proof import WrongBits
from bench.gpu.run import Run


@dataclass(frozen=True)
class Stage:
    """`needs_s`: seconds that must be left for it to be begun."""

    name: str
    work: Callable[[Run], None]
    needs_s: float


STAGES = (
    Stage("ceilings", ceilings.ceilings, 30),
    Stage("lerp", lerp.lerp, 40),
    Stage("packed", packed.packed, 60),
    Stage("host", host.host, 30),
    Stage("checksum", checksum.checksum, 20),
    Stage("graph", graph.graph, 15),
    Stage("sweep", sweep.sweep, 110),
    Stage("encode", encode.encode, 40),
    Stage("first", first_switch.first_switch, 60),
    Stage("sparse", sparse.sparse, 40),
    Stage("lowrank", lowrank.lowrank, 40),
    Stage("stochastic", stochastic.stochastic, 30),
    Stage("ncu", tools.ncu, 90),
    Stage("sanitize", tools.sanitize, 120),
)


def perform(run: Run, names: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[str]:
    """Run the stages of these names for which there is time, ceilings before all others. Returns
    what failed.

    A stage that fails leaves its rows and the others alone, but for wrong bits: then nothing more
    is timed.
    """
    failed: list[str] = []
    for stage in stages:
        if stage.name not in names and stage.name != "ceilings":
            continue
        if stage.needs_s > run.left_s:
            run.ledger.say(
                stage.name,
                f"left out: it takes about {stage.needs_s:.0f} s, and {max(run.left_s, 0):.0f} are"
                " left",
            )
            continue
        began = time.monotonic()
        try:
            stage.work(run)
        except WrongBits as error:
            run.ledger.say(stage.name, f"wrong bits, and no further speed is printed: {error}")
            return [*failed, stage.name]
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            run.ledger.say(stage.name, f"failed: {type(error).__name__}: {error}")
            failed.append(stage.name)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            run.ledger.add(Row(stage.name, "whole stage", ms=1000 * (time.monotonic() - began)))
            run.ledger.write_markdown()
    return failed
