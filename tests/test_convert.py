"""Checkpoints of transformers and nanoGPT: the same logits and greedy text, exact round trips, refusals by name."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hostile import CANARY, PICKLE
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from ckl_jax import alphabet, critical, discovery, tasks
from ckl_jax.certainty import certainty
from ckl_jax.checkpoint import fingerprint, load_model, save_model
from ckl_jax.columns import ADDITION, SUBTRACTION
from ckl_jax.config import ConfigError
from ckl_jax.convert import ConvertConfig, main
from ckl_jax.evaluate import judge
from ckl_jax.gpt2_files import load_foreign
from ckl_jax.model import forward
from experiments import figure1_scratchpad as figure1
from experiments import figure5_certainty_colors as figure5

WIDTH, HEADS, BLOCK, EXTRA = 16, 2, 300, 7
THEIRS = "".join(reversed(alphabet.VOCABULARY))
SIZES = {"n_layer": 2, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": len(THEIRS) + EXTRA}


class NanoBlock(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.attn.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.attn.register_buffer("bias", torch.ones(1, 1, BLOCK, BLOCK).tril())
        self.mlp.c_fc = nn.Linear(WIDTH, 4 * WIDTH, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * WIDTH, WIDTH, bias=bias)

    def forward(self, x):
        heads = [
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        ]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.attn.c_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(functional.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(SIZES["vocab_size"], WIDTH),
                "wpe": nn.Embedding(BLOCK, WIDTH),
                "h": nn.ModuleList([NanoBlock(bias) for _ in range(2)]),
                "ln_f": nn.LayerNorm(WIDTH, bias=bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, SIZES["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens):
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def randomize(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=3 if "wpe" in name else 0.5)
    return model.eval()


def write_tokenizer(directory):
    ids = {{"\n": "Ċ", " ": "Ġ"}.get(character, character): row for row, character in enumerate(THEIRS)}
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": ids}, "added_tokens": []}))


def write_nano(directory, bias=True, pytorch=False):
    directory.mkdir(parents=True)
    model = randomize(NanoGPT(bias))
    state = {f"_orig_mod.{name}": x.clone() for name, x in model.state_dict().items()}
    if pytorch:
        torch.save({"model": state}, directory / "ckpt.pt")
    else:
        save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**SIZES, "block_size": BLOCK, "bias": bias, "dropout": 0.2}))
    write_tokenizer(directory)
    return lambda tokens: model(tokens)


def write_transformers(directory):
    directory.mkdir(parents=True)
    model = randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, n_positions=BLOCK)))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return lambda tokens: model(tokens).logits


WRITERS = {
    "transformers": write_transformers,
    "nanoGPT": write_nano,
    "nanoGPT without biases": lambda directory: write_nano(directory, bias=False),
    "nanoGPT of PyTorch": lambda directory: write_nano(directory, bias=False, pytorch=True),
}


def to_theirs(tokens):
    return torch.tensor([[THEIRS.index(alphabet.VOCABULARY[token]) for token in row] for row in tokens])


@pytest.mark.parametrize("kind", WRITERS)
def test_logits_and_greedy_text_equal_those_of_the_source_character_by_character(kind, tmp_path):
    reference = WRITERS[kind](tmp_path / "source")
    model = load_foreign(tmp_path / "source", ADDITION, 7)
    assert model.config.use_bias == ("without" not in kind and "PyTorch" not in kind)
    columns = [THEIRS.index(character) for character in alphabet.VOCABULARY]
    columns += range(len(THEIRS), SIZES["vocab_size"])
    run = jax.jit(lambda tokens: forward(model.config, model.params, tokens).logits_BxTxV)
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 50))
    with torch.no_grad():
        expected = reference(to_theirs(tokens)).numpy()[..., columns]
        assert expected.std() > 0.5
        np.testing.assert_allclose(run(tokens), expected, atol=1e-4)

        ours = np.zeros((1, 30), np.int32)
        prompt = alphabet.encode(ADDITION.prompt_text(12, 7))
        ours[0, : len(prompt)] = prompt
        theirs = ours.copy()
        for end in range(len(prompt), 30):
            ours[0, end] = np.asarray(run(ours))[0, end - 1, : alphabet.VOCAB_SIZE].argmax()
            logits_V = reference(to_theirs(theirs[:, :end]))[0, -1].numpy()[columns]
            theirs[0, end] = logits_V[: alphabet.VOCAB_SIZE].argmax()
    assert (ours == theirs).all()
    assert len(set(ours[0, len(prompt) :])) > 1


def test_the_certainty_and_the_rollout_are_those_of_the_whole_vocabulary(tmp_path):
    reference = write_nano(tmp_path / "source")
    main(ConvertConfig(str(tmp_path / "source"), tmp_path / "ours", digits=1))
    model = load_model(tmp_path / "ours")
    tokens = alphabet.encode("Input:\n12+7")[None].astype(np.int32)
    with torch.no_grad():
        log_p = torch.log_softmax(reference(to_theirs(tokens)), -1)
        expected = 1 + (log_p.exp() * log_p).sum(-1) / np.log(SIZES["vocab_size"])
    found = certainty(jax.jit(lambda x: forward(model.config, model.params, x).logits_BxTxV)(jnp.array(tokens)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert judge(model, [tasks.Problem(1, 2)], 1).tolist() == [0.0]


@pytest.mark.parametrize(("use_bias", "task"), [(True, ADDITION), (False, SUBTRACTION)])
def test_ours_to_transformers_and_back_is_exact(use_bias, task, tmp_path):
    write_nano(tmp_path / "source", bias=use_bias)
    model = load_foreign(tmp_path / "source", task, 5)
    save_model(tmp_path / "ours", model, {})
    main(ConvertConfig(str(tmp_path / "ours"), tmp_path / "exported", to="transformers"))
    main(ConvertConfig(str(tmp_path / "exported"), tmp_path / "back"))
    back = load_model(tmp_path / "back")
    assert fingerprint(back.params) == fingerprint(load_model(tmp_path / "ours").params)
    assert back._replace(params=None) == model._replace(params=None)
    reference, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values())
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        expected = reference.eval()(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(lambda x: forward(model.config, model.params, x).logits_BxTxV)(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transformer.h.1.mlp.c_fc.weight": None}, r"source: got 'no tensors h\.1\.mlp\.c_fc\.weight'"),
        ({"transformer.wpe.weight": torch.zeros(5, WIDTH)}, r"wpe\.weight: got \(5, 16\), allowed is \(300, 16\)"),
        ({"transformer.h.0.attn.c_attn.weight": torch.zeros(3, 3)}, r"h\.0\.attn\.c_attn\.weight: got \(3, 3\)"),
        ({"transformer.h.9.ln_1.weight": torch.zeros(3)}, r"source: got 'tensors h\.9\.ln_1\.weight'"),
        ({"transformer.ln_f.weight": torch.full((WIDTH,), torch.nan)}, r"ln_f\.weight: got 'NaN or infinity'"),
        ({"transformer.ln_f.weight": torch.ones(WIDTH, dtype=torch.int32)}, r"ln_f\.weight: got 'I32'"),
        ({"lm_head.weight": torch.zeros(SIZES["vocab_size"], WIDTH)}, r"lm_head\.weight: got 'other values"),
    ],
)
def test_tensors_that_cannot_be_ours_are_named(change, expected, tmp_path):
    write_nano(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    state = {name.removeprefix("_orig_mod."): x for name, x in load_file(path).items()} | change
    save_file({name: x for name, x in state.items() if x is not None}, path)
    with pytest.raises(ConfigError, match=expected):
        load_foreign(tmp_path / "source", ADDITION, 7)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 50257}, r"config\.json vocab_size: got 50257, allowed is 41\.\.256"),
        ({"n_embd": 8192}, r"config\.json: got '\d+ weights', allowed is at most"),
        ({"n_layer": None}, r"config\.json n_layer: got None"),
        ({"activation_function": "relu"}, r"config\.json activation_function: got 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, r"config\.json layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"config\.json scale_attn_by_inverse_layer_idx"),
        ({"bias": False}, r"bias: got 'other numbers than 0'"),
    ],
)
def test_settings_that_our_model_lacks_are_named(change, expected, tmp_path):
    write_nano(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=expected):
        load_foreign(tmp_path / "source", ADDITION, 7)


def test_a_reduced_vocabulary_has_the_logits_of_our_characters(tmp_path):
    reference = write_transformers(tmp_path / "source")
    main(ConvertConfig(str(tmp_path / "source"), tmp_path / "ours", vocabulary="ours", digits=1))
    model = load_model(tmp_path / "ours")
    assert model.config.vocab_size == alphabet.VOCAB_SIZE
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 20))
    columns = [THEIRS.index(character) for character in alphabet.VOCABULARY]
    with torch.no_grad():
        expected = reference(to_theirs(tokens)).numpy()[..., columns]
    found = jax.jit(lambda x: forward(model.config, model.params, x).logits_BxTxV)(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tokens_that_are_none_of_ours_are_shown_as_unknown(tmp_path):
    write_nano(tmp_path / "source")
    model = load_foreign(tmp_path / "source", ADDITION, 1)
    problem = tasks.Problem(12, 7)
    assert alphabet.UNKNOWN in figure1.measure(model, problem.a, problem.b, temperature=2.0)["text"]
    found = critical.sample(model, [problem] * 4, 2, critical.Sampling(temperature=2.0))
    shown = figure5.scratchpad(ADDITION, found, problem, 0)
    assert len(shown.text) == found.mask_BxT[0].sum()
    assert alphabet.UNKNOWN in "".join(found.text(row) for row in range(4))
    probes = discovery.choose(found, discovery.Rule(), seed=0)
    beyond = [probe for probe in probes if probe["own_token"] >= alphabet.VOCAB_SIZE]
    assert {probe["own"] for probe in beyond} == {alphabet.UNKNOWN}


def test_our_characters_that_a_vocabulary_lacks_are_named(tmp_path):
    write_nano(tmp_path / "source")
    ids = {character: row for row, character in enumerate(THEIRS) if character not in "<%"}
    (tmp_path / "source" / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(ConfigError, match=re.escape("['%', '<']")):
        load_foreign(tmp_path / "source", ADDITION, 7)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nano(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(PICKLE)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged"):
        load_foreign(tmp_path / "source", ADDITION, 7)
    assert not (tmp_path / CANARY).exists()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    write_nano(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match="the extra convert installed"):
        load_foreign(tmp_path / "source", ADDITION, 7)


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a snapshot needs: a model's list of files, and each of them."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        source, name = self.server.source, self.path.split("?")[0].rpartition("/")[2]
        commit = "0" * 40
        if self.path.startswith("/api/models/"):
            files = [{"rfilename": path.name} for path in source.iterdir()]
            content, self.path = json.dumps({"id": "a/b", "sha": commit, "siblings": files}).encode(), ""
            if "/tree/" in name or "tree" in self.requestline:
                entries = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}
                    for path in source.iterdir()
                ]
                content = json.dumps(entries).encode()
        elif (source / name).is_file():
            content = (source / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for header, value in (("Content-Length", len(content)), ("ETag", f'"{name}"'), ("X-Repo-Commit", commit)):
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_a_model_is_had_by_name_from_a_stand_in_of_the_hub(tmp_path):
    write_nano(tmp_path / "source", bias=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.source = tmp_path / "source"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "ckl_jax.convert", "--source", "lecraquito/gpt2_reduced_vocab_FT_7digits"]
    done = subprocess.run([*command, "--out", tmp_path / "ours"], env=environment, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "ours")
    assert model.max_pretrain_digits == 7
    assert fingerprint(model.params) == fingerprint(load_foreign(tmp_path / "source", ADDITION, 7).params)
