"""Dotted names in texts, and whether the package has them."""

import importlib
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
FULL_NAMES = {
    path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "ckl_jax").rglob("*.py")
    if path.stem != "__init__"
} | {path.parent.name: f"ckl_jax.{path.parent.name}" for path in (ROOT / "ckl_jax").glob("*/__init__.py")}
"""By the last part of a module's name; of a package's and a module's that are alike, the package's."""


def exists(name):
    """Whether ``package.module.object.attribute`` leads to something."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "?"):
                raise
            continue
        for part in parts[count:]:
            fields = {*getattr(found, "__annotations__", ()), *getattr(found, "__dataclass_fields__", ())}
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def missing(text):
    """The full names of the package in a text that lead nowhere."""
    return sorted({name for name in re.findall(r"\bckl_jax(?:\.\w+)+", text) if not exists(name)})


def missing_in_docstring(text):
    """As ``missing``; names in backticks that start with a module count too, as ``losses.entropy``."""
    short = [name.partition(".") for name in re.findall(r"`(\w+(?:\.\w+)+)`", text)]
    files = ("json", "jsonl", "py", "css", "js")
    names = [
        f"{FULL_NAMES[module]}.{name}"
        for module, _, name in short
        if module in FULL_NAMES and name.split(".")[-1] not in files
    ]
    return missing(" ".join([text, *names]))
