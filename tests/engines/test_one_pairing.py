"""What pairs on disk pairs in a model, and the other way round: the same folders are inspected,
merged, verified, loaded and saved, or all refuse them with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pa_fast
from pa_fast.engines.served.arguments import PairArguments
from pa_fast.errors import PaFastError, PairError, UsageError
from pa_fast.run import SweepSpec, check_beside_delta
from tests.checkpoint.pairs import load_folder, same_bits
from tests.engines.architectures import write_model

LAM = 0.3
Tensors = dict[str, Tensor]


def pair(tmp_path: Path, name: str = "llama", **changes: object) -> tuple[Path, Path]:
    """Base and instruct, each in one file."""
    for seed, side in enumerate(("base", "instruct")):
        write_model(tmp_path / side, name, seed=seed, shard="1GB", **changes)
    return tmp_path / "base", tmp_path / "instruct"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], **config: object) -> None:
    """Put `change` of its tensors into the file of `folder`, and `config` into its config.json."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def wrapped(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def check_all_verbs(tmp_path: Path, base: Path, instruct: Path, **options: object) -> None:
    """Merge, live weights and what is saved of them are the same, and transformers loads it."""
    from transformers import AutoModelForCausalLM

    pa_fast.inspect(base, instruct, **options)
    pa_fast.merge(base, instruct, LAM, tmp_path / "merged", **options)
    live = pa_fast.load(base, instruct, device="cpu", **options)
    live.set_lambda(LAM)
    live.save(tmp_path / "saved")
    merged, saved = load_folder(tmp_path / "merged"), load_folder(tmp_path / "saved")
    assert merged.keys() == saved.keys()
    assert all(same_bits(saved[name], tensor) for name, tensor in merged.items())
    report = pa_fast.verify(tmp_path / "saved", base, instruct)
    assert report.ok and not any("lossy" in note for note in report.notes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    ids = torch.arange(24).view(2, 12) % 100 + 3
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (live.model, loaded))
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("sides", [(1,), (0, 1)], ids=["instruct", "both"])
def test_norms_in_fp32_beside_weights_in_bf16(tmp_path: Path, sides: tuple[int, ...]) -> None:
    folders = pair(tmp_path)
    for side in sides:
        rewrite(
            folders[side],
            lambda tensors: {n: t.float() + 1e-4 if "norm" in n else t for n, t in tensors.items()},
        )
    check_all_verbs(tmp_path, *folders)
    notes = pa_fast.load(*folders, device="cpu").notes
    assert any("bfloat16 in the live model" in note and "float32" in note for note in notes)


def test_a_narrow_live_tensor_that_is_not_the_merge_is_not_saved(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    rewrite(instruct, lambda ts: {n: t.float() if "norm" in n else t for n, t in ts.items()})
    live = pa_fast.load(base, instruct, device="cpu")
    live.set_lambda(LAM)
    with torch.no_grad():
        live.model.model.norm.weight.mul_(2)
    with pytest.raises(PaFastError, match="does not hold the merge"):
        live.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_buffers_that_both_sides_store_and_the_class_ignores(tmp_path: Path, equal: bool) -> None:
    base, instruct = pair(tmp_path)
    for side, scale in ((base, 1.0), (instruct, 1.0 if equal else 2.0)):
        more = {
            f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) * scale for n in (0, 1)
        }
        rewrite(side, lambda tensors, more=more: {**tensors, **more})
    check_all_verbs(tmp_path, base, instruct)


@pytest.mark.parametrize("extra", ["mtp.0.weight", "model.layers.0.self_attn.masked_bias"])
def test_tensors_that_both_sides_store_and_no_class_has_a_place_for(
    tmp_path: Path, extra: str
) -> None:
    base, instruct = pair(tmp_path)
    for seed, side in enumerate((base, instruct)):
        more = {extra: torch.full((4, 4), float(seed)).bfloat16()}
        rewrite(side, lambda tensors, more=more: {**tensors, **more})
    check_all_verbs(tmp_path, base, instruct)
    notes = pa_fast.load(base, instruct, device="cpu").notes
    assert any(extra in note and "no part of the live model" in note for note in notes)


VERBS = {
    "inspect": lambda b, i, out, **o: pa_fast.inspect(b, i, **o),
    "merge": lambda b, i, out, **o: pa_fast.merge(b, i, LAM, out, **o),
    "load": lambda b, i, out, **o: pa_fast.load(b, i, device="cpu", **o),
    "encode": lambda b, i, out, **o: pa_fast.encode(b, i, out, **o),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)], ids=["base", "instruct", "both"])
def test_a_wrapper_prefix_is_named_by_every_verb(
    tmp_path: Path, sides: tuple[int, ...], prefix: str, verb: str
) -> None:
    folders = pair(tmp_path, num_hidden_layers=1)
    for side in sides:
        rewrite(folders[side], wrapped(prefix))
    with pytest.raises(PairError, match="begin with") as refusal:
        VERBS[verb](*folders, tmp_path / "out")
    assert refusal.value.hint.startswith(f"--strip-prefix {prefix} ")
    assert not (tmp_path / "out").exists()
    VERBS[verb](*folders, tmp_path / "out", strip_prefix=prefix)


