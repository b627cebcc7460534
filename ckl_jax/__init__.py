"""Prioritized KL for RL fine-tuning of language models, in JAX (arXiv 2502.06533).

A KL penalty holds a policy as firmly at every token. Here the KL of a token is weighted by J(s)^beta, where J is how
sure the frozen pre-trained model is of its next token: firm where it is sure, loose where it is not.

Nothing is imported with the package; take the modules that you need:

- **The loss in a trainer of your own.** `ckl_jax.certainty.certainty` and `ckl_jax.losses.prioritized_kl` take plain
  arrays of any vocabulary and batch layout; `ckl_jax.token_weights` has the controls and the weights of other works.
- **The experiment as commands.** `ckl_jax.pretrain`, `ckl_jax.finetune` and `ckl_jax.evaluate` run with `python -m`.
  Their options are the fields of `ckl_jax.config.PretrainConfig` and `ckl_jax.finetune_config.FinetuneConfig`. A module
  of `experiments` (outside of the package) makes each figure.
- **How a round computes.** In the order of the data: `ckl_jax.columns` (tasks and their texts), `ckl_jax.problems`
  (arrays), `ckl_jax.rollout` and `ckl_jax.speculative` (answers), `ckl_jax.episodes` (rewards, certainty, advantages),
  `ckl_jax.objective` (the loss), `ckl_jax.updates` (Adam, rounds, runs). `experiments/tutorial.py` goes through it with
  one problem.
- **Another task.** `ckl_jax.tasks.Task` is what one has to say; `ckl_jax.columns` has three.
- **Another algorithm.** `ckl_jax.advantages`, `ckl_jax.advantage_shaping` and `ckl_jax.losses` are what the recipes of
  `ckl_jax.finetune_config` choose from.
- **What a model does.** `ckl_jax.checkpoint.load_model` reads one (`ckl_jax.convert` makes one from other GPT-2
  files), `ckl_jax.critical` and `ckl_jax.discovery` look at its critical tokens, `ckl_jax.statistics` has the
  intervals, `ckl_jax.plots` and `ckl_jax.report` the pictures.

Names of arrays carry their shape: `logits_BxTxV` is [B, T, V]. B are episodes, T time, P prompt, V vocabulary, D width,
H heads, S cache slots, R runs. A value that cannot work raises `ckl_jax.errors.ConfigError`, a `ValueError` that names
it and what is allowed.
"""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # Python has found the package of a command, and not yet its module.
    from ckl_jax import startup

    startup.before_imports("jax")
