"""Outputs onto what is no output, links planted at working names, companions that lead elsewhere:
nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pa_fast.checkpoint.inspect import inspect
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.verify import verify
from pa_fast.engines.tokenizer import tokenizer_of
from pa_fast.engines.transformers import load
from pa_fast.errors import CheckpointError, OutputError, PaFastError
from pa_fast.stores import file as delta_file
from pa_fast.stores.sparse import SparseStore
from pa_fast.sweep import report, sweep
from pa_fast.sweep.figure import check_output_path
from tests.checkpoint.pairs import write_checkpoint, write_pair
from tests.engines import architectures
from tests.stores import pairs as deltas
from tests.sweep.fakes import FakeEngine, Scorer


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def ends_within(seconds: int = 30) -> Iterator[None]:
    """A bound for what would wait for a pipe for ever."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# --- what an overwrite may replace
# ---------------------------------------------------------------------------------------

MODEL = json.dumps({"model_type": "llama"})
PROJECTS: dict[str, tuple[dict[str, str], str]] = {
    "an application": (
        {"config.json": '{"port": 8080}', "src/main.py": "mine"},
        "which is no checkpoint",
    ),
    "its config alone": ({"config.json": '{"port": 8080}'}, "which is no checkpoint"),
    "a pa_fast.json of something else": (
        {"pa_fast.json": "{}", "thesis.tex": "mine"},
        "which is no checkpoint",
    ),
    "a config that is not JSON": ({"config.json": "port = 8080"}, "which is no checkpoint"),
    "a model and notes": (
        {"config.json": MODEL, "notes.txt": "mine"},
        "holds `notes.txt`, which no checkpoint consists of",
    ),
    "a model and its sources": (
        {"config.json": MODEL, "src/main.py": "mine"},
        "holds `src`, which no",
    ),
    "a repository": (
        {"config.json": MODEL, ".git/HEAD": "ref", "README.md": "#"},
        "holds `.git`, which no",
    ),
    "a training": (
        {"config.json": MODEL, "optimizer.pt": "x", "checkpoint-5/a": "b"},
        "holds `checkpoint-5`, `optimizer.pt`",
    ),
    "templates and more": (
        {"config.json": MODEL, "additional_chat_templates/notes.txt": "mine"},
        "holds `additional_chat",
    ),
    "somebody's weights": (
        {"config.json": MODEL, "my_best.safetensors": "mine"},
        "holds `my_best.safetensors`",
    ),
}


@pytest.mark.parametrize("project", PROJECTS)
def test_an_overwrite_replaces_no_folder_that_holds_something_else(
    tmp_path: Path, project: str
) -> None:
    files, said = PROJECTS[project]
    pair = write_pair(tmp_path)
    put(tmp_path / "out", **files)
    before = contents(tmp_path)
    with pytest.raises(OutputError) as error:
        merge(*pair, 0.5, tmp_path / "out", overwrite=True)
    assert said in error.value.message and error.value.hint
    assert contents(tmp_path) == before


def test_notes_beside_an_own_merge_are_not_lost_either(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    merge(*pair, 0.5, tmp_path / "out")
    put(tmp_path / "out", **{"results of the eval.txt": "mine"})
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"holds `results of the eval\.txt`"):
        merge(*pair, 0.25, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_what_pa_fast_and_save_pretrained_wrote_is_replaced(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path, shards=(3, 1))
    put(instruct, **{"odd companion.txt": "it is copied", "LICENSE": "x"})
    merge(base, instruct, 0.5, tmp_path / "out")
    put(tmp_path / "out", **{".cache/huggingface/download/x.metadata": "hub"})
    put(
        tmp_path / "out",
        **{
            ".gitattributes": "hub",
            "trainer_state.json": "{}",
            "additional_chat_templates/rag.jinja": "x",
        },
    )
    merge(base, instruct, 0.25, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", base, instruct).lam == "0.25"
    assert set(json.loads((tmp_path / "out" / "pa_fast.json").read_text())["files"]) == set(
        contents(tmp_path / "out")
    )
    saved = tmp_path / "saved"
    put(
        saved,
        **{
            n: MODEL
            for n in (
                "config.json",
                "generation_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
            )
        },
    )
    put(
        saved,
        **{
            "special_tokens_map.json": "{}",
            "model-00001-of-00002.safetensors": "",
            "training_args.bin": "",
            "README.md": "",
        },
    )
    merge(base, instruct, 0.75, saved, overwrite=True)
    assert verify(saved, base, instruct).lam == "0.75"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "instruct", "out", "saved"}


@pytest.mark.parametrize("side", [0, 1])
def test_the_folder_that_a_source_links_into_is_not_replaced(tmp_path: Path, side: int) -> None:
    pair = write_pair(tmp_path)
    real = pair[side].rename(tmp_path / "real")
    pair[side].mkdir()
    for path in real.iterdir():
        (pair[side] / path.name).symlink_to(path)
    before = contents(real)
    with pytest.raises(PaFastError) as error:
        merge(*pair, 0.5, real, overwrite=True)
    assert "link" in error.value.message and contents(real) == before
    with pytest.raises(PaFastError):
        (tmp_path / "alias").symlink_to(real)
        merge(*pair, 0.5, tmp_path / "alias", overwrite=True)
    assert contents(real) == before


@pytest.mark.parametrize("name", [".out.pa_fast.partial", ".out.pa_fast.old"])
def test_a_source_with_a_working_name_of_the_output_survives(tmp_path: Path, name: str) -> None:
    base, instruct = write_pair(tmp_path)
    source = base.rename(tmp_path / name)
    before = contents(source)
    with pytest.raises(OutputError, match="is, holds or lies in the source"):
        merge(source, instruct, 0.5, tmp_path / "out")
    assert contents(source) == before


def write_delta(path: Path, **options: Any) -> None:
    delta_file.write(
        path, deltas.sources(*deltas.pair(shapes={"a": (8, 8)})), SparseStore(), **options
    )


def test_a_delta_replaces_deltas_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "notes.txt").write_text("mine, and longer than any header of eight bytes")
    before = contents(tmp_path)
    for name in before:
        with pytest.raises(OutputError, match="exists, and is no delta file"):
            write_delta(tmp_path / name, overwrite=True)
    assert contents(tmp_path) == before
    write_delta(tmp_path / "delta")
    write_delta(tmp_path / "delta", overwrite=True)