def test_pairs_with_prefixes_are_one_in_all_verbs(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    rewrite(base, wrapped("module."))
    rewrite(instruct, wrapped("_orig_mod."))
    with pytest.raises(PairError, match="which differ") as refusal:
        pa_fast.inspect(base, instruct)
    assert "--strip-prefix module. --strip-prefix _orig_mod." in refusal.value.hint
    check_all_verbs(tmp_path, base, instruct, strip_prefix=["module.", "_orig_mod."])


def test_a_prefix_does_not_make_another_instruct_model_beside_a_delta(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    rewrite(instruct, wrapped("module."))
    delta = str(tmp_path / "delta")
    pa_fast.encode(base, instruct, delta, strip_prefix="module.")
    sides, out = (str(base), str(instruct)), str(tmp_path / "out")
    job = SweepSpec(*sides, "0", (), out, delta=delta, strip_prefix=("module.",))
    check_beside_delta(job)
    with pytest.raises(PairError, match="encoded from an instruct model"):
        check_beside_delta(replace(job, instruct=str(base)))


def test_a_prefix_is_said_before_a_head_that_it_hides(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    head = "lm_head.weight"
    rewrite(
        instruct,
        lambda tensors: wrapped("_orig_mod.")({n: t for n, t in tensors.items() if n != head}),
        tie_word_embeddings=True,
    )
    with pytest.raises(PairError, match="begin with _orig_mod"):
        pa_fast.inspect(base, instruct)
    check_all_verbs(tmp_path, base, instruct, strip_prefix="_orig_mod.")


def test_a_prefix_without_its_dot(tmp_path: Path) -> None:
    base, instruct = pair(tmp_path)
    rewrite(instruct, wrapped("_orig_mod."))
    with pytest.raises(UsageError, match="would begin with a dot") as refusal:
        pa_fast.inspect(base, instruct, strip_prefix="_orig_mod")
    assert "--strip-prefix _orig_mod." in refusal.value.hint


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named_by_every_verb(tmp_path: Path, name: str, verb: str) -> None:
    base, instruct = pair(tmp_path)
    rewrite(instruct, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(PairError, match=f"lacks `{name}`"):
        VERBS[verb](base, instruct, tmp_path / "out")


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_both_sides_tie_and_store(tmp_path: Path, equal: bool) -> None:
    base, instruct = pair(tmp_path, tie_word_embeddings=True)
    for side in (base, instruct):

        def with_head(tensors: Tensors) -> Tensors:
            embedding = tensors["model.embed_tokens.weight"]
            return {**tensors, "lm_head.weight": embedding.clone() if equal else embedding * 2}

        rewrite(side, with_head)
    report = pa_fast.inspect(base, instruct)
    assert report.tied == equal
    pa_fast.merge(base, instruct, LAM, tmp_path / "merged")
    said = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert said == equal
    assert ("lm_head.weight" in load_folder(tmp_path / "merged")) != equal
    assert pa_fast.verify(tmp_path / "merged", base, instruct).ok


@pytest.mark.parametrize("store", ["lowrank", "sparse"])
def test_what_a_lossy_store_saves_says_so(tmp_path: Path, store: str) -> None:
    base, instruct = pair(tmp_path)
    chosen = (
        pa_fast.LowRankStore(rank=2)
        if store == "lowrank"
        else pa_fast.SparseStore(select="topk", density=0.1)
    )
    live = pa_fast.load(base, instruct, device="cpu", store=chosen)
    live.set_lambda(LAM)
    live.save(tmp_path / "saved")
    held = load_folder(tmp_path / "saved")
    assert all(same_bits(held[n], t) for n, t in live.model.state_dict().items() if n in held)
    written = json.loads((tmp_path / "saved" / "pa_fast.json").read_text())
    assert written["store"] and written["store"] in (tmp_path / "saved" / "README.md").read_text()
    report = pa_fast.verify(tmp_path / "saved", base, instruct)
    assert not report.ok and any("loses some of it" in note for note in report.notes)


@pytest.mark.parametrize("format", ["packed", "lowrank"])
def test_whole_weights_beside_an_adapter_are_refused_by_encode_too(
    tmp_path: Path, format: str
) -> None:
    base, instruct = pair(tmp_path)
    (instruct / "adapter_config.json").write_text("{}")
    with pytest.raises(PaFastError, match="found an adapter, which transformers would add"):
        pa_fast.encode(base, instruct, tmp_path / "delta", format)
    assert not (tmp_path / "delta").exists()


def test_one_folder_for_both_sides_is_said(tmp_path: Path) -> None:
    """By whatever pairs them."""
    base, instruct = (str(folder) for folder in pair(tmp_path))
    (tmp_path / "link").symlink_to(base)
    for sides, is_one in (((base, instruct), False), ((base, str(tmp_path / "link")), True)):
        for notes in (
            pa_fast.inspect(*sides).notes,
            pa_fast.load(*sides).notes,
            PairArguments.of(*sides).notes,
        ):
            said = [note for note in notes if "the model is the same at every λ" in note]
            assert len(said) == is_one, notes
