"""LoRA folders: what peft computes from ours, and what we compute from peft's, are the same
logits."""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pa_fast
from pa_fast.engines.attached import attach
from pa_fast.engines.encoding import encode
from pa_fast.errors import CheckpointError, DataError, OutputError, PaFastError, PairError
from pa_fast.live import encoding
from pa_fast.stores import lora as lora_import
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.lora import LoraStore, export
from pa_fast.stores.lowrank import Factors, LowRankStore
from pa_fast.stores.store import DenseEntry, Entry, Source
from tests.engines.architectures import config, write_pair

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 27).view(2, 12)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TRAINED = ["q_proj", "down_proj", "embed_tokens", "lm_head"]

# torch lists its constructors when a device context is first used: here, before each test gets
# poisoned ones
with torch.device("meta"):
    assert torch.zeros(1).is_meta


@pytest.fixture(autouse=True)
def _offline_and_calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """peft asks the hub whether a base has other embeddings, and warns of every adapted
    embedding."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(architecture: str, device: str = "cpu") -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config(architecture), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


class Given:
    """A store that keeps the entries that it is given, and for all other tensors the instruct
    side."""

    name, exact, lossless = "lowrank", False, False

    def __init__(self, entries: dict[str, Factors]):
        self._entries = entries

    def describe(self) -> str:
        return self.name

    def encode(self, sources: list[Source]) -> Iterator[Entry]:
        for source in sources:
            yield self._entries.get(source.name, DenseEntry(source.instruct))


def factors_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
    """Factors of every matrix, of ranks that differ; of one matrix of rank 0."""
    g = torch.Generator().manual_seed(1)
    made = {}
    for place, (name, weight) in enumerate(model.named_parameters()):
        if weight.dim() == 2:
            rank = 0 if name.endswith("layers.1.mlp.up_proj.weight") else 3 + place % 3
            sides = (
                torch.randn(weight.shape[0], rank, generator=g),
                torch.randn(rank, weight.shape[1], generator=g),
            )
            made[name] = Factors(*((0.05 * side).to(dtype) for side in sides))
    return made


def delta_of(
    model: torch.nn.Module,
    path: pathlib.Path,
    entries: dict[str, Factors],
    changed: dict[str, torch.Tensor] | None = None,
) -> pathlib.Path:
    base = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    encoding.encode(path, base, base, {**base, **(changed or {})}, Given(entries))
    return path


def attached(model: torch.nn.Module, factors: dict[str, Factors]) -> torch.Tensor:
    return attach(model, {name: (entry.u, entry.v) for name, entry in factors.items()})


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("lam", [1.0, 0.3, -0.5])
def test_peft_computes_what_the_attached_model_computes(
    architecture: str, lam: float, tmp_path: pathlib.Path
) -> None:
    factors = factors_of(model_of(architecture))
    delta = delta_of(model_of(architecture), tmp_path / "delta", factors)
    exported = export(
        delta, model_of(architecture, "meta"), tmp_path / "lora", lam, base_model="org/base"
    )
    theirs = peft.PeftModel.from_pretrained(model_of(architecture), tmp_path / "lora")
    ours = model_of(architecture)
    base = logits(ours)
    attached(ours, factors).fill_(lam)
    assert torch.allclose(logits(theirs), logits(ours), **CLOSE)
    assert not torch.allclose(logits(ours), base, atol=1e-3)
    tied = ["lm_head.weight"] if architecture == "qwen2" else []
    expected = [name for name, entry in factors.items() if entry.u.shape[1]]
    assert sorted(exported.ranks) == sorted(
        name.removesuffix(".weight") for name in expected + tied
    )
    assert exported.left_out == () and set(exported.ranks.values()) == {3, 4, 5}
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (
        5,
        5 * lam,
        "org/base",
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_is_exported_comes_back_bit_by_bit(architecture: str, tmp_path: pathlib.Path) -> None:
    model = model_of(architecture)
    factors = factors_of(model, torch.bfloat16)
    export(delta_of(model, tmp_path / "delta", factors), model, tmp_path / "lora", 0.5)
    found = lora_import.read(tmp_path / "lora", model_of(architecture, "meta"))
    assert found.keys() == {name for name, entry in factors.items() if entry.u.shape[1]}
    for name, entry in found.items():
        assert torch.equal(entry.u, factors[name].u * 0.5) and torch.equal(
            entry.v, factors[name].v
        ), name
        assert (
            entry.u.dtype == torch.bfloat16 and entry.u.is_contiguous() and entry.v.is_contiguous()
        )


def test_a_factor_that_is_no_power_of_two_is_folded_in_fp32(tmp_path: pathlib.Path) -> None:
    model = model_of("llama")
    factors = factors_of(model, torch.bfloat16)
    export(delta_of(model, tmp_path / "delta", factors), model, tmp_path / "lora", 0.3)
    for name, entry in lora_import.read(tmp_path / "lora", model).items():
        assert entry.u.dtype == entry.v.dtype == torch.float32
        assert torch.equal(entry.v, factors[name].v.float())
        assert torch.allclose(entry.u, factors[name].u.float() * 0.3, rtol=2e-7, atol=0)


def changed_norm(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    name = "model.norm.weight"
    return {name: model.get_parameter(name).detach() + 0.5}


def test_what_does_not_fit_is_refused_or_left_out_by_name(tmp_path: pathlib.Path) -> None:
    model = model_of("llama")
    delta = delta_of(model, tmp_path / "delta", factors_of(model), changed_norm(model))
    with pytest.raises(
        DataError, match=r"changes 1 tensors that a LoRA cannot hold, such as `model\.norm\.weight`"
    ):
        export(delta, model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert export(delta, model, tmp_path / "lora", partial=True).left_out == ("model.norm.weight",)
    assert torch.isfinite(
        logits(peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "lora"))
    ).all()


def test_a_head_that_only_the_base_ties_keeps_factors_of_its_own(tmp_path: pathlib.Path) -> None:
    apart = model_of("qwen2")
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    factors = factors_of(apart)
    assert not torch.equal(factors["lm_head.weight"].u, factors["model.embed_tokens.weight"].u)
    delta = delta_of(apart, tmp_path / "delta", factors)
    export(delta, model_of("qwen2", "meta"), tmp_path / "lora")
    attached(apart, factors).fill_(1.0)
    theirs = peft.PeftModel.from_pretrained(model_of("qwen2"), tmp_path / "lora")
    assert torch.allclose(logits(theirs), logits(apart), **CLOSE)


def test_a_pair_encoded_as_factors_is_exported_without_its_norms(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    encode(base, instruct, tmp_path / "delta", LowRankStore(rank=16))
    exported = export(
        tmp_path / "delta", model_of("llama", "meta"), tmp_path / "lora", partial=True
    )
    assert (
        exported.ranks
        and all("norm" in name for name in exported.left_out)
        and len(exported.left_out) == 5
    )
    with DeltaFile.open(tmp_path / "delta") as file:
        found = {f"{path}.weight": file.entry(f"{path}.weight") for path in exported.ranks}
    factors = {
        name: Factors(e.u.float(), e.v.float())
        for name, e in found.items()
        if isinstance(e, Factors)
    }
    ours = model_of("llama")
    attached(ours, factors).fill_(1.0)
    theirs = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "lora")
    assert torch.allclose(logits(theirs), logits(ours), **CLOSE)


def test_experts_do_not_fit(tmp_path: pathlib.Path) -> None:
    model = model_of("mixtral")
    name, stack = next((name, p) for name, p in model.named_parameters() if p.dim() == 3)
    experts = Factors(
        torch.ones(*stack.shape[:2], 2), torch.ones(stack.shape[0], 2, stack.shape[2])
    )
    router = next(name for name, p in model.named_parameters() if ".gate." in name and p.dim() == 2)
    own = factors_of(model)
    entries = {"lm_head.weight": own["lm_head.weight"], router: own[router], name: experts}
    exported = export(
        delta_of(model, tmp_path / "delta", entries), model, tmp_path / "lora", partial=True
    )
    # a router is no linear layer of its own
    assert set(exported.left_out) == {name, router} and list(exported.ranks) == ["lm_head"]


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path: pathlib.Path) -> None:
    model = model_of("llama")
    delta = delta_of(model, tmp_path / "delta", factors_of(model))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        export(delta, model, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["notes.txt"]


def test_a_delta_of_another_model_is_not_exported(tmp_path: pathlib.Path) -> None:
    model = model_of("llama")
    delta = delta_of(model, tmp_path / "delta", factors_of(model))
    with pytest.raises(PairError, match=r"the model has (no such tensor|\[)"):
        export(delta, model_of("gpt-2"), tmp_path / "lora")


def test_a_delta_without_factors_is_not_exported(tmp_path: pathlib.Path) -> None:
    model = model_of("llama")
    with pytest.raises(DataError, match="nothing in it fits"):
        export(delta_of(model, tmp_path / "delta", {}), model, tmp_path / "lora")


def trained(architecture: str, folder: pathlib.Path, **options: Any) -> torch.nn.Module:
    """An adapter that peft made and saved, its B not zero; the model with it."""
    said = {"r": 4, "lora_alpha": 7, "target_modules": TRAINED, "task_type": "CAUSAL_LM", **options}
    made = peft.get_peft_model(model_of(architecture), peft.LoraConfig(**said)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        if architecture == "qwen2" and not options.get("ensure_weight_tying"):
            head, rows = made.base_model.model.lm_head, made.base_model.model.model.embed_tokens
            head.lora_A.default.weight.copy_(rows.lora_embedding_B.default.T)
            head.lora_B.default.weight.copy_(rows.lora_embedding_A.default.T)
    made.save_pretrained(folder)
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.down_proj": 3},
        "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 5, "down_proj": 90},
    },
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_of_peft_attached_is_that_adapter(
    architecture: str, options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    trained(architecture, tmp_path, **options)
    # peft sorts patterns as it saves them, and takes the first that fits: the adapter is what it
    # makes of its own folder
    theirs = peft.PeftModel.from_pretrained(model_of(architecture), tmp_path)
    ours = model_of(architecture)
    base = logits(ours)
    lam = attached(ours, lora_import.read(tmp_path, ours))
    assert torch.equal(logits(ours), base)
    lam.fill_(1.0)
    assert torch.allclose(logits(ours), logits(theirs), **CLOSE)
    assert not torch.allclose(logits(ours), base, atol=1e-2)
    for module in theirs.modules():
        if hasattr(module, "scale_layer"):  # which leaves embeddings out
            module.scaling["default"] *= 0.3
    lam.fill_(0.3)
    assert torch.allclose(logits(ours), logits(theirs), **CLOSE)


def test_layers_that_peft_ties_have_one_delta(tmp_path: pathlib.Path) -> None:
    theirs = trained("qwen2", tmp_path, ensure_weight_tying=True)
    ours = model_of("qwen2")
    attached(ours, lora_import.read(tmp_path, ours)).fill_(1.0)
    assert torch.allclose(logits(ours), logits(theirs), **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_adapter_becomes_a_delta_file(architecture: str, tmp_path: pathlib.Path) -> None:
    trained(architecture, tmp_path / "lora")
    model_of(architecture).save_pretrained(tmp_path / "base")
    store = LoraStore(lora_import.read(tmp_path / "lora", model_of(architecture)))
    said = encode(tmp_path / "base", tmp_path / "base", tmp_path / "delta", store)
    assert said.lossless and not said.exact and said.options.startswith("lowrank, adapter of ")
    lm = pa_fast.load(tmp_path / "base", delta=tmp_path / "delta")
    lm.set_lambda(1)
    again = peft.PeftModel.from_pretrained(model_of(architecture), tmp_path / "lora")
    assert torch.allclose(logits(lm.model), logits(again), **CLOSE)
    lm.set_lambda(0)
    assert torch.equal(logits(lm.model), logits(model_of(architecture)))
    # what the adapter leaves alone costs nearly nothing
    whole = sum(tensor.nbytes for tensor in lm.model.state_dict().values())
    assert (tmp_path / "delta").stat().st_size < 0.6 * whole


def test_a_store_of_factors_for_another_base_is_refused() -> None:
    base = torch.zeros(4, 6)
    source = Source("w", base, base, torch.float32, torch.device("cpu"))
    with pytest.raises(PairError, match="`head`, which is not live"):
        list(LoraStore({"head": Factors(torch.zeros(4, 1), torch.zeros(1, 6))}).encode([source]))
    with pytest.raises(PairError, match=r"`w` is \[4, 5\], the base has \[4, 6\]"):
        list(LoraStore({"w": Factors(torch.zeros(4, 1), torch.zeros(1, 5))}).encode([source]))


def edited(
    folder: pathlib.Path,
    config: dict[str, Any],
    tensors: Callable[[dict[str, torch.Tensor]], object],
) -> None:
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, **config}))
    found = load_file(folder / "adapter_model.safetensors")
    tensors(found)
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()},
        folder / "adapter_model.safetensors",
    )


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
ROWS = "base_model.model.model.embed_tokens.{}"


def config_is(**changes: Any) -> tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], object]]:
    return changes, lambda tensors: None


def tensor_is(
    key: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], object]]:
    return {}, lambda tensors: tensors.update({key: change(tensors[key].clone())})


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


REFUSALS: dict[str, tuple[Any, str]] = {
    "another method": (config_is(peft_type="IA3"), "`peft_type` is `IA3`, expected LORA"),
    "DoRA": (config_is(use_dora=True), "`use_dora` is `True`: this is no plain LoRA"),
    "biases": (config_is(bias="all"), "`bias` is `all`, expected none"),
    "biases of B": (config_is(lora_bias=True), "`lora_bias` is `True`"),
    "whole modules": (config_is(modules_to_save=["score"]), "`modules_to_save` is"),
    "turned": (config_is(fan_in_fan_out=True), "`fan_in_fan_out` is `True`"),
    "parameters": (config_is(target_parameters=["experts"]), "`target_parameters` is"),
    "an option of the future": (config_is(use_magic={"a": 1}), "`use_magic` is"),
    "a base that was changed": (
        config_is(init_lora_weights="pissa"),
        "`init_lora_weights` is `pissa`, which changes the base",
    ),
    "a beginning that is a list": (config_is(init_lora_weights=[]), "`init_lora_weights` is `[]`"),
    "no rank": (config_is(r=0), "rank `r` is `0`"),
    "a rank in words": (config_is(r="4"), "rank `r` is `4`"),
    "a true rank": (config_is(r=True), "rank `r` is `True`"),
    "alpha without end": (config_is(lora_alpha=float("inf")), "alpha `lora_alpha` is `inf`"),
    "alpha that is no number": (config_is(lora_alpha=float("nan")), "alpha `lora_alpha` is `nan`"),
    "alpha past any float": (config_is(lora_alpha=10**400), "alpha `lora_alpha` is `1000"),
    "alpha that overflows": (
        ({"lora_alpha": 2.9e38}, lambda t: t[Q.format("B")].mul_(1e3)),
        "times 7.25e+37 is not finite",
    ),
    "patterns in a list": (config_is(rank_pattern=["q_proj"]), "`rank_pattern` is"),
    "a pattern that never ends": (
        config_is(rank_pattern={"(a+)+$": 2}),
        "`rank_pattern` has the pattern `(a+)+$`",
    ),
    "many repetitions": (config_is(rank_pattern={".*.*.*.*.*x": 2}), "expected a simpler one"),
    "many options": (config_is(alpha_pattern={".?" * 30 + "x": 2}), "expected a simpler one"),
    "many choices": (config_is(alpha_pattern={"(m|m)" * 30 + "x": 2}), "expected a simpler one"),
    "many patterns": (
        config_is(alpha_pattern={str(n): 2 for n in range(10_001)}),
        "at most 10000 patterns",
    ),
    "a pattern that is none": (
        config_is(alpha_pattern={"(": 2}),
        "`alpha_pattern` has the pattern `(`:",
    ),
    "another rank": (
        config_is(r=3),
        "lora_A.weight` is F32 [4, 64], expected BF16, F16, F32 [3, 64]",
    ),
    "another rank of one": (
        config_is(rank_pattern={"0.self_attn.q_proj": 1}),
        "expected BF16, F16, F32 [1, 64]",
    ),
    "half a pair": (
        ({}, lambda t: t.pop(Q.format("B"))),
        "q_proj.lora_B.weight` is missing beside its other half",
    ),
    "nothing": (({}, lambda t: t.clear()), "adapts no layer"),
    "rows too many": (
        tensor_is(Q.format("B"), lambda t: torch.cat([t, t])),
        "lora_B.weight` is F32 [128, 4], expected",
    ),
    "one dimension": (
        tensor_is(Q.format("A"), lambda t: t.view(-1)),
        "lora_A.weight` is F32 [256], expected",
    ),
    "integers": (
        tensor_is(Q.format("A"), lambda t: t.int()),
        "lora_A.weight` is I32 [4, 64], expected",
    ),
    "rows for columns": (
        tensor_is(ROWS.format("lora_embedding_A"), lambda t: t.T),
        "lora_embedding_A` is F32 [128, 4]",
    ),
    "not a number": (
        tensor_is(Q.format("A"), poisoned),
        "lora_A.weight` has weights that are not finite",
    ),
    "a layer of another model": (
        (
            {},
            lambda t: t.update(
                {Q.format("A").replace("layers.0", "layers.9"): t[Q.format("A")].clone()}
            ),
        ),
        (
            "layers.9.self_attn.q_proj.lora_A.weight`: the model has no linear or embedding layer"
            " for it"
        ),
    ),
    "a whole tensor": (
        ({}, lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)})),
        "norm.weight`: no factor of a plain LoRA",
    ),
    "another base": (
        tensor_is(ROWS.format("base_layer.weight"), lambda t: t + 1),
        "is not the base's",
    ),
    "a smaller base": (
        tensor_is(ROWS.format("base_layer.weight"), lambda t: t[:-1]),
        "is not the base's",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained("llama", folder)
    return folder


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return model_of("llama")


def copied(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_plain_lora_of_this_model_is_refused_by_name(
    case: str, good: pathlib.Path, llama: torch.nn.Module, tmp_path: pathlib.Path
) -> None:
    edit, message = REFUSALS[case]
    copied(good, tmp_path)
    assert lora_import.read(tmp_path, llama)
    edited(tmp_path, *edit)
    with pytest.raises(PaFastError) as caught:
        lora_import.read(tmp_path, llama)
    assert message in caught.value.message and caught.value.hint


def test_layers_of_one_weight_must_agree(tmp_path: pathlib.Path) -> None:
    trained("qwen2", tmp_path)
    edited(tmp_path, {}, lambda t: t["base_model.model.lm_head.lora_B.weight"].view(-1)[0].add_(1))
    with pytest.raises(
        PairError, match=r"adapts `\S+`, and adapts differently `\S+`, which has the same weight"
    ):
        lora_import.read(tmp_path, model_of("qwen2"))
    edited(tmp_path, {}, lambda t: [t.pop(key) for key in list(t) if "lm_head.lora" in key])
    with pytest.raises(
        PairError, match=r"adapts `model\.embed_tokens`, and does not adapt `lm_head`"
    ):
        lora_import.read(tmp_path, model_of("qwen2"))


def test_files_that_are_missing_or_cut_short_are_refused(
    good: pathlib.Path, llama: torch.nn.Module, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        lora_import.read(tmp_path, llama)
    file = copied(good, tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        lora_import.read(tmp_path, llama)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.bin"):
        lora_import.read(tmp_path, llama)


def test_copies_of_the_base_need_the_base(good: pathlib.Path) -> None:
    with pytest.raises(PairError, match="cannot be compared"):
        lora_import.read(good, model_of("llama", "meta"))
