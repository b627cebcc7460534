"""What of a configuration may change when a run goes on: declared at the field itself, all else has to stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ckl_jax.errors import ConfigError

_KEY = "resuming"
_Name = tuple[str, ...]


class _Declared(NamedTuple):
    """How a field may change: at will (``unless`` None), or only up, and that unless the field of that name is set."""

    unless: str | None = None


def speed(default: Any) -> Any:
    """A field that decides how fast the same numbers are computed; they change by rounding at most, and pre-training's
    with dropout also where one says that it draws others."""
    return dataclasses.field(default=default, metadata={_KEY: _Declared()})


def end(default: Any, unless: str) -> Any:
    """A field that says where training ends. A run may go on to a later end, with the numbers that it would have had.

    Args:
      unless: the field that, if set, makes all numbers depend on the end, a learning rate's decay say.
    """
    return dataclasses.field(default=default, metadata={_KEY: _Declared(unless)})


class Resumable:
    """The rules of some config classes, for their dictionaries at any depth of a config.json.

    A field that an older config.json does not have yet was its default, if that is the same in all classes.

    Args:
      classes: dataclasses; a name means the same in all of them.
      later: first names that an older config.json does not have at all, and that are then taken for the same.
    """

    def __init__(self, *classes: Any, later: frozenset[str] = frozenset()):
        self._later = later
        fields = [field for cls in classes for field in dataclasses.fields(cls)]
        self._declared: Mapping[str, _Declared] = {f.name: f.metadata[_KEY] for f in fields if _KEY in f.metadata}
        defaults = [(f.name, f.default) for f in fields if f.default is not dataclasses.MISSING]
        self._defaults = {name: value for name, value in defaults if all(v == value for n, v in defaults if n == name)}

    @property
    def speed(self) -> frozenset[str]:
        """The fields that change the speed alone."""
        return frozenset(name for name, declared in self._declared.items() if declared.unless is None)

    def same_numbers(self, old: Any, new: Any) -> bool:
        """Whether two configs, as dictionaries, make the same numbers, but for rounding."""
        return not self.differing(old, new)

    def differing(self, old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
        """What makes other numbers in ``new`` than in ``old``, both dictionaries: its dotted name and its two values.

        A later end does too. None stands for what is not there.
        """
        before, after = self._filled(old, new)
        ends, others = self._differing(before, after)
        old_values, new_values = ({_dotted(name): x for name, x in config.items()} for config in (before, after))
        names = sorted([*map(_dotted, ends), *others])
        return {name: (old_values.get(name), new_values.get(name)) for name in names}

    def require(self, old: Any, new: Any, where: str) -> None:
        """Raises a ConfigError unless a run of the config ``old`` may go on as one of ``new``.

        Args:
          where: the run, for the message.
        """
        before, after = self._filled(old, new)
        ends, others = self._differing(before, after)
        if others:
            raise ConfigError(
                f"out: {where} holds a run with another config (differing: {', '.join(sorted(others))}); "
                "allowed is a directory that is new, empty or of this run"
            )
        for name in ends:
            self._require_later(name, before, after[name], where)

    def _filled(self, old: Any, new: Any) -> tuple[dict[_Name, Any], dict[_Name, Any]]:
        """Both by name; what the old one does not have yet is the default, or of ``later`` what the new one has."""
        before, after = (dict(_leaves(config)) for config in (old, new))
        since = self._later - {name[0] for name in before if name}
        for name in after.keys() - before.keys():
            if name and name[0] in since:
                before[name] = after[name]
            elif name[:-1] in {known[:-1] for known in before} and name[-1] in self._defaults:
                before[name] = self._defaults[name[-1]]
        return before, after

    def _differing(self, before: Mapping[_Name, Any], after: Mapping[_Name, Any]) -> tuple[list[_Name], list[str]]:
        """The names of ends that differ, and of all else that does but speed."""
        ends, others = list[_Name](), list[str]()
        for name in before.keys() | after.keys():
            if (name and name[-1] in self.speed) or (name in before and name in after and before[name] == after[name]):
                continue
            if name and name[-1] in self._declared and name in before and name in after:
                ends.append(name)
            else:
                others.append(_dotted(name))
        return ends, others

    def _require_later(self, name: tuple[str, ...], before: Mapping[Any, Any], wanted: Any, where: str) -> None:
        unless, had = self._declared[name[-1]].unless, before[name]
        fixed = before.get((*name[:-1], unless))
        if fixed:
            reason = f": with {unless} = {fixed} its training depends on it; begin another run for more"
            raise ConfigError(f"{name[-1]}: got {wanted}, allowed is {had}, that of the run in {where}{reason}")
        if not (isinstance(had, int) and wanted > had):
            raise ConfigError(f"{name[-1]}: got {wanted}, allowed is {had} or more, as the run in {where} has")


def unequal(one: Any, other: Any) -> list[str]:
    """The dotted names of all that two configs, as dictionaries, do not have in common, speed included."""
    left, right = (dict(_leaves(config)) for config in (one, other))
    missing = object()
    return sorted(_dotted(n) for n in left.keys() | right.keys() if left.get(n, missing) != right.get(n, missing))


def _dotted(name: _Name) -> str:
    return ".".join(name) or "config"


def _leaves(config: Any, name: _Name = ()) -> Iterator[tuple[_Name, Any]]:
    if isinstance(config, dict) and (config or not name):
        for key, value in config.items():
            yield from _leaves(value, (*name, key))
    else:
        yield name, config
