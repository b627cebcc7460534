"""What XLA does on CPU unless it is told otherwise: wrong fused reductions, and memory given back at every step.

The commands avoid both. Whoever imports the library starts Python with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for the
second, and calls, before JAX is imported:

    from ckl_jax.runtime import xla_cpu

    xla_cpu.avoid_wrong_fusions()
    xla_cpu.keep_freed_memory()

    import jax

`ckl_jax.check_xla` shows what the first of them avoids.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import sys
from collections.abc import Iterator

FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
SAFE_FLAG = f"--{FUSIONS}=-reduce"
PATIENCE = "xla_cpu_collective_call_terminate_timeout_seconds"
A_DAY = 86_400
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_FEW_BYTES = 10_000_000


def avoid_wrong_fusions() -> None:
    """Adds ``SAFE_FLAG`` to XLA_FLAGS, which XLA reads when JAX first computes.

    From 0.10.2 on jaxlib hands reductions on CPU to YNNPACK, fused with what they sum, and some of them are wrong or
    crash (jax issues 39103, 39257, 40412; seen here in 0.10.2 and 0.12.0.1). The flag keeps reductions to XLA's own.
    Nothing is done where XLA_FLAGS has a word about these fusions already, or where an XLA that is installed does not
    know the flag, which would end the process.
    """
    _add(FUSIONS, SAFE_FLAG)


def wait_for_other_devices() -> None:
    """Adds a flag to XLA_FLAGS by which devices of the CPU wait a day for each other, unless a time is set there.

    Each device writes its own episodes, then all exchange gradients. By default XLA aborts the process where one waits
    a minute for another, and at the same round again when the run goes on.
    """
    _add(PATIENCE, f"--{PATIENCE}={A_DAY}")


def _add(name: str, flag: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags and is_known(name):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def is_known(flag: str) -> bool:
    """Whether every XLA that is installed knows a flag; one that does not ends the process where it is set."""
    return all(_knows(library, flag) for library in _xla_libraries())


def flags_without_fusions() -> str:
    """XLA_FLAGS without what they say about these fusions."""
    return " ".join(word for word in os.environ.get("XLA_FLAGS", "").split() if FUSIONS not in word)


def _xla_libraries() -> Iterator[pathlib.Path]:
    """The shared libraries that have an XLA: jaxlib's, and those of accelerators."""
    plugins = (entry.module for entry in importlib.metadata.entry_points(group="jax_plugins"))
    for package in ("jaxlib", "libtpu", *plugins):
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:  # A plugin that was removed by halves, which JAX passes over too.
            continue
        for directory in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(pathlib.Path(directory).rglob("*.so")):
                if path.stat().st_size > _FEW_BYTES:
                    yield path


def _knows(library: pathlib.Path, flag: str) -> bool:
    """Whether it has the flag's name as a string that ends there; a removed one stays in a message's fields."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"XLA_FLAGS") < 0 or content.find(flag.encode() + b"\0") >= 0


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory where it takes it by huge pages; elsewhere nothing is done.

    XLA allocates its temporary buffers anew at every call, from threads, and faulting in fresh pages took two fifths of
    a pre-training step. Without huge pages a thread's arena gives back what is greater than 64 MB whatever it is told;
    one arena for all threads would keep it, but they wait for each other there: rounds took up to twice as long.
    """
    if HUGE_PAGES in os.environ.get(TUNABLES, ""):
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def start_with_huge_pages() -> None:
    """Starts this ``python -m`` command once more in its place, where glibc then takes memory by huge pages.

    glibc (2.35 or newer) reads that from GLIBC_TUNABLES when a process starts, and never again. Nothing is done where
    the variable says something about it already, or the system has no huge pages to give on request.
    """
    tunables = os.environ.get(TUNABLES, "")
    if "glibc.malloc.hugetlb" not in tunables and _has_huge_pages():
        os.environ[TUNABLES] = f"{tunables}:{HUGE_PAGES}".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_huge_pages() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        offered = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
        return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35) and "[never]" not in offered
    except (AttributeError, OSError, ValueError):  # Another system, or another C library.
        return False
