"""Models of transformers and nanoGPT with random weights, as their own code writes them, and their logits."""

import json

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from ckl_jax.model import forward
from ckl_jax.tasks import alphabet

WIDTH, HEADS, BLOCK, EXTRA = 16, 2, 300, 7
THEIRS = "".join(reversed(alphabet.VOCABULARY))
SIZES = {"n_layer": 2, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": len(THEIRS) + EXTRA}


class NanoBlock(nn.Module):
    def __init__(self, bias, approximate):
        super().__init__()
        self.gelu = nn.GELU(approximate)
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
        return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, bias=True, approximate="tanh"):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(SIZES["vocab_size"], WIDTH),
                "wpe": nn.Embedding(BLOCK, WIDTH),
                "h": nn.ModuleList([NanoBlock(bias, approximate) for _ in range(2)]),
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


def write_nano(directory, bias=True, pytorch=False, **settings):
    """nanoGPT's weights with a config.json that says the activation too; returns what computes logits."""
    directory.mkdir(parents=True)
    model = randomize(NanoGPT(bias))
    state = {f"_orig_mod.{name}": x.clone() for name, x in model.state_dict().items()}
    if pytorch:
        torch.save({"model": state}, directory / "ckpt.pt")
    else:
        save_file(state, directory / "model.safetensors")
    described = {**SIZES, "block_size": BLOCK, "bias": bias, "dropout": 0.2, "activation_function": "gelu_new"}
    (directory / "config.json").write_text(json.dumps(described | settings))
    write_tokenizer(directory)
    return lambda tokens: model(tokens)


def write_transformers(directory, model=None, **settings):
    directory.mkdir(parents=True)
    if model is None:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | {"n_positions": BLOCK} | settings))
    randomize(model).save_pretrained(directory)
    write_tokenizer(directory)
    return lambda tokens: model(tokens).logits


def to_theirs(tokens):
    return torch.tensor([[THEIRS.index(alphabet.VOCABULARY[token]) for token in row] for row in tokens])


COLUMNS = [THEIRS.index(character) for character in alphabet.VOCABULARY] + list(range(len(THEIRS), SIZES["vocab_size"]))
_forward = jax.jit(forward, static_argnums=0)


def require_same_logits(model, reference):
    """Asserts that a converted model has the logits of its source, for random tokens."""
    tokens = np.random.default_rng(0).integers(0, alphabet.VOCAB_SIZE, (2, 50))
    with torch.no_grad():
        expected = reference(to_theirs(tokens)).numpy()[..., COLUMNS]
    assert expected.std() > 0.5
    found = _forward(model.config, model.params, tokens).logits_BxTxV
    np.testing.assert_allclose(found, expected, atol=1e-4)
