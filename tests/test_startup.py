"""A command on machines of others: schedulers, containers, accounts without a home, terminals inside notebooks."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types

import jax
import pytest

from ckl_jax.errors import ConfigError
from ckl_jax.runtime import startup

ROOT = pathlib.Path(__file__).parents[1]
FIGURE4 = ROOT / "experiments" / "results" / "tiny" / "figure4"
NOTHING = ("-m", "experiments.common.claims")  # Imports what every command imports first.
HELP = ("-m", "ckl_jax.evaluate", "--help")
NOBODY = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
NOBODY += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]  # Python may be root's.


def ended(words, variables=(), by=(), **options):
    """A process of ``python words`` in a plain environment with these variables."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | dict(variables)
    environment = {name: value for name, value in environment.items() if value is not None}
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 600} | options
    return subprocess.run([*by, sys.executable, *words], env=environment, **options)


@pytest.fixture
def devices(monkeypatch):
    """What JAX is told about the number of devices, in an environment that says nothing about it and has 8 cores."""
    for name in ("JAX_NUM_CPU_DEVICES", "NPROC", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    told = []
    monkeypatch.setattr(startup, "cores", lambda: 8)
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.append((name, value)))
    return told


FORCED = "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4"


@pytest.mark.parametrize(
    ("variables", "told", "threads"),
    [
        ({}, 8, "16"),
        ({"NPROC": "1"}, 1, "1"),
        ({"NPROC": "6"}, 3, "6"),
        ({"NPROC": "96"}, 8, "96"),
        ({"NPROC": ""}, 8, "16"),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3, "6"),
        ({"JAX_NUM_CPU_DEVICES": ""}, 8, "16"),
        ({"JAX_NUM_CPU_DEVICES": "1", "NPROC": "1"}, 1, "1"),
        ({"JAX_NUM_CPU_DEVICES": "12"}, 12, "24"),
        ({"XLA_FLAGS": FORCED}, None, "8"),
        ({"XLA_FLAGS": FORCED, "JAX_NUM_CPU_DEVICES": "4", "NPROC": "9"}, None, "9"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}, 8, "16"),
    ],
)
def test_the_users_number_of_devices_and_threads_wins(devices, monkeypatch, variables, told, threads):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    startup.use_all_cores()
    assert devices == ([] if told is None else [("jax_num_cpu_devices", told)])
    assert os.environ["NPROC"] == threads


@pytest.mark.parametrize("value", ["auto", "0", "-1", "1.5", "²", "1e3", " "])
@pytest.mark.parametrize("name", ["JAX_NUM_CPU_DEVICES", "NPROC"])
def test_a_number_of_devices_or_threads_that_is_none_is_refused_by_name(devices, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name}: got '{re.escape(value)}', allowed is a whole number of at least"):
        startup.use_all_cores()


