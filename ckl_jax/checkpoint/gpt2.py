"""Directories of transformers' GPT-2 and of nanoGPT (the authors' released models): reading both, writing the first.

Both name their tensors alike (``transformer.h.0.attn.c_attn.weight``); transformers stores matrices [in, out], nanoGPT
[out, in]. The fused query, key and value matrix is never square, so its shape tells which for the whole file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckl_jax.checkpoint import description, gpt2_config, tensor_names, token_files
from ckl_jax.checkpoint import tensors as tensor_files
from ckl_jax.checkpoint.store import Model
from ckl_jax.checkpoint.tensor_names import EMBEDDING, HEAD
from ckl_jax.checkpoint.tensors import Stored
from ckl_jax.config import ModelConfig
from ckl_jax.errors import extra, require
from ckl_jax.model import LAYER_NORM_EPSILON
from ckl_jax.runtime import reading
from ckl_jax.runtime.hosts import write_json
from ckl_jax.runtime.paths import AnyPath, require_directory, resolved, writing
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.task import Task

WEIGHTS = "model.safetensors"  # As transformers names it.
LAYER = {
    "ln_1": "ln_1",
    "c_attn": "attn.c_attn",
    "c_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
}


def signed(directory: pathlib.Path, made_by: Mapping[str, Any]) -> dict[str, Any]:
    """``made_by`` with the SHA-256 of the weights that are there, which tells an export from what was trained since."""
    path = directory / WEIGHTS
    return {**made_by, WEIGHTS: hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else dict(made_by)


def described(source: pathlib.Path) -> dict[str, Any]:
    """config.json in a directory or beside a file; {} where there is none, as beside nanoGPT's ckpt.pt."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    return reading.read_object(path, "source") if path.exists() else {}


def load_foreign(
    source: AnyPath,
    task: Task,
    digits: int,
    reduced: bool = False,
    activation: str | None = None,
    tokenizer: pathlib.Path | None = None,
) -> Model:
    """The model in a directory with config.json (which nanoGPT has in its file), a vocabulary, and the weights.

    The vocabulary keeps its size, which J's normalization by log V needs: our characters come first in our order, then
    the rows that are none of ours.

    Args:
      source: the directory, or the file of weights in it.
      task: what it was pre-trained on.
      digits: N, the digits that it was pre-trained on.
      reduced: only the rows of our characters are kept; of what the model knows beside, nothing.
      activation: ``ModelConfig.activation``; needed where the files do not say.
      tokenizer: as ``token_files.rows``; default: where the weights are.

    Raises:
      ConfigError: a file is missing or damaged; a setting that our model lacks; tensors that are missing, unknown or of
        wrong shape; one of our characters is unknown to it.
    """
    description.require_digits(digits)
    source = resolved(source, "source")
    contents = tensor_files.contents(source)
    tensors = tensor_names.canonical(contents)
    found = gpt2_config.settings(described(source), contents.settings)
    is_linear = _is_linear(found, tensors)
    config = gpt2_config.model_config(
        found,
        is_linear=is_linear,
        biased="h.0.attn.c_attn.bias" in tensors,
        activation=activation,
    )
    most_tokens = config.vocab_size if reduced else alphabet.MOST_TOKENS
    fits = alphabet.VOCAB_SIZE <= config.vocab_size <= most_tokens
    allowed = f"{alphabet.VOCAB_SIZE}..{alphabet.MOST_TOKENS}; --vocabulary ours keeps only our characters"
    require(fits, "config.json vocab_size", config.vocab_size, allowed)
    few = config.num_weights <= contents.size  # One byte at least for each.
    allowed = f"at most {contents.size}, by the size of the files of weights"
    require(few, "config.json", f"{config.num_weights} weights", allowed)
    place = tokenizer or (source if source.is_dir() else source.parent)
    rows_V = token_files.rows(place, config.vocab_size)
    rows_V = rows_V[: alphabet.VOCAB_SIZE] if reduced else rows_V
    params = _params(config, tensors, rows_V, is_linear=is_linear, unbiased=found.get("bias") is False)
    kept = alphabet.VOCAB_SIZE if reduced else config.vocab_size
    return Model(dataclasses.replace(config, vocab_size=kept), digits, {"params": params}, task)


def _is_linear(found: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bool:
    """Whether matrices are [out, in]."""
    first, width = tensors.get("h.0.attn.c_attn.weight"), found.get("n_embd")
    return first is not None and len(first.shape) == 2 and first.shape[1] == width


def _shapes(config: ModelConfig, is_linear: bool) -> dict[str, tuple[int, ...]]:
    width = config.width
    sizes = {"c_attn": (width, 3 * width), "c_proj": (width, width)}
    sizes |= {"c_fc": (width, 4 * width), "mlp_c_proj": (4 * width, width)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, width)}
    shapes["wpe.weight"] = (config.block_size, width)
    norms = ["ln_f"]
    for index in range(config.num_layers):
        for ours, theirs in LAYER.items():
            name = f"h.{index}.{theirs}"
            if ours in sizes:
                shapes[f"{name}.weight"] = sizes[ours][::-1] if is_linear else sizes[ours]
                if config.use_bias:
                    shapes[f"{name}.bias"] = sizes[ours][1:]
            else:
                norms.append(name)
    for name in norms:
        shapes |= {f"{name}.{kind}": (width,) for kind in ("weight", "bias")[: 1 + config.use_bias]}
    return shapes


