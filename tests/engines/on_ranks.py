"""What `test_tensor_parallel.py` checks inside every rank: `torchrun -m tests.engines.on_ranks
FOLDER`.

A check is a function that every rank runs; `FOLDER/results.json` says what came of each. Ranks
compare notes after each check through a group of their own, so that one that fails does not leave
the others waiting.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import random
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pa_kernels import reference
from transformers import AutoModelForCausalLM

import pa_fast
from pa_fast.base import Generation, Score
from pa_fast.checkpoint.provenance import combine
from pa_fast.engines import layout, loading, sources
from pa_fast.engines.tensor_parallel import ShardedModel, load
from pa_fast.errors import (
    CheckpointError,
    DataError,
    EngineError,
    PairError,
    UsageError,
    WeightsError,
)
from pa_fast.live.binding import as_integers
from pa_fast.live.memory import FileMaps, nbytes
from tests.engines.architectures import write_pair

# Shapes that four ranks divide; grouped matrix products want rows of 16 bytes on each.
CHANGES: dict[str, dict[str, Any]] = {"qwen3-moe": {"moe_intermediate_size": 64}}
SHARDED = ("llama", "qwen2", "phi-3", "mixtral", "qwen3-moe", "gpt-neox")
LAMBDAS = (0.3, 1.0, -0.2, 1 / 3, 0.0, 1.5, 0.7, 0.3)


class World:
    """The ranks of one launch, the folder that they share, and the pairs in it."""

    def __init__(self, folder: pathlib.Path):
        dist.init_process_group("gloo")
        self.folder, self.rank, self.size = folder, dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._loaded: dict[str, ShardedModel] = {}

    def pair(self, name: str, **changes: Any) -> tuple[pathlib.Path, pathlib.Path]:
        """Base and instruct folders of a pair whose heads every world here divides."""
        at = self.folder / "-".join([name, *map(str, changes.values())])
        if self.rank == 0 and not at.exists():
            write_pair(at, name, **{"num_key_value_heads": 4, **CHANGES.get(name, {}), **changes})
        self.gather(None)
        return at / "base", at / "instruct"

    def model(self, name: str) -> ShardedModel:
        """The pair called `name`, loaded once for all checks."""
        if name not in self._loaded:
            self._loaded[name] = load(
                *self.pair(name), dtype="float32" if name == "qwen3" else "auto"
            )
        return self._loaded[name]

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def refused(self, kind: type[Exception], match: str, act: Callable[[], object]) -> None:
        """`act` must raise `kind` on every rank."""
        with pytest.raises(kind, match=match):
            act()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of `model` put together again."""
    with torch.no_grad():
        return {
            name: t.full_tensor() if hasattr(t, "full_tensor") else t
            for name, t in model.state_dict().items()
        }


def on_one_device(folder: pathlib.Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **options})


def assert_same_bits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(
            as_integers(found[name].contiguous()), as_integers(tensor.contiguous())
        ), name


def merges_are_those_of_one_device(name: str) -> Callable[[World], None]:
    def check(world: World) -> None:
        lm = world.model(name)
        base, instruct = (on_one_device(folder).state_dict() for folder in world.pair(name))
        order = list(LAMBDAS)
        random.Random(name).shuffle(order)
        for lam in order:
            lm.set_lambda(lam)
            merged = {n: reference.lerp(base[n], instruct[n], lam, base[n].dtype) for n in base}
            assert_same_bits(whole(lm.model), merged)
            assert lm.weights.verify()

    return check


def a_saved_merge_is_the_live_one(world: World) -> None:
    lm, (base, instruct) = world.model("mixtral"), world.pair("mixtral")
    lm.set_lambda(0.6)
    if world.rank == 0:
        pa_fast.merge(base, instruct, lam=0.6, out=world.folder / f"merged-{world.size}")
    world.gather(None)
    assert_same_bits(
        whole(lm.model), on_one_device(world.folder / f"merged-{world.size}").state_dict()
    )


def every_kind_of_placement_was_met(world: World) -> None:
    kinds = {
        str(p)
        for name in SHARDED
        for t in layout.distributed(world.model(name).model).values()
        for p in t.placements
    }
    assert kinds == {"S(0)", "S(1)", "S(2)", "_S(1, 2)", "R"}, kinds


