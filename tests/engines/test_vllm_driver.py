"""The driver's side of the vLLM engine, against fakes of `collective_rpc` and `vllm.LLM` with their
ways to fail. `make vllm` runs the real ones."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.engines.served import layout
from pa_fast.engines.served.weights import EngineWeights
from pa_fast.engines.vllm import engine, supported
from pa_fast.engines.vllm.engine import LambdaLLM, weight_version
from pa_fast.engines.vllm.workers import RpcWorkers
from pa_fast.errors import EngineError, UsageError, WeightsError
from pa_fast.run import SweepSpec, arguments_of

MEMORY = {"live_bytes": 4, "device_bytes": 8, "host_bytes": 0, "mapped_bytes": 0}


@dataclass
class FakeWorker:
    """One rank: `WorkerWeights` over one number."""

    rank: int = 0
    key: str | None = None
    changed: list[str] = field(default_factory=list)
    fails: Exception | None = None
    holds: str | None = None
    sums: dict[str, list[str]] = field(default_factory=lambda: {"norm": ["1", "2"]})

    def pa_call(self, method: str, *arguments: Any) -> dict[str, Any]:
        if self.fails is not None:
            error, self.fails = self.fails, None
            if isinstance(error, pa_fast.PaFastError):
                return {"error": [type(error).__name__, error.message, error.hint]}
            raise error
        return {"value": getattr(self, f"do_{method}")(*arguments)}

    def do_report(self) -> dict[str, Any]:
        own = {f"shard of {self.rank}": [str(self.rank), "3"]}
        content = {} if self.rank else {"base": "b", "instruct": "i"}
        return {"store": "dense", "memory": MEMORY, "sums": self.sums | own, "content": content}

    def do_set_lambda(self, key: str, rows: Any) -> str:
        self.key = key
        return self.holds or key

    def do_load(self, side: str) -> None:
        self.key = {"base": "0", "instruct": "1"}[side]

    def do_check_lambda(self, key: str, rows: Any) -> None:
        if float(key) > 1:
            raise AssertionError("a fake has no range")

    def do_checksum(self) -> str:
        return f"{hash(self.key) % 2**64:016x}"

    def do_read_back(self, merge_again: bool) -> str:
        return self.do_checksum()

    def do_changed(self) -> list[str]:
        return self.changed

    def do_projection(self, copies: list[str] | None = None) -> list[float]:
        norm = [] if copies and self.rank else [(0.5, 1.0)]
        parts = [*norm, (3.0 * (self.rank + 1), 6.0 * (self.rank + 1))]
        return [sum(column) for column in zip(*parts)]

    def do_inventory(self) -> None:
        pass


class FakeLLM:
    """`vllm.LLM`: prefixes of requests are cached under their salt, with the λ that computed
    them."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = [FakeWorker(rank) for rank in range(workers)]
        self.unfinished, self.resets, self.cached = False, True, dict[Any, str | None]()
        self.queue: list[Any] = []
        self.paused: list[str] = []
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 100),
            has_unfinished_requests=lambda: self.unfinished,
            engine_core=type("SyncMPClient", (), {})(),
        )

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self.workers]

    def reset_prefix_cache(self) -> bool:
        if self.resets:
            self.cached.clear()
        return self.resets

    def sleep(self, level: int, mode: str) -> None:
        self.paused.append("asleep")

    def wake_up(self, tags: list[str]) -> None:
        self.paused.append("awake")

    def enqueue(self, requests: list[Any], params: Any, use_tqdm: bool) -> None:
        assert self.paused[-1:] != ["awake"] or len(self.paused) % 2
        each = params if isinstance(params, list) else [params] * len(requests)
        self.queue += list(zip(requests, each))

    def wait_for_completion(self, use_tqdm: Any) -> list[Any]:
        queue, self.queue = self.queue, []
        return [self._answered(*one) for one in queue]

    def _answered(self, request: dict[str, Any], params: Any) -> Any:
        ids = request["prompt_token_ids"]
        known = (request.get("cache_salt"), tuple(ids))
        key = self.cached.setdefault(known, self.workers[0].key)
        value = -float(eval(key)) if key else -9.0
        step = {t: SimpleNamespace(logprob=value, rank=1) for t in range(100)}
        count = params.options.get("max_tokens", 1)
        said = SimpleNamespace(token_ids=[7] * count, logprobs=[step] * count)
        return SimpleNamespace(
            prompt_token_ids=ids, prompt_logprobs=[None, *[step] * (len(ids) - 1)], outputs=[said]
        )


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = lambda **options: SimpleNamespace(options=options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def bare(llm: FakeLLM) -> LambdaLLM:
    """A LambdaLLM around `llm` without files."""
    lm = object.__new__(LambdaLLM)
    lm.llm, lm.on_progress, lm._salt, lm._seen = llm, None, "none", 0
    lm.weights = bound(llm, lm.is_idle)
    return lm


def bound(llm: FakeLLM, idle: Callable[[], bool] = lambda: True) -> EngineWeights:
    own = EngineWeights(RpcWorkers(llm.collective_rpc), idle)
    own.join()
    return own


def weights(count: int = 2) -> tuple[EngineWeights, list[FakeWorker]]:
    llm = FakeLLM(count)
    return bound(llm), llm.workers


def test_lambda_is_exact_on_every_rank() -> None:
    own, workers = weights()
    own.set_lambda("1/3")  # type: ignore[arg-type]
    assert [worker.key for worker in workers] == ["1/3", "1/3"]
    assert pa_fast.Lambda(own.lam).key == "1/3"


def test_ranks_that_disagree_hold_no_lambda() -> None:
    own, workers = weights()
    own.set_lambda(0.3)
    workers[1].holds = "0.2"
    with pytest.raises(EngineError, match=r"differ in λ: rank 0 has 0.6, rank 1 has 0.2"):
        own.set_lambda(0.6)
    assert own.lam is None


def test_an_error_of_a_worker_keeps_its_kind_and_names_its_rank() -> None:
    own, workers = weights()
    workers[1].fails = WeightsError("a tensor moved", "load again")
    with pytest.raises(WeightsError, match="rank 1: a tensor moved") as raised:
        own.set_lambda(0.3)
    assert raised.value.hint == "load again" and own.lam is None
    one, (worker,) = weights(1)
    worker.fails = WeightsError("a tensor moved")
    with pytest.raises(WeightsError) as alone:
        one.set_lambda(0.3)
    assert alone.value.message == "a tensor moved"


def test_an_argument_that_is_refused_changes_nothing() -> None:
    own, workers = weights(1)
    own.set_lambda(0.3)
    workers[0].fails = UsageError("λ = 2 is outside 0 to 1")
    with pytest.raises(UsageError):
        own.set_lambda(2)
    assert own.lam == 0.3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Exception("Call to pa_call method failed: worker died"), "worker"),
        (RuntimeError("EngineCore encountered an issue"), "start the engine again"),
        (TimeoutError("RPC call timed out"), "λ is not known"),
        (AttributeError("'Worker' object has no attribute 'pa_call'"), "no worker extension"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_vllm_raises_is_one_error(error: Exception, message: str) -> None:
    own, workers = weights()
    own.set_lambda(0.3)
    workers[0].fails = error
    with pytest.raises(EngineError, match=message):
        own.set_lambda(0.6)
    assert own.lam is None
    own.set_lambda(0.6)
    assert own.lam == 0.6


def test_a_process_that_dies_during_a_call_ends_it() -> None:
    """vLLM itself would wait for ever."""
    forever = threading.Event()

    def waits(method: str, args: object) -> list[Any]:
        forever.wait()
        return []

    workers = RpcWorkers(waits, died=lambda: True)
    with pytest.raises(EngineError, match="start the engine again"):
        workers.call("report")
    forever.set()
    alive = RpcWorkers(FakeLLM().collective_rpc, died=lambda: False)
    assert alive.call("set_lambda", "0.3", None) == ["0.3"]
    failing = FakeLLM()
    failing.workers[0].fails = WeightsError("a tensor moved")
    with pytest.raises(WeightsError):
        RpcWorkers(failing.collective_rpc, died=lambda: False).call("set_lambda", "0.3", None)


def test_no_answer_is_an_error() -> None:
    with pytest.raises(EngineError, match="no worker"):
        RpcWorkers(lambda method, args: []).call("report")


def test_copies_count_once() -> None:
    """A norm that both ranks have is one tensor of the model; shards are all counted."""
    own, _ = weights(2)
    assert own.effective_lambda() == (0.5 + 3 + 6) / (1 + 6 + 12)
    one, _ = weights(1)
    assert one.effective_lambda() == 3.5 / 7


def test_changed_tensors_are_named_once() -> None:
    own, workers = weights()
    own.set_lambda(0.3)
    assert own.verify()
    workers[0].changed = workers[1].changed = ["norm"]
    assert own.changed() == ["norm"]
    with pytest.raises(WeightsError, match=r"`norm` does not hold the merge at λ = 0.3"):
        own.verify()


def test_checksums_of_ranks_are_combined_in_order() -> None:
    llm = FakeLLM(2)
    own = bound(llm)
    own.set_lambda(0.3)
    before = own.checksum()
    llm.workers[0].key, llm.workers[1].key = "0.1", "0.3"
    one = own.checksum()
    llm.workers[0].key, llm.workers[1].key = "0.3", "0.1"
    assert len({before, one, own.checksum()}) == 3
    assert own.memory().live_bytes == 8


def test_unfinished_requests_refuse_a_switch() -> None:
    llm = FakeLLM()
    lm = bare(llm)
    lm.set_lambda(0.3)
    llm.unfinished = True
    with pytest.raises(EngineError, match="while vLLM computes requests"):
        lm.set_lambda(0.6)
    assert lm.lam == 0.3 and llm.workers[0].key == "0.3"


def test_a_reset_that_fails_refuses_answers() -> None:
    llm = FakeLLM()
    lm = bare(llm)
    llm.resets = False
    with pytest.raises(EngineError, match="key-value blocks"):
        lm.set_lambda(0.3)
    with pytest.raises(EngineError, match="key-value blocks"):
        lm.loglikelihood([([1], [2])])
    llm.resets = True
    lm.set_lambda(0.3)
    assert lm.loglikelihood([([1], [2])])[0].logprob == -0.3


def test_answers_are_never_of_another_lambda() -> None:
    """Neither after a switch without `on_weights_changed`, nor where the reset does nothing."""
    llm = FakeLLM()
    lm = bare(llm)
    for lam in (0.3, 0.6, 0.3):
        lm.weights.set_lambda(lam)
        assert lm.loglikelihood([([1], [2])])[0].logprob == -lam
    llm.reset_prefix_cache = lambda: True  # type: ignore[method-assign]
    for lam in (0.6, 0.3, 0.6):
        lm.set_lambda(lam)
        assert lm.loglikelihood([([1], [2])])[0].logprob == -lam
    # the fake must be able to fail
    (stale,) = [llm._answered({"prompt_token_ids": [1]}, SimpleNamespace(options={}))] * 1
    llm.workers[0].key = "0.9"
    again = llm._answered({"prompt_token_ids": [1]}, SimpleNamespace(options={}))
    assert again.outputs[0].logprobs[0][0].logprob == stale.outputs[0].logprobs[0][0].logprob


def test_requests_are_queued_before_the_first_is_scheduled() -> None:
    llm = FakeLLM()
    lm = bare(llm)
    lm.set_lambda(0.3)
    lm.generate([[1]] * 5, pa_fast.Generation(2))
    assert llm.paused == ["asleep", "awake"]
    assert lm.generate([], pa_fast.Generation(2)) == []


def test_requests_are_checked_before_the_first_is_queued() -> None:
    llm = FakeLLM()
    lm = bare(llm)
    lm.set_lambda(0.3)
    for prompt, message in (([], "has 0 tokens"), ([1] * 64, "has 64 tokens"), ([100], "id 100")):
        with pytest.raises(EngineError, match=f"request 1 has.*{message[4:]}"):
            lm.generate([[1], prompt], pa_fast.Generation(2))
    assert not llm.queue


def test_a_lost_request_is_an_error() -> None:
    llm = FakeLLM()
    lm = bare(llm)
    lm.set_lambda(0.3)
    answered = llm.wait_for_completion
    llm.wait_for_completion = lambda use_tqdm: answered(use_tqdm)[1:]  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="answered 1 of 2 requests"):
        lm.generate([[1]] * 2, pa_fast.Generation(2))


