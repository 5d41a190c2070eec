"""The tensor-parallel engine: a model pair as one live transformers model, split over the ranks of
a torchrun launch.

Each rank holds its shards of the live weights and of both sources, and whole tensors only where the
plan of transformers splits none. A merge is elementwise, so each rank merges its own shards and
sends no weight. Tested with gloo on CPU. The code for GPUs is the same and has not been run on one
yet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pa_fast.base import Continuation, Generation, Lambda
from pa_fast.checkpoint.provenance import combine
from pa_fast.engines import endpoints, layout, transformers
from pa_fast.engines.model import LambdaModel
from pa_fast.engines.ranks import Ranks
from pa_fast.errors import EngineError, WeightsError, first_line
from pa_fast.live.memory import Memory
from pa_fast.live.weights import LiveWeights
from pa_fast.rules import LambdaRule


class ShardedWeights:
    """The live weights of all ranks as one; implements `pa_fast.base.Weights`. Every rank calls
    every method but `memory`.

    Args:
        part: the live weights of this rank.
        ranks: the ranks that have the other parts.
        owners: the DTensors around live shards.
        split: names of the tensors of which `part` has a shard; of all others it has a copy.
    """

    def __init__(
        self, part: LiveWeights, ranks: Ranks, owners: Sequence[Any], split: Collection[str]
    ):
        self._part, self._ranks, self._owners, self._split = part, ranks, owners, split

    @property
    def lam(self) -> float | None:
        """The λ that the live tensors of this rank hold."""
        return self._part.lam

    @property
    def rule(self) -> LambdaRule | None:
        """The rule that gives each tensor its λ from `lam`, or None where all have the same."""
        return self._part.rule

    @property
    def followed(self) -> LambdaRule | None:
        """The rule that spreads a plain λ, or None."""
        return self._part.followed

    def follow(self, rule: LambdaRule | None) -> None:
        """See `LiveWeights.follow`; every rank gives the same rule."""
        self._ranks.agree("the rule", None if rule is None else rule.document())
        with self._ranks.step("following the rule"):
            self._part.follow(rule)

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Write W(λ) on all ranks; returns when all have written it, on a GPU queued it.

        Raises:
            EngineError: the ranks were given different λ; nothing was written.
            UsageError, WeightsError: see `LiveWeights.set_lambda`; on all ranks, whichever failed.
        """
        import torch

        keys = self._ranks.gather(
            "set_lambda", lambda: repr(lam) if isinstance(lam, LambdaRule) else Lambda(lam).key
        )
        if len(set(keys)) > 1:
            keys_by_rank = ", ".join(f"rank {rank} has {key}" for rank, key in enumerate(keys))
            raise EngineError(
                f"the ranks were given different λ: {keys_by_rank}",
                "call set_lambda with the same λ on every rank",
            )
        with self._ranks.step("the switch"):
            self._part.set_lambda(lam)
        # they do not share their shard's counter
        torch.autograd.graph.increment_version(self._owners)

    def check_lambda(self, lam: float | LambdaRule) -> None:
        """See `LiveWeights.check_lambda`; on all ranks, whichever cannot reach λ."""
        with self._ranks.step("checking λ"):
            self._part.check_lambda(lam)

    def checksum(self) -> int:
        """Return the checksum S = Σ_r odd("rank r of R") · S_r mod 2⁶⁴, S_r that of rank r's live
        tensors; the same on all ranks.

        Sums are comparable within one layout only, of which the number of ranks is a part.
        """
        return self._combined(self._ranks.gather("checksum", self._part.checksum))

    def read_back(self, merge_again: bool = False) -> int:
        """Return `checksum()`, after every rank has compared its tensors with what it wrote; see
        `LiveWeights.read_back`.

        Raises:
            WeightsError: a tensor differs (named), or no λ is set.
        """
        return self._combined(
            self._ranks.gather("read_back", lambda: self._part.read_back(merge_again))
        )

    def _combined(self, sums: Sequence[int]) -> int:
        return combine(
            {f"rank {rank} of {self._ranks.world}": value for rank, value in enumerate(sums)}
        )

    def verify(self) -> bool:
        """Compare every bit on every rank with a fresh merge; returns True.

        Raises:
            WeightsError: a tensor differs (named, with its rank), or no λ is set.
        """
        for rank, names in enumerate(self._ranks.gather("verify", self._part.changed)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise WeightsError(
                    f"live tensor `{names[0]}`{more} on rank {rank} does not hold the merge at λ ="
                    f" {self.lam}",
                    "something else wrote to the weights; the next set_lambda writes all of them"
                    " again",
                )
        return True

    def changed(self) -> list[str]:
        """Return the names of tensors whose bits are not those of a fresh merge on some rank."""
        by_rank = self._ranks.gather("changed", self._part.changed)
        return list(dict.fromkeys(name for names in by_rank for name in names))

    def effective_lambda(self) -> float:
        """See `LiveWeights.effective_lambda`; over the whole model, tensors that every rank has a
        copy of counted once."""
        names = None if self._ranks.rank == 0 else self._split
        parts = self._ranks.gather("effective_lambda", lambda: self._part.projection(names))
        moved, distance = (sum(column) for column in zip(*parts))
        return moved / distance if distance else float("nan")

    def intended_lambda(self) -> float:
        """See `LiveWeights.intended_lambda`; over the whole model, tensors that every rank has a
        copy of counted once."""
        if self.lam is None or self.rule is None:
            return float("nan") if self.lam is None else self.lam
        names = None if self._ranks.rank == 0 else self._split
        parts = self._ranks.gather("intended_lambda", lambda: self._part.aim(names))
        aimed, distance = (sum(column) for column in zip(*parts))
        return aimed / distance if distance else float("nan")

    def memory(self) -> Memory:
        """Return the bytes on this rank; see `LiveWeights.memory`."""
        return self._part.memory()

    def close(self) -> None:
        """Release this rank's sources."""
        self._part.close()

    def __repr__(self) -> str:
        return f"<ShardedWeights, rank {self._ranks.rank} of {self._ranks.world}: {self._part!r}>"


class ShardedModel(LambdaModel):
    """A `LambdaModel` split over ranks, all of which make every call with the same arguments.

    Attributes:
        ranks: the ranks; an evaluator reads its own from `ranks.rank`.
    """

    weights: Any

    def __init__(self, part: LambdaModel, ranks: Ranks):
        vars(self).update(vars(part))
        owners = list(
            {id(tensor): tensor for tensor in layout.distributed(part.model).values()}.values()
        )
        self.ranks = ranks
        # warn on rank 0 alone
        self._not_shared = part._not_shared if ranks.rank == 0 else None
        self.weights = ShardedWeights(part.weights, ranks, owners, layout.split(part.model))
        self.identity = {**part.identity, "engine": "transformers-tp", "world": ranks.world}

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score N (context ids, continuation ids); see `pa_fast.Engine`."""
        self.ranks.agree("loglikelihood", _digest(ids for pair in pairs for ids in pair))
        return super().loglikelihood(pairs)

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Return greedy continuations of N prompts; see `pa_fast.Engine`."""
        self.ranks.agree("generate", (_digest(prompts), config))
        config.check_greedy("the tensor-parallel engine")
        return super().generate(prompts, config)

    def on_weights_changed(self) -> None:
        """Check on every rank that the model computes with the live tensors; see
        `LambdaModel.on_weights_changed`."""
        with self.ranks.step("on_weights_changed"):
            super().on_weights_changed()

    def __repr__(self) -> str:
        return f"<ShardedModel, rank {self.ranks.rank} of {self.ranks.world}: {super().__repr__()}>"


def load(
    base: str | Path, instruct: str | Path, device: str = "auto", **options: Any
) -> ShardedModel:
    """Load two checkpoints as one transformers model at λ = 0, split over all ranks; every rank
    calls it.

    Args:
        base, instruct: local folders, or hub ids, which every rank can read.
        device: `cpu`, `cuda` (each rank takes the GPU of its local number), or `auto`.
        options: as for `pa_fast.load`.

    Example:
        # torchrun --nproc-per-node 2 script.py
        lm = tensor_parallel.load("base", "instruct")
        lm.set_lambda(0.6)

    Numerics: every shard is bit for bit that of the merge on one device. Logits are not, since
        their sums are split.
    Cost: each rank reads and keeps its shards of both sides, and one live copy of them.

    Raises:
        EngineError: no launcher, no plan to split this architecture or not by so many ranks, ranks
            that read different files, or see `pa_fast.load`.
        PairError: the sides are split differently, or see `pa_fast.load`.
        CheckpointError, DataError, UsageError: see `pa_fast.load`; on all ranks, whichever failed.
    """
    ranks = Ranks.join(device)
    try:
        part = transformers.load(base, instruct, ranks.device, ranks=ranks, **options)
        endpoints.try_out(part.model)
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"the model does not run on {ranks.world} ranks: {first_line(error)}",
            "start another number of ranks; it must divide the attention heads and the key-value"
            " heads",
        ) from error
    ranks.agree("identity", part.identity)
    return ShardedModel(part, ranks)


def _digest(texts: Iterable[Sequence[int]]) -> str:
    """Return a digest of token lists, by which ranks compare their arguments."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in texts:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()
