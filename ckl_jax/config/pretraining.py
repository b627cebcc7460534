"""Pre-training, chapter by chapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ckl_jax import tasks
from ckl_jax.config.shape import ModelConfig, require_vocabulary
from ckl_jax.errors import require
from ckl_jax.fields import (
    Above,
    AtLeast,
    Chapter,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
    require_fields,
)
from ckl_jax.resuming import end, speed
from ckl_jax.tasks.catalog import TaskName, task_named

Scale = Literal["tiny", "ladder", "small", "gpt2"]
MOST_CHARACTERS = 2**31 - 1  # Places in the text are int32.


@dataclass(frozen=True)
class Data(Chapter):
    """What is learned, and from how much of it."""

    scale: Scale = "tiny"
    """Preset that the other fields start from."""
    task: TaskName = "addition"
    """What the scratchpads calculate."""
    seed: NonNegativeInt = 0
    """Of the first parameters, the dataset (each seed prepares its own), the windows drawn, dropout and the tests."""
    max_digits: Annotated[int, AtLeast(1, tasks.MAX_DIGITS - 1)] = 7
    """N: operand lengths are balanced over 1..N, as far as the task allows."""
    num_documents: PositiveInt = 100_000
    """Training problems in the dataset, at least max_digits^2 (the test split has a twentieth)."""
    packing: Literal["stream", "documents"] = "stream"
    """`stream`: windows of block_size start anywhere in the concatenated documents and attention crosses documents
    (Lee et al.). `documents`: windows of the longest document's length start with a document, at a random position of
    the block, and attention stays inside documents: several times cheaper per learned character."""
    start_share: Share = 0.0
    """Share of the windows of `documents` that are at position 0, where every answer is asked for. At random positions
    alone the first ones are the least trained of all."""


@dataclass(frozen=True)
class Optimizer(Chapter):
    """Steps and their size."""

    batch_size: PositiveInt = 40
    """Windows per step."""
    num_steps: PositiveInt = end(20_000, unless="learning_rate")
    """Steps, more than warmup_steps."""
    warmup_steps: NonNegativeInt = 100
    """First steps, in which the learning rate rises from 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the layers, AdamW for the rest (optax.contrib.muon)."""
    learning_rate: PositiveFloat = 1e-3
    """Peak, after a linear warm-up and before a cosine decay."""
    final_learning_rate: Share = 0.1
    """At the last step, as a share of the peak."""
    adam_beta2: Annotated[float, Above(0, 0.9999)] = 0.99
    """Decay of the mean of squared gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices and embeddings with adamw, of the layers' matrices alone with muon; biases and norms have none."""
    clip_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    position_init: Literal["normal", "sinusoidal"] = "normal"
    """First embeddings of the positions: random as in GPT-2, or sines and cosines (Vaswani et al.) of the same size,
    which say from the start how far two characters are apart; both are learned from there."""
    ema_decay: Annotated[float, AtLeast(0, 0.99999)] = 0.0
    """Decay of the exponential moving average of the parameters that is tested and saved; 0: the last parameters."""


@dataclass(frozen=True)
class Testing(Chapter):
    """Greedy evaluations on the way."""

    checkpoint_every: PositiveInt = 1_000
    """Steps between checkpoints, metric lines and greedy evaluations."""
    eval_problems: PositiveInt = 100
    """Problems per cell of the evaluations on the way."""
    target_accuracy: PositiveShare | None = None
    """End before `num_steps`, at the first checkpoint whose greedy accuracy on operands of up to `max_digits` digits is
    this; the learning rate still decays as for `num_steps`."""


@dataclass(frozen=True)
class Speed(Chapter):
    """They change the speed alone."""

    data_devices: PositiveInt | None = speed(None)
    """Devices that share a batch, each a part of it; default: as many as there are and share it evenly."""
    microbatches: PositiveInt = speed(1)
    """Equal parts of a batch whose gradients are computed one after another: less memory. Dropout then draws other
    numbers."""
    shard_state: bool = speed(False)
    """Split parameters and optimizer state over those devices too (fully sharded data parallelism)."""


@dataclass(frozen=True)
class PretrainConfig(Speed, Testing, Optimizer, Data):  # In reverse: the fields of the last come first.
    """Next-character pre-training on scratchpads of operands of 1 to `max_digits` digits (paper, section 3.2)."""

    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require_fields(self)
        longer = f"above warmup_steps = {self.warmup_steps}, the rate decays after the warm-up"
        require(self.num_steps > self.warmup_steps, "num_steps", self.num_steps, longer)
        divides = self.batch_size % self.microbatches == 0
        require(divides, "microbatches", self.microbatches, f"a divisor of batch_size = {self.batch_size}")
        starts = "0 with packing = stream, whose windows are all at position 0"
        require(self.packing == "documents" or self.start_share == 0, "start_share", self.start_share, starts)
        fewest = self.max_digits**2
        require(self.num_documents >= fewest, "num_documents", self.num_documents, f"at least {fewest}")
        most = MOST_CHARACTERS // task_named(self.task).longest_episode(self.max_digits, extra=0)
        allowed = f"at most {most}: up to {MOST_CHARACTERS} characters"
        require(self.num_documents <= most, "num_documents", self.num_documents, allowed)
        require_vocabulary(self.model.vocab_size, "model.vocab_size")
        tested = self.max_digits + 1
        longest = task_named(self.task).longest_episode(tested)
        fits = f"at least {longest}, the longest episode of the tests on max_digits + 1 = {tested}"
        require(self.model.block_size >= longest, "model.block_size", self.model.block_size, fits)
