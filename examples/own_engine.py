"""A model of one's own under `pa_fast.sweep`: what an engine must have, and what the sweep then
gives.

python -m examples.own_engine runs/own_engine
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import pa_fast
from pa_fast import Continuation, Generation, Score


class Bytes:
    """A tokenizer of 256 tokens."""

    bos_token_id, eos_token_id = 0, 10

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


class Bigram(torch.nn.Module):
    """The smallest language model: logits of the next byte from the last one."""

    def __init__(self, text: str):
        super().__init__()
        counts = torch.ones(256, 256)
        for a, b in zip(text.encode(), text.encode()[1:]):
            counts[a, b] += 20
        self.table = torch.nn.Parameter(counts.log(), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.table[ids], -1)


class BigramEngine:
    """A `pa_fast.Engine`: live weights, a tokenizer, likelihoods, text, and a hook that is called
    after every switch."""

    tokenizer = Bytes()

    def __init__(self, base: Bigram, instruct: Bigram):
        # a sweep goes on in a run folder of the same identity alone
        self.identity = {"base": float(base.table.sum()), "instruct": float(instruct.table.sum())}
        self.model = Bigram("")
        self.remembered: dict[tuple[int, ...], torch.Tensor] = {}
        self.table = self.model.table
        self.weights = pa_fast.LiveWeights.bind(
            {"table": self.table}, {"table": base.table}, {"table": instruct.table}
        )

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        found = []
        for context, continuation in pairs:
            scores = self.scores((context + continuation)[:-1])[-len(continuation) :]
            wanted = torch.tensor(continuation)
            found.append(
                Continuation(
                    float(scores.gather(1, wanted[:, None]).sum()),
                    bool((scores.argmax(-1) == wanted).all()),
                )
            )
        return found

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        config.check_greedy("BigramEngine")
        spoken = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + config.max_new_tokens:
                token = int(self.scores(ids)[-1].argmax())
                if token in config.stop:
                    break
                ids.append(token)
            spoken.append(ids[len(prompt) :])
        return spoken

    def on_weights_changed(self) -> None:
        self.remembered.clear()  # what the old weights said is wrong now
        if self.model.table is not self.table:
            raise RuntimeError("somebody replaced the parameter: the model no longer follows λ")

    def scores(self, ids: list[int]) -> torch.Tensor:
        key = tuple(ids)
        if key not in self.remembered:
            self.remembered[key] = self.model(torch.tensor(ids))
        return self.remembered[key]


class Loudness:
    """A `pa_fast.Evaluator`: how much likelier `HELLO` is than `hello`."""

    name, higher_is_better = "loudness", True

    def __call__(self, engine: pa_fast.Engine) -> Score:
        start = engine.tokenizer.encode("")
        loud, quiet = engine.loglikelihood([(start, list(b"HELLO")), (start, list(b"hello"))])
        return Score(loud.logprob - quiet.logprob, "nats", n=1)


def main(out: str) -> pa_fast.SweepResult:
    prose = "hello, she said, and hello again, and nobody knew who had said hello first. " * 4
    engine = BigramEngine(Bigram(prose), Bigram(prose.upper()))
    result = pa_fast.sweep(engine, "0:1:0.1", [Loudness()], out)
    for row in result.rows:
        print(f"λ = {row.lam.key:4} {row.evaluator} {row.score:8.4f} {row.unit}")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_engine")
