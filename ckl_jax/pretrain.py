"""Next-character pre-training (paper, section 3.2; Lee et al. 2024).

    python -m ckl_jax.pretrain --scale tiny --out runs/tiny
    python -m ckl_jax.pretrain --task subtraction --out runs/tiny_subtraction

An interrupted run goes on from its last checkpoint with the same command and ends with the same numbers. Fields that
change the speed alone may be others then.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from ckl_jax.checkpoint import reading
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import PretrainConfig
from ckl_jax.datasets.stream import (
    TokenStream,
    Windows,
    dataset_directory,
    load_stream,
    sample_documents,
    sample_stream,
)
from ckl_jax.evaluate import judge
from ckl_jax.fields import require_fields
from ckl_jax.losses import masked_mean
from ckl_jax.model import EMBEDDING_STDDEV, GPT2, forward
from ckl_jax.presets import pretrain_preset
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runs.progress import Status, display
from ckl_jax.runtime import cli, finite, preemption, sharding
from ckl_jax.runtime.paths import require_directory
from ckl_jax.tasks.catalog import TaskName, task_named


class PretrainState(NamedTuple):
    """Everything that a run needs to go on: the step, the parameters, the optimizer's state, and the average.

    ``average`` is the exponential moving average of the parameters, or None where none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None

    @property
    def tested(self) -> Any:
        """The parameters that are tested and saved."""
        return self.params if self.average is None else self.average


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon under a linear warm-up and a cosine decay, after clipping the global norm."""
    peak, final = config.learning_rate, config.final_learning_rate * config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, config.num_steps, final)
    decays = functools.partial(jax.tree.map, lambda p: p.ndim >= 2)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b2=config.adam_beta2, weight_decay=config.weight_decay, mask=decays)
    else:
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.adam_beta2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _muon_dimensions(params: Any) -> Any:
    """Muon for the layers' matrices; embeddings, biases and norms get AdamW."""

    def dimensions(path, leaf):
        in_layer = leaf.ndim == 2 and any(str(getattr(key, "key", "")).startswith("h_") for key in path)
        return optax.contrib.MuonDimensionNumbers() if in_layer else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def init_params(config: PretrainConfig) -> Any:
    """Random parameters from the config's seed; the positions' embeddings as ``position_init`` says."""
    params = GPT2(config.model).init(jax.random.key(config.seed), jnp.zeros((1, 2), jnp.int32))
    if config.position_init == "normal":
        return params
    rows = sinusoids(config.model.block_size, config.model.width)
    return {"params": {**params["params"], "wpe": {"embedding": EMBEDDING_STDDEV * rows}}}


def sinusoids(positions: int, width: int) -> jax.Array:
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi, of mean square 1 (Vaswani et al. 2017, section 3.5).

    Returns: float32 [positions, width], the sines first.
    """
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.outer(jnp.arange(positions), frequencies)
    return 2**0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[:, :width]


def init_state(config: PretrainConfig) -> PretrainState:
    """The state before the first step; call it under jit."""
    params = init_params(config)
    average = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    return PretrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), average)


def _averaged(config: PretrainConfig, state: PretrainState, params: Any) -> Any:
    """The moving average with the parameters of one more step; it forgets the first ones early."""
    if state.average is None:
        return None
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    return optax.incremental_update(params, state.average, 1 - decay)


def next_token_loss(config: PretrainConfig, params: Any, windows: Windows, dropout_key: jax.Array) -> jax.Array:
    """Mean of -log p(next character) over the unmasked positions, in nats."""
    logits_BxTxV = forward(
        config.model,
        params,
        windows.inputs_BxT,
        windows.positions_BxT,
        windows.segments_BxT,
        deterministic=config.model.dropout == 0,
        rngs={"dropout": dropout_key},
    ).logits_BxTxV
    logits_BxTxV = jnp.where(windows.mask_BxT[..., None], logits_BxTxV, 0.0)
    losses_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, windows.targets_BxT)
    return masked_mean(losses_BxT, windows.mask_BxT)


def window_length(config: PretrainConfig) -> int:
    """Characters a window predicts: the block (`stream`) or the longest document (`documents`)."""
    if config.packing == "stream":
        return config.model.block_size
    return task_named(config.task).longest_episode(config.max_digits, extra=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(config: PretrainConfig, state: PretrainState, stream: TokenStream) -> tuple[PretrainState, dict]:
    """One update. The batch is a function of (seed, step) alone, so a resumed run sees the same ones."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    sample_key, dropout_key = jax.random.split(key)
    window = window_length(config)
    if config.packing == "stream":
        windows = sample_stream(stream, sample_key, config.batch_size, window)
    else:
        windows = sample_documents(
            stream, sample_key, config.batch_size, window, config.model.block_size, config.start_share
        )
    windows = sharding.share_rows(windows)
    loss, grads = jax.value_and_grad(functools.partial(next_token_loss, config), argnums=0)(
        state.params, windows, dropout_key
    )
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = PretrainState(state.step + 1, params, opt_state, _averaged(config, state, params))
    if config.shard_state:
        state = sharding.split_state(state)
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def make_mesh(config: PretrainConfig) -> Mesh:
    """Devices for a batch; raises ConfigError like ``sharding.make_mesh``."""
    return sharding.make_mesh(1, config.batch_size, data_devices=config.data_devices)


