"""The built wheel and sdist: what they contain, and that the wheel's package works where there is no checkout."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import ckl_jax
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import fingerprint, load_model

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
READMES = README + "".join(path.read_text() for path in sorted(ROOT.glob("*/README.md")))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
WITHOUT_NETWORK = ["--no-deps", "--no-index", "--no-build-isolation", "-q"]
FINETUNE = """ckl_jax.finetune --extra-length 0 --episodes 2 --minibatch-episodes 2 --diagnostic-episodes 1 --rounds 1
--test-every 1 --test-problems 2 --final-problems 2 --old-problems 2 --rollout plain --out finetuned"""


def test_the_readmes_extras_are_pyprojects():
    (paragraph,) = re.findall(r"^`pip install .* installs an extra: .*?\n\n", README, re.DOTALL | re.MULTILINE)
    described = re.findall(r"`([a-z]+)` \(", paragraph)
    assert sorted(described) == sorted(EXTRAS)
    assert {"gpu", "tpu", "bench", "test", "convert", "logs"} <= EXTRAS


def test_every_extra_that_the_readme_or_an_error_asks_for_exists():
    sources = "".join(path.read_text() for path in sorted((ROOT / "ckl_jax").rglob("*.py")))
    by_errors = re.findall(r'\bextra\([^)]*"(\w+)"\)', sources) + re.findall(r"install the extra (\w+)", sources)
    by_readme = re.findall(r"(?:\bextra\s`|# extra |'\.\[)(\w+)", READMES)
    assert {"convert", "logs", "tpu"} <= set(by_errors)
    assert {"convert", "docs", "test", "tpu"} <= set(by_readme)
    assert {*by_errors, *by_readme} <= EXTRAS


def _run(*words: object, cwd: pathlib.Path, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _wheel(source: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    _run("-m", "pip", "wheel", *WITHOUT_NETWORK, "--wheel-dir", place, source, cwd=place.parent)
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def tracked():
    """Path and bytes of every file of the package that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z", "ckl_jax"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if name}


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel, tracked):
    assert {"ckl_jax/py.typed", "ckl_jax/analysis/report.css", "ckl_jax/analysis/report.js"} <= set(tracked)
    assert any(name.startswith("ckl_jax/pretrained/tiny/params/") for name in tracked)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    assert {name: packed.get(name) for name in tracked} == tracked
    metadata = f"ckl_jax-{ckl_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in packed} == {"ckl_jax", metadata}
    assert f"\nVersion: {ckl_jax.__version__}\n" in packed[f"{metadata}/METADATA"].decode()


@pytest.mark.slow
def test_the_sdist_is_the_package_alone_and_builds_the_same_wheel(wheel, tracked, tmp_path):
    _run("-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames()}
    beside = {name for name in packed if not name.startswith("ckl_jax/")}
    assert beside == {".gitignore", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert set(tracked) <= packed
    (tmp_path / "rebuilt").mkdir()
    with zipfile.ZipFile(_wheel(sdist, tmp_path / "rebuilt")) as rebuilt, zipfile.ZipFile(wheel) as built:
        assert {file.filename: file.CRC for file in rebuilt.infolist()} == {
            file.filename: file.CRC for file in built.infolist()
        }


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``run(*words)`` in a directory outside the checkout, where PYTHONPATH has the installed wheel alone."""
    place = tmp_path_factory.mktemp("elsewhere")
    target = place / "target"
    _run("-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", target, wheel, cwd=place)
    environment = {
        **os.environ,
        "PYTHONPATH": str(target),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
    }

    def run(*words: object) -> str:
        return _run(*words, cwd=place, environment=environment)

    run.place, run.target = place, target
    return run


@pytest.mark.slow
def test_the_installed_package_its_data_and_its_checkpoint_are_those_of_the_wheel(installed):
    code = """import importlib, json, pathlib, pkgutil, sys, ckl_jax
from ckl_jax.checkpoint import SHIPPED_TINY, fingerprint, load_model
for module in pkgutil.walk_packages(ckl_jax.__path__, "ckl_jax."):
    importlib.import_module(module.name)
files = {module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "ckl_jax"}
others = [name for name in sys.modules if name.split(".")[0] in ("experiments", "tests")]
model = load_model(SHIPPED_TINY)
print(json.dumps([sorted(files), others, str(SHIPPED_TINY), fingerprint(model.params)]))"""
    files, others, shipped, parameters = json.loads(installed("-c", code).splitlines()[-1])
    package = installed.target / "ckl_jax"
    assert len(files) == len(list((ROOT / "ckl_jax").rglob("*.py")))
    assert all(pathlib.Path(file).is_relative_to(package) for file in files)
    assert others == []
    assert pathlib.Path(shipped) == package / "pretrained" / "tiny"
    assert parameters == fingerprint(load_model(SHIPPED_TINY).params)


@pytest.mark.slow
def test_evaluate_runs_from_the_installed_package(installed):
    said = installed("-m", "ckl_jax.evaluate", "--problems", "20")
    assert said.startswith("addition, N = 5, 20 problems per cell")
    accuracy = {row.split()[0]: float(row.split()[1]) for row in said.splitlines()[2:]}
    assert list(accuracy) == ["5", "6", "7", "8"]
    assert accuracy["5"] >= 50 > accuracy["8"]


@pytest.mark.slow
def test_finetune_runs_from_the_installed_package_and_its_checkpoint(installed):
    installed("-m", *FINETUNE.split())
    run = installed.place / "finetuned"
    config = json.loads((run / "config.json").read_text())
    assert config["command"] == "finetune"
    assert config["checkpoint"] == fingerprint(load_model(SHIPPED_TINY).params)
    assert load_model(run / "run" / "seed_0").max_pretrain_digits == 5
    assert (run / "metrics.jsonl").read_text()
