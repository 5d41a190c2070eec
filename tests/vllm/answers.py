"""Everything that evaluators see of an engine, as exact floats, by vLLM's own calls."""

from __future__ import annotations

from typing import Any

PROMPTS = [
    [1, 5, 7, 9, 11],
    [1, *range(20, 60)],
    [1, 50, 40, 30, 20, 10],
    [1, *[3, 4, 5] * 40],
]


def answers(llm: Any, count: int = 12) -> dict[str, Any]:
    """Return greedy tokens with their log-likelihoods, and those of the prompts with ranks, as
    JSON values."""
    from vllm import SamplingParams

    size = llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [t % size for t in ids]} for ids in PROMPTS]
    plain = {"temperature": 0.0, "detokenize": False}
    spoken = llm.generate(
        prompts,
        SamplingParams(max_tokens=count, logprobs=0, ignore_eos=True, **plain),
        use_tqdm=False,
    )
    scored = llm.generate(
        prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, **plain), use_tqdm=False
    )
    return {
        "tokens": [
            [
                [t, step[t].logprob]
                for t, step in zip(one.outputs[0].token_ids, one.outputs[0].logprobs)
            ]
            for one in spoken
        ],
        "prompts": [
            [
                [t, step[t].logprob, step[t].rank]
                for t, step in zip(one.prompt_token_ids[1:], one.prompt_logprobs[1:])
            ]
            for one in scored
        ],
    }
