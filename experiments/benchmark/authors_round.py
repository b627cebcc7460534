"""A round of RL the authors' way (github jvasso/llm-rl-arithmetic, on tianshou), plainly in PyTorch, timed in parts.

There is no KV cache and every character is a transition of its own: the policy passes over the whole prefix for each
character of 2 environments; the critic over the prefix of every state and every next state; and each Adam step on a
minibatch of single transitions passes policy, critic (the trunk again) and reference over their prefixes. A round is
far too slow to run whole, so ``time_round`` runs a stated share of it, with the real loss, and scales the seconds up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckl_jax.config import FinetuneConfig, ModelConfig
from ckl_jax.errors import require
from ckl_jax.rl.assessment import Episodes
from ckl_jax.tasks import alphabet
from experiments.benchmark.pytorch import GPT, device, functional, load_flax, nn, torch

VALUE_FEATURES = 128
TIMED_REPEATS = 3
MEMORY_BYTES = 4e9


class ValueMLP(nn.Module):
    """D -> 128 -> 128 -> 1 with ReLU, on hidden states [..., D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc_1 = nn.Linear(config.width, VALUE_FEATURES)
        self.fc_2 = nn.Linear(VALUE_FEATURES, VALUE_FEATURES)
        self.out = nn.Linear(VALUE_FEATURES, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out(functional.relu(self.fc_2(functional.relu(self.fc_1(hidden)))))[..., 0]


@dataclass(frozen=True)
class AuthorsRound:
    """The networks of a run: policy and critic share ``trunk``; ``reference`` is the frozen pre-trained model."""

    config: FinetuneConfig
    trunk: GPT
    critic: ValueMLP
    reference: GPT
    optimizer: torch.optim.Optimizer


def make_round(model: ModelConfig, config: FinetuneConfig, params: dict[str, Any], ref_params: Any) -> AuthorsRound:
    """Networks with the Flax parameters of a run (``params`` has ``policy`` and ``value``) and one Adam for both.

    Raises ConfigError for another KL than k2, or another certainty or other weights than the paper's.
    """
    require(config.kl == "k2", "kl", config.kl, "k2")
    require(config.certainty == "negentropy", "certainty", config.certainty, "negentropy")
    require(config.kl_weights == "prioritized", "kl_weights", config.kl_weights, "prioritized")
    trunk, reference = GPT.from_params(model, params["policy"]), GPT.from_params(model, ref_params)
    critic = ValueMLP(model)
    load_flax(critic, params["value"])
    critic.to(device())
    reference.requires_grad_(False)
    groups = [
        {"params": list(trunk.parameters()), "lr": config.learning_rate},
        {"params": list(critic.parameters()), "lr": config.value_learning_rate},
    ]
    return AuthorsRound(config, trunk, critic, reference, torch.optim.Adam(groups, eps=config.adam_epsilon))


@dataclass(frozen=True)
class Transitions:
    """A collect as N transitions: the state is ``texts[episode][:end]``, the action the character at ``end``.

    Attributes:
      texts: int64 tokens of each episode, prompt and answer, without padding.
      episode_N, end_N: which episode, and how many characters its state has.
      advantages_N, returns_N: float32.
    """

    texts: list[torch.Tensor]
    episode_N: np.ndarray
    end_N: np.ndarray
    advantages_N: torch.Tensor
    returns_N: torch.Tensor

    def prefixes(self, indices: np.ndarray, ahead: int = 0) -> list[torch.Tensor]:
        """States (``ahead=0``) or next states (1)."""
        return [self.texts[self.episode_N[i]][: self.end_N[i] + ahead] for i in indices]

    def actions(self, indices: np.ndarray) -> torch.Tensor:
        return torch.stack([self.texts[self.episode_N[i]][self.end_N[i]] for i in indices])


def to_transitions(episodes: Episodes) -> Transitions:
    """Our collect as transitions, with the advantages and returns that it computed."""
    tokens_BxL = np.asarray(episodes.trajectory.tokens_BxL).astype(np.int64)
    mask_BxT = np.asarray(episodes.trajectory.mask_BxT)
    num_prompt = tokens_BxL.shape[1] - mask_BxT.shape[1]
    padding_B = (np.asarray(episodes.trajectory.segments_BxL) == 0).sum(axis=1)
    episode_N, column_N = np.nonzero(mask_BxT)
    texts = [
        torch.tensor(tokens[padding : num_prompt + count], device=device())
        for tokens, padding, count in zip(tokens_BxL, padding_B, mask_BxT.sum(axis=1), strict=True)
    ]
    advantages, returns = (
        torch.tensor(np.asarray(x)[episode_N, column_N], device=device())
        for x in (episodes.advantages_BxT, episodes.returns_BxT)
    )
    return Transitions(texts, episode_N, num_prompt - padding_B[episode_N] + column_N, advantages, returns)


def last_outputs(model: GPT, prefixes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, V] and hidden states [B, D] after each prefix: one pass over all, padded to the longest."""
    padded_BxT = nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_value=alphabet.PAD_ID)
    logits_BxTxV, hidden_BxTxD = model(padded_BxT)
    rows = torch.arange(len(prefixes), device=padded_BxT.device)
    last_B = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=padded_BxT.device)
    return logits_BxTxV[rows, last_B], hidden_BxTxD[rows, last_B]


def next_characters(model: GPT, prefixes: list[torch.Tensor], temperature: float | None) -> list[int]:
    """A step of the rollout: one character per environment; ``temperature=None`` takes the likeliest."""
    with torch.no_grad():
        logits_BxV, _ = last_outputs(model, prefixes)
        if temperature is None:
            return logits_BxV.argmax(dim=1).tolist()
        return torch.distributions.Categorical(logits=logits_BxV / temperature).sample().tolist()


def state_values(networks: AuthorsRound, prefixes: list[torch.Tensor]) -> np.ndarray:
    """The critic's value after each prefix [B]."""
    with torch.no_grad():
        return networks.critic(last_outputs(networks.trunk, prefixes)[1]).cpu().numpy()


def update(networks: AuthorsRound, transitions: Transitions, indices: np.ndarray) -> float:
    """One Adam step on a minibatch of single transitions: A2C, value, entropy and the prioritized k2 KL; the loss."""
    config = networks.config
    prefixes, actions_N = transitions.prefixes(indices), transitions.actions(indices)
    log_p_NxV = functional.log_softmax(last_outputs(networks.trunk, prefixes)[0] / config.temperature, dim=1)
    log_probs_N = log_p_NxV.gather(1, actions_N[:, None])[:, 0]
    values_N = networks.critic(last_outputs(networks.trunk, prefixes)[1])
    with torch.no_grad():
        ref_logits_NxV = last_outputs(networks.reference, prefixes)[0]
        ref_log_p_NxV = functional.log_softmax(ref_logits_NxV / config.temperature, dim=1)
        ref_log_probs_N = ref_log_p_NxV.gather(1, actions_N[:, None])[:, 0]
        sure_NxV = functional.log_softmax(ref_logits_NxV / config.certainty_temperature, dim=1)
        entropy_N = -(sure_NxV.exp() * sure_NxV).sum(dim=1)
        certainty_N = (1 - entropy_N / np.log(sure_NxV.shape[1])).clamp(0, 1)
    policy = -(transitions.advantages_N[indices] * log_probs_N).mean()
    value = functional.mse_loss(values_N, transitions.returns_N[indices])
    entropy = -(log_p_NxV.exp() * log_p_NxV).sum(dim=1).mean()
    kl = (certainty_N**config.beta * 0.5 * (log_probs_N - ref_log_probs_N) ** 2).mean()
    loss = policy + config.value_coefficient * value - config.entropy_coefficient * entropy + config.kl_coefficient * kl
    networks.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    networks.optimizer.step()
    return loss.item()


def _seconds(call: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def _rollout_seconds(networks: AuthorsRound, transitions: Transitions, timed: int) -> tuple[float, int, int]:
    """Seconds and steps of the whole rollout, and how many steps were timed: some at each of several prefix lengths.

    Episodes of neighbouring lengths share the 2 environments, which wastes the least on padding and waiting.
    """
    longest = sorted(transitions.texts, key=len)[-2:]
    lengths = np.unique(np.linspace(transitions.end_N.min(), transitions.end_N.max(), timed).astype(int))
    seconds = []
    for length in lengths:
        prefixes = [text[:length] for text in longest]
        temperature = networks.config.temperature
        next_characters(networks.trunk, prefixes, temperature)
        times = [_seconds(next_characters, networks.trunk, prefixes, temperature) for _ in range(TIMED_REPEATS)]
        seconds.append(np.median(times))
    longest_first = sorted(range(len(transitions.texts)), key=lambda b: -len(transitions.texts[b]))
    steps = np.concatenate([transitions.end_N[transitions.episode_N == b] for b in longest_first[::2]])
    return float(np.interp(steps, lengths, seconds).sum()), len(steps), TIMED_REPEATS * len(lengths)


def fitting_batch(width: int, longest: int) -> int:
    """Prefixes of ``longest`` characters whose activations of one layer (about 16 D floats each) stay within 4 GB."""
    return max(1, int(MEMORY_BYTES / (longest * 16 * width * 4)))


def time_round(
    networks: AuthorsRound,
    transitions: Transitions,
    *,
    batch: int = 8,
    value_batch: int = 8,
    rollout_lengths: int = 12,
    value_batches: int = 20,
    share: float = 0.01,
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds of a whole round on ``transitions``, stage by stage, from a timed part of each stage.

    Args:
      batch: transitions per Adam step (authors: 8 or 16).
      value_batch: prefixes per value pass, less if memory forbids. The authors' script passes its minibatch size as
        tianshou's ``max_batchsize``, whose default is 256.
        The passes go through the collect in order, as tianshou does, so neighbours differ by one character.
      rollout_lengths: prefix lengths at which a step of the rollout is timed.
      value_batches: value passes timed, at random places (each for states and for next states).
      share: of the Adam steps that is timed, on random minibatches.

    Returns:
      ``seconds``: {rollout, values, updates} scaled up to the whole round; ``items`` and ``timed_items``: steps,
      value passes and updates of the round, and those timed; ``total``: the sum of the seconds.
    """
    rng = np.random.default_rng(seed)
    count = len(transitions.end_N)
    longest = max(len(text) for text in transitions.texts)
    value_batch = min(value_batch, count, fitting_batch(networks.trunk.wte.embedding_dim, longest))
    num_updates = networks.config.epochs * (count // batch)
    timed_updates = max(1, round(share * num_updates))
    rollout, steps, timed_steps = _rollout_seconds(networks, transitions, rollout_lengths)

    def value_seconds() -> float:
        start = rng.integers(0, count - value_batch + 1)
        indices = np.arange(start, start + value_batch)
        return sum(_seconds(lambda a: state_values(networks, transitions.prefixes(indices, a)), a) for a in (0, 1))

    def update_seconds() -> float:
        return _seconds(update, networks, transitions, rng.choice(count, batch, replace=False))

    value_seconds(), update_seconds()
    values = np.mean([value_seconds() for _ in range(value_batches)]) * count / value_batch
    updates = np.mean([update_seconds() for _ in range(timed_updates)]) * num_updates
    seconds = {"rollout": rollout, "values": float(values), "updates": float(updates)}
    return {
        "seconds": seconds,
        "total": sum(seconds.values()),
        "items": {"rollout": steps, "values": 2 * -(-count // value_batch), "updates": num_updates},
        "timed_items": {
            "rollout": timed_steps,
            "values": 2 * value_batches,
            "updates": timed_updates,
        },
        "batch": batch,
        "value_batch": value_batch,
    }