def test_weight_versions_say_lambda_and_checksum() -> None:
    assert weight_version("1/3") == "λ=1/3"
    assert weight_version(0.60, 255) == "λ=0.6 checksum=00000000000000ff"


def test_a_start_that_fails_beside_an_engine_that_was_not_closed_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = FakeLLM()
    monkeypatch.setattr(engine, "_unclosed", {id(llm): True})
    error = engine._of_start(AssertionError("process group is initialized"))
    assert "AssertionError: process group" in error.message and "its close()" in str(error.hint)

    class Invalid(ValueError):
        def errors(self) -> list[dict[str, Any]]:
            return [{"loc": ("max_model_len",), "msg": "Input should be a valid integer"}]

    invalid = engine._of_start(Invalid())
    assert invalid.message.endswith("max_model_len: Input should be a valid integer")
    assert "its close()" not in str(invalid.hint), "arguments fail wherever they are given"
    bare(llm).close()
    assert "its close()" not in str(engine._of_start(AssertionError()).hint)


def test_one_process_holds_one_engine_where_vllm_has_none_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    envs = SimpleNamespace(VLLM_ENABLE_V1_MULTIPROCESSING=False)
    monkeypatch.setattr(sys.modules["vllm"], "envs", envs, raising=False)
    for opened, own_processes, refused in (
        ({}, False, False),
        ({1: False}, False, True),
        ({1: False}, True, False),
        ({1: True}, False, False),
    ):
        monkeypatch.setattr(engine, "_unclosed", opened)
        envs.VLLM_ENABLE_V1_MULTIPROCESSING = own_processes
        if not refused:
            engine._check_alone()
            continue
        with pytest.raises(EngineError, match="was not closed") as raised:
            engine._check_alone()
        assert "its close()" in str(raised.value.hint)


