"""What we compare with, plainly in PyTorch: a nanoGPT-style model, its training step, and transformers' generate.

Importing this needs the ``bench`` extra. Everything runs in eager mode, in float32, on the device that JAX uses.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np

from ckl_jax import tasks
from ckl_jax.config import ModelConfig, PretrainConfig
from ckl_jax.errors import ConfigError
from ckl_jax.model import LAYER_NORM_EPSILON
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.problems import Problems

try:
    import torch
    import transformers
    from torch import nn
    from torch.nn import functional
except ImportError as error:
    raise ConfigError(f"{error.name}: not installed; the comparisons need the extra: pip install '.[bench]'") from error

_KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def device() -> torch.device:
    """Where the baselines compute: a GPU if JAX computes on one, else the CPU."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def _arrays(params: Any) -> dict[str, torch.Tensor]:
    """Flax parameters by path, ``h_0/c_attn/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(params["params"])
    return {"/".join(str(key.key) for key in path): torch.tensor(np.array(leaf)) for path, leaf in leaves}


def load_flax(module: nn.Module, params: Any) -> None:
    """Copies Flax parameters into a module whose names are the Flax ones, layers ``h_0`` being ``h.0``."""
    state = {}
    for path, array in _arrays(params).items():
        *modules, kind = path.split("/")
        name = ".".join(part.replace("h_", "h.", 1) if part.startswith("h_") else part for part in modules)
        state[f"{name}.{_KINDS[kind]}"] = array.T if kind == "kernel" else array
    module.load_state_dict(state)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, bias = config.width, config.use_bias
        self.num_heads = config.num_heads
        self.gelu = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        self.ln_1 = nn.LayerNorm(width, LAYER_NORM_EPSILON, bias=bias)
        self.c_attn = nn.Linear(width, 3 * width, bias)
        self.c_proj = nn.Linear(width, width, bias)
        self.ln_2 = nn.LayerNorm(width, LAYER_NORM_EPSILON, bias=bias)
        self.c_fc = nn.Linear(width, 4 * width, bias)
        self.mlp_c_proj = nn.Linear(4 * width, width, bias)

    def forward(self, x_BxTxD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BxTxD.shape
        heads = (batch, length, 3, self.num_heads, width // self.num_heads)
        qkv_3xBxHxTxK = self.c_attn(self.ln_1(x_BxTxD)).view(heads).permute(2, 0, 3, 1, 4)
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = qkv_3xBxHxTxK.unbind(0)
        attended_BxHxTxK = functional.scaled_dot_product_attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, is_causal=True)
        x_BxTxD = x_BxTxD + self.c_proj(attended_BxHxTxK.transpose(1, 2).reshape(x_BxTxD.shape))
        h_BxTx4D = self.gelu(self.c_fc(self.ln_2(x_BxTxD)))
        return x_BxTxD + self.mlp_c_proj(h_BxTx4D)


class GPT(nn.Module):
    """GPT-2 as nanoGPT writes it (pre-LN, fused causal attention, tied head), the model of the authors' code.

    Rows start at position 0 and may be padded on the right.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.block_size, config.width)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.width, LAYER_NORM_EPSILON, bias=config.use_bias)

    @classmethod
    def from_params(cls, config: ModelConfig, params: Any) -> GPT:
        """The model with the Flax parameters of ``ckl_jax.model.GPT2``, on the device of the comparison."""
        model = cls(config)
        load_flax(model, params)
        return model.to(device())

    def forward(self, tokens_BxT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T, V] and last hidden states [B, T, D]."""
        x_BxTxD = self.wte(tokens_BxT) + self.wpe(torch.arange(tokens_BxT.shape[1], device=tokens_BxT.device))
        for block in self.h:
            x_BxTxD = block(x_BxTxD)
        hidden_BxTxD = self.ln_f(x_BxTxD)
        return functional.linear(hidden_BxTxD, self.wte.weight), hidden_BxTxD


def make_adamw(config: PretrainConfig, model: GPT) -> torch.optim.AdamW:
    """AdamW in PyTorch's fused implementation, decaying the matrices alone, at the peak learning rate."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (0.9, config.adam_beta2), fused=True)


