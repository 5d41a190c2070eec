"""One merge as every tool does it: the commands, each a process of its own, with what it runs
on."""

from __future__ import annotations

import os
import pathlib
import sys
from dataclasses import dataclass

from bench import peers

FORMS = pathlib.Path(__file__).with_name("forms")
MERGEKIT_OPTIONS = (
    "-j",
    str(os.cpu_count()),
    "--async-write",
    "--lazy-unpickle",
    "--low-cpu-memory",
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--quiet",
)
"""Its fastest, by measurement: see bench/NOTES.md."""


@dataclass(frozen=True)
class Contender:
    """A command that writes the merge to the folder it ends with, and what to say beside its
    figures."""

    command: tuple[object, ...]
    note: str = ""


def ours(base: pathlib.Path, instruct: pathlib.Path, lam: float, out: pathlib.Path) -> Contender:
    """`pa-fast merge`."""
    program = pathlib.Path(sys.executable).with_name("pa-fast")
    return Contender(
        (program, "merge", base, instruct, "--lambda", lam, "--out", out), _here("pa_fast", "torch")
    )


def mergekit(
    base: pathlib.Path,
    instruct: pathlib.Path,
    lam: float,
    out: pathlib.Path,
    method: str = "linear",
    dtype: str = "bfloat16",
) -> Contender:
    """mergekit's `linear` or `task_arithmetic`, in bf16 arithmetic or in fp32; bf16 is written."""
    file = out.with_name(f"mergekit-{method}-{dtype}-{lam}.yml")
    head = (
        f"merge_method: {method}\ndtype: {dtype}\nout_dtype: bfloat16\nparameters: {{normalize:"
        " false}\n"
    )
    sides = [(base, 1 - lam), (instruct, lam)] if method == "linear" else [(instruct, lam)]
    head += "" if method == "linear" else f"base_model: {base}\n"
    models = "".join(
        f"- {{model: {side}, parameters: {{weight: {weight}}}}}\n" for side, weight in sides
    )
    file.write_text(f"{head}models:\n{models}")
    return Contender(
        (peers.MERGEKIT.path, file, out, *MERGEKIT_OPTIONS),
        f"{peers.MERGEKIT.versions()}; {' '.join(MERGEKIT_OPTIONS)}",
    )


def sd_mecha(
    base: pathlib.Path, instruct: pathlib.Path, lam: float, out: pathlib.Path
) -> Contender:
    """sd-mecha's `weighted_sum`, from one file each to one file, fp32 arithmetic."""
    return Contender(
        (peers.SD_MECHA.path, FORMS / "mecha.py", base, instruct, lam, out),
        peers.SD_MECHA.versions(),
    )


def naive(base: pathlib.Path, instruct: pathlib.Path, lam: float, out: pathlib.Path) -> Contender:
    """b + λ (i − b) in bf16 between `from_pretrained` and `save_pretrained`."""
    return Contender(
        (sys.executable, FORMS / "naive.py", base, instruct, lam, out),
        _here("torch", "safetensors", "transformers"),
    )


def lerp(base: pathlib.Path, instruct: pathlib.Path, lam: float, out: pathlib.Path) -> Contender:
    """`torch.lerp` tensor by tensor, from one file each to one file."""
    return Contender(
        (sys.executable, FORMS / "lerp.py", base, instruct, lam, out), _here("torch", "safetensors")
    )


def _here(*packages: str) -> str:
    return peers.installed(sys.executable, packages)
