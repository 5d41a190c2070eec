"""Answers of one engine that is switched: `python -m tests.vllm.swept JSON OUT`."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
from typing import Any


def main() -> None:
    asked, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    import pa_fast.vllm
    from pa_fast.errors import EngineError
    from tests.vllm.answers import answers

    lm = pa_fast.vllm.load(*asked["pair"], **asked["options"])
    found: dict[str, Any] = {}
    for lam in asked["lambdas"]:
        lm.set_lambda(lam)
        assert lm.weights.verify()
        known = found.setdefault(lam, answers(lm.llm))
        assert known == answers(lm.llm)
        found[f"checksum {lam}"] = lm.weights.checksum()
        found[f"effective {lam}"] = lm.weights.effective_lambda()
    scored = [lm.loglikelihood([([1, 2 + k], [3, 4])] * 3 + [([5], [6 + k])]) for k in range(3)]
    assert scored == [
        lm.loglikelihood([([1, 2 + k], [3, 4])] * 3 + [([5], [6 + k])]) for k in range(3)
    ]
    if asked.get("kill"):
        os.kill(_worker(os.getpid()), signal.SIGKILL)
        try:
            lm.set_lambda(0.5)
        except EngineError as error:
            found["killed"] = str(error)
        found["lam"] = lm.lam
    out.write_text(json.dumps(found))
    lm.close()


def _worker(pid: int) -> int:
    """Return a rank of the engine that `pid` started: a process of its process."""
    parents: dict[int, int] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            name = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"resource_tracker" not in name:
            parents[int(path.name)] = int(fields[1])
    engines = [child for child, parent in parents.items() if parent == pid]
    return max(child for child, parent in parents.items() if parent in engines)


if __name__ == "__main__":
    main()
