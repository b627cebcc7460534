"""The mesh ('run', 'data'): every device has its own runs, and its share of their rows (episodes, windows of text).

Runs are spread over the devices that share them evenly. What is left shares each run's episodes, or a pre-training
batch; ``--data-devices`` sets that number, and ``--shard-state`` splits parameters and optimizer state too. Without an
accelerator every core that the process may use is a device. Tested on up to 8 simulated devices.

Rollouts are computed device by device on their own rows and wait for nobody; everything else is one program over all
rows that XLA partitions, so that means, minibatches and gradients are those of the whole batch.

Where there are several processes (``hosts``), the devices are those of all, as many of each: every process takes part
in every program. What enters one is the same on all of them, drawn from the seed, and each keeps its own part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ckl_jax.errors import require
from ckl_jax.runtime import hosts, targets

RUN_AXIS, DATA_AXIS = "run", "data"
RUNS = "runs"  # The axis of vmapped runs; the others are of devices.
ALL, BY_RUN, BY_ROW = PartitionSpec(), PartitionSpec(RUN_AXIS), PartitionSpec(DATA_AXIS)


def make_mesh(num_runs: int, num_rows: int, run_devices: int | None = None, data_devices: int | None = None) -> Mesh:
    """The mesh with the axes ``run`` and ``data`` that uses the most devices; runs come first.

    Args:
      num_runs: runs of the program.
      num_rows: rows that are shared evenly, of each run.
      run_devices, data_devices: sizes of the axes, if they are not to be chosen.

    Raises:
      ConfigError: the runs or rows cannot be shared evenly by that many devices, or they are not there.
    """
    devices = targets.devices()
    allowed_runs = [n for n in range(1, len(devices) + 1) if num_runs % n == 0]
    if run_devices is not None:
        allowed = f"one of {allowed_runs} ({num_runs} runs, {len(devices)} devices)"
        require(run_devices in allowed_runs, "run_devices", run_devices, allowed)
        allowed_runs = [run_devices]
    at_most = len(devices) // min(allowed_runs)
    allowed_rows = [n for n in range(1, at_most + 1) if num_rows % n == 0]
    if data_devices is not None:
        allowed = f"one of {allowed_rows} ({num_rows} rows to share, {at_most} devices)"
        require(data_devices in allowed_rows, "data_devices", data_devices, allowed)
        allowed_rows = [data_devices]
    shapes = [(runs, rows) for runs in allowed_runs for rows in allowed_rows if runs * rows <= len(devices)]
    processes = sorted({device.process_index for device in devices})
    fitting = [shape for shape in shapes if shape[0] * shape[1] % len(processes) == 0]
    shared = f"one that evenly shares {num_runs} runs, or {num_rows} rows of each, or both"
    require(len(fitting) >= 1, "number of processes", len(processes), shared)
    shape = max(fitting, key=lambda shape: (shape[0] * shape[1], shape[0]))
    of_each = shape[0] * shape[1] // len(processes)
    chosen = [own for process in processes for own in [d for d in devices if d.process_index == process][:of_each]]
    return Mesh(np.array(chosen).reshape(shape), (RUN_AXIS, DATA_AXIS))


def idle(mesh: Mesh, shared: str) -> str:
    """What to tell somebody who pays for accelerators that do not all compute; "" where they do.

    Args:
      shared: what they share, in words.
    """
    devices = targets.devices()
    if mesh.size == len(devices) or targets.platform() == "cpu":
        return ""
    return f"{mesh.size} of {len(devices)} devices compute: {shared} are shared evenly by no more of them"


def filled_up(rows: Any) -> Any:
    """The same arrays, with several processes some rows again behind the last, so that every device has as many.

    So every process can take part in what is computed of any number of rows; the results of the rest are dropped.
    """
    if not targets.several_processes():
        return rows
    count, devices = jax.tree.leaves(rows)[0].shape[0], len(targets.devices())
    index = np.arange(-(-count // devices) * devices) % count
    return jax.tree.map(lambda x: x[index], rows)


def put(tree: Any, shardings: Any) -> Any:
    """``jax.device_put``, also onto a mesh of several processes: of what each has whole, or of global arrays.

    While programs are only compiled it gives the arrays' shapes there.
    """
    if targets.only_compiling():
        return placed(tree, jax.tree.broadcast(shardings, tree))
    if not hosts.several():
        return jax.device_put(tree, shardings)
    return jax.tree.map(_put, tree, jax.tree.broadcast(shardings, tree))


def placed(shapes: Any, shardings: Any) -> Any:
    """The shapes of arrays with where they are to be."""

    def one(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(x.dtype) if isinstance(x, np.ndarray) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)


def planned_state(
    create: Callable[..., Any], arguments: tuple[Any, ...], mesh: Mesh, split: bool, *leading: str
) -> tuple[Any, targets.Call]:
    """The shapes of the train state ``create(*arguments)`` on the mesh, and what makes it there.

    ``split`` and ``leading`` are those of ``state_shardings``.
    """
    shapes = jax.eval_shape(create, *arguments)
    shardings = state_shardings(mesh, shapes, split, *leading)
    return placed(shapes, shardings), targets.Call(jax.jit(create, out_shardings=shardings), mesh, arguments)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if x.sharding.device_set == sharding.device_set:
            return jax.device_put(x, sharding)
        x = to_host(x)
    return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)


def to_host(tree: Any) -> Any:
    """NumPy arrays of the whole values on every process; all must call it."""
    if hosts.several():
        replicated = jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, ALL), tree)
        tree = jax.jit(_same, out_shardings=replicated)(tree)
    return jax.tree.map(np.asarray, tree)


def _same(tree: Any) -> Any:
    return tree


def by_run(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a leading axis of runs."""
    return NamedSharding(mesh, BY_RUN)


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device has whole."""
    return NamedSharding(mesh, ALL)


def state_shardings(mesh: Mesh, state: Any, split: bool, *leading: str) -> Any:
    """The shardings of a train state whose leading axes are ``leading``.

    Args:
      split: each array over the devices of the axis ``data``, by its largest axis that they share evenly, as in fully
        sharded data parallelism; else every one of them has it whole.
    """
    num_data = mesh.shape[DATA_AXIS] if split else 1
    return jax.tree.map(lambda x: NamedSharding(mesh, _state_spec(x.shape, num_data, *leading)), state)


def _state_spec(shape: tuple[int, ...], num_data: int, *leading: str) -> PartitionSpec:
    free = range(len(leading), len(shape))
    fitting = [axis for axis in free if num_data > 1 and shape[axis] % num_data == 0]
    if not fitting:
        return PartitionSpec(*leading)
    largest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*leading, *(DATA_AXIS if axis == largest else None for axis in free))


def num_shares() -> int:
    """Devices that share the rows in the program that is being traced; 1 outside of any mesh and in ``over_rows``."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if DATA_AXIS in mesh.manual_axes else dict(mesh.shape).get(DATA_AXIS, 1)


