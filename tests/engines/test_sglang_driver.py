"""The SGLang engine, driver and ranks, against a fake of SGLang 0.5.23 with its ways to fail. It
has not been run with the real one."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pa_fast
import pa_fast.sglang
from pa_fast.engines.served.worker_weights import WorkerWeights
from pa_fast.engines.sglang import supported, worker
from pa_fast.errors import (
    CheckpointError,
    EngineError,
    MissingExtra,
    PaFastError,
    RunError,
    UsageError,
    WeightsError,
)
from pa_fast.run import SweepSpec
from tests.engines import fake_sglang
from tests.engines.architectures import write_pair
from tests.engines.test_loading import edit

Fail = Callable[..., None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    return fake_sglang.install(monkeypatch)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base, instruct = write_pair(tmp_path_factory.mktemp("pair"), "llama")
    return str(base), str(instruct)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base, instruct = write_pair(
        tmp_path_factory.mktemp("tied"), "llama", tie_word_embeddings=True, vocab_size=100
    )
    return str(base), str(instruct)


def load(pair: tuple[str, str], **options: Any) -> Any:
    return pa_fast.sglang.load(*pair, skip_tokenizer_init=True, **options)


def expected(folder: pathlib.Path, world: int = 1) -> list[dict[str, torch.Tensor]]:
    """The parameters of each rank of an engine that starts on `folder`."""
    engine = fake_sglang.Engine(model_path=str(folder), tp_size=world)
    return [dict(part.named_parameters()) for part in engine.parts]


def assert_holds(lm: Any, wanted: list[dict[str, torch.Tensor]]) -> None:
    for part, own in zip(lm.served.parts, wanted, strict=True):
        found = dict(part.named_parameters())
        assert found.keys() == own.keys()
        for name, tensor in own.items():
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


# --- λ


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_are_those_of_a_merge_that_sglang_loads(
    fail: Fail, pair: tuple[str, str], tmp_path: pathlib.Path, world: int
) -> None:
    lm = load(pair, tp_size=world)
    assert lm.lam == 0
    assert_holds(lm, expected(pathlib.Path(pair[0]), world))
    for lam in (0.3, "1/3"):
        pa_fast.merge(*pair, lam, tmp_path / f"{lam}".replace("/", "_"))
        lm.set_lambda(lam)
        assert_holds(lm, expected(tmp_path / f"{lam}".replace("/", "_"), world))
        assert pa_fast.Lambda(lm.lam).key == str(lam) and lm.weights.verify()
        assert lm.weights.read_back(merge_again=True) == lm.weights.checksum()
    assert lm.weights.effective_lambda() == pytest.approx(1 / 3, abs=0.01)
    assert lm.weights.memory().live_bytes > 0
    lm.close()
    assert lm.served.is_shut


def test_a_tied_and_padded_vocabulary(
    fail: Fail, tied: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    lm = load(tied, store="packed", tp_size=2)
    pa_fast.merge(*tied, 0.6, tmp_path / "merged")
    for lam in (0.1, 0.6):
        lm.set_lambda(lam)
    assert_holds(lm, expected(tmp_path / "merged", 2))
    with pytest.raises(UsageError, match=r"λ = 2 is outside \[0, 1\]"):
        lm.set_lambda(2)
    assert lm.lam == 0.6


def test_rules_and_noise_by_the_names_of_the_checkpoint(
    fail: Fail, pair: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    rule = [{"match": "*q_proj*", "lambda": 1}, {"match": "*up_proj*", "times": "1/2"}]
    pa_fast.merge(*pair, 0.3, tmp_path / "rule", rule=rule)
    pa_fast.merge(*pair, 0.3, tmp_path / "noise", rounding="stochastic", seed=5)
    for options, folder in (
        ({"rule": rule}, "rule"),
        ({"rounding": pa_fast.Rounding("stochastic", 5)}, "noise"),
    ):
        lm = load(pair, **options)
        lm.set_lambda(0.3)
        assert_holds(lm, expected(tmp_path / folder))


def test_the_protocol_gives_what_sglang_gives(fail: Fail, pair: tuple[str, str]) -> None:
    lm = load(pair)
    lm.set_lambda(0.3)
    seen: list[tuple[int, int]] = []
    lm.on_progress = lambda done, count: seen.append((done, count))
    last = lm.vocabulary - 1
    pairs = [([4, 5], [6, 7]), ([4], [last]), ([4, 5, 6], [7, 8, 9]), ([4], [])]
    scores = lm.loglikelihood(pairs)
    (output,) = lm.served.generate(
        input_ids=[[4, 5, 6, 7]],
        sampling_params={"max_new_tokens": 1},
        cache_salt=lm.salt(),
        return_logprob=True,
    )
    steps = output["meta_info"]["input_token_logprobs"]
    assert scores[0].logprob == steps[2][0] + steps[3][0] and not scores[0].is_greedy
    assert scores[3] == pa_fast.base.Continuation(0.0, True)
    assert seen == [(4, 4)]
    config = pa_fast.Generation(3, stop=(5,))
    assert all(5 not in ids and len(ids) <= 3 for ids in lm.generate([[4], [6, 7]], config))
    assert lm.generate([], config) == lm.loglikelihood([]) == []
    with pytest.raises(EngineError, match="the SGLang engine cannot sample"):
        lm.generate([[4]], pa_fast.Generation(3, temperature=1.0))
    for prompt, message in (
        ([], "has 0 tokens"),
        ([1] * 64, "has 64"),
        ([last + 1], "has token id"),
    ):
        with pytest.raises(EngineError, match=f"request 1 {message}"):
            lm.generate([[1], prompt], config)
    with pytest.raises(EngineError, match="request 0 has an empty context"):
        lm.loglikelihood([([], [1])])


def test_a_sweep_runs(fail: Fail, pair: tuple[str, str], tmp_path: pathlib.Path) -> None:
    lm = load(pair)

    def score(lm: Any) -> float:
        return float(lm.loglikelihood([([4], [5])])[0].logprob)

    result = pa_fast.sweep(lm, "0,0.5,1", score, tmp_path / "run", figure=False)
    assert len(result.rows) == 3 and not result.failures
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "sglang" in json.dumps(identity) and "enable_deterministic_inference" in str(identity)


def test_one_byte_of_a_side_is_another_sweep(fail: Fail, tmp_path: pathlib.Path) -> None:
    """What a sampled fingerprint does not see: a run goes on over the same weights alone."""
    sides = write_pair(tmp_path, "llama", vocab_size=4000)

    def one(lm: Any) -> float:
        return 1.0

    def swept(lambdas: str) -> Any:
        return pa_fast.sweep(load(sides), lambdas, one, tmp_path / "run", figure=False)

    def last_bit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].view(torch.int16)[-1, -1] ^= 1

    assert not swept("0,1").failures
    known = load(sides).identity
    live = pa_fast.load(*sides).identity
    assert known["base_content"] == live["base_content"] != known["instruct_content"]
    edit(sides[0], last_bit)
    now = load(sides).identity
    assert now["base"] == known["base"], "the test must need the content"
    assert now["base_content"] != known["base_content"]
    with pytest.raises(RunError, match=r"engine\.base_content: recorded"):
        swept("0,0.5,1")


def test_another_pair_may_be_bound_until_a_side_was_loaded(
    fail: Fail, pair: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    part = load(pair).served.parts[0]
    asked = {"base": str(tmp_path / "nope"), "instruct": pair[1]}
    weights = WorkerWeights(worker.SglangStack("bfloat16"))
    for file in pathlib.Path(pair[1]).glob("*.safetensors"):
        part.load_weights(load_file(file).items())
    with fake_sglang.rank(0, 1):
        with pytest.raises(CheckpointError, match="nope"):
            weights.bind(part, asked)
        assert weights.bind(part, {**asked, "base": pair[0]})["tensors"] > 0


# --- nothing of the last λ


def test_answers_are_never_of_another_lambda(fail: Fail, pair: tuple[str, str]) -> None:
    """Neither after a switch without `on_weights_changed`, nor where a flush drops nothing."""
    lm = load(pair)
    right: dict[float, float] = {}
    for drops in (True, False):
        fail(*(() if drops else ("a flush drops nothing",)))
        for lam in (0.3, 0.6, 0.3):
            lm.weights.set_lambda(lam)
            score = lm.loglikelihood([([1], [2])])[0].logprob
            assert right.setdefault(lam, score) == score
    assert right[0.3] != right[0.6]
    # the fake must be able to fail
    lm.served.cached = dict.fromkeys([("salt", (1, 2))], "other weights")
    for salt in ("salt", "another"):
        (stale,) = lm.served.generate(
            input_ids=[[1, 2]],
            sampling_params={"max_new_tokens": 1},
            cache_salt=salt,
            return_logprob=True,
        )
        value = stale["meta_info"]["input_token_logprobs"][1][0]
        assert (value == right[0.3]) is (salt == "another")


def test_unfinished_requests_refuse_a_switch(
    fail: Fail, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pa_fast.engines.sglang.engine._IDLE_S", 0.05)
    lm = load(pair)
    lm.set_lambda(0.3)
    before = lm.weights.checksum()
    lm.served.busy = 10**6
    with pytest.raises(EngineError, match="while SGLang computes requests"):
        lm.set_lambda(0.6)
    lm.served.busy = 0
    lm.served.tokenizer_manager.is_pause = True
    with pytest.raises(EngineError, match="while SGLang computes requests"):
        lm.set_lambda(0.6)
    lm.served.tokenizer_manager.is_pause = False
    assert lm.lam == 0.3 and lm.weights.checksum() == before
    lm.served.busy = 2  # its last batch is put away a moment after the answer
    lm.set_lambda(0.6)
    assert lm.lam == 0.6


def test_a_flush_that_fails_refuses_answers(
    fail: Fail, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pa_fast.engines.sglang.engine._IDLE_S", 0.05)
    lm = load(pair)
    lm.weights.set_lambda(0.3)
    lm.served.busy = 10**6
    for call in (lm.on_weights_changed, lambda: lm.loglikelihood([([1], [2])])):
        with pytest.raises(EngineError, match="could not flush"):
            call()
    lm.served.busy = 0
    assert lm.loglikelihood([([1], [2])])


# --- failures of ranks and updates


def test_ranks_that_disagree_hold_no_lambda(fail: Fail, pair: tuple[str, str]) -> None:
    lm = load(pair, tp_size=2)
    lm.set_lambda(0.3)
    fail("a rank goes its own way")
    lm.weights.set_lambda(0.6)
    fail()
    assert lm.weights.changed() == ["model.norm.weight"]
    with pytest.raises(WeightsError, match=r"`model.norm.weight` does not hold the merge"):
        lm.weights.verify()
    with pytest.raises(WeightsError, match=r"rank 1: "):
        lm.weights.read_back()
    answers = lm.weights._workers.answers

    def one_of_another(method: str, arguments: Any) -> Any:
        first, second = answers(method, arguments)
        return [first, {"value": "0.2"}] if method == "set_lambda" else [first, second]

    lm.weights._workers.answers = one_of_another
    with pytest.raises(EngineError, match=r"differ in λ: rank 0 has 0.6, rank 1 has 0.2"):
        lm.set_lambda(0.6)
    assert lm.lam is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a rank does not answer", "rank 1 of SGLang left no answer"),
        ("derived weights", "refuses update_weights_from_tensor: Online weight updates are not"),
        ("the session does not end", "refuses end_weight_update: no weight-update session"),
        ("a scheduler is gone", "ranks failed: ConnectionError: zmq"),
    ],
)
def test_an_update_that_fails_leaves_no_lambda(
    fail: Fail, pair: tuple[str, str], fault: str, message: str
) -> None:
    lm = load(pair, tp_size=2)
    lm.set_lambda(0.3)
    fail(fault)
    with pytest.raises(EngineError, match=message) as raised:
        lm.set_lambda(0.6)
    assert lm.lam is None and "start the engine again" in str(raised.value.hint)
    assert_no_answers_left(lm)


def test_a_session_of_another_is_named(fail: Fail, pair: tuple[str, str]) -> None:
    lm = load(pair)
    lm.served.begin_weight_update()
    with pytest.raises(EngineError, match=r"refuses begin_weight_update: .* already open"):
        lm.set_lambda(0.6)
    lm.served.end_weight_update()
    lm.set_lambda(0.6)
    assert lm.lam == 0.6


def test_errors_of_a_rank_keep_their_kind(fail: Fail, pair: tuple[str, str]) -> None:
    lm = load(pair, tp_size=2)
    lm.set_lambda(0.3)
    norm: Any = lm.served.parts[1].model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    with pytest.raises(EngineError, match=r"rank 1: SGLang's parameter `model.norm.weight` was"):
        lm.set_lambda(0.6)
    assert lm.lam is None
    assert_no_answers_left(lm)


def assert_no_answers_left(lm: Any) -> None:
    """What one call left is never taken for the answer of the next."""
    folder = pathlib.Path(lm.weights._workers._folder.name)
    names = [re.match(r"(\d+)-", path.name) for path in folder.iterdir()]
    assert all(name and int(name[1]) < next(lm.weights._workers._numbers) for name in names)


@pytest.mark.parametrize(
    "text",
    ["λ", "", "[]", "{}", json.dumps({"method": "lam", "arguments": [], "dtype": "no"}), None],
)
def test_what_is_no_call_of_ours_ends_no_rank(
    fail: Fail, pair: tuple[str, str], text: Any, tmp_path: pathlib.Path
) -> None:
    """An exception would end SGLang's scheduler, and the driver with it."""
    part = fake_sglang.Engine(model_path=pair[1]).parts[0]
    with fake_sglang.rank(0, 1):
        worker.apply(part, [(text, torch.empty(0))])
        worker.apply(part, [("a", torch.zeros(1)), ("b", torch.zeros(1))])
        taken = tmp_path / "0.json"
        taken.write_text("mine")
        call = {"method": "lam", "arguments": [], "dtype": "bfloat16", "answers": f"{tmp_path}/"}
        worker.apply(part, [(json.dumps(call), torch.empty(0))])
    assert taken.read_text() == "mine"


