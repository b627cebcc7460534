"""What config.json of transformers' GPT-2, or nanoGPT's model_args, says of a model; what ours lacks is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError, is_integer, require, require_word
from ckl_jax.model import LAYER_NORM_EPSILON

ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu_erf"),
}
"""GELUs of transformers, which has five names for the one by tanh, and ours."""
EXPORTED = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu"}
SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "block_size", "vocab_size", "bias")
NANOGPT = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout", "use_flash")
"""``use_flash``, of the paper's authors and of Lee et al., chooses a kernel of attention and changes no number."""
SYNONYMS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def settings(config_json: Mapping[str, Any], model_args: Mapping[str, Any]) -> dict[str, Any]:
    """What both say, under nanoGPT's and transformers' shorter names.

    Raises:
      ConfigError: there is neither; two places say different things; model_args have what nanoGPT's do not.
    """
    allowed = "config.json beside the weights, or nanoGPT's model_args in the file with them"
    require(bool(config_json or model_args), "config.json", None, allowed)
    for name in model_args:
        require_word(name, "model_args", NANOGPT)
    found = dict(model_args)
    for given, value in config_json.items():
        name = SYNONYMS.get(given, given)
        elsewhere = "nanoGPT's model_args" if name in model_args else "another name of it in config.json"
        if name in SIZES:
            said = f"{repr(found.get(name))[:40]}, by {elsewhere}"
            require(found.setdefault(name, value) == value, f"config.json {given}", value, said)
        else:
            found[name] = value
    return found


def model_config(found: dict[str, Any], *, is_linear: bool, biased: bool, activation: str | None) -> ModelConfig:
    """The shape of the model that ``settings`` describe.

    Args:
      is_linear: whether matrices are [out, in], as nanoGPT's.
      biased: whether the file has biases; counts where ``found`` does not say.
      activation: the user's word on it; needed where ``found`` does not say.

    Raises:
      ConfigError: a setting is missing, or is one that our model lacks.
    """
    block = "block_size" if "block_size" in found and (is_linear or "n_positions" not in found) else "n_positions"
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", block):
        require(is_integer(found.get(name)), f"config.json {name}", found.get(name), "an integer")
    allowed: dict[str, tuple[Any, ...]] = {
        # Other types name their tensors alike and compute something else (gpt_bigcode, imagegpt).
        "model_type": ("gpt2",),
        "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "n_inner": (None, 4 * found["n_embd"]),
        "bias": (True, False),
        "quantization_config": (None,),
        "pruned_heads": (None, {}),
    }
    for name, values in allowed.items():
        shown = " | ".join(repr(value) for value in values)
        require(name not in found or found[name] in values, f"config.json {name}", found.get(name), shown)
    return ModelConfig(
        num_layers=found["n_layer"],
        num_heads=found["n_head"],
        width=found["n_embd"],
        block_size=found[block],
        vocab_size=found["vocab_size"],
        use_bias=found.get("bias", biased),
        activation=_activation(found, is_linear, activation),
    )


def _activation(found: Mapping[str, Any], is_linear: bool, given: str | None) -> Any:
    if "activation_function" in found:
        named = found["activation_function"]
        require_word(named, "config.json activation_function", ACTIVATIONS)
        said = ACTIVATIONS[named]
        require(given in (None, said), "activation", given, f"{said}, by config.json's activation_function {named}")
        return said
    if given is None and is_linear and "model_type" not in found:
        raise ConfigError(
            "activation: got None, allowed is gelu_tanh (new_gelu of nanoGPT before 14 June 2023, and of the paper's "
            "authors) or gelu_erf (its nn.GELU() since then): the files do not say which"
        )
    return given or ACTIVATIONS["gelu_new"]  # Transformers' default.
