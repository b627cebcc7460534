"""Files of weights in every form that transformers, nanoGPT and wrappers write them, and what is refused of them."""

import argparse
import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from foreign_models import BLOCK, SIZES, WIDTH, NanoGPT, randomize, write_nano, write_transformers
from hostile import CANARY, Canary
from safetensors.torch import load_file, save_file, save_model

from ckl_jax.checkpoint.gpt2 import load_foreign
from ckl_jax.checkpoint.store import fingerprint
from ckl_jax.errors import ConfigError
from ckl_jax.tasks.columns import ADDITION

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


@pytest.fixture
def source(tmp_path):
    write_nano(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def state(source):
    """The tensors of ``source`` by nanoGPT's names, its file being gone."""
    found = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    return {name.removeprefix("_orig_mod."): x for name, x in found.items()}


@pytest.fixture
def expected(source):
    return fingerprint(load_foreign(source, ADDITION, 7).params)


def converted(source):
    return fingerprint(load_foreign(source, ADDITION, 7).params)


def refused(source, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_foreign(source, ADDITION, 7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("kept", ["lm_head.weight", "wte.weight"])
def test_a_tied_tensor_may_be_kept_once_under_either_name(kept, prefix, metadata, source, expected, state):
    named = {name.replace("transformer.", prefix): x for name, x in state.items()}
    dropped = f"{prefix}wte.weight" if kept == "lm_head.weight" else "lm_head.weight"
    del named[dropped]
    other = kept if kept == "lm_head.weight" else f"{prefix}{kept}"
    save_file(named, source / "model.safetensors", {dropped: other, "format": "pt"} if metadata else None)
    assert converted(source) == expected


def test_what_save_model_of_safetensors_writes_is_read(source, expected, state):
    model = randomize(NanoGPT())
    save_model(model, source / "model.safetensors")
    assert len(load_file(source / "model.safetensors")) == len(state) - 1
    assert converted(source) == expected


def test_layers_that_are_kept_once_are_read_by_the_metadata(source, state):
    model = randomize(NanoGPT())
    model.transformer["h"][1] = model.transformer["h"][0]
    save_model(model, source / "model.safetensors")
    params = load_foreign(source, ADDITION, 7).params["params"]
    assert fingerprint(params["h_0"]) == fingerprint(params["h_1"])


@pytest.mark.parametrize("save", ["safetensors", "bin"])
def test_an_untied_head_is_refused_and_not_dropped(save, source, state):
    state["lm_head.weight"] = state["lm_head.weight"] * 1.001
    if save == "bin":
        torch.save(state, source / "pytorch_model.bin")
    else:
        save_file(state, source / "model.safetensors")
    refused(source, r"^lm_head\.weight: got 'other values than wte\.weight \(an untied head\)', allowed is the same")


PREFIXES = ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "model.module._orig_mod."]
PREFIXES += ["_forward_module.model._orig_mod.", "_fsdp_wrapped_module.", "policy.", "module.policy.net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_are_read_without_what_wrappers_put_before_them(prefix, source, expected, state):
    head = state.pop("lm_head.weight")
    body = {name.removeprefix("transformer."): x for name, x in state.items()}
    for inner in ("", "transformer.", "model.transformer._orig_mod."):
        for outer in (prefix, prefix + inner) if "policy" not in prefix else (prefix,):
            named = {f"{prefix}{inner}{name}": x for name, x in body.items()} | {f"{outer}lm_head.weight": head}
            save_file(named, source / "model.safetensors")
            assert converted(source) == expected


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_names_are_read_without_the_wrapper_of_each_layer(wrapper, source, expected, state):
    named = {re.sub(r"\.(h\.\d+)\.", rf".\1.{wrapper}.", name): x for name, x in state.items()}
    assert named.keys() != state.keys()
    save_file(named, source / "model.safetensors")
    assert converted(source) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state | {f"teacher.{name}": x.clone() for name, x in state.items()},
            r"^source: got 'tensors under no prefix, teacher\.', allowed is those of one model alone",
        ),
        (
            lambda state: {
                f"{side}.{name}": x + offset for name, x in state.items() for side, offset in (("a", 0), ("b", 1))
            },
            r"^\S+: got 'different tensors a\.\S+ and b\.\S+', allowed is one",
        ),
        (
            lambda state: state | {"module.transformer.ln_f.weight": state["transformer.ln_f.weight"] + 1},
            r"^ln_f\.weight: got 'different tensors \S*transformer\.ln_f\.weight and \S*transformer\.ln_f\.weight'",
        ),
        (lambda state: state | {"v_head.weight": torch.zeros(3)}, r"^source: got 'tensors v_head\.weight'"),
        (lambda state: state | {"lm_head.bias": torch.zeros(3)}, r"^source: got 'tensors lm_head\.bias'"),
    ],
)
def test_tensors_of_more_than_one_gpt2_are_refused(change, said, source, state):
    save_file(change(state), source / "model.safetensors")
    refused(source, said)


