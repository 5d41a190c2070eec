"""A fake of SGLang 0.5.23 in one process, by its source: the weight-update session, the callable of
`custom_weight_loader` in every rank, the flush that is refused, cached prefixes, and a Llama whose
parameters are fused, padded and split over ranks. `faults` makes it fail in its ways."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import pathlib
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

UNPICKLED = {
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.multiprocessing.reductions", "rebuild_storage_empty"),
    ("torch.storage", "UntypedStorage"),
    ("torch", "Tensor"),
    ("torch", "Size"),
    ("torch", "float32"),
}
"""Of what SGLang's own unpickler lets pass, what no shared memory is needed for."""

_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_BY_COLUMNS = ("o_proj", "down_proj")
_PADDED = 96


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in UNPICKLED, (module, name)
        return super().find_class(module, name)


class Part(nn.Module):
    """One rank's parameters, under SGLang's names with `.` for `__`."""

    def __init__(self, config: dict[str, Any], rank: int, world: int, faults: set[str]):
        super().__init__()
        self.rank, self.world, self.faults = rank, world, faults
        hidden, wide = config["hidden_size"], config["intermediate_size"]
        head = hidden // config["num_attention_heads"]
        keys = head * config["num_key_value_heads"]
        self.sizes = {
            "qkv_proj": (hidden // world, keys // world, keys // world),
            "gate_up_proj": (wide // world, wide // world),
        }
        rows = -(-config["vocab_size"] // _PADDED) * _PADDED // world
        shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
        if not config["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (rows, hidden)
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            shapes |= {
                f"{at}.self_attn.qkv_proj.weight": (sum(self.sizes["qkv_proj"]), hidden),
                f"{at}.self_attn.o_proj.weight": (hidden, hidden // world),
                f"{at}.mlp.gate_up_proj.weight": (sum(self.sizes["gate_up_proj"]), hidden),
                f"{at}.mlp.down_proj.weight": (hidden, wide // world),
                f"{at}.input_layernorm.weight": (hidden,),
                f"{at}.post_attention_layernorm.weight": (hidden,),
            }
        for name, shape in shapes.items():
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]  # type: ignore[assignment]
            value = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)
            parent.register_parameter(last, value)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """As SGLang's older loaders: says nothing of what was loaded."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if "a weight is left out" in self.faults and name.endswith("1.mlp.down_proj.weight"):
                continue
            if "loading fails" in self.faults:
                raise RuntimeError("CUDA out of memory")
            kind = name.split(".")[-2]
            fused, place = _FUSED.get(kind, (kind, 0))
            data = parameters[name.replace(kind, fused)].data
            if fused in self.sizes:
                rows = self.sizes[fused]
                start = sum(rows[:place])
                tensor = tensor[self.rank * rows[place] :][: rows[place]]
                data[start : start + rows[place]].copy_(tensor)
            elif kind in ("embed_tokens", "lm_head"):
                own = tensor[self.rank * data.shape[0] :][: data.shape[0]]
                data[: own.shape[0]].copy_(own)
                data[own.shape[0] :].fill_(0)
            elif kind in _BY_COLUMNS:
                data.copy_(tensor[:, self.rank * data.shape[1] :][:, : data.shape[1]])
            else:
                data.copy_(tensor)
        if "parameters move" in self.faults:
            norm: Any = self.model.norm
            norm.weight = nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
        if "a buffer is made of weights" in self.faults:
            norm = self.model.norm
            norm.doubled = norm.weight.detach() * 2
        if "rounds as it loads" in self.faults:
            norm = self.model.norm
            norm.weight.data.mul_(1.0078125)
        self.packed = [parameter.clone() for parameter in self.parameters()]


class Engine:
    """`sglang.Engine`: prefixes are cached under their salt, with the weights that computed
    them."""

    faults: ClassVar[set[str]] = set()
    """What goes wrong in engines from now on."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        folder = pathlib.Path(arguments["model_path"])
        config = json.loads((folder / "config.json").read_text())
        self.world = int(arguments.get("tp_size", 1))
        self.parts = [Part(config, rank, self.world, self.faults) for rank in range(self.world)]
        tensors = {
            name: tensor
            for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for part in self.parts:
            faults, part.faults = part.faults, set()
            part.load_weights(tensors.items())
            part.faults = faults
            if "experts" in faults:
                name = "model.layers.0.mlp.down_proj"
                part.get_submodule(name).__class__ = type(
                    "FusedMoE", (nn.Module,), {"__module__": "sglang.srt.layers.moe.layer"}
                )
        self.tokenizer_manager = SimpleNamespace(
            is_pause=False,
            model_config=SimpleNamespace(
                dtype=torch.bfloat16, context_len=64, vocab_size=config["vocab_size"]
            ),
        )
        self.busy = 0
        """How many flushes are refused."""
        self.is_open, self.is_shut = False, False
        self.cached: dict[Any, str] = {}
        self.asked: list[dict[str, Any]] = []

    def get_server_info(self) -> dict[str, Any]:
        known = {
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "quantization": None,
            "version": "0.5.23",
        }
        return {**known, "offload_group_size": -1, "kv_cache_dtype": "auto", **self.arguments}

    def shutdown(self) -> None:
        self.is_shut = True

    # --- weight updates

    def begin_weight_update(self) -> tuple[bool, str]:
        if self.is_open:
            return False, "a weight-update session is already open"
        self.is_open = True
        return True, "Success"

    def end_weight_update(self) -> tuple[bool, str]:
        if not self.is_open or "the session does not end" in self.faults:
            return False, "no weight-update session is open"
        self.is_open = False
        return True, "Success"

    def update_weights_from_tensor(
        self,
        named_tensors: list[tuple[str, torch.Tensor]],
        load_format: str | None = None,
        flush_cache: bool = True,
    ) -> tuple[bool, str]:
        """The outcome is the first rank's; what the callable returns is lost, and what it raises
        ends the process."""
        if not self.is_open:
            return False, "update_weights_from_tensor must run between begin and end"
        if "a scheduler is gone" in self.faults:
            raise ConnectionError("zmq")
        if "derived weights" in self.faults:
            return False, "Online weight updates are not supported while splits are active"
        assert load_format in self.arguments["custom_weight_loader"], "NotImplementedError"
        module, _, function = load_format.rpartition(".")
        payload = io.BytesIO()
        ForkingPickler(payload).dump(named_tensors)
        for part in self.parts:
            if "a rank does not answer" in self.faults and part.rank == self.world - 1:
                continue
            # as the event loop of a scheduler may
            with rank(part.rank, self.world), torch.inference_mode():
                call = getattr(importlib.import_module(module), function)
                call(part, Unpickler(io.BytesIO(payload.getvalue())).load())
        if "a rank goes its own way" in self.faults and self.world > 1:
            norm: Any = self.parts[1].model.norm
            norm.weight.data.add_(1)
        return True, "Success"

    def flush_cache(self) -> Any:
        if self.busy:
            self.busy -= 1
            return SimpleNamespace(success=False)
        if "a flush drops nothing" not in self.faults:
            self.cached.clear()
        return SimpleNamespace(success=True)

    # --- answers

    def weights(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            packed = "packed weights are multiplied" in self.faults
            for tensor in part.packed if packed else part.parameters():
                digest.update(tensor.detach().view(torch.uint8).numpy().tobytes())
        if "answers differ each time" in self.faults:
            digest.update(str(len(self.asked)).encode())
        return digest.hexdigest()

    def generate(
        self,
        *,
        input_ids: list[list[int]],
        sampling_params: dict[str, Any],
        cache_salt: str,
        return_logprob: bool = False,
        logprob_start_len: Iterable[int] = (),
        top_logprobs_num: int = 0,
    ) -> list[dict[str, Any]]:
        if "requests fail" in self.faults:
            raise ValueError("The request is aborted")
        starts = list(logprob_start_len) or [0] * len(input_ids)
        outputs = []
        for ids, start in zip(input_ids, starts, strict=True):
            self.asked.append({"ids": ids, "salt": cache_salt, **sampling_params})
            weights = self.cached.setdefault((cache_salt, tuple(ids)), self.weights())
            new = [
                self._next(weights, ids, k) % 60 + 3
                for k in range(sampling_params["max_new_tokens"])
            ]
            last = self.tokenizer_manager.model_config.vocab_size - 1
            about: dict[str, Any] = {"finish_reason": {"type": "length"}}
            if return_logprob:
                steps: list[Any] = [(None, ids[start], None)]
                tops: list[Any] = [None]
                for k in range(start + 1, len(ids)):
                    value = -self._next(weights, ids, k) / 1000
                    steps.append((value, ids[k] if ids[k] < last else 0, None))
                    tops.append([(value + (k % 2), 5, None)])
                about["input_token_logprobs"], about["input_top_logprobs"] = steps, tops
                about["output_token_logprobs"] = [(-0.5, token, None) for token in new]
            if "requests are aborted" in self.faults:
                about["finish_reason"] = {"type": "abort"}
            outputs.append({"output_ids": new, "meta_info": about})
        return outputs

    def _next(self, weights: str, ids: list[int], k: int) -> int:
        text = f"{weights} {ids[: k + 1]} {k}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)


@contextmanager
def rank(number: int, world: int) -> Iterator[None]:
    """Within the block this process is rank `number`."""
    context = sys.modules["sglang.srt.runtime_context"]
    before = context.get_parallel
    context.get_parallel = lambda: SimpleNamespace(tp_rank=number, tp_size=world)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        context.get_parallel = before  # type: ignore[attr-defined]


def install(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the fake in the place of `sglang`, and return what sets its faults."""
    for name in ("sglang", "sglang.srt", "sglang.srt.runtime_context"):
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["sglang"].Engine = Engine  # type: ignore[attr-defined]
    sys.modules["sglang.srt.runtime_context"].get_parallel = None  # type: ignore[attr-defined]
    faults: set[str] = set()
    patch.setattr(Engine, "faults", faults)

    def fail(*names: str) -> None:
        faults.clear()
        faults.update(names)

    return fail
