"""One merge as every tool does it: the commands, each a process of its own, with what it runs
on."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench import peers
from pa_fast.throughput.harness import Sample

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


IN_MEMORY = "mergekit merge_state_dicts + copy_"
"""Its best path of one λ of a live model: no disk, no new model, and no proof of what it wrote."""


@dataclass(frozen=True)
class InMemory:
    """A process of mergekit's environment that holds both sides and a live copy; see
    `forms/in_memory.py`."""

    process: subprocess.Popen[str]

    def switch(self, lam: float) -> Sample:
        """Merge at λ into the live copy. Returns its own wall and processor seconds."""
        return Sample(*self._ask(f"{lam!r}\n")["seconds"])  # type: ignore[misc]

    def wrong_share(self, lam: float) -> float:
        """Share of the weights at λ that are not `torch.lerp`'s."""
        return float(self._ask(f"{lam!r}?\n")["wrong_share"])  # type: ignore[arg-type]

    def _ask(self, line: str) -> dict[str, object]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()
        answer: dict[str, object] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def in_memory(base: pathlib.Path, instruct: pathlib.Path) -> Iterator[InMemory]:
    """mergekit's `merge_state_dicts` with `linear`, ready for any λ; its environment must be here.

    Cost: memory of four models: both sides, the live copy, and the merge before it is copied.
    """
    python = peers.MERGEKIT.path.with_name("python")
    with subprocess.Popen(
        [python, FORMS / "in_memory.py", base, instruct],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield InMemory(process)
        finally:
            process.kill()


def sd_mecha(
    base: pathlib.Path, instruct: pathlib.Path, lam: float, out: pathlib.Path
) -> Contender:
    """sd-mecha's `weighted_sum`, from one file each to one file, fp32 arithmetic."""
    return Contender(
        (peers.SD_MECHA.path, FORMS / "mecha.py", base, instruct, lam, out),
        peers.SD_MECHA.versions(),
    )


def state_dicts(
    base: pathlib.Path, instruct: pathlib.Path, lam: float, out: pathlib.Path
) -> Contender:
    """mergekit's `merge_state_dicts` in memory, from one file each to one file."""
    python = peers.MERGEKIT.path.with_name("python")
    return Contender(
        (python, FORMS / "state_dicts.py", base, instruct, lam, out), peers.MERGEKIT.versions()
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
