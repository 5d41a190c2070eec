"""What transformers read is what was fingerprinted: every known way apart is refused by name, and
any other by the tensors."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pa_fast
from pa_fast.errors import CheckpointError, EngineError
from tests.engines.architectures import write_pair
from tests.engines.test_loading import edit, edit_config


def other_weights(folder: pathlib.Path, name: str) -> None:
    """Put other weights of the same shapes into the folder, as one file called `name`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    save_file(
        {key: tensor.flip(0).contiguous() for key, tensor in tensors.items()},
        folder / name,
        {"format": "pt"},
    )


def names_other_weights(folder: pathlib.Path) -> None:
    other_weights(folder, "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")


def names_another_index(folder: pathlib.Path) -> None:
    other_weights(folder, "other.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "other.safetensors"), "other.safetensors")
    (folder / "other.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    edit_config(folder, transformers_weights="other.safetensors.index.json")


def names_other_weights_of_its_text_model(folder: pathlib.Path) -> None:
    other_weights(folder, "other.safetensors")
    edit_config(folder, text_config={"transformers_weights": "other.safetensors"})


def has_an_adapter_beside_its_weights(folder: pathlib.Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder / "adapter")
    for file in (folder / "adapter").glob("adapter_*"):
        shutil.move(file, folder / file.name)


def has_another_configuration(folder: pathlib.Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.4.0.0.json").write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 0.5}))
    edit_config(folder, configuration_files=["config.4.0.0.json"])


WAYS = {
    "transformers_weights": names_other_weights,
    "transformers_weights, an index": names_another_index,
    "transformers_weights, nested": names_other_weights_of_its_text_model,
    "adapter_config.json": has_an_adapter_beside_its_weights,
    "configuration_files": has_another_configuration,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", ["load", "merge", "verify", "inspect", "encode"])
def test_what_transformers_would_read_instead_is_refused_by_every_verb(
    way: str, verb: str, tmp_path: pathlib.Path
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    if verb == "verify":
        pa_fast.merge(base, instruct, 0.5, tmp_path / "merged")
    # an instruct folder with one is a LoRA folder there
    adapters = way == "adapter_config.json" and verb == "encode"
    for folder in (base,) if adapters else (base, instruct):
        edit(folder, lambda tensors: None)  # one file
        WAYS[way](folder)
    verbs: dict[str, Callable[[], object]] = {
        "load": lambda: pa_fast.load(base, instruct),
        "merge": lambda: pa_fast.merge(base, instruct, 0.5, tmp_path / "out"),
        "verify": lambda: pa_fast.verify(tmp_path / "merged", base, instruct),
        "inspect": lambda: pa_fast.inspect(base, instruct),
        "encode": lambda: pa_fast.encode(base, instruct, tmp_path / "delta", format="sparse"),
    }
    with pytest.raises(CheckpointError, match=f"{way.partition(',')[0]}.*transformers"):
        verbs[verb]()
    assert not (tmp_path / "out").exists() and not (tmp_path / "delta").exists()


def test_a_live_model_is_the_merge_of_the_files_that_were_fingerprinted(
    tmp_path: pathlib.Path,
) -> None:
    """The fault as it was found: the model follows one file, the merge and every proof another
    one."""
    base, instruct = write_pair(tmp_path, "llama")
    for folder in (base, instruct):
        edit(folder, lambda tensors: None)
        names_other_weights(folder)
    try:
        lm = pa_fast.load(base, instruct)
        lm.set_lambda(0.5)
        assert lm.weights.verify()
        pa_fast.merge(base, instruct, 0.5, tmp_path / "merged")
        assert pa_fast.verify(tmp_path / "merged", base, instruct)
    except CheckpointError as error:
        assert "transformers_weights" in str(error)
        return
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    differing = [
        name
        for name, tensor in lm.model.state_dict().items()
        if not torch.equal(tensor, merged[name])
    ]
    assert not differing, (
        f"{len(differing)} of {len(merged)} tensors differ at λ = 0.5, and every proof passed"
    )


@pytest.mark.parametrize(
    ("architecture", "side", "files"),
    [
        # every two of the three together
        ("llama", "base", "as they are"),
        ("llama", "instruct", "of mixed dtypes"),
        ("mixtral", "base", "of mixed dtypes"),
        ("mixtral", "instruct", "as they are"),
        ("qwen2", "base", "of mixed dtypes"),
        ("qwen2", "instruct", "as they are"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "base", "of mixed dtypes"),
                ("llama", "instruct", "as they are"),
                ("mixtral", "base", "as they are"),
                ("mixtral", "instruct", "of mixed dtypes"),
                ("qwen2", "base", "as they are"),
                ("qwen2", "instruct", "of mixed dtypes"),
            )
        ),
    ],
)
def test_files_that_transformers_takes_from_elsewhere_are_noticed_by_their_tensors(
    architecture: str,
    side: str,
    files: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever made it read them: the ways above are known, the next one is not."""
    import transformers.modeling_utils as inner

    folders = dict(zip(("base", "instruct"), write_pair(tmp_path, architecture)))
    if files == "of mixed dtypes":
        edit(
            folders[side],
            lambda tensors: tensors.update(
                {n: t.float() for n, t in tensors.items() if "norm" in n}
            ),
        )
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folders[side], elsewhere)
    last = max(elsewhere.glob("*.safetensors"))
    tensors = load_file(last)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[3] += 1
    save_file(tensors, last, {"format": "pt"})
    plain = inner._get_resolved_checkpoint_files

    def resolved(*args: Any, **kwargs: Any) -> Any:
        if kwargs["pretrained_model_name_or_path"] == str(folders[side]):
            kwargs["pretrained_model_name_or_path"] = str(elsewhere)
        return plain(*args, **kwargs)

    monkeypatch.setattr(inner, "_get_resolved_checkpoint_files", resolved)
    for act in (
        lambda: pa_fast.load(folders["base"], folders["instruct"]),
        lambda: pa_fast.encode(
            folders["base"], folders["instruct"], tmp_path / "delta", format="packed"
        ),
    ):
        with pytest.raises(
            EngineError, match=f"(?s){folders[side]}.*transformers.*other.*than the files"
        ):
            act()
    assert not (tmp_path / "delta").exists()