def shard(source, state, kind, parts=3):
    names = sorted(state)
    found = {}
    for part in range(parts):
        file = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{part + 1:05}-of-{parts:05}.{kind}"
        some = {name: state[name] for name in names[part::parts]}
        save_file(some, source / file) if kind == "safetensors" else torch.save(some, source / file)
        found |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 1}, "weight_map": found}
    (source / INDEX[kind]).write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("kind", INDEX)
def test_shards_are_read_by_their_index(kind, source, expected, state):
    shard(source, state, kind)
    assert converted(source) == expected
    assert converted(source / INDEX[kind]) == expected


def test_shards_that_transformers_writes_are_read(tmp_path):
    write_transformers(tmp_path / "whole")
    model = write_transformers(tmp_path / "source").__closure__[0].cell_contents
    (tmp_path / "source" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "source", max_shard_size="10KB")
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 1
    assert converted(tmp_path / "source") == converted(tmp_path / "whole")


@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: {"metadata": {}}, r"^source: got '\S+\.index\.json without weight_map'"),
        (lambda index: {"weight_map": {"a": 1}}, r"^source: got '\S+\.index\.json without weight_map'"),
        (lambda index: {"weight_map": ["a"]}, r"^source: got '\S+\.index\.json without weight_map'"),
        (lambda index: {"weight_map": {}}, r"^source: got '\S+\.index\.json without weight_map'"),
        (
            lambda index: {"weight_map": {"a": "../secret.bin"}},
            r"^source: got '\.\./secret\.bin in \S+', allowed is ",
        ),
        (lambda index: {"weight_map": {"a": "/secret.bin"}}, r"^source: got '/secret\.bin in \S+', allowed is names"),
        (lambda index: {"weight_map": {"a": "config.json"}}, r"^source: got 'config\.json in \S+', allowed is names"),
        (
            lambda index: {"weight_map": {"a": "b.bin"}},
            r"^source: got 'no file b\.bin', allowed is all 1 shards of ",
        ),
        (
            lambda index: {"weight_map": index["weight_map"] | {"z": next(iter(index["weight_map"].values()))}},
            r"^source: got 'shards without z', allowed is all that \S+ names",
        ),
    ],
)
def test_an_index_that_is_not_of_its_shards_is_refused(kind, change, said, source, state):
    index = shard(source, state, kind)
    (source / INDEX[kind]).write_text(json.dumps(change(index)))
    refused(source, said)