def test_a_closed_engine_says_that_it_is() -> None:
    llm = FakeLLM()
    lm = bare(llm)
    lm.set_lambda(0.3)
    lm.close()
    llm.unfinished = True
    for call in (lambda: lm.set_lambda(0.6), lm.weights.checksum, lm.weights.verify):
        with pytest.raises(EngineError, match="this vLLM engine was closed"):
            call()
    assert lm.lam is None


def test_what_is_no_engine_is_not_attached() -> None:
    for wrong, kind in ((None, "NoneType"), ("x", "str")):
        with pytest.raises(UsageError, match=f"llm is a {kind}, expected a vllm.LLM"):
            engine.attach(wrong, "base", "instruct")


def test_a_dtype_that_is_the_default_is_no_other_sweep() -> None:
    """The command line names it always, Python does not; what comes of it is recorded."""
    llm = FakeLLM()
    llm.llm_engine.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=64, enforce_eager=True),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=1, max_num_batched_tokens=1),
    )
    sys.modules["vllm"].__version__ = "0"  # type: ignore[attr-defined]
    given = [engine._of_engine(llm, arguments) for arguments in ({}, {"dtype": "auto"})]
    assert given[0] == given[1] and given[0]["dtype"] == "bfloat16"


# --- layout


def labelled(numbers: list[int], columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two digits of numbers by row, as `TensorParts.traced` loads them; −1 is padding."""
    low = torch.tensor([0 if n < 0 else n % 255 + 1 for n in numbers], dtype=torch.bfloat16)
    high = torch.tensor([0 if n < 0 else n // 255 + 1 for n in numbers], dtype=torch.bfloat16)
    return low[:, None].expand(-1, columns).clone(), high[:, None].expand(-1, columns).clone()


def test_labels_tell_every_tensor_apart() -> None:
    numbers = [0, 1, 254, 255, 256, 65024, -1]
    found = layout._numbers(*labelled(numbers))
    assert found is not None and found.tolist() == numbers


def test_rows_of_several_tensors_are_mixed() -> None:
    low, high = labelled([3, 4])
    low[0, 1] += 1
    assert layout._numbers(low, high) is None


def test_parts_are_views_under_names_of_the_checkpoint() -> None:
    part = layout.Part
    origins = layout.TensorParts(
        (part("qkv", 0, 4, "q"), part("qkv", 4, 5, "k"), part("head", 0, 2, "q")), {"odd": ("a",)}
    )
    tensors = {"qkv": torch.zeros(6, 2), "head": torch.zeros(2, 2), "odd": torch.zeros(2)}
    views = origins.split(tensors)
    assert {name: list(view.shape) for name, view in views.items()} == {
        "q in qkv": [4, 2],
        "k": [1, 2],
        "q in head": [2, 2],
        "odd": [2],
    }
    assert views["k"].data_ptr() == tensors["qkv"][4:].data_ptr()
    assert origins.checkpoint_names()["q in head"] == ["q"]


# --- what is refused


def config(**changes: Any) -> Any:
    usual: dict[str, Any] = {
        "model_config": SimpleNamespace(quantization=None, use_mla=False, enable_sleep_mode=False),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, enable_expert_parallel=False),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "lora_config": None,
        "speculative_config": None,
    }
    return SimpleNamespace(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_config": SimpleNamespace()}, "LoRA is"),
        ({"model_config": SimpleNamespace(trust_remote_code=True)}, "code of the checkpoint"),
        ({"model_config": SimpleNamespace(runner_type="pooling")}, "generation .pooling"),
        ({"model_config": SimpleNamespace(logprobs_mode="raw_logits")}, "mode=raw_logits"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding .eagle"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8")}, "a quantised KV cache"),
        ({"cache_config": SimpleNamespace(cache_dtype="auto", cpu_offload_gb=4)}, "offloaded"),
        ({"kv_transfer_config": SimpleNamespace()}, "a KV connector"),
        ({"model_config": SimpleNamespace(quantization="awq")}, "quantised weights .awq"),
        ({"model_config": SimpleNamespace(quantization=None, use_mla=True)}, "latent attention"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline"),
        (
            {
                "parallel_config": SimpleNamespace(
                    pipeline_parallel_size=1, enable_expert_parallel=True
                )
            },
            "expert",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_proven_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    supported.check(config())
    with pytest.raises(EngineError, match=message):
        supported.check(config(**changes))


# --- command line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tensor_parallel_size=2", 2),
        ("gpu-memory-utilization=0.5", 0.5),
        ("enforce_eager=True", True),
        ("enforce_eager=false", False),
        ("dtype=half", "half"),
        ("revision=", ""),
        ("download_dir=/a=b", "/a=b"),
        ('compilation_config={"level": 3}', {"level": 3}),
    ],
)
def test_engine_arguments_are_values(text: str, value: object) -> None:
    assert list(arguments_of([text]).values()) == [value]


@pytest.mark.parametrize("texts", [["fast"], ["=1"], ["a b=1"], ["a=1", "a=2"]])
def test_malformed_engine_arguments_are_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="--engine-args"):
        arguments_of(texts)


def spec(**options: Any) -> SweepSpec:
    return SweepSpec("base", "instruct", "0,1", (), "out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm", "device": "cuda"}, "--device cuda with --engine vllm"),
        ({"engine": "vllm", "batch_size": 4}, "--batch-size 4 with --engine vllm"),
        ({"engine": "vllm", "delta": "d"}, "--delta d with --engine vllm"),
        ({"engine_args": ("a=1",)}, "--engine-args a=1 with --engine transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_another_engine_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec(**options).load_options()


def test_options_reach_vllm() -> None:
    given = spec(engine="vllm", engine_args=("max_model_len=64",), rounding="stochastic", seed=3)
    options = given.load_options()
    assert options["max_model_len"] == 64 and options["rounding"] == pa_fast.Rounding(
        "stochastic", 3
    )
    assert (options["store"], options["dtype"]) == ("dense", "auto")
    assert "residency" not in options  # that of the engine's own `load`


def test_ray_asks_for_a_gpu_for_each_rank() -> None:
    assert spec(engine="vllm", engine_args=("tensor_parallel_size=2",)).ranks == 2
    assert spec(engine="vllm").ranks == spec().ranks == 1
