"""XLA on CPU computes reductions rightly in every command, and keeps the memory that it freed."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ckl_jax import check_xla
from ckl_jax.runtime import cli, processes, xla_cpu

PAGE = 4096
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _compiles_anew(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (None, xla_cpu.SAFE_FLAG),
        ("", xla_cpu.SAFE_FLAG),
        ("--xla_a=1 --xla_b=2", f"--xla_a=1 --xla_b=2 {xla_cpu.SAFE_FLAG}"),
        (f"--{xla_cpu.FUSIONS}=", f"--{xla_cpu.FUSIONS}="),
        (f"--xla_a=1 --{xla_cpu.FUSIONS}=-dot", f"--xla_a=1 --{xla_cpu.FUSIONS}=-dot"),
        (xla_cpu.SAFE_FLAG, xla_cpu.SAFE_FLAG),
    ],
)
def test_the_flag_is_added_once_and_a_choice_of_the_users_stays(monkeypatch, flags, expected):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    xla_cpu.avoid_wrong_fusions()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("content", "is_added"),
    [
        (b"XLA_FLAGS", False),
        (b"XLA_FLAGS " + xla_cpu.FUSIONS.encode() + b"\0", True),
        (b"XLA_FLAGS " + xla_cpu.FUSIONS.encode() + b"R\x19", False),  # The name of a field of a protocol buffer.
        (b"no XLA in it", True),
    ],
)
def test_an_xla_that_does_not_know_the_flag_is_not_given_it(monkeypatch, tmp_path, content, is_added):
    package = tmp_path / "libtpu"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "libtpu.so").write_bytes(content.ljust(xla_cpu._FEW_BYTES + 1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    xla_cpu.avoid_wrong_fusions()
    assert (xla_cpu.SAFE_FLAG in os.environ["XLA_FLAGS"]) == is_added


TWO_DEVICES = """
import time
from ckl_jax.runtime import xla_cpu
xla_cpu.wait_for_other_devices()
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("data",))
def slow(x):
    time.sleep(5 * float(x))
    return np.float32(x)
def rollout(x):
    waited = jax.pure_callback(slow, jax.ShapeDtypeStruct((), np.float32), x[0])
    return x * 0 + waited
rows = jax.sharding.PartitionSpec("data")
summed = jax.jit(lambda x: jax.shard_map(rollout, mesh=mesh, in_specs=rows, out_specs=rows)(x).sum())
print(summed(jax.device_put(np.arange(2, dtype=np.float32), jax.sharding.NamedSharding(mesh, rows))))
"""


@pytest.mark.parametrize(("own", "code"), [("", 0), (f"--{xla_cpu.PATIENCE}=1", -signal.SIGABRT)])
def test_a_device_waits_for_another_one_unless_the_user_says_how_long(own, code):
    flags = f"--xla_cpu_collective_call_warn_stuck_timeout_seconds=1 {own}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "4"}
    command = [sys.executable, "-c", TWO_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert ("1.0" in done.stdout) == (code == 0)


def test_commands_have_the_patience(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    nothing = dataclasses.make_dataclass("Nothing", ())
    monkeypatch.setattr(sys, "argv", ["command"])
    cli.run(lambda _: None, nothing)
    assert f"--{xla_cpu.PATIENCE}={xla_cpu.A_DAY}" in os.environ["XLA_FLAGS"].split()


def _printed(code, **variables):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", xla_cpu.TUNABLES: "", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_command_computes_every_pattern_rightly():
    code = """
import dataclasses
from ckl_jax import check_xla
from ckl_jax.runtime import cli
Nothing = dataclasses.make_dataclass("Nothing", ())
cli.run(lambda _: print(*map(check_xla.is_right, range(len(check_xla.PATTERNS)))), Nothing)
"""
    assert _printed(code, XLA_FLAGS="--xla_backend_optimization_level=0") == ["True"] * len(check_xla.PATTERNS)


@pytest.mark.skipif(not xla_cpu._has_huge_pages(), reason="nothing is done without huge pages")
def test_memory_freed_by_a_thread_is_not_mapped_anew():
    code = """
