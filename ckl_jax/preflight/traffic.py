"""The bytes that an instruction moves through main memory, and what a collective sends over the links."""

import math
import re
from collections.abc import Callable, Iterable, Mapping

from ckl_jax.preflight import hlo

SLICES = ("dynamic-slice", "slice", "gather")
SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda devices: 2 * (devices - 1) / devices,
    "all-gather": lambda devices: (devices - 1) / devices,
    "reduce-scatter": lambda devices: devices - 1,
    "all-to-all": lambda devices: (devices - 1) / devices,
    "collective-permute": lambda _: 1,
    "collective-broadcast": lambda _: 1,
}
"""What of its result a device sends in a collective of so many devices, as a ring does it."""


def devices(collective: hlo.Instruction, header: str) -> int:
    """How many devices take part in it, each with all others of its group.

    Args:
      header: the program's first line, which says how many there are in all.
    """
    groups = re.search(r"replica_groups=(\{\{[\d,]*\}|\[[\d,]+\]|mesh\[[^\]]*\] ?\{[^}]*\})", collective.attributes)
    if groups is None:
        return math.prod(int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))
    if groups[1].startswith("mesh"):
        sizes, axes = groups[1].split("]")
        return math.prod(int(size) for axis, size in re.findall(r"('[^']*')=(\d+)", sizes) if axis in axes)
    numbers = [int(number) for number in re.findall(r"\d+", groups[1])]
    return len(numbers) if groups[1].startswith("{") else numbers[-1]


def moved(instruction: hlo.Instruction, there: hlo.Computation, computations: Mapping[str, hlo.Computation]) -> float:
    """Bytes read and written in main memory."""
    opcode = instruction.opcode
    kind, _, half = opcode.rpartition("-")
    if half == "done":
        of_start = there[instruction.operands[0]] if kind in SENT else None
        return 0.0 if of_start is None else _far(instruction.arrays) + _given(of_start, there)
    if half == "start" and kind in SENT:
        return 0.0
    if opcode == "fusion":
        return _moved_by_fusion(instruction, computations)
    far = _far(_results(instruction))
    if opcode.removesuffix("-start") in SLICES:
        source, read = there.get(instruction.operands[0]), sum(array.bytes for array in _results(instruction))
        return far + (read if source is not None and not source.is_near else 0)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = there.get(instruction.operands[-1 if opcode == "scatter" else 1])
        return 0.0 if update is None or instruction.is_near else 2.0 * update.bytes
    return far + _given(instruction, there)


def _results(instruction: hlo.Instruction) -> tuple[hlo.Array, ...]:
    """What an operation gives; the start of a copy or slice also repeats its operand and has a context."""
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and len(arrays) > 1:
        return arrays[:1] if instruction.opcode == "copy-start" else arrays[1:2]
    return arrays


def _far(arrays: Iterable[hlo.Array]) -> float:
    """Bytes in main memory."""
    return float(sum(array.bytes for array in arrays if not array.near))


def _given(instruction: hlo.Instruction, there: hlo.Computation) -> float:
    """Bytes of its operands in main memory; a kernel that is given an array several times reads parts of it."""
    return sum(_far(there[name].arrays) for name in dict.fromkeys(instruction.operands) if name in there)


def _moved_by_fusion(fusion: hlo.Instruction, computations: Mapping[str, hlo.Computation]) -> float:
    """Its parameters, of those only sliced the slices, and its results, of those updated in place the updates."""
    inside = computations[fusion.called()["calls"][0]]
    total = sum(_read(x, inside, computations) for _, x in hlo.parameters(inside) if not x.is_near)
    root = hlo.root(inside)
    results = [inside[name] for name in root.operands] if root and root.opcode == "tuple" else [root] if root else []
    for result, array in zip(results, fusion.arrays, strict=False):
        update = _update(result, inside, computations)
        total += 0 if array.near else array.bytes if update is None else update
    return float(total)


def _is_view(instruction: hlo.Instruction) -> bool:
    """Whether it is its operand in another shape or tiling, and nothing moves."""
    return instruction.opcode == "bitcast" or "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes


def _read(parameter: hlo.Instruction, inside: hlo.Computation, computations: Mapping[str, hlo.Computation]) -> int:
    """Bytes that a fused computation reads of a parameter, at most all."""
    whole, total = parameter.bytes, 0
    names = [parameter.name]
    while names and total < whole:
        name = names.pop()
        for user in [x for x in inside.values() if name in x.operands]:
            if _is_view(user):
                names.append(user.name)
            elif user.opcode in SLICES and user.operands[0] == name:
                total += user.bytes
            elif user.opcode == "fusion":
                nested = computations[user.called()["calls"][0]]
                given = [x for number, x in hlo.parameters(nested) if user.operands[number] == name]
                total += sum(_read(x, nested, computations) for x in given)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                total += whole
    return min(total, whole)


def _update(
    result: hlo.Instruction | None, inside: hlo.Computation, computations: Mapping[str, hlo.Computation]
) -> int | None:
    """Bytes of an update in place, or None where a whole array is written."""
    while result is not None and result.opcode in ("bitcast", "convert") and result.operands[0] in inside:
        result = inside[result.operands[0]]
    if result is None:
        return None
    if result.opcode == "fusion":
        nested = computations[result.called()["calls"][0]]
        return _update(hlo.root(nested), nested, computations)
    if result.opcode != "dynamic-update-slice" or result.operands[1] not in inside:
        return None
    return inside[result.operands[1]].bytes
