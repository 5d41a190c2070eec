"""Greedy decoding in one CUDA graph, captured once and replayed at every λ.

A graph holds addresses. A switch rewrites the weights where they lie, so the graph stays right: no
second capture. Without a GPU the same step runs as it is, uncaptured. The captured form has not
been run on a GPU yet.

    python -m examples.cuda_graph_generate
"""

from __future__ import annotations

import inspect
import pathlib
from typing import Any

import torch
from transformers import StaticCache

import pa_fast

PAIR = pathlib.Path(__file__).parent / "demo" / "pair"


class Decoder:
    """One sequence at a time, greedily: an eager prompt, then one fixed step per token.

    Args:
        model: a transformers model whose parameters never move.
        length: the most tokens that a prompt and its answer may have together.
    """

    def __init__(self, model: Any, length: int):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        # transformers renamed the argument in 5.24
        named = (
            "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        )
        self.past = {named: self.cache}
        self.token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._capture()

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The next `count` tokens after `prompt`."""
        self.cache.reset()  # what it holds was computed with other weights
        self._step(torch.tensor([prompt], device=self.token.device))
        spoken = []
        for _ in range(count):
            spoken.append(int(self.token))
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(self.token)
        return spoken

    def _step(self, ids: torch.Tensor) -> None:
        logits = self.model(input_ids=ids, use_cache=True, **self.past).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the first calls allocate, which a capture must not see
            for _ in range(3):
                self._step(self.token)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(self.token)


def main(device: str = "auto") -> dict[str, str]:
    lm = pa_fast.load(PAIR / "base", PAIR / "instruct", device=device)
    decoder = Decoder(lm.model, length=64)
    print(
        "one captured CUDA graph for all λ"
        if decoder.graph
        else "no GPU: the same step, not captured"
    )
    prompt = lm.tokenizer.encode("[rev owgny]")
    said = {}
    for lam in pa_fast.lambdas("0:1:0.25"):
        lm.set_lambda(lam)
        said[lam.key] = lm.tokenizer.decode(decoder.generate(prompt, 8))
        print(f"λ = {lam.key:4} {said[lam.key]!r}")
    return said


if __name__ == "__main__":
    main()
