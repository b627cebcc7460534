"""What config.json may say: every setting that changes the numbers is honoured, with the same logits, or refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from foreign_models import BLOCK, SIZES, WIDTH, NanoGPT, randomize, require_same_logits, write_nano, write_transformers
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from ckl_jax.checkpoint.gpt2 import load_foreign
from ckl_jax.checkpoint.gpt2_config import ACTIVATIONS, EXPORTED
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.tasks.columns import ADDITION

REFUSED = {"n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "add_cross_attention"}
REFUSED |= {"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}
UNUSUAL = {
    "vocab_size": 60,
    "n_positions": 64,
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 4,
    "n_inner": 32,
    "activation_function": "gelu_10",
    "summary_type": "mean",
    "summary_activation": "tanh",
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 5,
    "layer_norm_epsilon": 1e-3,
}
DESCRIBING = {"model_type", "attribute_map", "keys_to_ignore_at_inference", "base_model_tp_plan", "base_model_pp_plan"}
FIELDS = sorted(set(transformers.GPT2Config.__annotations__) | set(UNUSUAL))


def unusual(name):
    usual = getattr(transformers.GPT2Config(), name)
    return UNUSUAL[name] if name in UNUSUAL else not usual if isinstance(usual, bool) else usual * 2


@pytest.mark.parametrize("name", sorted(set(FIELDS) - DESCRIBING))
def test_every_setting_of_transformers_gpt2_is_honoured_or_refused(name, tmp_path):
    assert unusual(name) != getattr(transformers.GPT2Config(), name)
    config = transformers.GPT2Config(**SIZES | {"n_positions": BLOCK, name: unusual(name)}, attn_implementation="eager")
    source = tmp_path / "source"
    reference = write_transformers(source, transformers.GPT2LMHeadModel(config))
    if name == "tie_word_embeddings":  # As if the second tensor was lost: the shapes alone do not tell.
        state = load_file(source / "model.safetensors")
        save_file({key: x for key, x in state.items() if key != "lm_head.weight"}, source / "model.safetensors")
    if name in REFUSED:
        with pytest.raises(ConfigError, match=rf"^config\.json {name}: got "):
            load_foreign(source, ADDITION, 7)
        return
    model = load_foreign(source, ADDITION, 7)
    if name == "vocab_size":
        assert model.config.vocab_size == 60
        return
    require_same_logits(model, reference)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_by_name_are_that_function_or_refused(name, tmp_path):
    write_nano(tmp_path / "source", activation_function=name)
    if name not in ACTIVATIONS:
        with pytest.raises(
            ConfigError, match=rf"^config\.json activation_function: got '{name}', allowed is gelu_new \| "
        ):
            load_foreign(tmp_path / "source", ADDITION, 7)
        return
    ours = load_foreign(tmp_path / "source", ADDITION, 7).config.activation
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    found = nn.gelu(jnp.array(x), approximate=ours == "gelu_tanh")
    np.testing.assert_allclose(found, ACT2FN[name](torch.tensor(x)).numpy(), atol=2e-6)


def test_all_activations_that_are_known_are_those_of_transformers():
    assert set(ACTIVATIONS) <= set(ACT2FN)
    assert {ACTIVATIONS[name] for name in EXPORTED.values()} == set(EXPORTED)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_logits_are_those_of_transformers_with_each_activation(name, tmp_path):
    reference = write_transformers(tmp_path / "source", activation_function=name)
    require_same_logits(load_foreign(tmp_path / "source", ADDITION, 7), reference)


@pytest.mark.parametrize(("ours", "theirs"), [("gelu_tanh", "tanh"), ("gelu_erf", "none")])
def test_the_activation_is_asked_for_where_nanogpts_files_do_not_say_it(ours, theirs, tmp_path):
    write_nano(tmp_path / "source")
    reference = randomize(NanoGPT(approximate=theirs))
    path = tmp_path / "source" / "config.json"
    described = json.loads(path.read_text())
    del described["activation_function"]
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"^activation: got None, allowed is gelu_tanh \(.*\) or gelu_erf \(.*\)"):
        load_foreign(tmp_path / "source", ADDITION, 7)
    model = load_foreign(tmp_path / "source", ADDITION, 7, activation=ours)
    assert model.config.activation == ours
    require_same_logits(model, reference)


def test_another_activation_than_the_files_say_is_refused(tmp_path):
    write_nano(tmp_path / "source", activation_function="gelu")
    with pytest.raises(ConfigError, match=r"^activation: got 'gelu_tanh', allowed is gelu_erf, by config\.json's "):
        load_foreign(tmp_path / "source", ADDITION, 7, activation="gelu_tanh")


def test_a_model_without_the_field_is_one_by_tanh():
    assert ModelConfig().activation == "gelu_tanh"
    with pytest.raises(ConfigError, match=r"^activation: got 'gelu', allowed is gelu_tanh \| gelu_erf$"):
        ModelConfig(activation="gelu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt_bigcode"}, "config.json model_type: got 'gpt_bigcode', allowed is 'gpt2'"),
        ({"model_type": None}, "config.json model_type: got None, allowed is 'gpt2'"),
        ({"quantization_config": {"bits": 4}}, "config.json quantization_config: got {'bits': 4}, allowed is None"),
        ({"pruned_heads": {"0": [1]}}, "config.json pruned_heads: got {'0': [1]}, allowed is None | {}"),
        ({"activation_function": None}, "config.json activation_function: got None, allowed is gelu_new | "),
        ({"activation_function": ["gelu"]}, "config.json activation_function: got ['gelu'], allowed is gelu_new | "),
        ({"hidden_size": 32}, "config.json hidden_size: got 32, allowed is 16, by another name of it in config.json"),
        ({"n_head": 3}, "width: got 16, allowed is a multiple of num_heads = 3"),
        ({"n_head": True}, "config.json n_head: got True, allowed is an integer"),
        ({"n_layer": 1}, "source: got 'tensors h.1."),
        ({"n_layer": 3}, "source: got 'no tensors h.2."),
        ({"block_size": BLOCK + 1}, f"wpe.weight: got ({BLOCK}, 16), allowed is ({BLOCK + 1}, 16), by config.json"),
        ({"block_size": BLOCK - 1}, f"wpe.weight: got ({BLOCK}, 16), allowed is ({BLOCK - 1}, 16), by config.json"),
        ({"vocab_size": SIZES["vocab_size"] - 1}, "wte.weight: got (48, 16), allowed is (47, 16), by config.json"),
        ({"bias": None}, "config.json bias: got None, allowed is True | False"),
        ({"bias": "yes"}, "config.json bias: got 'yes', allowed is True | False"),
    ],
)
def test_settings_that_are_wrong_or_of_another_model_are_named(change, said, tmp_path):
    write_nano(tmp_path / "source", **change)
    with pytest.raises(ConfigError) as caught:
        load_foreign(tmp_path / "source", ADDITION, 7)
    assert str(caught.value).startswith(said)


def test_longer_names_of_the_sizes_are_read(tmp_path):
    write_nano(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    described = json.loads(path.read_text())
    longer = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    for long, short in (longer | {"max_position_embeddings": "block_size"}).items():
        described[long] = described.pop(short)
    path.write_text(json.dumps(described))
    assert load_foreign(tmp_path / "source", ADDITION, 7).config.block_size == BLOCK


def test_positions_are_as_many_as_the_own_code_of_each_layout_reads(tmp_path):
    write_nano(tmp_path / "nano", model_type="gpt2", n_positions=1024)
    write_transformers(tmp_path / "transformers")
    path = tmp_path / "transformers" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_size": 1024}))
    for name in ("nano", "transformers"):
        assert load_foreign(tmp_path / name, ADDITION, 7).config.block_size == BLOCK


@pytest.mark.parametrize("part", ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", "ln_f"])
@pytest.mark.parametrize("says", [True, False])
def test_biases_of_some_parts_alone_are_refused_by_name(part, says, tmp_path):
    write_nano(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    biases = {name: x for name, x in load_file(path).items() if f"{part}.bias" in name}
    save_file({name: x for name, x in load_file(path).items() if name not in biases}, path)
    if not says:
        config = tmp_path / "source" / "config.json"
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "bias"}))
    with pytest.raises(ConfigError, match=r"^source: got '(no )?tensors \S+\.bias") as caught:
        load_foreign(tmp_path / "source", ADDITION, 7)
    assert says is False or f"{part}.bias" in str(caught.value)
    assert WIDTH in {len(x) for x in biases.values()} or part in ("attn.c_attn", "mlp.c_fc")
