"""Pairs that are not plain: mixed dtypes, heads tied on one side, what transformers upcasts, and
what must be refused."""

from __future__ import annotations

import gc
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_kernels import reference
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import pa_fast
from pa_fast.checkpoint.folder import located
from pa_fast.engines import loading
from pa_fast.errors import DataError, EngineError, PairError, UsageError, WeightsError
from tests.engines.architectures import write_model, write_pair
from tests.engines.test_architectures import assert_same_bits, reload

LAMBDAS = (0.0, 0.3, 1 / 3, 0.999, 1.0, -0.2, 1.5)
MERGED = (0.3, 1.0, -0.2)
"""Where the comparison takes a saved merge, which is read again."""


def edit(folder: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a checkpoint as one file after `change` on its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def edit_config(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("base", "instruct"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("float32", "float16"),
    ],
)
def test_sides_of_different_dtypes_give_the_instruct_dtype(
    base: str, instruct: str, tmp_path: pathlib.Path
) -> None:
    write_model(tmp_path / "base", "llama", 1, dtype=base)
    write_model(tmp_path / "instruct", "llama", 2, dtype=instruct)
    lm = pa_fast.load(tmp_path / "base", tmp_path / "instruct")
    b, i = reload(tmp_path / "base"), reload(tmp_path / "instruct")
    for lam in LAMBDAS:
        lm.set_lambda(lam)
        expected = {
            name: reference.lerp(b[name], i[name], lam, getattr(torch, instruct)) for name in i
        }
        assert_same_bits(lm.model.state_dict(), expected)


def test_files_of_mixed_dtypes_give_what_a_saved_merge_gives(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "mixtral")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" in name or "gate" in name:
                tensors[name] = tensors[name].float() * 1.001

    edit(instruct, widen)
    lm = pa_fast.load(base, instruct)
    for lam in MERGED:
        lm.set_lambda(lam)
        pa_fast.merge(base, instruct, lam=lam, out=tmp_path / f"merged-{lam}")
        assert_same_bits(lm.model.state_dict(), reload(tmp_path / f"merged-{lam}"))


@pytest.mark.parametrize("side", ["base", "instruct", "both"])
def test_one_fp32_tensor_leaves_the_others_as_their_files_have_them(
    tmp_path: pathlib.Path, side: str
) -> None:
    base, instruct = write_pair(tmp_path, "llama")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() * 1.001

    kept = pa_fast.load(base, instruct).weights.memory()
    for folder in (base, instruct):
        if side in (folder.name, "both"):
            edit(folder, widen)
    lm = pa_fast.load(base, instruct)
    # all else stays a map of its file: nothing is copied to be fp32
    assert lm.weights.memory().host_bytes <= kept.host_bytes + 2 * 4 * lm.model.config.hidden_size
    for lam in MERGED:
        lm.set_lambda(lam)
        pa_fast.merge(base, instruct, lam=lam, out=tmp_path / f"merged-{lam}")
        assert_same_bits(lm.model.state_dict(), reload(tmp_path / f"merged-{lam}"))


def test_what_a_model_keeps_in_fp32_holds_values_of_the_file_dtype(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    base, instruct = write_pair(tmp_path, "llama")
    # Llama's own forward pass cannot mix dtypes
    lm = pa_fast.load(base, instruct, endpoint_check=False)
    assert lm.model.model.norm.weight.dtype == torch.float32
    assert lm.model.lm_head.weight.dtype == torch.bfloat16
    for lam in MERGED:
        lm.set_lambda(lam)
        pa_fast.merge(base, instruct, lam=lam, out=tmp_path / f"merged-{lam}")
        assert_same_bits(lm.model.state_dict(), reload(tmp_path / f"merged-{lam}"))


def test_a_chosen_dtype_holds_for_every_tensor(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    lm = pa_fast.load(base, instruct, dtype="float32")
    lm.set_lambda(0.3)
    b, i = reload(base), reload(instruct)
    assert_same_bits(
        lm.model.state_dict(),
        {name: reference.lerp(b[name], i[name], 0.3, torch.float32) for name in i},
    )


@pytest.mark.parametrize("tied", ["base", "instruct"])
def test_a_head_tied_on_one_side_gets_storage_of_its_own(tied: str, tmp_path: pathlib.Path) -> None:
    for seed, side in ((1, "base"), (2, "instruct")):
        write_model(tmp_path / side, "llama", seed, tie_word_embeddings=side == tied)
    b, i = reload(tmp_path / "base"), reload(tmp_path / "instruct")
    lm = pa_fast.load(tmp_path / "base", tmp_path / "instruct")
    assert any("lm_head" in note for note in lm.notes)
    assert lm.model.config.tie_word_embeddings is False
    assert lm.model.lm_head.weight.data_ptr() != lm.model.model.embed_tokens.weight.data_ptr()
    for lam in LAMBDAS:
        lm.set_lambda(lam)
        assert_same_bits(
            lm.model.state_dict(), {name: reference.lerp(b[name], i[name], lam) for name in i}
        )
    lm.model.tie_weights()  # what some harnesses do to a model they are handed
    lm.on_weights_changed()


def test_a_tied_head_stays_tied(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "qwen2")
    lm = pa_fast.load(base, instruct)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    assert lm.weights.memory().live_bytes == sum(p.numel() * 2 for p in lm.model.parameters())


def test_sources_stay_memory_maps_on_cpu(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    memory = lm.weights.memory()
    assert memory.host_bytes == memory.device_bytes == 0
    assert memory.mapped_bytes == 2 * memory.live_bytes


def test_converted_experts_cost_memory_and_say_so(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "mixtral"))
    assert lm.weights.memory().host_bytes > 0
    assert any("converted" in note for note in lm.notes)


def test_at_restores_the_previous_lambda(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    lm.set_lambda(0.6)
    with pytest.raises(KeyError), lm.at(0.3) as same:
        assert same is lm and lm.lam == 0.3
        raise KeyError
    assert lm.lam == 0.6 and lm.weights.verify()


@pytest.mark.parametrize("store", ["dense", "packed"])
@pytest.mark.parametrize(("side", "lam"), [("base", 0), ("instruct", 1)])
def test_wrong_pairing_is_caught_by_the_endpoint_check(
    side: str, lam: int, store: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    load_pair = loading.load_pair

    def crossed(*args: object, **options: object) -> loading.Loaded:
        loaded = load_pair(*args, **options)  # type: ignore[arg-type]
        names = [f"model.layers.{n}.input_layernorm.weight" for n in (0, 1)]
        sources: dict[str, torch.Tensor] = getattr(loaded, side)
        sources.update(zip(names, [sources[name] for name in reversed(names)]))
        return loaded

    monkeypatch.setattr("pa_fast.engines.sources.load_pair", crossed)
    with pytest.raises(
        WeightsError, match=f"endpoint check failed: at λ = {lam} live tensor `model.layers"
    ):
        pa_fast.load(base, instruct, store=store)
    pa_fast.load(base, instruct, store=store, endpoint_check=False)


def test_a_wrong_tie_is_caught_by_the_endpoint_check(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    load_pair = loading.load_pair

    def tied(*args: object, **options: object) -> loading.Loaded:
        loaded = load_pair(*args, **options)  # type: ignore[arg-type]
        loaded.module.lm_head.weight = loaded.module.model.embed_tokens.weight
        loaded.live["lm_head.weight"] = loaded.live["model.embed_tokens.weight"]
        for sources in (loaded.base, loaded.instruct):
            sources["lm_head.weight"] = sources["model.embed_tokens.weight"]
        return loaded

    monkeypatch.setattr("pa_fast.engines.sources.load_pair", tied)
    with pytest.raises(
        WeightsError, match=r"endpoint check failed: at λ = . live tensor `lm_head.weight`"
    ):
        pa_fast.load(base, instruct)


def test_a_tensor_computed_from_weights_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep what it is while the weights that it came from follow λ, and no file holds
    it."""
    base, instruct = write_pair(tmp_path, "llama")
    from_pretrained = LlamaForCausalLM.from_pretrained

    def deriving(*args: Any, **options: Any) -> Any:
        model, info = from_pretrained(*args, **options)
        model.model.norm.square = model.model.norm.weight.detach() ** 2
        return model, info

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", deriving)
    with pytest.raises(PairError, match=r"derived tensor `model\.norm.square` differs"):
        pa_fast.load(base, instruct)


def _replace(model: torch.nn.Module) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


def _move(model: torch.nn.Module) -> None:
    model.model.norm.weight.data = model.model.norm.weight.clone()


def _add(model: torch.nn.Module) -> None:
    model.model.norm.register_buffer("copy_of_weight", model.model.norm.weight.clone())


def _remove(model: torch.nn.Module) -> None:
    del model.model.norm.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace, "`lm_head.weight` was replaced"),
        (_move, "norm.weight` has moved|replaced or moved"),
        (_add, "copy_of_weight` was added"),
        (_remove, "norm.weight` is gone"),
    ],
)
def test_a_model_that_no_longer_uses_the_live_tensors_is_refused(
    change: Callable[[torch.nn.Module], None], message: str, tmp_path: pathlib.Path
) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    change(lm.model)
    with pytest.raises(pa_fast.PaFastError, match=message):
        lm.set_lambda(0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.lm_head.to(torch.float16),
    ],
    ids=["half", "double", "to", "to of a layer"],
)
def test_a_model_of_another_dtype_is_refused_by_what_did_it(
    change: Callable[[torch.nn.Module], object], tmp_path: pathlib.Path
) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    change(lm.model)
    for ask in (lambda: lm.set_lambda(0.5), lm.weights.verify, lm.weights.checksum):
        with pytest.raises(
            WeightsError, match=r"was bound as torch\.\w+, and is torch\."
        ) as caught:
            ask()
        assert "`.half()`, `.to()`" in str(caught.value.hint)
        assert "transposed" not in str(caught.value.hint)


def test_leftover_tensors_are_noted_and_missing_ones_refused(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    for folder in (base, instruct):
        edit(folder, lambda tensors: tensors.update(stray=torch.zeros(3)))
    notes = pa_fast.load(base, instruct).notes
    assert any("`stray`" in note and "no part of the live model" in note for note in notes)
    for folder in (base, instruct):
        edit(folder, lambda tensors: (tensors.pop("stray"), tensors.pop("model.norm.weight"))[0])
    with pytest.raises(EngineError, match=r"1 missing keys, such as `model\.norm\.weight`"):
        pa_fast.load(base, instruct)


def test_a_config_that_changes_the_function_is_refused(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    edit_config(instruct, hidden_act="gelu")
    with pytest.raises(PairError, match="hidden_act"):
        pa_fast.load(base, instruct)


def test_an_unknown_architecture_is_refused(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    for folder in (base, instruct):
        edit_config(folder, architectures=["NoSuchForCausalLM"])
    with pytest.raises(EngineError, match="no model class `NoSuchForCausalLM`"):
        pa_fast.load(base, instruct)


@pytest.mark.parametrize(
    "options",
    [
        {"store": "zipped"},
        {"residency": "disk"},
        {"dtype": "int8"},
        {"device": "tpu"},
        {"device": "cuda:99"},
    ],
)
def test_options_that_do_not_exist_are_usage_errors(
    options: dict[str, str], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UsageError, match=next(iter(options.values()))):
        pa_fast.load(tmp_path, tmp_path, **options)  # type: ignore[arg-type]


def test_config_json_is_part_of_the_identity(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    before = pa_fast.load(base, instruct).identity
    for folder in (base, instruct):
        edit_config(folder, transformers_version="0")
    assert pa_fast.load(base, instruct).identity == before
    for folder in (base, instruct):
        edit_config(folder, rms_norm_eps=0.5)
    assert pa_fast.load(base, instruct).identity != before


def test_fp32_pairs_survive_being_looked_at(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama", dtype="float32")
    lm = pa_fast.load(base, instruct)
    for lam in (0.3, 1.0):
        lm.set_lambda(lam)
        before = lm.weights.checksum()
        assert lm.weights.effective_lambda() == pytest.approx(lam, abs=1e-4)
        assert lm.weights.checksum() == before
    assert_same_bits(lm.model.state_dict(), reload(instruct))


@pytest.mark.parametrize(
    "change", [lambda file: os.truncate(file, 5000), lambda file: os.utime(file, ns=(1, 1))]
)
def test_a_source_that_changes_after_loading_is_noticed_and_not_a_crash(
    tmp_path: pathlib.Path, change: Callable[[pathlib.Path], None]
) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    assert lm.weights.memory().mapped_bytes, (
        "the sources should be maps of the files for this test to mean anything"
    )
    lm.set_lambda(0.3)
    change(next(iter((tmp_path / "instruct").glob("*.safetensors"))))
    for reads in (
        lambda: lm.set_lambda(0.6),
        lm.weights.verify,
        lm.weights.effective_lambda,
        lm.weights.checksum,
    ):
        with pytest.raises(
            DataError, match=r"instruct/model.*safetensors: the file changed while it was read"
        ):
            reads()
    assert lm.lam == 0.3, "nothing was written"
    lm.close()


def test_a_source_that_is_replaced_while_it_loads_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_pair(tmp_path, "llama")
    plain = loading.load_pair

    def replacing(*args: Any, **kwargs: Any) -> Any:
        file = next(iter(folders[0].glob("*.safetensors")))
        (tmp_path / "new").write_bytes(file.read_bytes())
        os.replace(tmp_path / "new", file)
        return plain(*args, **kwargs)

    monkeypatch.setattr("pa_fast.engines.sources.load_pair", replacing)
    with pytest.raises(DataError, match="the file was replaced while it was read"):
        pa_fast.load(*folders)


def test_a_source_may_be_replaced_once_it_is_loaded(tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    lm.set_lambda(0.3)
    before = lm.weights.checksum()
    for file in (tmp_path / "instruct").glob("*.safetensors"):
        (tmp_path / "new").write_bytes(b"another download")
        os.replace(tmp_path / "new", file)
    lm.set_lambda(0.0)
    lm.set_lambda(0.3)
    assert lm.weights.checksum() == before and lm.weights.verify()


def test_files_are_let_go_of_with_the_model(tmp_path: pathlib.Path) -> None:
    def held() -> set[str]:
        return {
            link
            for fd in os.listdir("/proc/self/fd")
            if (link := _link(fd)).startswith(str(tmp_path))
        }

    lm = pa_fast.load(*write_pair(tmp_path, "llama"))
    assert held()
    lm.close()
    gc.collect()
    assert not held()


def test_folders_are_recorded_where_another_process_finds_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    names = [os.path.relpath(side, tmp_path) for side in (base, instruct)]
    recorded = pa_fast.load(*names, tokenizer=names[1]).configuration
    assert [recorded[key] for key in ("base", "instruct", "tokenizer")] == [
        str(base),
        str(instruct),
        str(instruct),
    ]
    assert located("org/name@main") == "org/name@main"


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