def share_rows(batch: Any) -> Any:
    """Inside a program: the same arrays, their leading axis divided over ``data``."""
    return _constrain(batch, lambda x: BY_ROW)


def split_state(state: Any) -> Any:
    """Inside a program: the same arrays as ``state_shardings`` with ``split`` has them."""
    return _constrain(state, lambda x: _state_spec(x.shape, num_shares()))


def gathered(tree: Any) -> Any:
    """Inside a program: the same arrays, whole on every device.

    A step on split parameters wants it of them and of their gradients. Else XLA divides the products that make the
    gradients too, and computes parts of them twice.
    """
    return _constrain(tree, lambda x: ALL)


def _constrain(tree: Any, spec: Callable[[jax.Array], PartitionSpec]) -> Any:
    if num_shares() == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec(x)), tree)


def over_rows(call: Callable[[Any, Any], Any], whole: Any, rows: Any, *, total: bool = False) -> Any:
    """``call(whole, rows)`` with each device on its own rows, without waiting for others.

    Args:
      whole: what every device needs whole.
      rows: arrays with a leading axis that the devices of ``data`` share evenly.
      total: the results are sums over rows and are added up; else they have the rows' leading axis.
    """
    if num_shares() == 1:
        return call(whole, rows)

    def on_device(whole, rows):
        found = call(whole, rows)
        return jax.lax.psum(found, DATA_AXIS) if total else found

    specs = (ALL, BY_ROW)
    out = ALL if total else BY_ROW
    return jax.shard_map(on_device, in_specs=specs, out_specs=out, axis_names={DATA_AXIS}, check_vma=False)(whole, rows)


def by_device(kernel: Callable[..., jax.Array], *rows: jax.Array) -> jax.Array:
    """``kernel(*rows)`` with each device on its own rows, also where it is one: XLA must not divide a kernel.

    Rows that the devices do not share evenly are computed by each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    if not axes:
        return kernel(*rows)
    spec = BY_ROW if DATA_AXIS in axes and rows[0].shape[0] % num_shares() == 0 else ALL
    shared = jax.shard_map(kernel, in_specs=(spec,) * len(rows), out_specs=spec, axis_names=axes, check_vma=False)
    return cast(jax.Array, shared(*rows))


def over_runs(mesh: Mesh, call: Callable[..., Any], whole: Any, *of_runs: Any) -> Any:
    """``call(whole, *of_runs)`` with each device on its own runs, the arrays' leading axis."""
    specs = (ALL, *[BY_RUN] * len(of_runs))
    mapped = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=BY_RUN, axis_names={RUN_AXIS}, check_vma=False)
    return mapped(whole, *of_runs)


def map_runs(runs_at_once: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """Applies ``run(axis_name, *of_one_run)`` to arguments with a leading axis of runs.

    The runs are vmapped in equal groups of at most ``runs_at_once``, group after group. Groups of one are not vmapped
    at all (``axis_name`` is None): on CPU a batch axis of 1 makes decoding four times slower.
    """
    num_runs = jax.tree.leaves(arguments)[0].shape[0]
    group = largest_divisor(num_runs, at_most=runs_at_once)
    if group == 1:
        return jax.lax.map(lambda of_one_run: run(None, *of_one_run), arguments)
    grouped = jax.tree.map(lambda x: x.reshape(num_runs // group, group, *x.shape[1:]), arguments)
    vmapped = jax.vmap(functools.partial(run, RUNS), axis_name=RUNS)
    results = jax.lax.map(lambda of_group: vmapped(*of_group), grouped)
    return jax.tree.map(lambda x: x.reshape(num_runs, *x.shape[2:]), results)


def largest_divisor(count: int, at_most: int) -> int:
    """The largest divisor of ``count`` that is not above ``at_most`` (1 or more)."""
    return next(divisor for divisor in range(min(at_most, count), 0, -1) if count % divisor == 0)