def test_a_tensor_in_two_shards_is_refused(source, state):
    index = shard(source, state, "bin")
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["lm_head.weight"])
    torch.save(torch.load(source / other) | {"lm_head.weight": state["lm_head.weight"]}, source / other)
    refused(source, r"^source: got 'lm_head\.weight in two shards'")


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def save(state, source, kind):
    save_file(state, source / "model.safetensors") if kind == "safetensors" else torch.save(
        state, source / "pytorch_model.bin"
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_of_floats_is_read_to_the_nearest_float32(dtype, kind, source, state):
    name = "transformer.h.1.mlp.c_fc.weight"
    cast = {name: x.double().to(getattr(torch, dtype)) for name, x in state.items()}
    if dtype == "float64":
        cast[name] = cast[name] + 1e-12
    save(cast, source, kind)
    found = load_foreign(source, ADDITION, 7).params["params"]["h_1"]["c_fc"]["kernel"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, cast[name].double().numpy().T.astype(np.float32))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64"])
def test_weights_that_are_no_floats_are_refused_and_masks_of_any_type_left_out(dtype, kind, source, expected, state):
    cast = {name: x.to(getattr(torch, dtype)) if name.endswith(".attn.bias") else x for name, x in state.items()}
    cast["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4).to(getattr(torch, dtype))
    assert sum(x.dtype == getattr(torch, dtype) for x in cast.values()) == SIZES["n_layer"] + 1
    save(cast, source, kind)
    assert converted(source) == expected
    for name in ("transformer.ln_f.weight", "lm_head.weight", "transformer.h.0.ln_1.bias"):
        save(cast | {name: state[name].to(getattr(torch, dtype))}, source, kind)
        refused(source, rf"^{re.escape(name.removeprefix('transformer.'))}: got '\w+', allowed is floating point")


def nano_checkpoint(model, **changes):
    """What nanoGPT's train.py saves."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    args = {**SIZES, "block_size": BLOCK, "bias": True, "dropout": 0.0}
    config = {"out_dir": "out", "eval_interval": 2000, "compile": True, "learning_rate": 6e-4, "dataset": "addition"}
    state = {f"_orig_mod.{name}": x for name, x in model.state_dict().items()}
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": config,
    } | changes


def test_what_nanogpt_saves_needs_no_config_json(source, state):
    (source / "config.json").unlink()
    model = NanoGPT()
    torch.save(nano_checkpoint(model), source / "ckpt.pt")
    found = load_foreign(source, ADDITION, 7, activation="gelu_erf")
    assert (found.config.block_size, found.config.num_layers, found.config.activation) == (BLOCK, 2, "gelu_erf")
    np.testing.assert_array_equal(
        found.params["params"]["wpe"]["embedding"], model.transformer["wpe"].weight.detach().numpy()
    )
    refused(source, r"^activation: got None, allowed is gelu_tanh \(.*14 June 2023.*\) or gelu_erf \(.*\)")


@pytest.mark.parametrize("setting", [{"residual": "parallel"}, {"activation": "relu"}, {"logit_softcap": 30.0}])
def test_a_setting_that_nanogpt_does_not_have_is_refused(source, state, setting):
    checkpoint = nano_checkpoint(NanoGPT())
    checkpoint["model_args"] |= setting
    torch.save(checkpoint, source / "ckpt.pt")
    refused(source, rf"^model_args: got '{next(iter(setting))}', allowed is .*n_layer")


def test_a_config_json_beside_nanogpts_file_must_agree_with_it(source, state):
    checkpoint = nano_checkpoint(NanoGPT())
    checkpoint["model_args"]["n_head"] = 4
    torch.save(checkpoint, source / "ckpt.pt")
    refused(source, r"^config\.json n_head: got 2, allowed is 4, by nanoGPT's model_args")


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", "model"])
def test_trainers_files_hold_the_tensors_below_a_name(container, source, expected, state):
    torch.save({container: state, "epoch": 3, "callbacks": {"a": [1]}}, source / "last.ckpt")
    assert converted(source / "last.ckpt") == expected


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda state: Canary(), r"is damaged, or wants to run \S+, and nothing is unpickled; allowed is what"),
        (lambda state: {**state, "args": Canary()}, "is damaged, or wants to run"),
        (lambda state: {"model": state, "args": argparse.Namespace(a=1)}, r"wants to run argparse\.Namespace,"),
        (lambda state: {"model": state, "loss": np.float64(1)}, r"is damaged, or wants to run numpy\."),
        (lambda state: torch.nn.Linear(2, 3), r"wants to run torch\.nn\.modules\.linear\.Linear,"),
        (lambda state: [1, 2], "with a list', allowed is tensors by name"),
        (lambda state: {"model": state, "state_dict": state}, "with several of model, state_dict, model_state_dict'"),
        (lambda state: {"model": {"a": 1}}, "with a dict', allowed is tensors by name"),
        (
            lambda state: state | {"lm_head.weight": torch.zeros(1).expand(10**9)},
            r"^lm_head\.weight: got '4000000000 bytes', allowed is at most \d+, those of",
        ),
        (
            lambda state: state | {"lm_head.weight": torch.eye(3).to_sparse()},
            r"^lm_head\.weight: got 'a torch\.sparse_coo tensor on cpu', allowed is floating",
        ),
    ],
)
def test_files_of_pytorch_with_more_than_tensors_are_refused(make, said, legacy, source, state, monkeypatch):
    monkeypatch.chdir(source)
    torch.save(make(state), source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    refused(source, said)
    assert not (source / CANARY).exists()


def test_an_archive_that_inflates_is_refused(source, state):
    torch.save(state, source / "plain.bin")
    with (
        zipfile.ZipFile(source / "plain.bin") as plain,
        zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
        packed.writestr("archive/data/bomb", bytes(10**7))
    refused(source, r"^source: got '\S+pytorch_model\.bin with \d+ bytes inside', allowed is at most its own \d+")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "ckpt.pt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 100, b"\x80\x02}q\x00.", bytes(1000)])
def test_files_that_are_no_weights_are_refused(name, content, source, state):
    (source / name).write_bytes(content)
    refused(source, rf"^source: (\S*{re.escape(name)} is damaged|got '\S+ with a)")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
@pytest.mark.parametrize("name", ["a.bin", "b.safetensors", "model.safetensors.index.json"])
def test_pipes_devices_and_directories_are_not_read_as_files(make, name, source, state):
    make(source / name)
    refused(source / name, r"^source: got '\S+', allowed is a directory with one of model\.safetensors, ")
    refused(source, r"^source: got '\S+source', allowed is a directory with one of model\.safetensors, ")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["a\nb", "h.0.\n.weight", "lm_head.weight\x00", "wte." * 10**5])
def test_names_that_are_no_line_are_refused_in_one(name, kind, source, state):
    save(state | {name: torch.zeros(3, dtype=torch.int32)}, source, kind)
    refused(source, r"^source: got .a tensor named .*, allowed is names of at most 200 printable characters$")


def test_matrices_of_both_layouts_give_the_same_model(source, expected, state):
    for name, x in state.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[name] = x.T.contiguous()
    assert state["transformer.h.0.attn.c_proj.weight"].shape == (WIDTH, WIDTH)
    save_file(state, source / "model.safetensors")
    assert converted(source) == expected