def a_rank_holds_its_shards_and_no_more(world: World) -> None:
    lm, folder = world.model("llama"), world.pair("llama")[0]
    full = {name: nbytes(tensor) for name, tensor in on_one_device(folder).state_dict().items()}
    split = layout.split(lm.model)
    whole_names = {name.rpartition(".")[0].rpartition(".")[2] for name in full.keys() - split}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert norms <= whole_names <= norms | {"embed_tokens"}, (
        whole_names
    )  # transformers 5.24 splits embeddings, too
    own = sum(size // world.size if name in split else size for name, size in full.items())
    memory = lm.weights.memory()
    assert memory.live_bytes == own
    assert (
        memory.total_bytes + memory.mapped_bytes == 3 * own
    )  # transformers 5.24 maps shards of rows, 5.17 copies all
    part, maps = lm.weights._part, FileMaps()
    for tensor in (*(binding.live for binding in part._bindings), *part._store.beside()):
        assert maps.position(tensor) is not None or tensor.untyped_storage().nbytes() == nbytes(
            tensor
        )


def proofs_are_the_same_on_all_ranks(world: World) -> None:
    lm = world.model("gpt-neox")  # column, row and replicated DTensors, and plain tensors
    alone = pa_fast.load(*world.pair("gpt-neox"))
    sums = {}
    for lam in (0.2, 0.9, 0.2, 0.5):
        lm.set_lambda(lam)
        alone.set_lambda(lam)
        proof = (lm.weights.checksum(), lm.weights.effective_lambda(), lm.weights.changed())
        assert world.gather(proof) == [proof] * world.size
        assert sums.setdefault(lam, proof[0]) == proof[0]
        parts = world.gather(lm.weights._part.checksum())
        assert proof[0] == combine(
            {f"rank {rank} of {world.size}": part for rank, part in enumerate(parts)}
        )
        assert proof[1] == pytest.approx(alone.weights.effective_lambda(), rel=1e-6)
        assert proof[2] == []
    assert len(set(sums.values())) == 3
    assert lm.identity["engine"] == "transformers-tp" and lm.identity["world"] == world.size
    assert {**lm.identity, "engine": None, "world": None} == {
        **alone.identity,
        "engine": None,
        "world": None,
    }


def a_foreign_write_on_one_rank_is_seen_on_all(world: World) -> None:
    lm = world.model("llama")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        lm.set_lambda(0.5)
        before = lm.weights.checksum()
        versions = {n: t._version for n, t in lm.model.named_parameters()}
        if world.rank == 1:
            with torch.no_grad():
                layout.local(lm.model.get_parameter(name)).view(-1)[-1] += 1
        assert lm.weights.checksum() != before
        assert lm.weights.changed() == [name]
        world.refused(WeightsError, f"`{name}` on rank 1 does not hold", lm.weights.verify)
        lm.set_lambda(0.5)
        assert lm.weights.checksum() == before and lm.weights.verify()
        assert all(t._version > versions[n] for n, t in lm.model.named_parameters())


def a_rank_with_another_lambda_is_refused(world: World) -> None:
    lm = world.model("llama")
    lm.set_lambda(0.25)
    before = lm.weights.checksum()
    world.refused(
        EngineError,
        "different λ: rank 0 has 0.3, rank 1 has 0.4",
        lambda: lm.set_lambda((0.3, 0.4)[world.rank % 2]),
    )
    world.refused(
        UsageError,
        "not a finite number",
        lambda: lm.set_lambda((0.3, float("nan"))[world.rank % 2]),
    )
    assert lm.lam == 0.25 and lm.weights.checksum() == before
    with lm.at(0.75):
        assert lm.lam == 0.75 and lm.weights.verify()
    assert lm.lam == 0.25


def a_rule_is_that_of_one_device(world: World) -> None:
    lm = world.model("gpt-neox")
    alone = pa_fast.load(*world.pair("gpt-neox"))
    rule = pa_fast.LambdaRule(
        [{"group": "norms", "lambda": 1}, {"group": "mlp", "times": {0: 0.5, 1: 1}}]
    )
    for model in (lm, alone):
        model.set_lambda(rule.at(0.6))
    assert lm.weights.rule == rule.at(0.6) and lm.weights.verify()
    assert_same_bits(whole(lm.model), alone.model.state_dict())
    intended = lm.weights.intended_lambda()
    assert world.gather(intended) == [intended] * world.size
    assert (
        intended == pytest.approx(alone.weights.intended_lambda(), rel=1e-6)
        and abs(intended - 0.6) > 0.01
    )
    before = lm.weights.checksum()
    world.refused(
        EngineError, "different λ", lambda: lm.set_lambda(rule.at((0.3, 0.4)[world.rank % 2]))
    )
    assert lm.weights.checksum() == before
    lm.set_lambda(0.6)
    assert lm.weights.rule is None and lm.weights.intended_lambda() == 0.6
    lm.weights.follow(rule)
    assert lm.weights.followed == rule and lm.weights.checksum() == before
    lm.weights.follow(None)
    assert lm.weights.checksum() != before


def scores_and_texts_are_those_of_one_device(world: World) -> None:
    lm = world.model("qwen3")
    alone = pa_fast.load(*world.pair("qwen3"), dtype="float32")
    draw = random.Random(4)
    pairs = [
        (
            [draw.randrange(3, 128) for _ in range(n)],
            [draw.randrange(3, 128) for _ in range(1 + n % 3)],
        )
        for n in range(1, 14)
    ]
    # requests that begin alike
    pairs += [([9, 8, 7, 6, 5, 4, 3], [first, 11]) for first in range(20, 25)]
    config = Generation(max_new_tokens=6, stop=(2, 77))
    for lam in (0.0, 0.4, 1.0):
        for engine in (lm, alone):
            engine.set_lambda(lam)
        found, expected = lm.loglikelihood(pairs), alone.loglikelihood(pairs)
        assert world.gather(found) == [found] * world.size
        assert [f.logprob for f in found] == pytest.approx([e.logprob for e in expected], rel=1e-4)
        assert [f.is_greedy for f in found] == [e.is_greedy for e in expected]
        texts = lm.generate([context for context, _ in pairs], config)
        assert texts == alone.generate([context for context, _ in pairs], config)
        assert world.gather(texts) == [texts] * world.size


def ranks_out_of_step_fail_instead_of_waiting(world: World) -> None:
    lm = world.model("qwen3")
    asked = [([5], [6])]
    if world.rank == 0:
        world.refused(
            EngineError,
            "rank 0 in loglikelihood, rank 1 in generate",
            lambda: lm.loglikelihood(asked),
        )
    else:
        world.refused(EngineError, "out of step", lambda: lm.generate([[5]], Generation(2)))
    world.refused(
        EngineError, "differ in loglikelihood", lambda: lm.loglikelihood(asked * (world.rank + 1))
    )
    assert len(lm.loglikelihood(asked)) == 1


def sampling_is_refused_on_all_ranks(world: World) -> None:
    lm = world.model("qwen3")
    sampled = Generation(2, temperature=0.5)
    world.refused(
        EngineError,
        "the tensor-parallel engine cannot sample: found temperature = 0.5",
        lambda: lm.generate([[]], sampled),
    )
    world.refused(
        EngineError,
        "differ in generate",
        lambda: lm.generate([[5]], sampled if world.rank else Generation(2)),
    )
    assert len(lm.generate([[5]], Generation(2))) == 1


def a_replaced_parameter_fails_on_all_ranks(world: World) -> None:
    lm = load(*world.pair("llama"), endpoint_check=False)
    lm.on_weights_changed()
    if world.rank == 1:
        shard = layout.local(lm.model.lm_head.weight)
        shard.data = shard.data.clone()
    world.refused(EngineError, "`lm_head.weight` was replaced or moved", lm.on_weights_changed)
    world.refused(WeightsError, "`lm_head.weight` has moved", lambda: lm.set_lambda(0.5))


def an_endpoint_that_is_wrong_on_one_rank_fails_on_all(world: World) -> None:
    base, instruct = world.pair("llama")
    pair = loading.load_pair

    def spoilt(*args: Any, **options: Any) -> Any:
        loaded = pair(*args, **options)
        if world.rank == 1:
            loaded.endpoints["instruct"]["lm_head.weight"] = (
                loaded.endpoints["instruct"]["lm_head.weight"] * 2
            )
        return loaded

    sources.load_pair = spoilt
    try:
        world.refused(WeightsError, "endpoint check failed", lambda: load(base, instruct))
    finally:
        sources.load_pair = pair


def what_one_rank_cannot_load_no_rank_loads(world: World) -> None:
    base, instruct = world.pair("llama")
    missing = base if world.rank == 0 else world.folder / "nowhere"
    world.refused(CheckpointError, "nowhere", lambda: load(missing, instruct))
    broken = world.folder / f"broken-{world.size}"
    if world.rank == 0:
        model = on_one_device(base)
        with torch.no_grad():
            model.lm_head.weight[-1, 0] = float("inf")  # in the shard of the last rank
        model.save_pretrained(broken)
    world.gather(None)
    where = "" if world.rank == world.size - 1 else f"on rank {world.size - 1}: "
    world.refused(
        DataError,
        f"^{where}base tensor `lm_head.weight` has 1 non-finite",
        lambda: load(broken, instruct),
    )


def what_cannot_be_split_is_refused(world: World) -> None:
    world.refused(
        UsageError, "device `cuda:1`", lambda: load(*world.pair("llama"), device="cuda:1")
    )
    world.refused(
        EngineError, "splits no weight of GPT2LMHeadModel", lambda: load(*world.pair("gpt-2"))
    )
    odd = world.pair("llama", num_attention_heads=2, num_key_value_heads=1)
    world.refused(EngineError, f"does not run on {world.size} ranks", lambda: load(*odd))
    odd = world.pair("llama", intermediate_size=95)
    world.refused(EngineError, "does not split into", lambda: load(*odd))
    tied, untied = world.pair("llama", tie_word_embeddings=True)[0], world.pair("llama")[1]
    try:
        lm = load(tied, untied)
    except PairError as error:
        assert re.search(
            "is split as .* in the base model and whole on every rank in the instruct model",
            error.message,
        )
    else:  # transformers 5.24 splits a tied matrix as it does an untied one
        lm.set_lambda(0.3)
        left, right = (on_one_device(folder).state_dict() for folder in (tied, untied))
        assert_same_bits(
            whole(lm.model),
            {n: reference.lerp(left[n], right[n], 0.3, left[n].dtype) for n in left},
        )


def partial_sums_are_refused(world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = init_device_mesh("cpu", (world.size,))
    sides = []
    for _ in range(2):
        side = torch.nn.Linear(4, 4)
        side.weight = torch.nn.Parameter(
            DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)], run_check=False)
        )
        side.bias = torch.nn.Parameter(
            DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
        )
        sides.append(side)
    world.refused(EngineError, "`bias` is a partial sum", lambda: layout.check_split(*sides))  # type: ignore[arg-type]


