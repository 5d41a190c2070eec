"""`examples/vllm_server.py` as a process, with vLLM behind it, driven by HTTP as a client would."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import pa_fast
from tests.vllm.answers import PROMPTS

ROOT = pathlib.Path(__file__).parents[2]
START_S = 600
"""About 40 s on an idle machine."""

SMALL = [
    *("--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager", "--seed", "0"),
    *("--block-size", "32", "--disable-log-stats", "--enable-prompt-tokens-details"),
]
PROMPT = [1] + [(7 * k) % 50 + 3 for k in range(140)]
"""Longer than several blocks of the cache, so that stale states would be found there."""


class Server:
    """The example as a process, and a client of it.

    Attributes:
        token: what it printed at its start.
    """

    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.address = process, f"http://127.0.0.1:{port}"
        self.said: list[str] = []
        self.token: str | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.match(r"PA_FAST_ADMIN_TOKEN=(\S+)", line):
                self.token = found[1]

    def wait(self) -> Server:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "".join(self.said[-60:])
            with contextlib.suppress(OSError):
                if self.ask("/health")[0] == 200:
                    return self
            time.sleep(0.5)
        raise AssertionError(f"not up after {START_S} s:\n{''.join(self.said[-60:])}")

    def ask(
        self, path: str, body: Any = None, token: str | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers (lower case) and body of the answer."""
        request = urllib.request.Request(self.address + path)
        if body is not None:
            request.data = body if isinstance(body, bytes) else json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, headers, text = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as answer:
            status, headers, text = answer.code, answer.headers, answer.read()
        found = {name.lower(): value for name, value in headers.items()}
        return status, found, json.loads(text) if text else None

    def set(self, lam: float | str) -> dict[str, Any]:
        status, _, said = self.ask("/admin/lambda", {"lambda": lam}, self.token)
        assert status == 200, said
        found: dict[str, Any] = said
        return found

    def models(self) -> tuple[Any, Any]:
        (model,) = self.ask("/v1/models")[2]["data"]
        return model["lambda"], model["checksum"]

    def complete(self, count: int = 12) -> tuple[str, list[float]]:
        """The λ that the answer to PROMPT says, and the log-likelihoods of its greedy tokens."""
        lam, (values,) = self.answers([PROMPT], count)
        return lam, values

    def answers(self, prompts: list[list[int]], count: int = 12) -> tuple[str, list[list[float]]]:
        """The same of several prompts in one request; `cached` is then how many of their tokens
        were computed for an earlier one."""
        asked = {
            "prompt": prompts,
            "max_tokens": count,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
        }
        status, headers, said = self.ask("/v1/completions", asked)
        assert status == 200, said
        self.cached = said["usage"]["prompt_tokens_details"]["cached_tokens"]
        found = sorted(said["choices"], key=lambda choice: choice["index"])
        return headers["pa-fast-lambda"], [one["logprobs"]["token_logprobs"] for one in found]


def launched(pair: tuple[Any, Any], *more: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    inherited = {k: v for k, v in os.environ.items() if k != "PA_FAST_ADMIN_TOKEN"}
    inherited["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "examples.vllm_server", *map(str, pair), *SMALL, *more],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def server(pair: tuple[Any, Any]) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = launched(pair, "--port", str(port))
    try:
        yield Server(process, port).wait()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_answers_are_those_of_unmodified_vllm_on_a_merge(
    server: Server, pair: tuple[Any, Any], fresh: Any, tmp_path: pathlib.Path
) -> None:
    merged = str(tmp_path / "merged")
    pa_fast.merge(*pair, "0.6", merged)
    expected = fresh({"0.6": merged}, {"block_size": 32})["0.6"]["tokens"]
    server.set(0)
    _, other = server.answers(PROMPTS)
    server.set(0.6)
    lam, found = server.answers(PROMPTS)
    assert lam == "0.6" and found != other
    assert found == [[logprob for _, logprob in row] for row in expected]


def test_a_switch_changes_answers_and_leaves_nothing_of_the_old_ones(server: Server) -> None:
    first = server.set(0)
    assert server.models() == (0.0, first["checksum"])
    lam, zero = server.complete()
    assert lam == "0" and server.cached == 0
    assert server.complete() == ("0", zero) and server.cached == 128
    said = server.set(0.6)
    assert server.models() == (0.6, said["checksum"]) != (0.6, first["checksum"])
    lam, changed = server.complete()
    assert lam == "0.6" and changed != zero
    assert server.cached == 0, "states of another λ were left"
    assert server.set(0) == first
    assert server.complete() == ("0", zero) and server.cached == 0
    server.set("3/5")
    assert server.complete() == ("0.6", changed)


def test_requests_in_flight_end_at_their_lambda(server: Server) -> None:
    server.set(0)
    _, zero = server.complete(100)
    server.set(0.6)
    _, changed = server.complete(100)
    assert zero[-50:] != changed[-50:]
    expected = {"0": zero, "0.6": changed}
    with ThreadPoolExecutor(9) as pool:
        for lam in (0, 0.6, 0):
            answers = [pool.submit(server.complete, 100) for _ in range(4)]
            time.sleep(0.05)
            switch = pool.submit(server.set, lam)
            answers += [pool.submit(server.complete, 100) for _ in range(4)]
            for answer in answers:
                said, values = answer.result()
                # of batches of another size, so not to the last bit
                assert values == pytest.approx(expected[said], abs=0.05), said
            assert switch.result()["lambda"] == lam


def test_only_the_token_that_was_printed_sets_lambda(server: Server) -> None:
    before = server.set(0.3)
    assert server.token
    for token in (None, "", "guessed", server.token[:-1]):
        assert server.ask("/admin/lambda", {"lambda": 1}, token)[0] == 401
    for path in ("/collective_rpc", "/update_weights", "/pause"):
        assert server.ask(path, {"method": "pa_set_lambda", "args": [1]})[0] == 404
    for wrong in (b"", b'{"lambda": NaN}', b'{"lambda": "half"}'):
        assert server.ask("/admin/lambda", wrong, server.token)[0] == 400
    assert server.models() == (0.3, before["checksum"])
    assert server.ask("/admin/lambda", None, server.token)[2] == before


def test_it_listens_beyond_loopback_with_a_token_only(pair: tuple[Any, Any]) -> None:
    process = launched(pair, "--host", "0.0.0.0")
    _, said = process.communicate(timeout=START_S)
    assert process.returncode == 1
    assert "would listen on 0.0.0.0" in said and "PA_FAST_ADMIN_TOKEN is not set" in said
    assert "Traceback" not in said
