"""Refuses losses and parameters that are not finite, before they are logged or saved."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.runtime import sharding

EXIT_CODE = 3
# Causes come before effects: a policy's own numbers, the critic's, each term's gradient, and last the updates' means,
# of which those of the first update that is not finite are (see ``updates.update``).
_ORDER = ("loss", "entropy", "kl", "explained_variance", "grad_norm/", "loss/", "grad_norm", "param_norm")


class NotFiniteError(FloatingPointError):
    """A metric or a part of the state is NaN or infinite; the message is one line that names run, step and term."""


def require_metrics(unit: str, done: int, runs: Sequence[str], metrics: Mapping[str, np.ndarray]) -> None:
    """Refuses metrics of which any is not finite, and names the first of the first step.

    Args:
      unit: what the second axis counts, ``step`` or ``round``.
      done: units before the first of these.
      runs: names of the runs, R.
      metrics: arrays with leading axes [R, units].

    Raises:
      NotFiniteError: with the unit, the run, the term and its value.
    """
    found = []
    for name, values in metrics.items():
        values_RxUxN = np.reshape(values, (*np.shape(values)[:2], -1))
        for run, index, item in np.argwhere(~np.isfinite(values_RxUxN)):
            found.append((index, _rank(name), name, run, values_RxUxN[run, index, item]))
    if found:
        index, _, name, run, value = min(found)
        raise NotFiniteError(f"{unit} {done + index + 1} of {runs[run]}: {name} is {value}, allowed is a finite number")


def _rank(name: str) -> int:
    kind = name[: name.find("/") + 1] or name
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def require_state(unit: str, done: int, runs: Sequence[str], state: Any, *, by_run: bool) -> None:
    """Refuses a state of which any number is not finite.

    Args:
      unit, done: what was just finished.
      runs: names of the runs; one where the state has no axis for them.
      by_run: whether every array has a leading axis of runs.

    Raises:
      NotFiniteError: with the unit, the run and the array's name.
    """
    finite = sharding.to_host(_all_finite(state, by_run))
    for path, of_runs in jax.tree_util.tree_leaves_with_path(finite):
        for run, is_finite in zip(runs, np.atleast_1d(of_runs), strict=True):
            if not is_finite:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise NotFiniteError(f"after {unit} {done} of {run}: {name} has numbers that are not finite")


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(state: Any, by_run: bool) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(axis=tuple(range(int(by_run), x.ndim))), state)