class Likelihood:
    """Mean log-likelihood of a few requests; fails on rank 1 where λ is `failing`."""

    name, higher_is_better = "likelihood", True

    def __init__(self, rank: int, failing: float | None = None):
        self.rank, self.failing = rank, failing

    def __call__(self, engine: Any) -> Score:
        if self.rank == 1 and engine.weights.lam == self.failing:
            raise ZeroDivisionError("no luck on this rank")
        found = [c.logprob for c in engine.loglikelihood([([3, 4, 5], [6]), ([7], [8, 9])])]
        return Score(sum(found) / len(found), "nats", len(found))


def a_sweep_is_recorded_by_rank_0(world: World) -> None:
    from pa_fast.launch.lockstep import sweep

    lm, folders, out = world.model("qwen3"), world.pair("qwen3"), world.folder / f"run-{world.size}"
    first = sweep(lm, "0,0.5,1", [Likelihood(world.rank, failing=0.5)], out, figure=False)
    assert (first is None) == (world.rank > 0)
    if first is not None:
        assert [(f.lam.key, f.evaluator) for f in first.failures] == [("0.5", "likelihood")]
        assert first.failures[0].error == "on rank 1: ZeroDivisionError: no luck on this rank"
    again = sweep(lm, "0,0.5,1", [Likelihood(world.rank)], out, figure=False)
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert [line["lambda"] for line in lines if line.get("score") is not None] == ["0", "1", "0.5"]
    if again is not None:
        assert not again.failures
        rows = (out / "results.csv").read_text().splitlines()
        assert len(rows) == 4
        alone = pa_fast.load(*folders, dtype="float32")
        for line in lines:
            if line.get("score") is not None:
                alone.set_lambda(pa_fast.lambdas(line["lambda"])[0])
                assert line["score"] == pytest.approx(Likelihood(0)(alone).value, rel=1e-4)
    if world.rank == 0:
        (world.folder / "foreign").mkdir(exist_ok=True)
        (world.folder / "foreign" / "file").touch()
    world.gather(None)
    world.refused(
        pa_fast.errors.PaFastError,
        "foreign",
        lambda: sweep(lm, "0", [Likelihood(world.rank)], world.folder / "foreign", figure=False),
    )