def _params(
    config: ModelConfig, tensors: Mapping[str, Stored], rows_V: np.ndarray, *, is_linear: bool, unbiased: bool
) -> Any:
    shapes = _shapes(config, is_linear)
    whole = _shapes(dataclasses.replace(config, use_bias=True), is_linear)
    zero = (whole.keys() - shapes.keys()) & tensors.keys() if unbiased else set()
    missing = sorted(shapes.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - shapes.keys() - zero - {HEAD})
    require(not missing, "source", f"no tensors {', '.join(missing[:5])}", f"all {len(shapes)} of config.json's model")
    require(not unknown, "source", f"tensors {', '.join(unknown[:5])}", "those of config.json's GPT-2 alone")
    for name in (*shapes, *sorted(zero)):
        require(tensors[name].shape == whole[name], name, tensors[name].shape, f"{whole[name]}, by config.json")
    for name in sorted(zero):
        # Transformers' GPT-2 always has biases: without any, ours are exported as zeros.
        require(
            not np.any(tensors[name].read()),
            name,
            "other numbers than 0",
            "0, for bias is false in config.json (true if they were trained)",
        )
    arrays = {name: tensors[name].read() for name in shapes}
    for name, array in arrays.items():
        require(bool(np.isfinite(array).all()), name, "NaN or infinity", "finite parameters")
    if HEAD in tensors:
        head = tensors[HEAD]
        tied = head.shape == shapes[EMBEDDING] and np.array_equal(head.read(), arrays[EMBEDDING])
        require(tied, HEAD, f"other values than {EMBEDDING} (an untied head)", "the same: our model's head is tied")

    def module(name: str, ours: str) -> dict[str, np.ndarray]:
        weight = arrays[f"{name}.weight"]
        is_norm = ours.startswith("ln_")
        found = {"scale" if is_norm else "kernel": weight.T if is_linear and not is_norm else weight}
        return found | ({"bias": arrays[f"{name}.bias"]} if config.use_bias else {})

    params: dict[str, Any] = {
        "wte": {"embedding": arrays["wte.weight"][rows_V]},
        "wpe": {"embedding": arrays["wpe.weight"]},
        "ln_f": module("ln_f", "ln_f"),
    }
    for index in range(config.num_layers):
        params[f"h_{index}"] = {ours: module(f"h.{index}.{theirs}", ours) for ours, theirs in LAYER.items()}
    return _contiguous(params)


def _contiguous(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _contiguous(branch) for name, branch in tree.items()}
    return np.ascontiguousarray(tree)


def save_transformers(directory: AnyPath, model: Model, made_by: Mapping[str, Any]) -> None:
    """Writes a directory that ``transformers.GPT2LMHeadModel.from_pretrained`` loads, and ``load_foreign`` exactly.

    Its files are config.json, model.safetensors and vocab.json (ids by character).

    Args:
      made_by: what a reader needs to make it again.
    """
    config, params = model.config, model.params["params"]
    drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)  # Theirs are 0.1 if not given.
    arrays = {"wte.weight": params["wte"]["embedding"], "wpe.weight": params["wpe"]["embedding"]}
    modules = {"ln_f": params["ln_f"]}
    for index in range(config.num_layers):
        modules |= {f"h.{index}.{theirs}": params[f"h_{index}"][ours] for ours, theirs in LAYER.items()}
    for name, module in modules.items():
        weight = module["scale"] if "scale" in module else module["kernel"]
        arrays |= {f"{name}.weight": weight, f"{name}.bias": module.get("bias", np.zeros(weight.shape[-1], np.float32))}
    save_file = extra("safetensors.numpy", "source", "convert").save_file
    require_directory(directory, "out")
    directory = resolved(directory, "out")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / WEIGHTS
    stored = {f"transformer.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    with writing(path):
        save_file(stored, path, metadata={"format": "pt"})
    write_json(directory / "vocab.json", {character: row for row, character in enumerate(alphabet.VOCABULARY)})
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.width,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "bias": config.use_bias,
        "activation_function": gpt2_config.EXPORTED[config.activation],
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": True,
        "task": model.task.name,
        "max_pretrain_digits": model.max_pretrain_digits,
        "made_by": signed(directory, made_by),
        **drops,
    } | {f"{name}_token_id": alphabet.PAD_ID for name in ("bos", "eos", "pad")}
    write_json(directory / "config.json", described)
