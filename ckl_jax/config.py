"""Every number of a model, its pre-training and its fine-tuning: frozen dataclasses and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ckl_jax import tasks
from ckl_jax.advantages import AdvantageShaping
from ckl_jax.certainty import CertaintyKind
from ckl_jax.errors import require, require_choice, require_number, require_types
from ckl_jax.resuming import end, speed
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.catalog import TASKS, TaskName, task_named
from ckl_jax.token_weights import KLWeights

Scale = Literal["tiny", "small", "gpt2"]
Recipe = Literal["ours", "paper", "authors"]
Algorithm = Literal["a2c", "reinforce", "ppo", "grpo", "rloo"]
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
        longest = task_named(self.task).longest_episode(tested)
        require(
            self.model.block_size >= longest,
            "model.block_size",
            self.model.block_size,
            f"at least {longest}, the longest episode of the tests on max_digits + 1 = {tested}",
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """RL fine-tuning of a pre-trained model on operands of `extra_digits` more digits (paper, section 5)."""

    scale: Scale = "tiny"
    """Preset of the budget that the other fields start from; the model comes from the checkpoint."""
    recipe: Recipe = "ours"
    """`ours`: what learns well here: lambda 1, advantages normalized over the round, minibatches of whole episodes, the
    exact KL. `paper`: what the paper states for section 5.3, else what the authors' code does. `authors`: their code's
    settings, which differ in reward, certainty and entropy coefficient. Both were made for the 85M model."""
    seed: int = 0
    """First seed; run k of an experiment has seed + k."""
    extra_digits: int = 1
    """Target length beyond the pre-training length N: N + 1 or N + 2 digits."""
    rounds: int = end(14, unless="learning_rate_decay")
    """Collect-update rounds. Without learning_rate_decay a run may go on to more of them."""
    episodes: int = 128
    """Episodes collected per round."""
    algorithm: Algorithm = "a2c"
    """Advantage and policy loss. `a2c`: GAE with a critic, advantage times log-probability. `ppo`: the same advantage,
    clipped ratio. Without critic: `reinforce`, reward minus the mean of the round's other episodes; `rloo`, minus that
    of the other answers to the same problem; `grpo`, standardized over the answers to it, clipped ratio."""
    group_size: int = 1
    """Answers to each problem, so a round has episodes / group_size problems; divides `episodes`. rloo and grpo need at
    least 2."""
    clip: float = 0.2
    """ppo and grpo: the ratio of new to old probability counts up to 1 +- clip. No effect on the others."""
    minibatch: Literal["episodes", "transitions"] = "episodes"
    """What an Adam step averages over: whole episodes (4 to 50 steps a round), or single characters shuffled over the
    round's episodes (the authors' way: thousands of steps a round, so it wants a far smaller learning rate)."""
    minibatch_episodes: int = 16
    """Whole episodes per Adam step; divides `episodes`. No effect with minibatch transitions."""
    minibatch_transitions: int = 8
    """Single transitions per Adam step; the last step of an epoch takes what is left. No effect with minibatch
    episodes."""
    epochs: int = 1
    """Passes over a round's episodes."""
    extra_length: int = 100
    """Characters that an answer may be longer than the longest right one."""
    temperature: float = 1.0
    """Of sampling, log-probs, entropy and reference log-probs in training."""
    test_temperature: float = 1.0
    """Of sampling in tests."""
    learning_rate: float = 3e-4
    """Adam's, for the policy (the trunk included)."""
    learning_rate_decay: bool = True
    """Linear decay of the policy's learning rate, from its full value in the first round towards 0 after the last."""
    value_learning_rate: float = 1e-2
    """Adam's, for the value head, which starts at random."""
    value_warmup_rounds: int = 0
    """First rounds in which only the value head learns; Adam's statistics of the policy warm up meanwhile. 0 for
    algorithms without critic."""
    adam_epsilon: float = 1e-8
    discount: float = 1.0
    gae_lambda: float = 1.0
    normalize_advantages: bool = True
    """Subtract the round's mean and divide by its standard deviation; a round of equal rewards then has advantage 0.
    No effect with grpo, which standardizes within its groups, and gtpo."""
    advantage_shaping: AdvantageShaping = "none"
    """What the policy's entropy H at a token does to its advantage A. `top_entropy`: A where H is among the round's top
    `entropy_quantile`, else 0 (80/20, arXiv 2506.01939). `entropy_bonus`: A + min(entropy_scale * H, abs(A) /
    entropy_kappa) (arXiv 2506.14758). `gtpo`: the reward shared out by H among the answers to a problem, then
    standardized (arXiv 2508.04349); grpo and rloo alone."""
    entropy_quantile: float = 0.2
    """Share of tokens that top_entropy keeps."""
    entropy_scale: float = 0.4
    entropy_kappa: float = 2.0
    gtpo_share: float = 0.5
    """Share of the reward that gtpo deals out by entropy."""
    reward_right: float = 1.0
    reward_wrong: float = 0.0
    value_coefficient: float = 0.1
    detach_critic: bool = False
    """Keep the value loss's gradient out of the trunk."""
    entropy_coefficient: float = 0.0005
    kl_coefficient: float = 5.0
    """alpha, on the mean over tokens of J^beta * KL (the paper: 5 with the prioritized KL, 10 in section 5.2)."""
    kl: Literal["k1", "k2", "k3", "exact"] = "exact"
    """KL to the pre-trained model per token: over the whole vocabulary, or Schulman's estimates on the sampled tokens
    (the paper's is k2). In a loss without ratio k1 has no gradient in expectation; ppo and grpo multiply estimates by
    the ratio, so that with data used again all three have the gradient of KL(policy || reference)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`reward`: every token's advantage loses alpha * the weighted k1 of itself and of all after it; needs kl k1."""
    kl_target: float | None = None
    """Exact KL per token in nats that alpha is adapted to after every round (Ziegler et al. 2019); default: a fixed
    alpha. What is compared with it is the metric `kl`, that of the policy to the reference on the round's tokens before
    its updates, without weights."""
    kl_gain: float = 0.1
    """How fast: alpha is multiplied by 1 + kl_gain * (KL / kl_target - 1), the bracket clipped to +-0.2."""
    kl_cov: float = 0.0
    """Coefficient of KL-Cov: abs(log ratio to the policy of the rollout) on the round's tokens with the greatest
    covariance of advantage and log-probability, if above 0 (arXiv 2505.22617); 0: none."""
    kl_cov_share: float = 0.002
    """Share of the round's tokens that KL-Cov holds."""
    beta: float = 150.0
    """Exponent of the certainty J; 0 is the standard KL penalty."""
    kl_weights: KLWeights = "prioritized"
    """Weight of every token's KL. `prioritized`: J^beta. Its controls: `uniform` (1: the standard KL), `matched` (the
    round's mean of J^beta), `shuffled` (J^beta permuted over the round's tokens), `renormalized` (J^beta divided by its
    mean). By the reference's entropy: `threshold` (1 on the round's tokens of low entropy, else 0; arXiv 2512.04359),
    `archer` (1 on each episode's tokens of low entropy, else `kl_weak`; arXiv 2507.15778)."""
    kl_quantile: float = 0.8
    """Share of tokens whose entropy counts as low. No effect but with kl_weights threshold and archer."""
    kl_weak: float = 0.1
    """Weight of the tokens of high entropy with kl_weights archer (in that work's published settings 0)."""
    certainty: CertaintyKind = "negentropy"
    certainty_temperature: float = 1.0
    """Temperature of the reference's distribution inside J."""
    test_every: int = 7
    """Rounds between tests and checkpoints; divides `rounds`."""
    test_problems: int = 100
    """Problems of each test within the learning curve (the same for all runs)."""
    final_problems: int = 1000
    """Problems of the tests before the first and after the last round."""
    old_problems: int = 200
    """Problems of the old lengths in every test, at most as many as of the target length."""
    diagnostic_episodes: int = 4
    """Episodes of each round on which the gradient norm of each loss term is measured."""
    rollout: Literal["auto", "speculative", "plain"] = speed("auto")
    """How episodes are generated: the policy verifies drafts that the task writes, or decodes step by step, or the
    first unless the task has none or it turns out too slow. The same characters, up to rounding, at another speed."""
    rollout_batch: int = speed(128)
    """Episodes generated together, at most; it changes the speed alone."""
    transition_batch: int = speed(8)
    """Transitions of a minibatch computed together, at most; short prefixes come first and each group is padded to its
    own length. It changes the speed alone."""
    data_devices: int | None = speed(None)
    """Devices that share a run's episodes and minibatches; default: what runs side by side leave idle."""
    shard_state: bool = speed(False)
    """Split parameters and optimizer state over those devices too (fully sharded data parallelism)."""
    runs_at_once: int = speed(1)
    """Runs (arms x seeds) computed side by side by vmap, at most; equal groups are done one after another."""

    def __post_init__(self) -> None:
        require_types(self)
        require_choice(self, "scale", ("tiny", "small", "gpt2"))
        require_choice(self, "recipe", get_args(Recipe))
        require_choice(self, "algorithm", get_args(Algorithm))
        require_choice(self, "advantage_shaping", get_args(AdvantageShaping))
        require_choice(self, "kl_in", ("loss", "reward"))
        require_choice(self, "rollout", ("auto", "speculative", "plain"))
        require_choice(self, "minibatch", ("episodes", "transitions"))
        require_choice(self, "kl", ("k1", "k2", "k3", "exact"))
        require_choice(self, "certainty", ("negentropy", "negentropy_max_prob", "max_prob"))
        require_choice(self, "kl_weights", get_args(KLWeights))
        require_number(
            self, "seed extra_length value_warmup_rounds value_coefficient entropy_coefficient kl_coefficient beta", 0
        )
        require_number(self, "reward_right reward_wrong", -1e6, high=1e6)
        require_number(self, "rounds episodes epochs test_every test_problems", 1)
        require_number(self, "minibatch_episodes minibatch_transitions", 1)
        require_number(self, "final_problems old_problems rollout_batch transition_batch runs_at_once", 1)
        require(self.data_devices is None or self.data_devices >= 1, "data_devices", self.data_devices, "at least 1")
        require_number(self, "temperature test_temperature certainty_temperature", 0, exclusive=True)
        require_number(self, "learning_rate value_learning_rate adam_epsilon", 0, exclusive=True)
        require_number(self, "clip entropy_kappa", 0, exclusive=True)
        require_number(self, "entropy_scale kl_gain kl_cov", 0)
        require_number(self, "discount gae_lambda kl_weak gtpo_share", 0, high=1)
        require_number(self, "kl_quantile entropy_quantile kl_cov_share", 0, exclusive=True, high=1)
        require_number(self, "extra_digits", 1, high=2)
        require_number(self, "diagnostic_episodes", 1, high=self.episodes)
        divides = self.minibatch == "transitions" or self.episodes % self.minibatch_episodes == 0
        require(divides, "minibatch_episodes", self.minibatch_episodes, f"a divisor of episodes = {self.episodes}")
        require(
            self.rounds % self.test_every == 0, "test_every", self.test_every, f"a divisor of rounds = {self.rounds}"
        )
        self._require_combination()

    def _require_combination(self) -> None:
        grouped = self.algorithm in ("rloo", "grpo")
        require_number(self, "group_size", 2 if grouped else 1)
        whole = self.episodes % self.group_size == 0
        require(whole, "group_size", self.group_size, f"a divisor of episodes = {self.episodes}")
        shaped = grouped or self.advantage_shaping != "gtpo"
        require(shaped, "advantage_shaping", self.advantage_shaping, "with algorithm grpo or rloo alone")
        no_critic = f"with algorithm {self.algorithm}, which has no critic"
        require(
            self.has_critic or self.value_warmup_rounds == 0,
            "value_warmup_rounds",
            self.value_warmup_rounds,
            f"0 {no_critic}",
        )
        require(self.has_critic or self.discount == 1, "discount", self.discount, f"1 {no_critic}")
        require(self.kl_in == "loss" or self.kl == "k1", "kl", self.kl, "k1 with kl_in reward")
        if self.kl_target is not None:
            require_number(self, "kl_target", 0, exclusive=True)
            positive = self.kl_coefficient > 0
            require(positive, "kl_coefficient", self.kl_coefficient, "above 0 with a kl_target, which multiplies it")

    @property
    def has_critic(self) -> bool:
        return self.algorithm in ("a2c", "ppo")

    @property
    def has_ratio(self) -> bool:
        """The losses are corrected for how much more likely the policy makes a token than when it was sampled."""
        return self.algorithm in ("ppo", "grpo")