def test_a_delta_never_becomes_weights_of_its_source(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, shards=(2, 1))
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(OutputError, match="would be taken for weights of the source"):
        delta_file.output_path(tmp_path / "link" / "model.safetensors", sources=[base])
    assert delta_file.output_path(base / "delta", sources=[base]) == base / "delta"


def run_sweep(out: Path, **options: Any) -> None:
    sweep(FakeEngine(), "0,1", [Scorer("icl")], out, figure=False, **options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_whose_run_json_is_no_sweeps_is_left_alone(
    tmp_path: Path, overwrite: bool
) -> None:
    put(
        tmp_path / "out",
        **{
            "run.json": '{"port": 8080}',
            "results.csv": "mine",
            "items/a.jsonl": "mine",
            "outputs/x": "",
        },
    )
    before = contents(tmp_path)
    with pytest.raises(PaFastError, match="is not a run folder"):
        run_sweep(tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_figure_replaces_figures_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"\x89PNG of a beach")
    with pytest.raises(OutputError, match=r"holiday\.png exists, and pa_fast did not draw it"):
        check_output_path(tmp_path / "holiday")
    sweep(FakeEngine(), "0,1", [Scorer("icl")], tmp_path / "run")
    check_output_path(tmp_path / "run" / "trajectory")


# --- links at working names
# ---

# output → each working name, and whether a folder or a file of the victim's is linked there
PLANTED = {
    "merge": {
        ".out.pa_fast.partial": "folder",
        ".out.pa_fast.old": "folder",
        ".out.pa_fast.lock": "file",
    },
    "encode": {".out.pa_fast.partial": "file"},
    "sweep": {
        "out/journal.jsonl": "file",
        "out/.lock": "file",
        "out/items": "folder",
        "out/outputs": "folder",
        "out/run.json": "run",
    },
    "shard": {
        "out/journal.jsonl": "file",
        "out/journal.0-of-2.jsonl": "file",
        "out/items": "folder",
    },
    "resume": {
        "out/journal.jsonl": "file",
        "out/.lock": "file",
        "out/items": "folder",
        "out/outputs": "folder",
        "out/results.csv": "file",
        "out/results.json": "file",
        "out/run.json": "run",
    },
    "overwrite": {
        "out/journal.jsonl": "file",
        "out/items": "folder",
        "out/outputs": "folder",
        "out/results.csv": "file",
        "out/outputs/lambda=0.icl": "folder",
    },
    "report": {
        "out/results.csv": "file",
        "out/results.json": "file",
        "out/trajectory.svg": "file",
        "out/trajectory.png": "file",
        "out/trajectory.pdf": "file",
    },
}
HARMLESS = {
    "out/results.csv",
    "out/results.json",
    "out/trajectory.svg",
    "out/trajectory.png",
    "out/trajectory.pdf",
    "out/outputs/lambda=0.icl",
}
"""Files that are replaced as a whole: the link goes, and what it leads to stays."""


def run_verb(verb: str, root: Path) -> None:
    out = root / "out"
    if verb == "merge":
        merge(root / "base", root / "instruct", 0.5, out)
    elif verb == "encode":
        write_delta(out)
    elif verb == "report":
        report.report([out])
    else:
        run_sweep(
            out, overwrite=verb == "overwrite", **({"shard": (0, 2)} if verb == "shard" else {})
        )


def prepare(verb: str, root: Path) -> Path:
    """What `verb` starts from; the victim is beside it."""
    if verb == "merge":
        write_pair(root)
    elif verb in ("resume", "overwrite", "report"):
        run_sweep(root / "out")
    elif verb != "encode":
        (root / "out").mkdir()
    victim = root / "victim"
    put(
        victim,
        **{
            "journal.jsonl": "mine",
            "lambda=0.icl.jsonl": "mine",
            ".x.1.tmp": "mine",
            "config.json": MODEL,
        },
    )
    return victim


@pytest.mark.parametrize(
    ("verb", "name", "kind"),
    [
        (verb, name, kind)
        for verb, names in PLANTED.items()
        for name, what in names.items()
        for kind in ("link", "dangling link", "hard link")
        if kind != "hard link"
        or (what == "file" and not name.endswith("lock"))  # nothing is written to a lock
    ],
)
def test_a_link_at_a_working_name_is_not_followed(
    tmp_path: Path, verb: str, name: str, kind: str
) -> None:
    victim, what, link = prepare(verb, tmp_path), PLANTED[verb][name], tmp_path / name
    if what == "run":
        run_sweep(victim / "run")
    target = {
        "folder": victim,
        "file": victim / "journal.jsonl",
        "run": victim / "run" / "run.json",
    }[what]
    before = contents(victim)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    if kind == "hard link":
        os.link(target, link)
    else:
        link.symlink_to(target if kind == "link" else victim / "new")
    if name in HARMLESS:
        run_verb(verb, tmp_path)
    else:
        with pytest.raises(PaFastError) as error:
            run_verb(verb, tmp_path)
        assert link.name in error.value.message
    assert contents(victim) == before and not (victim / "new").exists()


@pytest.mark.parametrize(
    "name", ["notes.txt", "sub/notes.txt", "config.json/notes.txt", "optimizer.pt"]
)
def test_a_folder_of_others_at_the_working_name_keeps_its_files(tmp_path: Path, name: str) -> None:
    pair, planted = write_pair(tmp_path), tmp_path / ".out.pa_fast.partial"
    put(planted, **{name: "mine", "model.safetensors": "half"})
    before = contents(planted)
    with pytest.raises(OutputError) as error:
        merge(*pair, 0.5, tmp_path / "out")
    assert str(planted) in error.value.message and name.split("/")[0] in error.value.message
    assert contents(planted) == before and not (tmp_path / "out").exists()


def test_links_inside_an_unfinished_folder_are_not_followed(tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.randn(10_000) for n in range(2)}
    pair = (
        write_checkpoint(tmp_path / "base", tensors, shards=2),
        write_checkpoint(tmp_path / "instruct", tensors, shards=2),
    )

    def stop(done: int, total: int) -> None:
        if done > 40_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*pair, 0.5, tmp_path / "out", progress=stop)
    partial, victim = tmp_path / ".out.pa_fast.partial", tmp_path / "victim"
    victim.mkdir()
    shard = next(partial.glob("model-*.safetensors"))
    for path in (shard, partial / ".pa_fast.shards.jsonl"):
        path.rename(victim / path.name)
        path.symlink_to(victim / path.name)
    before = contents(victim)
    assert merge(*pair, 0.5, tmp_path / "out").resumed == 0
    assert contents(victim) == before and not any(
        path.is_symlink() for path in (tmp_path / "out").iterdir()
    )