@preemption.deferred()
def pretrain(
    config: PretrainConfig,
    directory: RunDirectory,
    data_dir: pathlib.Path | None = None,
    progress: Callable[[str], None] = print,
) -> Model:
    """Trains to the last step, with checkpoints on the way, and saves the model into the run's directory.

    Raises:
      PreemptedError: SIGTERM came, and the steps so far are saved.
      NotFiniteError: a loss or parameter is not finite; nothing since the last checkpoint is logged or saved.
      OSError: a file cannot be written. All three leave what was saved before.
    """
    run, task = f"seed {config.seed}", task_named(config.task)
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir, task=config.task)
    mesh = make_mesh(config)
    stream = sharding.put(stream, sharding.everywhere(mesh))
    create = functools.partial(init_state, config)
    abstract = jax.eval_shape(create)
    shardings = sharding.state_shardings(mesh, abstract, config.shard_state)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    restored = directory.checkpoints.restore_latest(abstract)
    done, state = restored or (0, jax.jit(create, out_shardings=shardings)())
    history = [jax.tree.map(np.float32, metrics) for metrics in directory.checkpoints.restore_history(done) or []]
    logged = done - len(history)
    directory.rewind_metrics(done, logged or None)
    start, first, stopping = time.monotonic(), done, False
    with reading.damaged(directory.metrics_path, "out"):
        reached = any(_reaches_target(config, record) for record in directory.metrics())
    while done < config.num_steps and not stopping and not reached:
        end = min(logged + config.checkpoint_every, config.num_steps)
        with jax.set_mesh(mesh):
            while done < end and not stopping:
                state, metrics = train_step(config, state, stream)
                history.append(metrics)
                done += 1
                stopping = preemption.requested(done)
        history = jax.device_get(history)
        values = {name: np.array([metrics[name] for metrics in history]) for name in history[0]}
        finite.require_metrics("step", logged, [run], jax.tree.map(lambda x: x[None], values))
        finite.require_state("step", done, [run], state, by_run=False)
        if done < end:
            directory.checkpoints.save(done, state, jax.tree.map(float, history))
            continue
        logged, history = done, []
        record: dict[str, Any] = {"step": done, **{name: float(np.mean(x)) for name, x in values.items()}}
        model = Model(config.model, config.max_digits, state.tested, task)
        for digits in (config.max_digits, config.max_digits + 1):
            rng = np.random.default_rng([config.seed, digits])
            problems = task.varying_problems(rng, config.eval_problems, digits)
            record[f"accuracy_varying_{digits}"] = float(judge(model, problems, digits).mean())
        reached = _reaches_target(config, record)
        directory.log([record])
        directory.checkpoints.save(done, state)
        elapsed = time.monotonic() - start
        left = elapsed / (done - first) * (config.num_steps - done)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        line = f"step {done}/{config.num_steps}: {shown} ({elapsed:.0f} s, {left:.0f} s left)"
        progress(Status(line, done, config.num_steps, shown, left))
    if stopping:
        raise preemption.PreemptedError(f"step {done}/{config.num_steps} is saved in {directory.path}")
    model = Model(config.model, config.max_digits, state.tested, task)
    save_model(directory.path, model, {"command": "python -m ckl_jax.pretrain", "config": dataclasses.asdict(config)})
    return model


def _reaches_target(config: PretrainConfig, record: dict[str, Any]) -> bool:
    accuracy = record[f"accuracy_varying_{config.max_digits}"]
    return config.target_accuracy is not None and accuracy >= config.target_accuracy


@dataclass(frozen=True)
class PretrainCommand:
    """Next-character pre-training on scratchpads of a task."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    out: pathlib.Path = pathlib.Path("runs/pretrained")
    """Directory of the run: new, empty, or of the same command interrupted."""
    data_dir: pathlib.Path | None = None
    """Where TFDS keeps the dataset; default: TFDS's own default directory."""
    logs: Annotated[LogOptions, tyro.conf.arg(name="")] = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        require_fields(self)
        if self.data_dir is not None:
            require_directory(self.data_dir, "data_dir", may_be_read_only=True)


def preset(scale: str = "tiny", task: TaskName = "addition") -> PretrainCommand:
    return PretrainCommand(pretrain_preset(scale, task))


def main(command: PretrainCommand) -> None:
    dataset_directory(command.data_dir)  # Refuses here what would be refused after the run's directory is made.
    config = {"command": "pretrain", **dataclasses.asdict(command.config)}
    with (
        contextlib.closing(RunDirectory(command.out, config, command.logs)) as directory,
        display(command.logs.quiet) as progress,
    ):
        model = pretrain(command.config, directory, command.data_dir, progress)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"saved: {directory.path} ({parameters:,} parameters)")


if __name__ == "__main__":
    cli.run(main, PretrainCommand, preset)
