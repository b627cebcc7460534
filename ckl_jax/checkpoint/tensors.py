"""Files of tensors by name: safetensors and PyTorch's, whole or in shards. Of PyTorch's the weights alone are read."""

import collections
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckl_jax.checkpoint import description
from ckl_jax.errors import ConfigError, extra, require
from ckl_jax.runtime import reading

WHOLE = ("model.safetensors", "pytorch_model.bin", "ckpt.pt")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In the order in which transformers looks for them.
WEIGHTS = (WHOLE[0], INDICES[0], WHOLE[1], INDICES[1], WHOLE[2])
SUFFIXES = description.WEIGHTS
MOST_NAME = 200
CONTAINERS = ("model", "state_dict", "model_state_dict")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
TORCH_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, its number type as the file names it, and how to read it (float32)."""

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]

    def require_floats(self, name: str) -> None:
        """Raises a ConfigError unless the numbers are floats."""
        fits = self.kind in (*FLOATS, *TORCH_FLOATS)
        require(fits, name, self.kind, f"floating point numbers ({' | '.join(FLOATS)})")


class Contents(NamedTuple):
    """What files of weights hold.

    Attributes:
      tensors: by their names in the file.
      aliases: names of tensors that are the same as another of ``tensors``, which safetensors keeps once.
      settings: nanoGPT's ``model_args``; {} where the file has none.
      size: bytes of the files.
    """

    tensors: dict[str, Stored]
    aliases: dict[str, str]
    settings: dict[str, Any]
    size: int


def contents(source: pathlib.Path) -> Contents:
    """The tensors of a file of weights, of an index with its shards, or of a directory with one of ``WEIGHTS``.

    Raises:
      ConfigError: there is none; a shard is missing, or lacks what the index says; a file is damaged, or holds
        something else.
    """
    present = [source / name for name in WEIGHTS if (source / name).is_file()] if source.is_dir() else [source]
    allowed = f"a directory with one of {', '.join(WEIGHTS)}; or the file of weights itself ({' | '.join(SUFFIXES)})"
    is_index = bool(present) and present[0].name.endswith(".index.json")
    known = bool(present) and present[0].is_file() and (is_index or present[0].suffix in SUFFIXES)
    require(known, "source", str(source), allowed)
    if not is_index:
        return _file(present[0])
    shards = [_file(path) for path in _shards(present[0])]
    named = collections.Counter(name for shard in shards for name in shard.tensors)
    twice = sorted(name for name, count in named.items() if count > 1)
    require(not twice, "source", f"{', '.join(twice[:5])} in two shards", f"once, in {present[0]}")
    missing = sorted(_weight_map(present[0]).keys() - named.keys())
    require(not missing, "source", f"shards without {', '.join(missing[:5])}", f"all that {present[0]} names")
    return Contents(
        {name: tensor for shard in shards for name, tensor in shard.tensors.items()},
        {alias: kept for shard in shards for alias, kept in shard.aliases.items()},
        {},
        sum(shard.size for shard in shards),
    )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    found: Any = reading.read_object(index, "source").get("weight_map")
    named = isinstance(found, dict) and bool(found) and all(isinstance(name, str) for name in found.values())
    require(named, "source", f"{index} without weight_map", "an index with the file of each tensor")
    return found


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        beside = pathlib.PurePath(name).name == name and pathlib.PurePath(name).suffix in SUFFIXES
        require(beside, "source", f"{name} in {index}", f"names of files beside it ({' | '.join(SUFFIXES)})")
    missing = [name for name in names if not (index.parent / name).is_file()]
    require(not missing, "source", f"no file {', '.join(missing[:5])}", f"all {len(names)} shards of {index}")
    return [index.parent / name for name in names]


def _file(path: pathlib.Path) -> Contents:
    with reading.damaged(path, "source"):
        return _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)


def _safetensors(path: pathlib.Path) -> Contents:
    extra("torch", "source", "convert")
    file = extra("safetensors", "source", "convert").safe_open(path, framework="pt")

    def stored(name: str) -> Stored:
        entry = file.get_slice(name)
        return Stored(tuple(entry.get_shape()), entry.get_dtype(), lambda: file.get_tensor(name).float().numpy())

    _require_names(file.keys())
    tensors = {name: stored(name) for name in file.keys()}  # noqa: SIM118 - it is no dict.
    aliases = {alias: kept for alias, kept in (file.metadata() or {}).items() if kept in tensors}
    return Contents(tensors, aliases, {}, path.stat().st_size)


def _pytorch(path: pathlib.Path) -> Contents:
    torch = extra("torch", "source", "convert")
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        require(
            claimed <= size, "source", f"{path} with {claimed} bytes inside", f"at most its own {size}, as torch.save"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What torch says at length is how to load it by running what is in it.
        ran = re.search(r"Unsupported global: GLOBAL ([\w.]{1,100})", str(error))
        what = f"wants to run {ran[1]}" if ran else "has what is neither tensor, number nor word"
        raise ConfigError(
            f"source: {path} is damaged, or {what}, and nothing is unpickled; allowed is what torch.save writes of a "
            "model's state_dict()"
        ) from error
    states = [found[name] for name in CONTAINERS if isinstance(found.get(name), Mapping)] if _is_named(found) else []
    require(len(states) <= 1, "source", f"{path} with several of {', '.join(CONTAINERS)}", "one of them")
    state = states[0] if states else found
    named = _is_named(state) and all(torch.is_tensor(x) for x in state.values())
    require(named, "source", f"{path} with a {type(state).__name__}", "tensors by name")

    _require_names(state)

    def stored(name: str, tensor: Any) -> Stored:
        claimed = tensor.numel() * tensor.element_size()  # By strides of 0 few bytes can claim any size.
        require(claimed <= size, name, f"{claimed} bytes", f"at most {size}, those of {path}")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        kind = str(tensor.dtype).removeprefix("torch.") if plain else f"a {tensor.layout} tensor on {tensor.device}"
        return Stored(tuple(tensor.shape), kind, lambda: tensor.detach().float().numpy())

    settings = found.get("model_args") if states else {}
    settings = settings if _is_named(settings) else {}
    settings = {name: value for name, value in settings.items() if isinstance(value, (int, float, str, type(None)))}
    return Contents({name: stored(name, tensor) for name, tensor in state.items()}, {}, settings, size)


def _require_names(names: Iterable[str]) -> None:
    odd = [name for name in names if not name.isprintable() or len(name) > MOST_NAME]
    require(not odd, "source", f"a tensor named {odd[:1]}", f"names of at most {MOST_NAME} printable characters")


def _is_named(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(name, str) for name in found)
