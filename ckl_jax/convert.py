"""Checkpoints of transformers' GPT-2 and of nanoGPT (the authors' released models) to ours, and ours to transformers.

python -m ckl_jax.convert --source lecraquito/gpt2_reduced_vocab_FT_7digits --out models/N7
python -m ckl_jax.convert --source models/N7 --out exported --to transformers
"""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import dataclass
from typing import Any, Literal

from ckl_jax import cli, foreign
from ckl_jax.checkpoint import load_model, save_model
from ckl_jax.columns import TaskName, task_named
from ckl_jax.config import ConfigError, require
from ckl_jax.errors import extra, require_choice, require_types
from ckl_jax.gpt2_files import load_foreign, save_transformers
from ckl_jax.paths import in_bucket, require_directory, resolved
from ckl_jax.tensor_files import WEIGHTS

HUB_FILES = ["config.json", "vocab.json", "tokenizer.json", "added_tokens.json", *WEIGHTS[:2]]


@dataclass(frozen=True)
class ConvertConfig:
    """Between checkpoints of ours and of transformers or nanoGPT."""

    source: str = "lecraquito/gpt2_reduced_vocab_FT_7digits"
    """A directory; or, where there is a network, a model's name on the hub (owner/name)."""
    out: pathlib.Path = pathlib.Path("runs/converted")
    """Directory to write to."""
    to: Literal["ours", "transformers"] = "ours"
    """`transformers`: the source is a checkpoint of ours."""
    vocabulary: Literal["whole", "ours"] = "whole"
    """`ours`: of the source's tokens only our 41 characters are kept, as from the stock GPT-2 with its 50,257."""
    task: TaskName | None = None
    """What the model was pre-trained on; default: what config.json says, else addition."""
    digits: int | None = None
    """N, digits that the model was pre-trained on; default: what config.json says, or the name (`_7digits`)."""

    def __post_init__(self) -> None:
        require_types(self)
        require_choice(self, "to", ("ours", "transformers"))
        require_choice(self, "vocabulary", ("whole", "ours"))
        for name in ("out", "source"):
            require(
                not in_bucket(resolved(getattr(self, name), name)), name, str(getattr(self, name)), "a local directory"
            )
        require_directory(self.out, "out")
        other = resolved(self.out, "out") != resolved(self.source, "source")
        require(other, "out", str(self.out), "another than source")


def _local(source: str) -> pathlib.Path:
    path = resolved(source, "source")
    if path.is_dir():
        return path
    require(
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None, "source", source, "a directory or owner/name"
    )
    hub = extra("huggingface_hub", "source", "convert")
    try:
        return pathlib.Path(hub.snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # Of any kind: the network, the hub's refusals, its own checks of names.
        said = " ".join(f"{type(error).__name__}: {error}".split())[: foreign.MOST_SAID]
        raise ConfigError(
            f"source: {source} is no directory here and could not be had from the hub ({said})"
        ) from error


def main(config: ConvertConfig) -> None:
    if config.to == "transformers":
        save_transformers(config.out, load_model(config.source))
    else:
        directory = _local(config.source)
        described = foreign.read_object(directory / "config.json", "source")
        task = task_named(config.task or described.get("task", "addition"))
        digits: Any = config.digits
        if digits is None:
            digits = described.get("max_pretrain_digits")
        if digits is None:
            named = re.search(r"_(\d{1,2})digits", config.source)
            require(named is not None, "digits", None, "a number, for neither config.json nor the name says it")
            digits = int(named[1]) if named else None
        model = load_foreign(directory, task, digits, config.vocabulary == "ours")
        save_model(config.out, model, {"command": "python -m ckl_jax.convert", "source": config.source})
        sizes = {"weights": model.config.num_weights, "vocabulary": model.config.vocab_size}
        print(json.dumps({"task": task.name, "N": digits, **sizes}))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    cli.run(main, ConvertConfig)