def test_numbers_of_devices_and_threads_that_contradict_each_other_are_refused(devices, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.setenv("NPROC", "3")
    with pytest.raises(ConfigError, match=r"^NPROC: got 3, allowed is at least twice the 2 devices, or unset"):
        startup.use_all_cores()
    monkeypatch.setenv("XLA_FLAGS", FORCED)
    with pytest.raises(ConfigError, match=r"^JAX_NUM_CPU_DEVICES: got 2, allowed is 4, as XLA_FLAGS says, or unset"):
        startup.use_all_cores()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4),
        ("0::/not/mounted/here\n", {"cpu.max": "200000 100000\n"}, 2),
        ("4:memory:/a\n1:cpuset,cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "150000\n"}, 2),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n"}, 8),
        ("nonsense\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_control_groups(tmp_path, monkeypatch, groups, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    (tmp_path / "proc").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert startup.cores(str(tmp_path / "proc"), str(tmp_path / "mount")) == expected
    assert startup.cores(str(tmp_path / "no proc"), str(tmp_path / "mount")) == 8


def test_a_process_that_may_use_one_core_of_many_has_one_device():
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from ckl_jax.runtime import startup
startup.use_all_cores()
import jax
print(jax.device_count(), os.environ["NPROC"])
"""
    assert ended(["-c", program], {"XLA_FLAGS": None, "NPROC": None}).stdout == "1 2\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_disable_jit", True),
        ("jax_enable_x64", True),
        ("jax_high_dynamic_range_gumbel", True),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_random_seed_offset", 1),
        ("jax_threefry_partitionable", False),
        ("jax_transfer_guard", "disallow"),
    ],
)
def test_settings_of_jax_that_would_change_the_numbers_are_refused(monkeypatch, name, value):
    monkeypatch.delenv(name.upper(), raising=False)
    startup.require_same_numbers()
    monkeypatch.setenv(name.upper(), str(value))
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(ConfigError, match=rf"^{name.upper()}: got {value!r}, allowed is {startup.FIXED[name]}: "):
            startup.require_same_numbers()
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("JAX_NUM_CPU_DEVICES", "auto", r"JAX_NUM_CPU_DEVICES: got 'auto', allowed is .*"),
        ("JAX_ENABLE_X64", "maybe", r"jax cannot start \(.*\); .* JAX_ENABLE_X64.*"),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "soon", r"jax cannot start \(.*\); .* JAX_PERSISTENT_CACHE_.*"),
        ("MATPLOTLIBRC", "RC", r"matplotlib cannot start \(.*\); .* MATPLOTLIBRC.*"),
        ("JAX_PLATFORMS", "cuda", r"JAX_PLATFORMS: got 'cuda', allowed is a platform with a device \(.*\)"),
        ("JAX_PLATFORMS", "abacus", r"JAX_PLATFORMS: got 'abacus', allowed is a platform with a device \(.*\)"),
        ("JAX_THREEFRY_PARTITIONABLE", "0", r"JAX_THREEFRY_PARTITIONABLE: got False, allowed is True: .*"),
        ("JAX_COMPILATION_CACHE_DIR", "s3://x", r"JAX_COMPILATION_CACHE_DIR: got s3://x, allowed are .*"),
    ],
)
def test_a_variable_that_cannot_work_is_one_line_that_names_it(tmp_path, name, value, said):
    (tmp_path / "rc").write_bytes(b"\xff\xfe\x00")
    value = str(tmp_path / "rc") if value == "RC" else value
    words = ["-m", "experiments.figure7_critical_tokens", "--run", "nowhere"]
    done = ended(words, {name: value}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"(?s)(Cannot decode [^\n]*\n)?error: {said}\n", done.stderr), done.stderr
    assert "\n" not in done.stderr.partition("error: ")[2][:-1]


@pytest.mark.parametrize(
    "variables",
    [
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        {"MPLBACKEND": "nonsense", "JAX_NUM_CPU_DEVICES": "", "JAX_ENABLE_X64": "", "JAX_PLATFORMS": ""},
        {"MPLBACKEND": "tkagg", "DISPLAY": ":77", "TERM": "dumb", "NO_COLOR": "1", "TZ": "nonsense/x"},
        {"MPLCONFIGDIR": "/proc/x", "TMPDIR": "/nowhere", "PYTHONOPTIMIZE": "2"},
    ],
    ids=lambda variables: next(iter(variables.values())),
)
def test_a_command_starts_whatever_screen_the_environment_names(variables):
    done = ended(NOTHING, variables)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


# A command whose TPU is held by another process: JAX's own code, with this factory in place of its TPU's.
BUSY = """
import dataclasses, jax
from jax._src import xla_bridge
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli

@dataclasses.dataclass
class Nothing:
    pass

def busy():
    raise RuntimeError("ABORTED: The TPU is already in use by process with pid 7.")

tpu = dataclasses.replace(xla_bridge._backend_factories["tpu"], factory=busy)
xla_bridge._backend_factories["tpu"] = tpu
cli.run(lambda command: print("on", jax.default_backend()), Nothing)
"""


@pytest.mark.parametrize(
    ("platforms", "code", "out", "said"),
    [
        ("tpu,cpu", 1, "", r"error: a device does not start \(Unable to initialize .* by process with pid 7\. .*\)\n"),
        (None, 0, "on cpu\n", ""),  # Why tpu_scripts/remote.sh names the platforms.
    ],
)
def test_a_tpu_that_does_not_start_is_no_bad_argument_and_is_not_replaced_where_it_is_named(platforms, code, out, said):
    done = ended(["-c", BUSY], {"JAX_PLATFORMS": platforms})
    assert (done.returncode, done.stdout) == (code, out)
    assert re.fullmatch(said, done.stderr), done.stderr


def test_importing_the_library_changes_no_backend_and_no_environment():
    program = """
import os
import matplotlib
matplotlib.use("svg")
from ckl_jax.analysis import plots
import experiments.figure4_prioritized_kl, experiments.regularizers.results, experiments.benchmark.report, sys
assert matplotlib.get_backend() == "svg"
assert "matplotlib.pyplot" not in sys.modules
assert not {"MPLBACKEND", "NPROC", "COLUMNS"} & set(os.environ)
"""
    done = ended(["-c", program])
    assert (done.returncode, done.stderr) == (0, "")


@contextlib.contextmanager
def _open_to_all():
    """A new directory that every user may write to: pytest's own are for one."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        pathlib.Path(name).chmod(0o777)
        yield pathlib.Path(name)


@pytest.mark.parametrize("home", [None, "/proc"])
def test_an_account_without_a_name_and_a_home_draws_a_figure_in_ascii(home):
    with _open_to_all() as place:
        shutil.copytree(FIGURE4, place / "figure4")
        for path in (place / "figure4", *(place / "figure4").iterdir()):
            path.chmod(0o777)
        by = NOBODY if os.geteuid() == 0 else ()
        variables = {"HOME": home, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "1"}
        words = ["-m", "experiments.figure4_prioritized_kl", "--plot-only", "--out", "figure4"]
        (place / "figure4" / "figure4.png").write_bytes(b"")
        done = ended(words, variables, cwd=place, by=by)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert (place / "figure4" / "figure4.png").read_bytes().startswith(b"\x89PNG")
        assert not (place / "~").exists()


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_directory_that_this_account_cannot_write_is_refused_before_anything_else(mode):
    by = NOBODY if os.geteuid() == 0 else ()
    with _open_to_all() as place:
        (place / "out" / "more").mkdir(parents=True)
        for path in (place / "out" / "more", place / "out"):
            path.chmod(mode)
        done = ended(["-m", "experiments.figure1_scratchpad", "--out", "out/more"], cwd=place, by=by)
        (place / "out").chmod(0o777)
        (place / "out" / "more").chmod(0o777)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.search(r"^error: (--out: )?(path|out): got '\S*', allowed is .*\n\Z", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("cache", ["file", "file/below", "/proc/none", "~nobody-of-that-name/x"])
@pytest.mark.parametrize("name", [startup.CACHE, "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be_written_costs_one_line_and_no_result(tmp_path, monkeypatch, name, cache):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(startup.CACHE, raising=False)
    monkeypatch.setenv(name, str(tmp_path / cache) if cache.startswith("file") else cache)
    (tmp_path / "file").write_text("not yours")
    if cache.startswith("~") and name == startup.CACHE:
        with pytest.raises(ConfigError, match=rf"^{name}: got ~nobody-of-that-name/x, allowed is ~ only where"):
            startup.keep_compiled_programs()
        return
    assert re.fullmatch(r"compiled programs were not kept \(.*\)", startup.keep_compiled_programs())
    assert told == {"jax_enable_compilation_cache": False}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/ckl_jax/compiled"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/ckl_jax/compiled"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/ckl_jax/compiled"),
        ({"XDG_CACHE_HOME": "~/c"}, "home/c/ckl_jax/compiled"),
        ({startup.CACHE: "~/c"}, "home/c"),
        ({startup.CACHE: "here"}, "here"),
    ],
)
def test_compiled_programs_are_kept_where_the_variables_say(tmp_path, monkeypatch, variables, expected):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.chdir(tmp_path)
    for name in (startup.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    assert startup.keep_compiled_programs() == ""
    assert told == {"jax_compilation_cache_dir": str(tmp_path / expected)}
    assert (tmp_path / expected).is_dir()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_nothing(tmp_path, closed):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for words, code in ((HELP, 0), (("-m", "ckl_jax.evaluate", "--checkpoint", "nowhere"), 2)):
        line = f'"$@" {closed}'
        shell = ["bash", "-c", line, "bash", sys.executable, *words]
        done = subprocess.run(shell, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stdout.startswith("usage") == (code == 0 and ">&-" not in closed.replace("2>&-", ""))


def test_output_that_nobody_reads_or_that_is_full_is_one_line(tmp_path):
    read, write = os.pipe()
    os.close(read)
    report = ("-m", "experiments.reproduce", "--report-only", "--out", str(tmp_path))
    with open(write, "w") as unread, open("/dev/full", "w") as full:
        for words, out, code, said in (
            (HELP, unread, 0, ""),
            (HELP, full, 1, "error: .*No space left on device\n"),
            (report, unread, 1, "error: nobody reads the standard output any more\n"),
        ):
            done = ended(words, capture_output=False, stdout=out, stderr=subprocess.PIPE)
            assert re.fullmatch(said, done.stderr), done.stderr
            assert done.returncode == code


def test_processes_with_unequal_devices_are_refused(monkeypatch):
    found = [types.SimpleNamespace(process_index=index) for index in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: found)
    with pytest.raises(ConfigError, match=r"^JAX_NUM_CPU_DEVICES: got \[2, 1\], allowed is the same number of devices"):
        startup.require_devices()
    found.pop(0)
    startup.require_devices()


@pytest.mark.parametrize("variables", [{"COLUMNS": "1"}, {"COLUMNS": "1", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}])
def test_help_is_printed_by_a_narrow_terminal_and_without_docstrings(variables):
    done = ended(["-OO", *HELP], variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--temperature" in done.stdout
    assert "likeliest" in done.stdout


def test_a_directory_that_is_gone_is_refused_where_a_path_is_relative(tmp_path):
    program = """
import os, pathlib, sys
gone = pathlib.Path(sys.argv[1], "gone")
gone.mkdir()
os.chdir(gone)
gone.rmdir()
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
    words = ("-m", "ckl_jax.finetune", "--out", "x")
    done = ended(["-c", program, str(tmp_path), *words])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: out: got x, allowed is an absolute path: this directory is gone\n"


def test_no_file_is_read_or_written_in_the_locales_encoding():
    check = ["ruff", "check", "--isolated", "--preview", "--select", "PLW1514", "ckl_jax", "experiments"]
    assert subprocess.run([sys.executable, "-m", *check], cwd=ROOT, capture_output=True).returncode == 0
