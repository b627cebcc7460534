"""Names of GPT-2's tensors: without what wrappers put before them, and with those that a file keeps only once."""

from __future__ import annotations

import re

import numpy as np

from ckl_jax.checkpoint.tensors import Contents, Stored
from ckl_jax.errors import require

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
SINGLE = {"wte", "wpe", "ln_f", "lm_head"}
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
# Of torch.compile, DataParallel, FSDP, Lightning and activation checkpointing; they stand anywhere in a name.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
# Modules that hold a GPT-2; the head may stand outside of them.
HOLDERS = {"transformer", "model"}


def canonical(contents: Contents) -> dict[str, Stored]:
    """The parameters by the names of transformers' ``GPT2Model`` (``h.0.attn.c_attn.weight``), and ``lm_head.weight``.

    Causal masks are left out. Names that no GPT-2 has stay as they are. Where one of ``wte.weight`` and
    ``lm_head.weight``, which are the same tensor, is kept, ``wte.weight`` is it.

    Raises:
      ConfigError: tensors of several models; several tensors of one name, which differ; numbers that are no floats.
    """
    tensors = contents.tensors
    aliased = {
        alias: tensors[kept]
        for alias, kept in contents.aliases.items()
        if _parts(alias) is not None and alias not in tensors
    }
    names: dict[str, list[str]] = {}
    found: dict[str, Stored] = {}
    prefixes: set[str] = set()
    for full, tensor in (tensors | aliased).items():
        parts = _parts(full)
        name = full if parts is None else parts[1]
        if BUFFERS.fullmatch(name):
            continue
        tensor.require_floats(name)
        if parts is not None:
            prefixes.add(parts[0])
        names.setdefault(name, []).append(full)
        earlier = found.setdefault(name, tensor)
        if earlier is not tensor:
            same = earlier.shape == tensor.shape and np.array_equal(earlier.read(), tensor.read())
            require(same, name, f"different tensors {' and '.join(names[name])}", "one")
    shown = sorted(f"{prefix}." if prefix else "no prefix" for prefix in prefixes)
    require(len(prefixes) <= 1, "source", f"tensors under {', '.join(shown[:5])}", "those of one model alone")
    if HEAD in found:
        found.setdefault(EMBEDDING, found[HEAD])
    return found


def _parts(full: str) -> tuple[str, str] | None:
    """The prefix of a GPT-2's tensor that is none of a known wrapper, and its name; None: no GPT-2 has it."""
    parts = [part for part in full.split(".") if part not in WRAPPERS]
    for start, part in enumerate(parts):
        is_layer = part == "h" and start + 1 < len(parts) and parts[start + 1].isdecimal()
        is_single = part in SINGLE and start + 2 == len(parts) and parts[-1] in ("weight", "bias")
        if is_layer or is_single:
            return ".".join(part for part in parts[:start] if part not in HOLDERS), ".".join(parts[start:])
    return None