import concurrent.futures, ctypes, resource
from ckl_jax.runtime import xla_cpu
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def fill(_):
    memory = libc.malloc(100_000_000)
    ctypes.memset(memory, 1, 100_000_000)
    libc.free(memory)
KEEP
with concurrent.futures.ThreadPoolExecutor(1) as thread:
    thread.submit(fill, 0).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(thread.map(fill, range(5)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    code = code.replace("KEEP", "xla_cpu.keep_freed_memory()")
    given_back, kept = (int(_printed(code, **{xla_cpu.TUNABLES: own})[0]) for own in ("", xla_cpu.HUGE_PAGES))
    assert kept < 500_000_000 / PAGE / 20 < given_back


@pytest.mark.parametrize("own", ["", "glibc.malloc.hugetlb=0", "glibc.malloc.arena_max=3"])
def test_a_command_starts_once_more_with_huge_pages_and_the_same_arguments(tmp_path, own):
    (tmp_path / "probe").mkdir()
    start = "from ckl_jax.runtime import xla_cpu; xla_cpu.start_with_huge_pages()"
    (tmp_path / "probe" / "__init__.py").write_text(start)
    (tmp_path / "probe" / "show.py").write_text(
        "import os, sys; print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:]); sys.exit(7)"
    )
    environment = {**os.environ, xla_cpu.TUNABLES: own, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "probe.show", "a b", "", "--x=$HOME"], env=environment, stdout=subprocess.PIPE, text=True
    )
    printed, _ = process.communicate(timeout=600)
    expected = f"{own}:{xla_cpu.HUGE_PAGES}".lstrip(":") if xla_cpu._has_huge_pages() and "huge" not in own else own
    assert printed.split(" ", 2) == [str(process.pid), expected, "['a b', '', '--x=$HOME']\n"]
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("libc", "offered", "has"),
    [
        ("glibc 2.36", "always [madvise] never", True),
        ("glibc 2.35", "[always] madvise never", True),
        ("glibc 2.34", "always [madvise] never", False),
        ("glibc 2.36", "always madvise [never]", False),
        ("musl 1.2", "always [madvise] never", False),
        (None, "always [madvise] never", False),
    ],
)
def test_huge_pages_are_asked_for_where_glibc_and_the_system_have_them(monkeypatch, libc, offered, has):
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path, encoding: offered)
    assert xla_cpu._has_huge_pages() == has


def test_a_difference_is_measured_against_the_greatest_value_of_its_kind():
    a = {"loss": [1.0, 100.0], "kl": [0.0, 0.0]}
    assert check_xla.difference(a, a)[0] == 0.0
    assert check_xla.difference(a, {"loss": [1.0, 90.0], "kl": [0.0, 0.0]}) == (0.1, "loss")
    assert check_xla.difference(a, {"loss": [1.0, float("nan")], "kl": [0.0, 0.0]}) == (float("inf"), "loss")
    assert check_xla.difference(a, {"loss": [1.0, 100.0], "kl": [0.0, 1.0]}) == (1.0, "kl")
    terms = {"loss/policy": [1e-9], "loss/kl": [0.1], "kl": [0.1]}
    assert check_xla.difference(terms, terms | {"loss/policy": [2e-9]}) == (1e-8, "loss/policy")
    assert check_xla.difference(terms, terms | {"loss/policy": [0.1]})[0] == pytest.approx(1.0)
    assert check_xla.difference(terms, terms | {"kl": [0.05]}) == (0.5, "kl")


@pytest.mark.parametrize("own", [None, "", "--xla_backend_optimization_level=0"])
def test_the_check_computes_with_xlas_own_flags_alone(monkeypatch, own):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if own is not None:
        monkeypatch.setenv("XLA_FLAGS", own)
    process = processes.Process("")
    assert process.start(os.getenv, "XLA_FLAGS")() == (own or "")
    assert process.start(check_xla.is_right, 0)() is not None
    process.close()


@pytest.mark.slow
def test_programs_of_every_kind_are_the_same_with_xlas_default_fusions(capsys):
    """The command's other stages are rounds and rollouts too, and take as long again."""
    stages = ("pretraining", "speculative", "ppo", "transitions")
    check_xla.main(check_xla.CheckXlaCommand(stages, episodes=16, quick=True))
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    for stage in stages:
        assert f"\n{stage} " in printed
