"""Memory that is free, by what the kernel says of the machine and of a container."""

from __future__ import annotations

import pathlib

import pytest
import torch

from pa_fast.live import memory

GB = 10**9


@pytest.fixture
def system(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    write(
        tmp_path,
        {"proc/meminfo": "MemTotal: 24000000 kB\nMemAvailable: 20000000 kB\nHugePages_Free: 0\n"},
    )
    return tmp_path


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_of_this_machine() -> None:
    free = memory.available_bytes()
    assert free is None or 10**6 < free < 10**14
    found = memory.FreeMemory.of(torch.device("cpu"))
    assert (found is None) == (free is None) and (found is None or found.on_host)


def test_a_machine_without_groups(system: pathlib.Path) -> None:
    assert memory.available_bytes() == 20_480_000_000
    (system / "proc/meminfo").unlink()
    assert memory.available_bytes() is None


@pytest.mark.parametrize("inside", [True, False])
def test_a_container_that_has_less(system: pathlib.Path, inside: bool) -> None:
    """By version 2 of the interface; inside a container its own group is the root."""
    where = "groups/" if inside else "groups/one/two/"
    write(
        system,
        {
            "proc/self/cgroup": "0::/one/two\n",
            f"{where}memory.max": f"{8 * GB}\n",
            f"{where}memory.current": f"{5 * GB}\n",
            f"{where}memory.stat": f"anon {2 * GB}\nfile {3 * GB}\n",
        },
    )
    assert memory.available_bytes() == 6 * GB
    write(system, {f"{where}memory.max": "max\n"})
    assert memory.available_bytes() == 20_480_000_000


def test_a_container_of_the_old_kind(system: pathlib.Path) -> None:
    write(
        system,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            "groups/memory/a/memory.limit_in_bytes": f"{2 * GB}\n",
            "groups/memory/a/memory.usage_in_bytes": f"{3 * GB}\n",
            "groups/memory/a/memory.stat": f"total_cache {GB // 2}\n",
        },
    )
    assert memory.available_bytes() == 0
