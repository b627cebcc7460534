"""Prioritized KL for RL fine-tuning of language models, in JAX (arXiv 2502.06533).

A KL penalty holds a policy as firmly at every token. Here the KL of a token is weighted by J(s)^beta, where J is how
sure the frozen pre-trained model is of its next token: firm where it is sure, loose where it is not.

Nothing is imported with the package; take the modules that you need:

- **The loss in a trainer of your own.** `ckl_jax.certainty.certainty` and `ckl_jax.losses.prioritized_kl` take plain
  arrays of any vocabulary and batch layout. `ckl_jax.token_weights` has the controls and the weights of other works,
  `ckl_jax.advantages` what multiplies the log-probabilities.
- **The experiment as commands.** `ckl_jax.pretrain`, `ckl_jax.finetune`, `ckl_jax.evaluate`, `ckl_jax.convert` and
  `ckl_jax.check_xla` run with `python -m`. Their options are the fields of `ckl_jax.config.PretrainConfig` and
  `ckl_jax.config.FinetuneConfig`, which start from `ckl_jax.presets`. A module of `experiments` (outside of the
  package) makes each figure.
- **How a round computes.** In the order of the data: `ckl_jax.tasks` (problems, their texts and arrays),
  `ckl_jax.model`, `ckl_jax.rollout` (answers), `ckl_jax.rl.collect` (rewards, certainty, advantages),
  `ckl_jax.rl.objective` (the loss), `ckl_jax.rl.updates` (Adam, rounds, runs). `experiments/tutorial.py` goes through
  it with one problem.
- **Another task.** `ckl_jax.tasks.Task` is what one has to say; `ckl_jax.tasks.columns` has three.
- **What a model does.** `ckl_jax.checkpoint.load_model` reads one, `ckl_jax.analysis` looks at its critical tokens and
  has intervals and pictures.
- **Around it.** `ckl_jax.runs` is the directory of a run, `ckl_jax.runtime` the machine: devices, hosts, paths,
  signals. `ckl_jax.datasets` has the task as a TFDS dataset.

Names of arrays carry their shape: `logits_BxTxV` is [B, T, V]. B are episodes, T time, P prompt, V vocabulary, D width,
H heads, S cache slots, R runs. A value that cannot work raises `ckl_jax.errors.ConfigError`, a `ValueError` that names
it and what is allowed.
"""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # Python has found the package of a command, and not yet its module.
    from ckl_jax.runtime import startup

    startup.before_imports("jax")
