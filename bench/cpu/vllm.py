"""The vLLM engine beside the transformers engine on one pair (P14): start, switches, scored and
generated requests. In an environment that has vLLM, such as that of `make vllm`:

    PYTHONPATH=.:kernels .venv-vllm/bin/python -m bench -k vllm

Each engine has a process of its own, in turn, twice: vLLM changes torch's threads for good.
"""

from __future__ import annotations

import importlib.util
import json
import sys

from bench.cases import JOBS
from bench.forms.engine import NEW_TOKENS
from bench.process import process
from bench.run import Run, Skip
from bench.synthetic import SIZES, write_pair
from pa_fast.throughput.harness import Way, format_large

CASE = JOBS["vllm"]
ENGINES = ("transformers", "vLLM", "transformers, again", "vLLM, again")
Found = dict[str, dict[str, list[float]]]


def vllm(run: Run) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed; `make vllm` makes an environment that has it")
    size, prompts = CASE.size
    pair = write_pair(run.folder, size)
    found: Found = {}
    for name in ENGINES:
        out = run.folder / f"{name}.json"
        kind = name.partition(",")[0].lower()
        command = (sys.executable, "-m", "bench.forms.engine", kind, *pair)
        process(*command, prompts, SIZES[size][-1], out)
        found[name] = json.loads(out.read_text())
    weights = f"{format_large(int(found['vLLM']['bytes'][0]) // 2)} bf16 weights"
    alone = Way("vLLM, without reset of caches", seconds=tuple(found["vLLM"]["weights"]))
    ways = _ways(found, "switch")
    beside = ways[1].median_s - ways[0].median_s
    run.record(
        CASE.target,
        f"switch of {weights}",
        [*ways, alone],
        "vLLM",
        goal=CASE.goal,
        headline=f"{1000 * beside:.0f} ms beside the transformers engine's switch",
    )
    for key, what in (
        ("scored", f"{4 * prompts} answers to {prompts} prompts of about 260 tokens"),
        ("generated", f"{NEW_TOKENS} new tokens of {prompts} prompts of 20 to 60 tokens"),
        ("start", "start of the engine, imports, loading and proofs included"),
    ):
        ways = _ways(found, key)
        ratio = ways[0].median_s / ways[1].median_s
        words = f"{ratio:.1f} × the requests a second of the transformers engine"
        run.record(
            CASE.target if key != "start" else "",
            f"{what}, {weights}",
            ways,
            "vLLM",
            goal=CASE.goal if key != "start" else "",
            headline=words if key != "start" else f"{1 / ratio:.1f} × the transformers engine's",
        )


def _ways(found: Found, key: str) -> list[Way]:
    return [Way(name, seconds=tuple(found[name][key])) for name in ENGINES]