def pretrain_step(
    model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[np.ndarray, np.ndarray], clip_norm: float = 1.0
) -> float:
    """One step of next-character training: cross-entropy, clipped global norm, optimizer step.

    Args:
      batch: inputs and targets, integers [B, T].

    Returns:
      the loss in nats.
    """
    inputs_BxT, targets_BxT = (torch.tensor(x, dtype=torch.long, device=device()) for x in batch)
    logits_BxTxV, _ = model(inputs_BxT)
    loss = functional.cross_entropy(logits_BxTxV.flatten(0, 1), targets_BxT.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def to_transformers(config: ModelConfig, params: Any) -> transformers.GPT2LMHeadModel:
    """The same model as transformers' GPT-2, on the device of the comparison. Missing biases are zero there."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            activation_function="gelu_new" if config.activation == "gelu_tanh" else "gelu",
            layer_norm_epsilon=LAYER_NORM_EPSILON,
            bos_token_id=alphabet.PAD_ID,
            eos_token_id=alphabet.PAD_ID,
            pad_token_id=alphabet.PAD_ID,
        )
    ).eval()
    names = {"c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_c_proj": "mlp.c_proj"}
    state = {name: torch.zeros_like(x) for name, x in model.state_dict().items() if name.endswith("bias")}
    for path, array in _arrays(params).items():
        *layer, module, kind = path.split("/")
        prefix = "".join(part.replace("h_", "h.", 1) + "." for part in layer) + names.get(module, module)
        state[f"transformer.{prefix}.{_KINDS[kind]}"] = array
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    return model.to(device())


class _EndOfEpisode(transformers.StoppingCriteria):
    """Marks the rows whose episode has ended: at the newline after the line that follows ``</scratch>``."""

    def __init__(self, batch: int):
        self.mark = torch.tensor(alphabet.encode(tasks.RESULT_MARK), dtype=torch.long, device=device())
        self.in_result_B = torch.zeros(batch, dtype=torch.bool, device=device())

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        ended_B = self.in_result_B & (input_ids[:, -1] == alphabet.NEWLINE_ID)
        self.in_result_B = self.in_result_B | (input_ids[:, -len(self.mark) :] == self.mark).all(dim=1)
        return ended_B


def generate(model: Any, problems: Problems, max_length: int, temperature: float | None, seed: int) -> np.ndarray:
    """Answers by transformers' ``generate`` with its KV cache, all problems in one batch, padded on the left.

    An episode ends as ours does: at the newline after the result line, at a padding token or at ``max_length``; the
    call returns as soon as all have.

    Args:
      model: from ``to_transformers``.
      temperature: of sampling from the whole distribution; None takes the likeliest character.

    Returns:
      answers [B, max_length], ``PAD_ID`` after the end.
    """
    prompts_BxP = np.asarray(problems.prompts_BxP).astype(np.int64)
    batch, num_prompt = prompts_BxP.shape
    padding_B = num_prompt - np.asarray(problems.prompt_lengths_B)
    attended_BxP = (np.arange(num_prompt)[None] >= padding_B[:, None]).astype(np.int64)
    sampling = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens_BxL = model.generate(
            torch.tensor(prompts_BxP, device=device()),
            attention_mask=torch.tensor(attended_BxP, device=device()),
            max_new_tokens=max_length,
            do_sample=temperature is not None,
            stopping_criteria=transformers.StoppingCriteriaList([_EndOfEpisode(batch)]),
            use_cache=True,
            **sampling,
        )
    answers = tokens_BxL[:, num_prompt:].cpu().numpy()
    return np.pad(answers, ((0, 0), (0, max_length - answers.shape[1])), constant_values=alphabet.PAD_ID)
