"""Pairs whose sides were written by different versions of transformers: merged as they are loaded,
in instruct's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pa_fast
from pa_fast.checkpoint.inspect import inspect
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.verify import verify
from tests.checkpoint.pairs import load_folder, same_bits, write_checkpoint
from tests.engines.architectures import EXPERTS, SMALL, config

LAM = 0.3


def gemma3() -> Any:
    """A text and vision model that ties its head."""
    from transformers import Gemma3Config

    text = {**SMALL, "head_dim": 16, "num_hidden_layers": 1}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=120
    )


def qwen3_vl_moe() -> Any:
    """A model whose files hold experts transposed, which its class tells from their shapes."""
    from transformers import Qwen3VLMoeConfig

    text = {**SMALL, "head_dim": 16, "num_hidden_layers": 1, **EXPERTS}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision)


KINDS: dict[str, Callable[[], Any]] = {
    "gemma-3": gemma3,
    "mixtral": lambda: config("mixtral"),
    "qwen3-moe": lambda: config("qwen3-moe"),
    "qwen3-vl-moe": qwen3_vl_moe,
    "gpt-neox": lambda: config("gpt-neox"),
}


def class_of(made: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    named = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )
    return getattr(transformers, named[made.model_type])


def sibling(made: Any, seed: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(seed)
    model = class_of(made)(made).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).mul_(0.02).to(dtype))
    return model.eval()


def as_of_old(kind: str, model: Any) -> dict[str, Tensor]:
    """The tensors of `model` as the first files of its kind have them."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    if kind == "qwen3-vl-moe":
        return {
            n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()
        }
    return {
        name: tensor.contiguous()
        for name, tensor in revert_weight_conversion(model, tensors).items()
    }


def write(
    folder: Path, kind: str, seed: int, layout: str, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A random sibling of `kind` at `folder`: laid out as its first files (`old`), or as its model
    class."""
    model = sibling(KINDS[kind](), seed, dtype)
    if layout == "old":
        said = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        write_checkpoint(
            folder,
            as_of_old(kind, model),
            shards=2,
            config=json.loads(json.dumps(said, default=str)),
        )
    else:
        model.save_pretrained(folder, save_original_format=False)
    return folder


def read(folder: Path) -> Any:
    """The model at `folder`, as transformers loads it."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.bfloat16).eval()


def loaded(folder: Path) -> dict[str, Tensor]:
    return read(folder).state_dict()


@pytest.mark.parametrize("layouts", [("old", "new"), ("new", "old")], ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_two_layouts_merge_to_the_lerp_of_the_loaded_sides(
    tmp_path: Path, kind: str, layouts: tuple[str, str]
) -> None:
    base = write(tmp_path / "base", kind, 1, layouts[0])
    instruct = write(tmp_path / "instruct", kind, 2, layouts[1])
    own = load_folder(instruct)
    assert load_folder(base).keys() != own.keys() or any(
        load_folder(base)[n].shape != t.shape for n, t in own.items()
    )
    found = inspect(base, instruct)
    assert found.tensors == len(own) and any(
        "of instruct" in note or "laid out" in note for note in found.notes
    )
    report = merge(base, instruct, LAM, tmp_path / "out")
    written = load_folder(tmp_path / "out")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in own.items()}, (
        "as instruct is laid out"
    )
    left, right, merged = (loaded(folder) for folder in (base, instruct, tmp_path / "out"))
    for name, tensor in merged.items():
        assert same_bits(tensor, torch.lerp(left[name], right[name], LAM)), name
    assert verify(tmp_path / "out", base, instruct).ok
    assert json.loads((tmp_path / "out" / "pa_fast.json").read_text())["notes"] == list(
        report.notes
    )
    ends = [merge(base, instruct, lam, tmp_path / str(lam)) for lam in (0, 1)]
    assert all(same_bits(t, own[n]) for n, t in load_folder(tmp_path / "1").items())
    prints = {
        merge(side, side, 0, tmp_path / f"{side.name}-alone").base_fingerprint
        for side in (base, instruct)
    }
    assert {
        ends[0].base_fingerprint,
        ends[0].instruct_fingerprint,
    } == prints, "fingerprints are of the files, not of the layout"


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        pytest.param(
            *(kind, layouts),
            id=f"{kind}-{'-'.join(layouts)}",
            # of each kind one side in turn; what is merged is tested with both
            marks=[pytest.mark.slow] if (number + turn) % 2 else [],
        )
        for number, kind in enumerate(KINDS)
        for turn, layouts in enumerate((("old", "new"), ("new", "old")))
    ],
)
def test_a_live_pair_of_two_layouts_is_what_is_merged_saved_and_encoded(
    tmp_path: Path, kind: str, layouts: tuple[str, str]
) -> None:
    base = write(tmp_path / "base", kind, 1, layouts[0])
    instruct = write(tmp_path / "instruct", kind, 2, layouts[1])
    live = pa_fast.load(base, instruct)
    live.set_lambda(LAM)
    merge(base, instruct, LAM, tmp_path / "merged")
    live.save(tmp_path / "saved")
    written, saved = load_folder(tmp_path / "merged"), load_folder(tmp_path / "saved")
    assert written.keys() == saved.keys() and all(
        same_bits(saved[name], tensor) for name, tensor in written.items()
    )
    assert verify(tmp_path / "saved", base, instruct).ok
    reloaded = read(tmp_path / "merged")
    ids = torch.arange(24).view(2, 12) % 100 + 3
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (live.model, reloaded)]
    assert same_bits(*logits), "logits of the merged folder are those of the live model"
    pa_fast.encode(base, instruct, tmp_path / "delta", format="sparse")
    held = pa_fast.load(base, delta=tmp_path / "delta")
    held.set_lambda(LAM)
    assert all(same_bits(t, reloaded.state_dict()[n]) for n, t in held.model.state_dict().items())
