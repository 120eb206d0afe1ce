"""What a cgroup allows, from trees as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

from layerpack.formats.units import GIB, MIB
from layerpack.runtime.machine.host_memory import cgroup_memory, host_memory

STAT = "anon 1000\nfile {file}\nshmem 0\ninactive_file {inactive}\nactive_file {active}\n"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def version_2(
    folder: Path, limit: object, used: int, *, inactive: int = 0, active: int = 0
) -> None:
    stat = STAT.format(file=inactive + active + 7 * MIB, inactive=inactive, active=active)
    write(folder, memory__max=limit, memory__current=used, memory__stat=stat)


def version_1(
    folder: Path, limit: object, used: int, *, inactive: int = 0, active: int = 0
) -> None:
    stat = f"cache 5\ninactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    write(
        folder,
        memory__limit_in_bytes=limit,
        memory__usage_in_bytes=used,
        memory__stat=stat,
    )


def test_version_2_page_cache_gives_way_but_tmpfs_does_not(tmp_path: Path) -> None:
    version_2(tmp_path, 8 * GIB, 3 * GIB, inactive=GIB, active=GIB // 2)
    assert cgroup_memory("0::/\n", tmp_path) == [(8 * GIB - 3 * GIB + GIB + GIB // 2, 8 * GIB)]


def test_every_ancestor_counts(tmp_path: Path) -> None:
    version_2(tmp_path / "user.slice" / "job", "max", GIB)
    version_2(tmp_path / "user.slice", 4 * GIB, GIB)
    version_2(tmp_path, 16 * GIB, 2 * GIB)
    found = cgroup_memory("0::/user.slice/job\n", tmp_path)
    assert found == [(3 * GIB, 4 * GIB), (14 * GIB, 16 * GIB)]


def test_version_1_beside_other_controllers(tmp_path: Path) -> None:
    version_1(tmp_path / "memory" / "docker", 2 * GIB, GIB, inactive=MIB, active=2 * MIB)
    version_1(tmp_path / "memory", 9223372036854771712, 5 * GIB)  # the kernel's "no limit"
    own = "12:cpu,cpuacct:/docker\n4:memory:/docker\n1:name=systemd:/docker\n0::/docker\n"
    assert cgroup_memory(own, tmp_path) == [(GIB + 3 * MIB, 2 * GIB)]


def test_a_path_of_the_host_means_the_root_that_is_seen(tmp_path: Path) -> None:
    version_1(tmp_path / "memory", 2 * GIB, GIB)
    assert cgroup_memory("4:memory:/docker/0123abcd\n", tmp_path) == [(GIB, 2 * GIB)]


def test_what_is_missing_or_broken_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_memory("", tmp_path) == []
    assert cgroup_memory("nonsense\n0::/\n", tmp_path) == []
    write(tmp_path, memory__max=GIB)
    assert cgroup_memory("0::/\n", tmp_path) == []
    write(tmp_path, memory__current="x", memory__stat="a b c\n\nfile\n")
    assert cgroup_memory("0::/\n", tmp_path) == []


def test_use_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    version_2(tmp_path, GIB, 2 * GIB)
    assert cgroup_memory("0::/\n", tmp_path) == [(0, GIB)]


def test_this_machine_has_memory() -> None:
    free, total = host_memory()
    assert 0 < free <= total
