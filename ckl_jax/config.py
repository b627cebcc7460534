"""Every number of a model and its pre-training: frozen dataclasses, the named scales, and what they refuse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from ckl_jax import alphabet, tasks
from ckl_jax.columns import TASKS, TaskName, task_named
from ckl_jax.errors import ConfigError as ConfigError
from ckl_jax.errors import require, require_choice, require_number, require_types
from ckl_jax.resuming import end, speed

Scale = Literal["tiny", "small", "gpt2"]
MOST_LAYERS, MOST_WEIGHTS = 1_000, 10**10


@dataclass(frozen=True)
class ModelConfig:
    """GPT-2's shape."""

    num_layers: int = 12
    num_heads: int = 12
    width: int = 768
    block_size: int = 1024
    """Positions the model has; prompt + answer must fit."""
    vocab_size: int = alphabet.VOCAB_SIZE
    use_bias: bool = True
    """Biases in the dense layers and layer norms (Lee et al. pre-train without)."""
    activation: Literal["gelu_tanh", "gelu_erf"] = "gelu_tanh"
    """GELU of the MLP: by tanh as in GPT-2, or exact by the error function as in nanoGPT since June 2023."""
    dropout: float = 0.0
    """Dropout rate in pre-training; reinforcement learning and evaluation run without."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations; parameters, logits and losses are float32 always."""
    precision: Literal["default", "high", "highest"] = "highest"
    """Precision of the matrix products (TF32 and bfloat16 passes on accelerators below `highest`)."""
    attention_chunk: int = speed(256)
    """Queries per chunk of causal attention: each chunk reads the keys up to its own end only."""

    def __post_init__(self) -> None:
        require_types(self)
        require_number(self, "num_heads width block_size vocab_size attention_chunk", 1)
        require_number(self, "num_layers", 1, high=MOST_LAYERS)
        require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of num_heads = {self.num_heads}")
        require_choice(self, "activation", ("gelu_tanh", "gelu_erf"))
        require_number(self, "dropout", 0, high=0.99)
        require_choice(self, "dtype", ("float32", "bfloat16"))
        require_choice(self, "precision", ("default", "high", "highest"))
        few = self.num_weights <= MOST_WEIGHTS
        sizes = f"{self.num_weights:.3g} weights (num_layers, block_size and vocab_size count too)"
        require(few, "width", self.width, f"what makes at most {MOST_WEIGHTS:.0e} weights, not {sizes}")

    @property
    def num_weights(self) -> int:
        """Entries of the matrices, which are nearly all parameters."""
        return 12 * self.num_layers * self.width**2 + (self.vocab_size + self.block_size) * self.width


@dataclass(frozen=True)
class PretrainConfig:
    """Next-character pre-training on scratchpads of operands of 1 to `max_digits` digits (paper, section 3.2)."""

    scale: Scale = "tiny"
    """Preset that the other fields start from."""
    task: TaskName = "addition"
    """What the scratchpads calculate."""
    seed: int = 0
    max_digits: int = 7
    """N: operand lengths are balanced over 1..N."""
    num_documents: int = 100_000
    """Training problems in the dataset (the test split has a twentieth)."""
    packing: Literal["stream", "documents"] = "stream"
    """`stream`: windows of block_size start anywhere in the concatenated documents and attention crosses documents
    (Lee et al.). `documents`: windows of the longest document's length start with a document, at a random position of
    the block, and attention stays inside documents: several times cheaper per learned character."""
    batch_size: int = 40
    """Windows per step."""
    num_steps: int = end(20_000, unless="learning_rate")
    warmup_steps: int = 100
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the layers, AdamW for the rest (optax.contrib.muon)."""
    learning_rate: float = 1e-3
    """Peak of a linear warm-up and cosine decay to a tenth."""
    adam_beta2: float = 0.99
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Global gradient norm is clipped to this."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints, metric lines and greedy evaluations."""
    eval_problems: int = 100
    """Problems per cell of the evaluations on the way."""
    target_accuracy: float | None = None
    """End before `num_steps`, at the first checkpoint whose greedy accuracy on operands of up to `max_digits` digits is
    this; the learning rate still decays as for `num_steps`."""
    data_devices: int | None = speed(None)
    """Devices that share a batch, each a part of it; default: as many as there are and share it evenly."""
    shard_state: bool = speed(False)
    """Split parameters and optimizer state over those devices too (fully sharded data parallelism)."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require_types(self)
        require_choice(self, "scale", ("tiny", "small", "gpt2"))
        require_choice(self, "task", tuple(TASKS))
        require(isinstance(self.model, ModelConfig), "model", self.model, "a ModelConfig")
        require_number(self, "seed warmup_steps weight_decay", 0)
        require_number(self, "batch_size num_steps checkpoint_every eval_problems", 1)
        require(self.data_devices is None or self.data_devices >= 1, "data_devices", self.data_devices, "at least 1")
        longer = f"above warmup_steps = {self.warmup_steps}, the rate decays after the warm-up"
        require(self.num_steps > self.warmup_steps, "num_steps", self.num_steps, longer)
        require_number(self, "num_documents", self.max_digits**2)
        require_number(self, "max_digits", 1, high=tasks.MAX_DIGITS - 1)
        require_choice(self, "packing", ("stream", "documents"))
        require_choice(self, "optimizer", ("adamw", "muon"))
        require_number(self, "learning_rate adam_beta2 clip_norm", 0, exclusive=True)
        if self.target_accuracy is not None:
            require_number(self, "target_accuracy", 0, exclusive=True, high=1)
        require_number(self, "adam_beta2", 0, high=0.9999)
        tested = self.max_digits + 1
        task = task_named(self.task)
        longest = task.max_prompt_length(tested) + task.max_answer_length(tested)
        require(
            self.model.block_size >= longest,
            "model.block_size",
            self.model.block_size,
            f"at least {longest}, the longest episode of the tests on max_digits + 1 = {tested}",
        )


def pretrain_preset(scale: str, task: TaskName = "addition") -> PretrainConfig:
    """The pre-training of a named scale and task. Raises ValueError for another name."""
    presets = {
        "tiny": PretrainConfig(
            scale="tiny",
            max_digits=5,
            packing="documents",
            batch_size=16,
            num_steps=2_500,
            optimizer="muon",
            learning_rate=1e-2,
            weight_decay=0.05,
            checkpoint_every=500,
            model=ModelConfig(num_layers=3, num_heads=2, width=96, block_size=768, attention_chunk=208),
        ),
        "small": PretrainConfig(
            scale="small",
            packing="documents",
            batch_size=64,
            num_steps=10_000,
            optimizer="muon",
            learning_rate=2e-3,
            model=ModelConfig(num_layers=6, num_heads=6, width=384, block_size=1024),
        ),
        "gpt2": PretrainConfig(scale="gpt2", model=ModelConfig(use_bias=False, dropout=0.2)),
    }
    require(scale in tuple(presets), "scale", scale, " | ".join(presets))
    chosen = dataclasses.replace(presets[scale], task=task)
    # A times table takes longer to learn than sums.
    return dataclasses.replace(chosen, num_steps=4_000) if (scale, task) == ("tiny", "multiplication") else chosen
