"""Checkpoints of transformers' GPT-2 and of nanoGPT (the authors' released models) to ours, and ours to transformers.

    python -m ckl_jax.convert --source lecraquito/gpt2_reduced_vocab_FT_7digits --out models/N7
    python -m ckl_jax.convert --source nanoGPT/out --activation gelu_erf --tokenizer stoi.json --digits 7 --out N7
    python -m ckl_jax.convert --source models/N7 --out exported --to transformers

It needs the extra ``convert``. The first model is the authors' for N = 7. Fine-tune with ``--checkpoint models/N7``.

**What is read.** A directory or one file of it; weights as safetensors or PyTorch (``weights_only``), whole or in
shards. nanoGPT's files do not say which GELU they compute, so ``--activation`` does. ``--tokenizer`` names the
vocabulary if it lies elsewhere. A setting of transformers by which a model computes what ours cannot is refused by
name, and so is one that nanoGPT does not have.

**The vocabulary** keeps its size of 41 to 256, because J divides by log V. ``--vocabulary ours`` keeps our 41
characters alone, which the stock GPT-2 needs.

Models with random weights give the logits of the other side. The released models themselves have not been loaded:
there was no network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ckl_jax.checkpoint.gpt2 import described, load_foreign, save_transformers, signed
from ckl_jax.checkpoint.shipped import located
from ckl_jax.checkpoint.store import load_model, save_model
from ckl_jax.checkpoint.tensors import INDICES, SUFFIXES
from ckl_jax.checkpoint.token_files import ADDED, VOCABULARIES
from ckl_jax.config import Activation
from ckl_jax.errors import ConfigError, extra, naming, require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.runtime import cli, reading
from ckl_jax.runtime.hosts import write_json
from ckl_jax.runtime.paths import in_bucket, require_directory, resolved
from ckl_jax.tasks.catalog import TaskName, task_named

TOKENIZER_FILES = [*VOCABULARIES, *ADDED]
HUB_FILES = ["config.json", *TOKENIZER_FILES, *INDICES, "model*.safetensors", "pytorch_model*.bin", "ckpt.pt"]
AUTHORS = "lecraquito/"
UNFINISHED = "unfinished.json"
COMMAND = "python -m ckl_jax.convert"


@dataclass(frozen=True)
class ConvertCommand:
    """Between checkpoints of ours and of transformers or nanoGPT."""

    source: str = "lecraquito/gpt2_reduced_vocab_FT_7digits"
    """A directory, or a file of weights with config.json and vocabulary beside it; or, where there is a network, a
    model's name on the hub (owner/name)."""
    out: pathlib.Path = pathlib.Path("runs/converted")
    """Directory to write to: a new or empty one, or what the same command made before."""
    to: Literal["ours", "transformers"] = "ours"
    """`transformers`: the source is a checkpoint of ours."""
    vocabulary: Literal["whole", "ours"] = "whole"
    """`ours`: of the source's tokens only our 41 characters are kept, as from the stock GPT-2 with its 50,257."""
    tokenizer: str | None = None
    """Where the vocabulary is, if not beside the weights: a directory or a name on the hub, of which vocab.json or
    tokenizer.json is read, or a JSON file of ids by token. (The authors take that of their `_3digits` for all.)"""
    activation: Activation | None = None
    """The GELU of a model whose files do not say it. nanoGPT's do not: `gelu_tanh` is its new_gelu until 14 June 2023
    and that of the paper's authors, `gelu_erf` its nn.GELU() since then."""
    task: TaskName | None = None
    """What the model was pre-trained on; default: what config.json says, else addition."""
    digits: PositiveInt | None = None
    """N, digits that the model was pre-trained on; default: what config.json says, or the name (`_7digits`)."""

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("out", "source", "tokenizer"):
            value = getattr(self, name)
            local = value is None or not in_bucket(resolved(value, name))
            require(local, name, str(value), "a path of this machine" + ("" if name == "out" else " or owner/name"))
        require_directory(self.out, "out")
        for name in ("vocabulary", "tokenizer", "activation", "task", "digits"):
            value, default = getattr(self, name), getattr(ConvertCommand, name)
            unread = f"{default} with --to transformers, which takes our checkpoint as it is"
            require(self.to == "ours" or value == default, name, value, unread)
        other = resolved(self.out, "out") != resolved(self.source, "source")
        require(other, "out", str(self.out), "another than source")


