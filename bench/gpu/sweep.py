"""A sweep of 11 λ of an 8B-shaped model made on the device: what is not a forward pass (P6)."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from dataclasses import dataclass, field

import torch

import pa_fast
from bench.cases import TARGETS
from bench.gpu.run import GpuRun
from pa_fast.base import Engine, Score
from pa_fast.engines.transformers import LambdaModel
from pa_fast.throughput.harness import Way, format_large, wait


def sweep(run: GpuRun) -> None:
    scale = run.scale
    layers = run.layers(6, share=0.75)
    model = _model(run, layers)
    live = {name: parameter.data for name, parameter in model.named_parameters()}
    base = {name: tensor.clone() for name, tensor in live.items()}
    instruct = {name: run.near(tensor, 0.02) for name, tensor in live.items()}
    count = sum(tensor.numel() for tensor in live.values())
    began = time.perf_counter()
    weights = pa_fast.LiveWeights.bind(live, base, instruct, "dense")
    wait()
    bound_s = time.perf_counter() - began
    engine = LambdaModel(
        model, None, weights, {"engine": "made on the device"}, {}, scale.tokens[0]
    )
    ids = torch.randint(0, scale.vocabulary, scale.tokens, device=run.device)
    Forward(ids, 1)(engine)  # the first pass chooses its kernels
    forward = Forward(ids, scale.batches)
    began = time.perf_counter()
    pa_fast.sweep(engine, scale.lambdas, [forward], run.folder / "run")
    whole = time.perf_counter() - began
    profile = cProfile.Profile()
    profile.runcall(
        pa_fast.sweep,
        engine,
        scale.lambdas,
        [Forward(ids, 1)],
        run.folder / "profiled",
        figure=False,
    )
    weights.close()
    rest, visited = whole - forward.seconds, len(pa_fast.lambdas(scale.lambdas))
    note = (
        f"{layers} layers; {scale.batches} batches of {ids.shape[0]} × {ids.shape[1]} tokens at"
        " each λ"
    )
    run.note("where the rest goes: " + _hottest(profile))
    run.record(
        "P6",
        f"sweep of {visited} λ, {format_large(count)} bf16 weights",
        [
            Way("whole sweep, figure included", seconds=(whole,), note=note),
            Way("forward passes", seconds=(forward.seconds,)),
            Way("all else, per λ", seconds=(rest / visited,)),
            Way("bind", seconds=(bound_s,)),
        ],
        "whole sweep, figure included",
        goal=TARGETS["P6"].gpu_goal,
        headline=(
            f"{rest / whole:.2%}: {rest / visited:.3f} s beside"
            f" {forward.seconds / visited:.2f} s per λ, without loading"
        ),
        met=rest <= 0.01 * whole,
    )


@dataclass
class Forward:
    """An evaluator that runs `batches` forward passes and knows how long they took."""

    ids: torch.Tensor
    batches: int
    seconds: float = field(default=0.0, init=False)
    name: str = "forward"
    higher_is_better: bool = True

    def __call__(self, engine: Engine) -> Score:
        assert isinstance(engine, LambdaModel)
        wait()
        began = time.perf_counter()
        with torch.inference_mode():
            logits = [
                engine.model(self.ids, use_cache=False, logits_to_keep=1).logits
                for _ in range(self.batches)
            ]
        wait()
        self.seconds += time.perf_counter() - began
        return Score(float(logits[-1].float().logsumexp(-1).mean()), "nats", self.batches)


def _model(run: GpuRun, layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    scale = run.scale
    config = LlamaConfig(
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.key_heads,
        vocab_size=scale.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(run.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _hottest(profile: cProfile.Profile, most: int = 6) -> str:
    """The functions of a sweep that cost most by themselves, in ms."""
    stats = pstats.Stats(profile, stream=io.StringIO())
    found = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:most]  # type: ignore[attr-defined]
    return ", ".join(f"{name} {1000 * own:.0f}" for (_, _, name), (_, _, own, _, _) in found)