def an_adaptive_schedule_is_the_same_on_all_ranks(world: World) -> None:
    from pa_fast.launch.lockstep import sweep
    from pa_fast.sweep.schedule import Schedule
    from tests.sweep.planted import Planted

    lm, out = world.model("qwen3"), world.folder / f"auto-{world.size}"
    planted = Planted("icl")
    sweep(lm, Schedule.of("auto"), [planted], out, figure=False)
    assert all(calls == planted.calls for calls in world.gather(planted.calls))
    assert planted.calls[:6] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and len(planted.calls) > 6


def a_rank_that_is_gone_is_missed(world: World) -> None:
    lm = world.model("llama")
    if world.rank == 1:
        os._exit(0)
    world.refused(
        EngineError, "rank 0 has lost the others in set_lambda", lambda: lm.set_lambda(0.5)
    )


CHECKS: dict[str, Callable[[World], None]] = {
    **{
        f"merges_are_those_of_one_device[{name}]": merges_are_those_of_one_device(name)
        for name in SHARDED
    },
    **{
        check.__name__: check
        for check in (
            every_kind_of_placement_was_met,
            a_rank_holds_its_shards_and_no_more,
            proofs_are_the_same_on_all_ranks,
            scores_and_texts_are_those_of_one_device,
        )
    },
}
ON_TWO_RANKS: dict[str, Callable[[World], None]] = {
    **CHECKS,
    **{
        check.__name__: check
        for check in (
            a_saved_merge_is_the_live_one,
            a_foreign_write_on_one_rank_is_seen_on_all,
            a_rule_is_that_of_one_device,
            a_rank_with_another_lambda_is_refused,
            ranks_out_of_step_fail_instead_of_waiting,
            sampling_is_refused_on_all_ranks,
            a_replaced_parameter_fails_on_all_ranks,
            an_endpoint_that_is_wrong_on_one_rank_fails_on_all,
            what_one_rank_cannot_load_no_rank_loads,
            what_cannot_be_split_is_refused,
            partial_sums_are_refused,
            a_sweep_is_recorded_by_rank_0,
            an_adaptive_schedule_is_the_same_on_all_ranks,
            a_rank_that_is_gone_is_missed,
        )
    },
}


def main(folder: pathlib.Path) -> None:
    # ranks that wait for each other are aborted by `tests.patience`, and say where
    faulthandler.enable()
    torch.set_num_threads(1)
    world = World(folder)
    results = {}
    for name, check in (ON_TWO_RANKS if world.size == 2 else CHECKS).items():
        try:
            check(world)
            fault = None
        except BaseException:
            fault = f"rank {world.rank}: {traceback.format_exc()}"
            print(fault, file=sys.stderr, flush=True)
        faults = [fault] if check is a_rank_that_is_gone_is_missed else world.gather(fault)
        results[name] = "\n".join(fault for fault in faults if fault)
        if world.rank == 0:
            (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
