"""Whether a program fits a chip, and the shortest time that it can take there."""

import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ckl_jax.preflight import costs, hlo
from ckl_jax.preflight.chips import GIB, Chip
from ckl_jax.preflight.programs import Planned

EXIT_CODE = 8
"""A program does not fit; ``tpu_scripts/supervise.sh`` tells it by this code from all that can fail."""


class Verdict(NamedTuple):
    """Of one program on one device; bytes, seconds, and shares of 1.

    Attributes:
      needed: memory at the peak, the command's other arrays included; None where the compiler did not say.
      memory: by kind, as the compiler counts it; empty where the program does not fit.
      cost: what it computes and moves; None where it does not fit.
      kernels: places in its text that call a Pallas kernel; one in a loop is one.
      has_float64, calls_the_host: what an accelerator is slow at; neither should be there.
      compile_seconds: of this machine, lowering included.
      mesh: devices that share the runs (``run``), and the rows of each run (``data``).
    """

    name: str
    fits: bool
    needed: float | None
    memory: dict[str, int]
    cost: costs.Cost | None
    compile_seconds: float
    kernels: int = 0
    has_float64: bool = False
    calls_the_host: bool = False
    mesh: Mapping[str, int] = {}

    def seconds(self, chip: Chip) -> dict[str, float]:
        """How long arithmetic, memory and links are busy at least: each alone at its full speed."""
        if self.cost is None:
            return {}
        sent = sum(self.cost.collectives.values())
        return {
            "arithmetic": self.cost.passes / chip.flops,
            "memory": self.cost.bytes / chip.bandwidth,
            "links": sent / chip.links,
        }

    def share_of_peak(self, chip: Chip) -> float:
        """Of the chip's bfloat16 operations, if it takes no longer than the busiest of the three."""
        longest = max(self.seconds(chip).values(), default=0.0)
        return self.cost.flops / chip.flops / longest if self.cost and longest else 0.0


def judged(planned: Planned, chip: Chip) -> Verdict:
    """Compiles a program for the chip's topology."""
    start, mesh = time.monotonic(), planned.call.mesh.shape
    lowered = planned.call.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Verdict(planned.name, False, _said(str(error)), {}, None, time.monotonic() - start, mesh=dict(mesh))
    seconds, text = time.monotonic() - start, compiled.as_text()
    memory = _memory(compiled) | {"beside": planned.beside}
    needed = sum(size for kind, size in memory.items() if kind != "aliased") - memory["aliased"]
    fits, cost = needed <= chip.memory, costs.cost(text, chip.passes)
    kernels = sum(text.count(f'"{target}"') for target in ("tpu_custom_call", "__gpu$xla.gpu.triton"))
    slow_at = "f64[" in text, hlo.calls_the_host(text)
    return Verdict(planned.name, fits, needed, memory, cost, seconds, kernels, *slow_at, dict(mesh))


def _memory(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    kinds = {"arguments": "argument", "results": "output", "temporary": "temp", "program": "generated_code"}
    sizes = {name: int(getattr(found, f"{kind}_size_in_bytes")) for name, kind in kinds.items()}
    return sizes | {"aliased": int(found.alias_size_in_bytes)}


def _said(message: str) -> float | None:
    """What the compiler would have needed, in bytes."""
    found = re.search(r"Used ([\d.]+)([KMG]) of", message) or re.search(r"\(?([\d.]+)([KMG])\)? exceeds", message)
    return float(found.group(1)) * GIB / 1024 ** "GMK".index(found.group(2)) if found else None
