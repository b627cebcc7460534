"""What a command settles with its machine: standard streams, environment variables, cores, and the compilation cache.

``before_imports`` is called by the packages' ``__init__`` when Python starts one of their modules by ``python -m``, for
JAX and matplotlib read their variables when they are imported; ``cli.run`` does the rest.

Compiled programs are kept in ~/.cache/ckl_jax, or where ``JAX_COMPILATION_CACHE_DIR`` says, so that a second start is
faster. Where JAX has no accelerator every core that the process may use is a device.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import importlib
import io
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime import xla_cpu

DEVICES, THREADS, CACHE = "JAX_NUM_CPU_DEVICES", "NPROC", "JAX_COMPILATION_CACHE_DIR"
UNKNOWN = "is not in the list of known backends"  # What JAX says of a platform that it has no code for.
FORCED = "--xla_force_host_platform_device_count"
READ_BY = {"jax": ("JAX_",), "matplotlib": ("MATPLOTLIBRC", "MPLCONFIGDIR", "TMPDIR", "XDG_CONFIG_HOME")}
OTHERWISE = "with other values a seed gives other numbers, or none"
NARROWEST = 60  # Columns; tyro's help never ends in 5.
WHOLE = "a whole number of at least 1, or unset"
FIXED = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_enable_x64": False,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_transfer_guard": None,
}
"""JAX's settings that a variable may not change: the same seed would give other numbers, or none."""


def before_imports(*packages: str) -> None:
    """Ends the process with one line and exit code 2 where a package cannot be imported in this environment."""
    xla_cpu.start_with_huge_pages()
    xla_cpu.keep_freed_memory()
    _open_standard_streams()
    for name in [name for name, value in os.environ.items() if name.startswith("JAX_") and not value]:
        del os.environ[name]  # JAX would read "" as a value.
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    os.environ["MPLBACKEND"] = "agg"  # Commands write files. A notebook's terminal names a backend that is not here.
    try:
        _given(DEVICES)
        for package in packages:
            _import(package)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _import(package: str) -> None:
    try:
        importlib.import_module(package)
    except (ValueError, OSError) as error:  # A value they do not know; no directory they can write to.
        found = ", ".join(name for name in sorted(os.environ) if name.startswith(READ_BY[package])) or "none"
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{package} cannot start ({said}); of the variables that it reads set are: {found}"
        ) from error


def _open_standard_streams() -> None:
    """Files never get a closed stream's number, where a library's messages would go into them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def require_same_numbers() -> None:
    """Raises ConfigError where a variable gives JAX a setting with which the same seed gives other numbers."""
    import jax

    for name, value in FIXED.items():
        found = getattr(jax.config, name, value)
        found = getattr(found, "value", found)  # Of an enumeration.
        same = found == value or name.upper() not in os.environ
        require(same, name.upper(), found, f"{value}: {OTHERWISE}")


def require_devices() -> None:
    """Starts JAX's devices.

    Raises:
      ConfigError: JAX_PLATFORMS names what is not here, or processes have unequal numbers of devices.
      OSError: a device did not start. It may later: another process may hold it still.
    """
    import jax

    try:
        counts = collections.Counter(device.process_index for device in jax.devices())
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split()) or "none of that kind is here"
        if isinstance(error, RuntimeError) and UNKNOWN not in said:
            raise OSError(f"a device does not start ({said})") from error
        raise ConfigError(
            f"JAX_PLATFORMS: got {os.environ.get('JAX_PLATFORMS', '')!r}, allowed is a platform with a device ({said})"
        ) from error
    found = [count for _, count in sorted(counts.items())]
    require(len(set(found)) == 1, DEVICES, found, "the same number of devices in each of the processes")


def cores(proc: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> int:
    """Cores that this process may use: by its affinity and, rounded up, by the time its control groups give it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(share) for share in _shares(pathlib.Path(proc), pathlib.Path(mount)))]))


def _shares(proc: pathlib.Path, mount: pathlib.Path) -> Iterator[float]:
    """Limits in cores of the process's control groups and those above them, of version 2 (cpu.max) and 1."""
    with contextlib.suppress(OSError, ValueError):
        for line in proc.read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            root = mount / "cpu" if controllers else mount
            if controllers and "cpu" not in controllers.split(","):
                continue
            inside = root / group.lstrip("/")
            for place in (inside, *(above for above in inside.parents if above.is_relative_to(root))):
                yield from _share(place)


def _share(group: pathlib.Path) -> Iterator[float]:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # No such file; "max".
            quota, period = " ".join((group / file).read_text(encoding="utf-8") for file in files).split()
            if int(quota) > 0:
                yield int(quota) / int(period)


def _given(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    require(value.isascii() and value.isdecimal() and int(value) >= 1, name, value, WHOLE)
    return int(value)


def use_all_cores() -> None:
    """One device per core where JAX has no accelerator, so that runs are computed side by side.

    JAX_NUM_CPU_DEVICES, or XLA_FLAGS, says another number. XLA gets twice as many threads (it reads NPROC): with one a
    device, pre-training on two devices stood still in its first all-reduce until XLA aborted, as if the thread that
    waited there was one that the other device needed. Where NPROC is set there are at most half as many devices. Where
    JAX has computed something already (in a notebook, say), its devices stay what they are.

    Raises:
      ConfigError: a variable is no number of at least 1, or two contradict each other.
    """
    import jax

    forced = re.findall(rf"{FORCED}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    devices, threads = _given(DEVICES), _given(THREADS)
    if forced:
        require(devices in (None, int(forced[-1])), DEVICES, devices, f"{forced[-1]}, as XLA_FLAGS says, or unset")
        devices = int(forced[-1])
    if threads is None:
        os.environ[THREADS] = str(2 * (devices or cores()))
    elif devices is not None:
        enough = devices == 1 or threads >= 2 * devices
        require(enough, THREADS, threads, f"at least twice the {devices} devices, or unset")
    chosen = devices or max(1, min(cores(), int(os.environ[THREADS]) // 2))
    if not forced:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", chosen)


def keep_compiled_programs() -> str:
    """Starting again skips the compilation. JAX's own variable JAX_COMPILATION_CACHE_DIR names another directory.

    Returns:
      Why they are not kept, where that directory cannot be written; else "".
    """
    import jax

    from ckl_jax.runtime import paths

    named = os.environ.get(CACHE)
    try:
        directory = paths.resolved(named, CACHE) if named else paths.cache_home() / "ckl_jax" / "compiled"
        if not paths.in_bucket(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        return f"compiled programs were not kept ({error.filename}: {error.strerror})"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return ""
