"""Prioritized KL for RL fine-tuning of language models, in JAX (arXiv 2502.06533).

A KL penalty holds a policy equally firmly at every token. Here a token's KL is weighted by J(s)^beta, where J is how
sure the frozen pre-trained model is of its next token: firm where it is sure, loose where it is not.

Nothing is imported with the package; take the modules that you need.

**Where to start?**

- **The loss in a trainer of your own.** `ckl_jax.certainty.certainty` and `ckl_jax.losses.prioritized_kl` take plain
  arrays of any vocabulary and batch layout; `ckl_jax.token_weights` has the controls and the weights of other works. On
  CPU call `ckl_jax.runtime.xla_cpu.avoid_wrong_fusions` before JAX computes anything.
- **The experiment as commands.** `ckl_jax.pretrain`, `ckl_jax.finetune`, `ckl_jax.evaluate` and `ckl_jax.convert` run
  with `python -m`. `ckl_jax.finetune` lists what they write, how they go on, and their exit codes. Their options are
  the fields of `ckl_jax.config`, and `ckl_jax.presets` has the named scales and recipes. A module of `experiments`
  (outside of the package) makes each figure.
- **Another task.** `ckl_jax.tasks.Task` is what one has to say; `ckl_jax.tasks.columns` has three.
- **Another algorithm.** A recipe chooses from `ckl_jax.advantages`, `ckl_jax.losses` and `ckl_jax.token_weights`, and
  the modules beside them; `ckl_jax.rl` calls them.
- **What a model does.** `ckl_jax.checkpoint.load_model` reads one, `ckl_jax.analysis` looks at it.

**How a round computes.** `experiments/tutorial.py` follows one problem through these folders. Their docstrings
say what lives there and what may be imported.

- `ckl_jax.tasks`: what is drawn, written and judged. `alphabet` has the paper's 41 characters as tokens, `task` says
  what a task has to say, `columns` has addition, subtraction, and multiplication by one digit, `catalog` their names,
  `problems` makes arrays of them, with reward and critical tokens on the device.
- `ckl_jax.datasets`: the text of pre-training. `scratchpads` is a TFDS dataset (without TensorFlow), `prepared` its
  files on disk, `stream` the token stream that is sampled on the device.
- `ckl_jax.attention`: how positions see each other. `plain` is for XLA to compile, `fused` one kernel of a `tpu` or a
  `gpu` (what they share is in `kernel`), `cache` the keys and values of a decoder.
- `ckl_jax.rollout`: policy, problems and key become answers. `trajectory` is an episode as arrays, `decoding` writes it
  step by step, `speculative` by verifying drafts a window at a time, and `generation` chooses between the two. `drafts`
  says how an episode goes on if it calculates faithfully from its own text, line by line (`scratchpad_lines`).
- `ckl_jax.rl`: a round. `program` has what is static and which runs (arms x seeds) there are, `collect` does rollout,
  reward and the reference's pass, `critic` is the value head, `assessment` has the advantages and the weights of the
  KL, `objective` the loss of a recipe and its gradient, `minibatches` deals whole episodes or single transitions,
  `updates` does Adam's steps, rounds and runs, `setup` puts all of it on the devices, `evaluation` has the tests on
  the way.
- `ckl_jax.checkpoint`: models on disk. `store` saves and loads them by Orbax, `states` has those of a run that goes on,
  `manifest` their SHA-256 digests, `arrays` what Orbax says that it stored, `shipped` knows the models of the package
  by name, `description` checks what a checkpoint says it holds, `gpt2`, `gpt2_config`, `tensors`, `tensor_names` and
  `token_files` those of transformers and nanoGPT: directories, settings, weights and vocabularies.
- `ckl_jax.runs`: the directory of a run. `directory` has config, metrics, samples and checkpoints, `lock` keeps a
  second process out, `logbook` writes down what a fine-tuning does, `progress` shows how far it is, `records` reads
  back, `logs` copies to TensorBoard and Weights & Biases.
- `ckl_jax.runtime`: the machine. `cli` parses and ends commands, whose fields are its `options`, `startup` settles
  streams, variables, cores and compilation cache, `processes` starts others here, each with its flags of XLA, `hosts`
  joins those of several machines, `targets` are the devices that programs are made for, `sharding` is their mesh,
  `preemption` holds SIGTERM until work is saved, `finite` refuses what is not finite, `paths` are local or of buckets,
  `reading` takes files that somebody else may have made as data alone, `strays` are files that nothing reads, `xla_cpu`
  avoids wrong fused reductions.
- `ckl_jax.analysis`: what came out. `critical` looks at critical tokens in a model's own answers, `discovery` finds
  them without knowing the task, `statistics` has the intervals, `plots` and `report` the pictures and pages.
- `ckl_jax.preflight`: the programs of a command compiled for a TPU or GPUs that are not here. `chips` has the machines,
  `programs` what a command compiles, `hlo` reads it, `costs` counts what it does, with the `traffic` of memory and
  links, `verdict` says whether it fits.

Beside the folders lie the formulas: `certainty` of the reference, the `token_weights` that are made of it,
`advantages`, what a policy's entropy does to them (`advantage_shaping`), the paper's `losses`, those that compare the
policy with the one that sampled (`ratio_losses`: clips, gates, KL-Cov), those of distributions without their tail
(`truncation`: top-k, nucleus, Lp-Reg), and `overflow`, whose products overflow without making NaN of a weight of 0.
There are also `ckl_jax.model` (GPT-2), a step of pre-training (`next_character`), the settings (`config`: `shape` of
the model, `pretraining`, and `finetuning` with the chapters `advantage` and `kl`; `presets` are what they start from,
`fields` says what they may hold, `resuming` which of them may change when a run goes on), what is refused (`errors`,
`checks`), and the commands (`pretrain`, `finetune`, `evaluate`, `convert`, `models`, which lists those that ship, and
`ckl_jax.check_xla`, which compares every program with XLA's default fusions and without).

**Conventions.** Names of arrays carry their shape: `logits_BxTxV` is [B, T, V]. B are episodes, T time, P prompt, L
prompt + answer, V vocabulary, D width, H heads, S cache slots, R runs. One key goes in and is folded with episode and
position, so that sampled characters do not depend on batching. Parameters, logits and losses are float32. A value that
cannot work raises `ckl_jax.errors.ConfigError`, a `ValueError` that names it and what is allowed.
"""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # Python has found the package of a command, and not yet its module.
    from ckl_jax.runtime import startup

    startup.before_imports("jax")
