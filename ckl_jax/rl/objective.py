"""The loss of a recipe and its gradient.

The loss is the sum of its terms, each a function of ``losses``, ``ratio_losses`` or ``truncation`` times a coefficient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ckl_jax import losses, overflow, ratio_losses, truncation
from ckl_jax.config import FinetuneConfig
from ckl_jax.rl.assessment import Episodes
from ckl_jax.rl.critic import values
from ckl_jax.rl.program import Hyper, Program
from ckl_jax.rollout.trajectory import score

Gradient = tuple[dict[str, Any], dict[str, jax.Array]]
"""The loss's gradient in the parameters, and the loss's terms."""


def term_names(config: FinetuneConfig) -> tuple[str, ...]:
    """The terms of the config's loss."""
    there = {
        "policy": True,
        "value": config.has_critic,
        "entropy": True,
        "kl": config.kl_in == "loss",
        "kl_cov": config.kl_cov > 0,
        "lp_reg": config.lp_reg > 0,
    }
    return tuple(name for name, present in there.items() if present)


def loss_terms(program: Program, hyper: Hyper, params: dict[str, Any], episodes: Episodes) -> dict[str, jax.Array]:
    """The loss as its weighted terms; their sum is what is minimized (paper, section 5)."""
    outputs = score(program.model, params["policy"], episodes.trajectory)
    return _terms(program, hyper, params["value"], outputs, episodes)


def _terms(
    program: Program, hyper: Hyper, value_params: Any, outputs: tuple[jax.Array, jax.Array], episodes: Episodes
) -> dict[str, jax.Array]:
    """The terms as functions of the policy's ``outputs``: logits and hidden states of ``score``."""
    config, trajectory, advantages_BxT = program.config, episodes.trajectory, episodes.advantages_BxT
    actions_BxT, mask_BxT, old_log_probs_BxT = trajectory.answers_BxT, trajectory.mask_BxT, trajectory.log_probs_BxT
    logits_BxTxV, hidden_BxTxD = outputs

    def of_actions(logits_BxTxV):
        return losses.token_log_probs(
            logits_BxTxV, actions_BxT, config.temperature, mask_BxT, clamp=config.clamp_log_probs
        )

    log_probs_BxT = of_actions(logits_BxTxV)
    clip: ratio_losses.Clip = config.clip
    if config.clip_by == "entropy":
        h_BxT = jnp.where(mask_BxT, episodes.signed_entropy_BxT, 0.0)
        clip = ratio_losses.entropy_clip(h_BxT, config.clip, config.hapo_clip)
        advantages_BxT = ratio_losses.redistributed(
            advantages_BxT, h_BxT, log_probs_BxT, old_log_probs_BxT, mask_BxT, clip, config.hapo_advantage
        )

    def pulled():
        proxy_BxT = truncation.proxy_log_probs(
            logits_BxTxV, actions_BxT, config.lp_reg_min_p, config.temperature, mask_BxT
        )
        return episodes.in_lp_reg_BxT & mask_BxT & jnp.isfinite(proxy_BxT), proxy_BxT

    def unclipped():
        return pulled()[0] if config.lp_reg > 0 else None

    def policy():
        if config.has_ratio:
            return ratio_losses.clipped_policy_loss(
                log_probs_BxT, old_log_probs_BxT, advantages_BxT, mask_BxT, clip, unclipped()
            )
        return losses.policy_gradient_loss(log_probs_BxT, advantages_BxT, mask_BxT)

    def value():
        hidden = jnp.where(mask_BxT[..., None], hidden_BxTxD, 0.0)
        values_BxT = values(value_params, jax.lax.stop_gradient(hidden) if config.detach_critic else hidden)
        return losses.value_loss(values_BxT, episodes.returns_BxT, mask_BxT)

    def entropy():
        def of_inside(inside_BxTxV):
            return truncation.entropy_within(logits_BxTxV, inside_BxTxV, config.temperature, mask_BxT)

        within = {
            "all": lambda: losses.entropy(logits_BxTxV, config.temperature, mask_BxT),
            "top": lambda: of_inside(truncation.top_tokens(logits_BxTxV, config.entropy_top)),
            "nucleus": lambda: of_inside(truncation.nucleus(logits_BxTxV, config.entropy_nucleus, config.temperature)),
        }

        return -losses.masked_mean(within[config.entropy_over](), mask_BxT)

    def kl():
        if config.kl == "exact":
            kl_BxT = losses.exact_kl(logits_BxTxV, episodes.ref_logits_BxTxV, config.temperature, mask_BxT)
        else:
            ref_log_probs_BxT = of_actions(episodes.ref_logits_BxTxV)
            kl_BxT = losses.kl_estimate(log_probs_BxT, ref_log_probs_BxT, config.kl, mask_BxT)
            if config.has_ratio or config.kl_correction == "ratio":
                kl_BxT = ratio_losses.off_policy_kl(kl_BxT, config.kl, log_probs_BxT, old_log_probs_BxT, mask_BxT)
        weights_BxT = episodes.kl_weights_BxT
        if config.kl_gate == "clip":
            gate_BxT = ratio_losses.open_gate(
                log_probs_BxT, old_log_probs_BxT, advantages_BxT, mask_BxT, clip, unclipped()
            )
            weights_BxT = jnp.where(gate_BxT, weights_BxT, 0.0)
        return losses.weighted_kl(kl_BxT, weights_BxT, mask_BxT)

    def kl_cov():
        return ratio_losses.kl_cov(log_probs_BxT, old_log_probs_BxT, episodes.in_kl_cov_BxT, mask_BxT)

    def lp_reg():
        pulled_BxT, proxy_BxT = pulled()
        return truncation.lp_reg(log_probs_BxT, proxy_BxT, pulled_BxT, mask_BxT)

    weighted = {
        "policy": (1.0, policy),
        "value": (config.value_coefficient, value),
        "entropy": (config.entropy_coefficient, entropy),
        "kl": (hyper.kl_coefficient, kl),
        "kl_cov": (config.kl_cov, kl_cov),
        "lp_reg": (config.lp_reg, lp_reg),
    }
    there = [(name, *weighted[name]) for name in term_names(config)]
    return {name: overflow.product(jnp.float32(coefficient), term()) for name, coefficient, term in there}


def loss_gradient(program: Program, hyper: Hyper, params: dict[str, Any], episodes: Episodes) -> Gradient:
    """The gradient of the sum of ``loss_terms`` in all parameters, the critic's included."""

    def total_loss(params):
        terms = loss_terms(program, hyper, params, episodes)
        return sum(terms.values()), terms

    return jax.grad(total_loss, has_aux=True)(params)


def gradient_norms(program: Program, hyper: Hyper, params: dict[str, Any], episodes: Episodes) -> dict[str, jax.Array]:
    """Norm of each term's gradient in the policy's parameters, on the first ``diagnostic_episodes`` episodes.

    The terms take turns in one backward pass, for four of them would take as long to compile as all of an update.
    """
    few = jax.tree.map(lambda x: x[: program.config.diagnostic_episodes], episodes)
    outputs, pullback = jax.vjp(lambda policy: score(program.model, policy, few.trajectory), params["policy"])

    def cotangents(name):
        return jax.grad(lambda outputs: _terms(program, hyper, params["value"], outputs, few)[name])(outputs)

    names = term_names(program.config)
    of_terms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(cotangents, names))
    norms = jax.lax.map(lambda of_term: optax.tree.norm(pullback(of_term)[0]), of_terms)
    return {f"grad_norm/{name}": norm for name, norm in zip(names, norms, strict=True)}
