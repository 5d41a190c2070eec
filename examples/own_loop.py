"""λ in a PyTorch loop of one's own: any module, any forward pass, no files and no transformers.

python -m examples.own_loop
"""

from __future__ import annotations

import copy

import torch

import pa_fast


def pair() -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A small classifier, the same one trained further on other labels, and data to score both
    with."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(256, 16), torch.randint(0, 4, (256,))
    base = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    instruct = copy.deepcopy(base)
    optimizer = torch.optim.Adam(instruct.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(instruct(inputs), labels).backward()
        optimizer.step()
    return base.bfloat16(), instruct.bfloat16(), inputs.bfloat16(), labels


def main() -> dict[str, float]:
    base, instruct, inputs, labels = pair()
    # the one live copy: its tensors are rewritten in place and never move
    model = copy.deepcopy(base)
    # the parameters themselves: that one of them moved shows on no alias
    live = dict(model.named_parameters())
    losses = {}
    with pa_fast.LiveWeights.bind(
        live, dict(base.named_parameters()), dict(instruct.named_parameters())
    ) as weights:
        for lam in pa_fast.lambdas("0:1:0.1"):
            weights.set_lambda(lam)
            before = weights.checksum()
            with torch.no_grad():
                losses[lam.key] = float(
                    torch.nn.functional.cross_entropy(model(inputs).float(), labels)
                )
            assert weights.checksum() == before, "the evaluation wrote to the weights"
            print(
                f"λ = {lam.key:4} loss {losses[lam.key]:.4f}   effective λ"
                f" {weights.effective_lambda():.4f}"
            )
        assert weights.verify()  # bit for bit what a fresh merge would be
    return losses


if __name__ == "__main__":
    main()