# --- what is proven when the pair is bound


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a weight is left out", r"loads nothing of base into `model.layers.1.mlp.down_proj.weigh"),
        ("parameters move", r"moved or replaced `model.norm.weight` when it loaded base"),
        ("a buffer is made of weights", r"`model.norm.doubled` is made of the weights of base"),
        ("rounds as it loads", r"`model.norm.weight` of instruct, loaded into SGLang a second"),
        ("loading fails", r"cannot load the pair anew: RuntimeError: CUDA out of memory"),
        ("packed weights are multiplied", r"answers at λ = 1 are not those of instruct"),
        ("answers differ each time", r"answers changed when the pair was bound"),
        ("experts", r"`model.layers.0.mlp.down_proj` is of mixtures of experts"),
        ("derived weights", "refuses update_weights_from_tensor"),
        ("requests fail", "did not answer: ValueError"),
        ("requests are aborted", "answered 0 of 1 requests"),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_not_proven_is_refused_and_the_engine_shut(
    fail: Fail,
    pair: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
    world: int,
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        fake_sglang.Engine,
        "get_server_info",
        lambda self, known=fake_sglang.Engine.get_server_info: started.append(self) or known(self),
    )
    fail(fault)
    with pytest.raises(PaFastError, match=message) as raised:
        load(pair, tp_size=world)
    assert raised.value.hint
    assert started[0].is_shut


def test_a_pair_is_bound_once(fail: Fail, pair: tuple[str, str]) -> None:
    lm = load(pair)
    lm.set_lambda(0.3)
    before = lm.weights.checksum()
    with pytest.raises(UsageError, match="this SGLang engine follows a pair already"):
        pa_fast.sglang.attach(lm.served, *pair)
    assert lm.weights.checksum() == before and lm.weights.verify()


def test_attach(fail: Fail, pair: tuple[str, str], tmp_path: pathlib.Path) -> None:
    started = {"model_path": pair[1], "custom_weight_loader": [pa_fast.sglang.LOADER]}
    llm = fake_sglang.Engine(**started)
    lm = pa_fast.sglang.attach(llm, *pair, store="packed")
    assert lm.served is llm and lm.lam == 0
    strange = fake_sglang.Engine(model_path=pair[1])
    with pytest.raises(EngineError, match="does not know pa_fast"):
        pa_fast.sglang.attach(strange, *pair)
    with pytest.raises(EngineError, match="SGLang was started on"):
        pa_fast.sglang.attach(fake_sglang.Engine(**started), *pair[::-1])
    assert not strange.is_open  # an update that names an unknown callable ends its scheduler


# --- what is refused before SGLang starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_remote_code": True}, "code of the checkpoint"),
        ({"quantization": "fp8"}, r"quantised weights .quantization=fp8"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "a quantised KV cache"),
        ({"enable_lora": True}, "LoRA"),
        ({"lora_paths": ["a"]}, "LoRA"),
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
        ({"pp_size": 2}, "pipeline parallelism"),
        ({"dp_size": 2}, "data parallelism"),
        ({"enable_dp_attention": True}, "data parallelism"),
        ({"ep_size": 2}, "expert parallelism"),
        ({"enable_eplb": True}, "expert parallelism"),
        ({"nnodes": 2}, "ranks on several hosts"),
        ({"enable_hierarchical_cache": True}, "a cache beyond the GPU"),
        ({"cpu_offload_gb": 4}, "offloaded weights"),
        ({"weight_cache_mode": "daemon"}, "shared weights"),
        ({"disaggregation_mode": "prefill"}, "prefill and decode apart"),
    ],
    ids=str,
)
def test_arguments_that_are_not_proven_are_refused_by_name(
    fail: Fail, pair: tuple[str, str], arguments: dict[str, Any], message: str
) -> None:
    usual = fake_sglang.Engine(model_path=pair[1]).get_server_info()
    supported.check(usual, {})
    for given in (arguments, {**usual, **arguments}):
        with pytest.raises(EngineError, match=f"SGLang with {message}"):
            supported.check(given, {})
    fail("a model was started")
    with pytest.raises(EngineError, match=message):
        load(pair, **arguments)


def test_architectures_that_are_not_proven_are_refused_by_name() -> None:
    for config, message in (
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"num_local_experts": 8}, "mixtures of experts"),
        ({"text_config": {"n_routed_experts": 64}}, "mixtures of experts"),
    ):
        with pytest.raises(EngineError, match=message):
            supported.check({}, config)
    supported.check({}, {"num_experts": 0, "kv_lora_rank": None, "text_config": None})


def test_arguments_of_pa_fast(
    fail: Fail, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("custom_weight_loader", "load_format", "model_path"):
        with pytest.raises(UsageError, match=f"`{name}` of SGLang is set by pa_fast"):
            load(pair, **{name: "x"})
    with pytest.raises(EngineError, match="has no tokenizer files"):
        pa_fast.sglang.load(*pair)
    with pytest.raises(UsageError, match="SGLang needs the instruct folder"):
        pa_fast.sglang.load(pair[0], None)
    with pytest.raises(UsageError, match="lowrank"):
        load(pair, store="lowrank")
    with pytest.raises(UsageError, match="over 2 ranks"):
        load(pair, rounding="stochastic", tp_size=2)
    lm = load(pair)
    assert lm.served.arguments["enable_deterministic_inference"] is True
    assert any("has not been run for real" in note for note in lm.notes)
    assert not any("batches requests as they arrive" in note for note in lm.notes)
    free = load(pair, enable_deterministic_inference=False)
    assert any("batches requests as they arrive" in note for note in free.notes)

    def refuses(**arguments: Any) -> None:
        raise TypeError("unexpected keyword argument 'fast'")

    monkeypatch.setattr("sglang.Engine", refuses)
    with pytest.raises(EngineError, match="SGLang cannot start: TypeError: unexpected keyword"):
        load(pair, fast=True)


def test_a_missing_sglang_is_said(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sglang", None)
    with pytest.raises(MissingExtra, match="SGLang is not installed"):
        pa_fast.sglang.load(*pair)


def spec(**options: Any) -> SweepSpec:
    return SweepSpec("base", "instruct", "0,1", (), "out", engine="sglang", **options)


def test_options_reach_sglang() -> None:
    with pytest.raises(UsageError, match="--batch-size 4 with --engine sglang") as raised:
        spec(batch_size=4).load_options()
    assert raised.value.hint == "use --engine-args max_running_requests=N"
    given = spec(engine_args=("context_length=64",), residency="device")
    options = given.load_options()
    assert (options["context_length"], options["residency"]) == (64, "device")
    assert spec(engine_args=("tp_size=4",)).ranks == 4


def test_the_fake_holds_a_checkpoint_whole(pair: tuple[str, str]) -> None:
    """What the ranks hold together is every tensor of the files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in pathlib.Path(pair[1]).glob("*.safetensors"):
        tensors |= load_file(file)
    count = sum(
        int(t.count_nonzero()) for own in expected(pathlib.Path(pair[1]), 2) for t in own.values()
    )
    norms = sum(int(t.count_nonzero()) for name, t in tensors.items() if "norm" in name)
    assert count == sum(int(t.count_nonzero()) for t in tensors.values()) + norms
