"""Directories of transformers' GPT-2 and of nanoGPT (the authors' released models): reading both, writing the first.

Both name their tensors alike (``transformer.h.0.attn.c_attn.weight``); transformers stores matrices [in, out], nanoGPT
[out, in]. The fused query, key and value matrix is never square, so its shape tells which for the whole file.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckl_jax import alphabet, foreign, tensor_files
from ckl_jax.checkpoint import Model, write_json
from ckl_jax.config import ModelConfig, require
from ckl_jax.errors import extra, is_integer
from ckl_jax.model import LAYER_NORM_EPSILON
from ckl_jax.paths import AnyPath, require_directory, resolved, writing
from ckl_jax.tasks import Task
from ckl_jax.tensor_files import Stored

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
LAYER = {
    "ln_1": "ln_1",
    "c_attn": "attn.c_attn",
    "c_proj": "attn.c_proj",
    "ln_2": "ln_2",
    "c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
}


def load_foreign(source: AnyPath, task: Task, digits: int, reduced: bool = False) -> Model:
    """The model in a directory with config.json, a tokenizer's vocabulary, and the weights.

    The vocabulary keeps its size, which J's normalization by log V needs: our characters come first in our order, then
    the rows that are none of ours.

    Args:
      task: what it was pre-trained on.
      digits: N, the digits that it was pre-trained on.
      reduced: only the rows of our characters are kept; of what the model knows beside, nothing.

    Raises:
      ConfigError: a file is missing or damaged; a setting that our model lacks; tensors that are missing, unknown or of
        wrong shape; one of our characters is unknown to it.
    """
    foreign.require_digits(digits)
    source = resolved(source, "source")
    found = foreign.read_object(source / "config.json", "source")
    path = tensor_files.weights(source)
    tensors = {_name(name): tensor for name, tensor in tensor_files.stored(path, skip=BUFFERS).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    config = _model_config(found, tensors)
    most_tokens = config.vocab_size if reduced else foreign.MOST_TOKENS
    fits = alphabet.VOCAB_SIZE <= config.vocab_size <= most_tokens
    allowed = f"{alphabet.VOCAB_SIZE}..{foreign.MOST_TOKENS}; --vocabulary ours keeps only our characters"
    require(fits, "config.json vocab_size", config.vocab_size, allowed)
    most = path.stat().st_size // 2
    require(
        config.num_weights <= most, "config.json", f"{config.num_weights} weights", f"at most {most}, by {path}'s size"
    )
    rows_V = _rows(_characters(source), config.vocab_size)
    params = _params(config, tensors, rows_V[: alphabet.VOCAB_SIZE] if reduced else rows_V, found.get("bias"))
    kept = alphabet.VOCAB_SIZE if reduced else config.vocab_size
    return Model(dataclasses.replace(config, vocab_size=kept), digits, {"params": params}, task)


def _name(name: str) -> str:
    for prefix in ("_orig_mod.", "transformer."):
        name = name.removeprefix(prefix)
    return name


def _model_config(found: dict[str, Any], tensors: Mapping[str, Stored]) -> ModelConfig:
    block = "block_size" if "block_size" in found else "n_positions"
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", block):
        require(is_integer(found.get(name)), f"config.json {name}", found.get(name), "an integer")
    allowed: dict[str, tuple[Any, ...]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * found["n_embd"]),
        "bias": (True, False),
    }
    for name, values in allowed.items():
        require(name not in found or found[name] in values, f"config.json {name}", found.get(name), f"one of {values}")
    return ModelConfig(
        num_layers=found["n_layer"],
        num_heads=found["n_head"],
        width=found["n_embd"],
        block_size=found[block],
        vocab_size=found["vocab_size"],
        use_bias=found.get("bias", "h.0.attn.c_attn.bias" in tensors),
    )


def _characters(source: pathlib.Path) -> dict[str, int]:
    """Token ids by token, of vocab.json or tokenizer.json; byte-level names of newline and space are undone."""
    if (source / "vocab.json").is_file():
        ids = foreign.read_object(source / "vocab.json", "source")
    else:
        whole = foreign.read_object(source / "tokenizer.json", "source")
        model, added = whole.get("model"), whole.get("added_tokens") or []
        named = isinstance(model, dict) and isinstance(model.get("vocab"), dict) and isinstance(added, list)
        require(named, "tokenizer.json", sorted(whole), "an object with model.vocab, ids by token")
        ids = dict(model["vocab"]) if isinstance(model, dict) else {}
        ids |= {str(token.get("content")): token.get("id") for token in added if isinstance(token, dict)}
    if (source / "added_tokens.json").is_file():
        ids |= foreign.read_object(source / "added_tokens.json", "source")
    for name, character in (("Ċ", "\n"), ("Ġ", " ")):
        if name in ids:
            ids.setdefault(character, ids[name])
    return ids


def _rows(ids: Mapping[str, Any], size: int) -> np.ndarray:
    missing = [character for character in alphabet.VOCABULARY if character not in ids]
    require(not missing, "source", f"a vocabulary without {missing}", f"one that has all of {alphabet.VOCABULARY!r}")
    ours = [ids[character] for character in alphabet.VOCABULARY]
    whole = all(is_integer(row) and 0 <= row < size for row in ours) and len(set(ours)) == len(ours)
    require(whole, "source", f"token ids {ours}", f"different ones of 0..{size - 1}")
    return np.array(ours + sorted(set(range(size)) - set(ours)))


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


def _params(config: ModelConfig, tensors: Mapping[str, Stored], rows_V: np.ndarray, biased: bool | None) -> Any:
    width, first = config.width, tensors.get("h.0.attn.c_attn.weight")
    is_linear = first is not None and first.shape == (3 * width, width)
    shapes = _shapes(config, is_linear)
    zero = {name for name in tensors if name.endswith(".bias")} if biased is False else set()
    missing = sorted(shapes.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - shapes.keys() - zero - {"lm_head.weight"})
    require(not missing, "source", f"no tensors {', '.join(missing[:5])}", f"all {len(shapes)} of config.json's model")
    require(not unknown, "source", f"tensors {', '.join(unknown[:5])}", "those of config.json's GPT-2 alone")
    for name, shape in shapes.items():
        require(tensors[name].shape == shape, name, tensors[name].shape, f"{shape}, by config.json")
    for name in sorted(zero):
        # Transformers' GPT-2 always has biases: without any, ours are exported as zeros.
        require(not np.any(tensors[name].read()), name, "other numbers than 0", "0, for bias is false in config.json")
    arrays = {name: tensors[name].read() for name in shapes}
    for name, array in arrays.items():
        require(bool(np.isfinite(array).all()), name, "NaN or infinity", "finite parameters")
    if "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        tied = head.shape == shapes["wte.weight"] and np.array_equal(head.read(), arrays["wte.weight"])
        require(tied, "lm_head.weight", "other values than wte.weight", "a tied head")

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


def save_transformers(directory: AnyPath, model: Model) -> None:
    """Writes a directory that ``transformers.GPT2LMHeadModel.from_pretrained`` loads, and ``load_foreign`` exactly.

    Its files are config.json, model.safetensors and vocab.json (ids by character).
    """
    config, params = model.config, model.params["params"]
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
    path = directory / "model.safetensors"
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
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": True,
        "task": model.task.name,
        "max_pretrain_digits": model.max_pretrain_digits,
    } | {f"{name}_token_id": alphabet.PAD_ID for name in ("bos", "eos", "pad")}
    write_json(directory / "config.json", described)
