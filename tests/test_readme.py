"""What the README promises is what the project does."""

import pathlib
import re

import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ten_line_example_runs_and_its_gradient_is_finite():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    assert namespace["value"] > 0
    assert jnp.isfinite(namespace["gradient"]).all()
    assert (namespace["gradient"] != 0).any()


def test_ci_calls_the_readmes_test_command():
    (command,) = re.findall(r"^python3 -m venv .*-m pytest$", README, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_layout_names_every_module():
    modules = {path.name for path in (ROOT / "ckl_jax").glob("*.py")} - {"__init__.py"}
    assert all(name in README for name in modules)


@pytest.mark.parametrize("directory", ["", "experiments", "tpu_scripts"])
def test_a_readme_has_no_open_placeholder_and_what_it_links_to_exists(directory):
    text = (ROOT / directory / "README.md").read_text()
    assert not re.findall(r"@[A-Z_]+@", text)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / directory / target).exists()] == []


def test_the_readme_links_to_headings_that_exist():
    linked = re.findall(r"\]\(experiments/README\.md#([^)]+)\)", README)
    headings = re.findall(r"^#+ (.*)$", (ROOT / "experiments" / "README.md").read_text(), re.MULTILINE)
    names = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert linked
    assert set(linked) <= names