def test_a_pipe_at_a_working_name_does_not_hang(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "run").mkdir()
    for name in (".out.pa_fast.lock", ".delta.pa_fast.partial", "run/journal.jsonl"):
        os.mkfifo(tmp_path / name)
    with ends_within():
        for run in (
            lambda: merge(tmp_path / "base", tmp_path / "instruct", 0.5, tmp_path / "out"),
            lambda: write_delta(tmp_path / "delta"),
            lambda: run_sweep(tmp_path / "run"),
        ):
            with pytest.raises(PaFastError):
                run()


# --- companions
# ---


def leads_out(instruct: Path) -> None:
    (instruct.parent / "secret").write_text("root:x:0:0")
    (instruct / "NOTICE").symlink_to("../secret")


def template_leads_out(instruct: Path) -> None:
    (instruct.parent / "secret").write_text("root:x:0:0")
    (instruct / "additional_chat_templates").mkdir()
    (instruct / "additional_chat_templates" / "rag.jinja").symlink_to("../../secret")


def config_leads_out(instruct: Path) -> None:
    (instruct / "config.json").rename(instruct.parent / "elsewhere.json")
    (instruct / "config.json").symlink_to("../elsewhere.json")


def pipe_for_generation(instruct: Path) -> None:
    (instruct / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(instruct / "generation_config.json")


COMPANIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link out": (leads_out, "NOTICE: a link that leads out of the folder"),
    "a template that is one": (
        template_leads_out,
        "rag.jinja: a link that leads out of the folder",
    ),
    "a config that is one": (config_leads_out, "config.json: a link that leads out of the folder"),
    "an absolute link": (
        lambda i: (i / "chat_template.jinja").symlink_to("/etc/hostname"),
        "chat_template.jinja: a link that",
    ),
    "a link to nothing": (
        lambda i: (i / "vocab.json").symlink_to("gone"),
        "vocab.json: cannot be opened",
    ),
    "a pipe": (
        lambda i: os.mkfifo(i / "chat_template.jinja"),
        "chat_template.jinja: not a regular file",
    ),
    "a pipe for generation": (pipe_for_generation, "generation_config.json: not a regular file"),
    "a device": (
        lambda i: (i / "vocab.txt").symlink_to("/dev/zero"),
        "vocab.txt: not a regular file",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair that transformers loads."""
    return architectures.write_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("attack", COMPANIONS)
@pytest.mark.parametrize("verb", ["merge", "load"])
def test_companions_that_lead_elsewhere_are_refused_before_anything_is_read(
    tmp_path: Path, llama: tuple[Path, Path], verb: str, attack: str
) -> None:
    pair = tmp_path / "base", tmp_path / "instruct"
    for source, folder in zip(llama, pair):
        shutil.copytree(source, folder)
    change, said = COMPANIONS[attack]
    change(pair[1])
    before = {path.name for path in tmp_path.iterdir()}
    with ends_within(), pytest.raises(CheckpointError) as error:
        if verb == "merge":
            merge(*pair, 0.5, tmp_path / "out")
        else:
            load(*pair)
    assert said in error.value.message and error.value.hint
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_pipe_beside_the_base_or_the_tokenizer_does_not_hang_a_sweep(
    tmp_path: Path, llama: tuple[Path, Path]
) -> None:
    base, instruct = shutil.copytree(llama[0], tmp_path / "base"), llama[1]
    (base / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(base / "generation_config.json")
    put(tmp_path / "tokenizer", **{"tokenizer.json": "{}"})
    os.mkfifo(tmp_path / "tokenizer" / "chat_template.jinja")
    with ends_within():
        for read in (load, inspect):
            with pytest.raises(CheckpointError, match="not a regular file"):
                read(base, instruct)
        with pytest.raises(CheckpointError, match="not a regular file"):
            tokenizer_of(tmp_path / "tokenizer")


def hub_cache(root: Path, instruct: Path) -> Path:
    """`instruct` as huggingface_hub keeps it: links into the blobs of its repository."""
    folder = root / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(instruct.iterdir())):
        shutil.copy(path, blobs / f"{number:040}")
        (folder / path.name).symlink_to(f"../../blobs/{number:040}")
    return folder


def test_the_links_of_a_hub_cache_are_its_own(tmp_path: Path) -> None:
    base, instruct = write_pair(tmp_path)
    put(instruct, NOTICE="copied")
    cached = hub_cache(tmp_path, instruct)
    (tmp_path / "alias").symlink_to(cached)
    merge(base, cached, 0.5, tmp_path / "out")
    merge(base, tmp_path / "alias", 0.5, tmp_path / "other")
    assert (
        (tmp_path / "out" / "NOTICE").read_text()
        == (tmp_path / "other" / "NOTICE").read_text()
        == "copied"
    )
    blobs = cached.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        merge(base, cached, 0.25, tmp_path / "third")


def test_companions_count_in_the_space_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path)
    with open(pair[1] / "vocab.txt", "wb") as file:
        file.truncate(20_000_000)  # sparse: it takes no space, and a copy does
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 80_000_000, 80_000_000),
    )
    with pytest.raises(OutputError, match=r"needs 87\.\d MB, 80 MB are free"):
        merge(*pair, 0.5, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "instruct"}


def test_a_companion_that_grows_meanwhile_is_not_copied_past_its_length(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    (pair[1] / "vocab.txt").write_text("a")

    def grow(done: int, total: int) -> None:
        (pair[1] / "vocab.txt").write_text("a" * 10)

    with pytest.raises(PaFastError, match=r"vocab\.txt: the file changed while it was read"):
        merge(*pair, 0.5, tmp_path / "out", progress=grow)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "instruct"}