def _local(source: str, field: str, files: list[str]) -> pathlib.Path:
    """The path that a word means, of a snapshot of the hub if it is no path and can be a name there."""
    path = resolved(source, field)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise ConfigError(f"{field}: got {source}, allowed is a directory, a file or owner/name ({error})") from error
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    is_name = is_name and path.suffix not in (*SUFFIXES, ".json") and not path.parent.exists()
    allowed = "a directory or file that exists, or owner/name on the hub where no directory here is named owner"
    require(is_name, field, source, allowed)
    hub = extra("huggingface_hub", field, "convert")
    try:
        snapshot = pathlib.Path(hub.snapshot_download(source, allow_patterns=files))
    except Exception as error:  # Of any kind: the network, the hub's refusals, its own checks of names.
        said = " ".join(f"{type(error).__name__}: {error}".split())[: reading.MOST_SAID]
        raise ConfigError(
            f"{field}: {source} is no directory here and could not be had from the hub ({said})"
        ) from error
    print(f"took {source} from the hub")
    return snapshot


def _require_free(out: pathlib.Path, description: str, made_by: dict[str, Any]) -> None:
    """Raises a ConfigError if something would be lost: if anything is there that the same command did not make."""
    if out.is_dir() and any(out.iterdir()):
        unfinished = (out / UNFINISHED).exists()
        path = out / (UNFINISHED if unfinished else description)
        earlier = reading.read_object(path, "out") if path.exists() else {}
        same = earlier.get("made_by") == (made_by if unfinished else signed(out, made_by))
        require(same, "out", f"{out}, which is not empty", "a new or empty directory, or what this command made before")


@contextlib.contextmanager
def _writing(out: pathlib.Path, made_by: dict[str, Any]) -> Iterator[None]:
    """Leaves word of what is being made as long as it is, so that the same command may begin again after a stop."""
    require_directory(out, "out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / UNFINISHED, {"made_by": made_by})
    yield
    (out / UNFINISHED).unlink()


def _to_transformers(command: ConvertCommand, made_by: dict[str, Any]) -> None:
    _require_free(command.out, "config.json", made_by)
    source = resolved(located(command.source), "source")
    allowed = "a checkpoint of ours (a directory with model.json, or a model that ships), for --to transformers"
    require((source / "model.json").is_file(), "source", command.source, allowed)
    with naming("source", instead_of="checkpoint"):
        model = load_model(source)
    with _writing(command.out, made_by):
        save_transformers(command.out, model, made_by)


def _to_ours(command: ConvertCommand, made_by: dict[str, Any]) -> None:
    _require_free(command.out, "model.json", made_by)
    source = _local(command.source, "source", HUB_FILES)
    allowed = "another's model: this is a checkpoint of ours already, for --checkpoint, or for --to transformers"
    require(not (source / "model.json").is_file(), "source", command.source, allowed)
    said = described(source)
    task = task_named(command.task or said.get("task", "addition"))
    digits: Any = command.digits
    if digits is None:
        digits = said.get("max_pretrain_digits")
    if digits is None:
        named = re.findall(r"_(\d{1,2})digits", pathlib.PurePath(command.source).name)
        require(len(named) == 1, "digits", None, "a number, for neither config.json nor the name says it once")
        digits = int(named[0])
    tokenizer = None if command.tokenizer is None else _local(command.tokenizer, "tokenizer", TOKENIZER_FILES)
    activation = command.activation
    if activation is None and command.source.startswith(AUTHORS) and "activation_function" not in said:
        activation = "gelu_tanh"  # new_gelu in their src/model_teaching_arithmetic.py.
    model = load_foreign(source, task, digits, command.vocabulary == "ours", activation, tokenizer)
    with _writing(command.out, made_by):
        save_model(command.out, model, made_by)
    sizes = {"weights": model.config.num_weights, "vocabulary": model.config.vocab_size}
    print(json.dumps({"task": task.name, "N": digits, **sizes, "activation": model.config.activation}))


def main(command: ConvertCommand) -> None:
    made_by = {"command": COMMAND, **{name: x for name, x in dataclasses.asdict(command).items() if name != "out"}}
    if command.to == "transformers":
        _to_transformers(command, made_by)
    else:
        _to_ours(command, made_by)
    print(f"wrote {command.out}")


if __name__ == "__main__":
    cli.run(main, ConvertCommand)
