"""The text of optimized HLO as computations: what XLA has made of a program, one instruction a line."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "tf32": 32, "token": 0, "opaque": 0}
CALLS = ("calls", "body", "condition", "to_apply", "branch_computations", "true_computation", "false_computation")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """A type of HLO. ``near`` is True in memory that is not the main one (VMEM, semaphores)."""

    kind: str
    shape: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.kind)
        bits = BITS.get(self.kind) or (int(digits.group()) if digits else 0)
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """``attributes`` are a constant's value and a parameter's number too."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def is_near(self) -> bool:
        """Whether nothing of it lies in main memory."""
        return all(array.near for array in self.arrays)

    def called(self) -> dict[str, list[str]]:
        """The computations that it runs, by how; not those that only combine two numbers of a reduction."""
        found = {}
        for key in CALLS:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            if match and not (key == "to_apply" and self.opcode != "call"):
                found[key] = _NAME.findall(match.group(1))
        return found

    def numbers(self, pattern: str) -> list[int]:
        """The comma-separated integers that the first group of a pattern finds in the attributes."""
        match = re.search(pattern, self.attributes)
        return [int(number) for number in match.group(1).split(",") if number] if match else []


Computation = dict[str, Instruction]


def parameters(computation: Computation) -> Iterator[tuple[int, Instruction]]:
    """Those of a computation with their numbers."""
    return ((int(x.attributes), x) for x in computation.values() if x.opcode == "parameter")


def root(computation: Computation) -> Instruction | None:
    return next((x for x in computation.values() if x.is_root), None)


def calls_the_host(text: str) -> bool:
    """Whether a program waits for Python or for data of its host: every turn of a loop would."""
    return bool(re.search(r"callback|\b(infeed|outfeed|send|recv)\(", text))


def parsed(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a program by name, and the name of the one that it starts with."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line and line[:1] in "%E":
            name = next(iter(_NAME.findall(line)))
            entry = name if line.startswith("ENTRY") else entry
            current = computations[name] = {}
        elif line.startswith("  ") and " = " in line:
            found = _instruction(line.strip())
            current[found.name] = found
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    arrays, rest = right[:end], right[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    stop = _closing("(" + rest) - 1
    operands, attributes = rest[:stop], rest[stop + 1 :]
    kept = operands if opcode in ("constant", "parameter") else attributes
    names = tuple(_NAME.findall(operands))
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"), _arrays(arrays), opcode, names, kept, left.startswith("ROOT")
    )


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(kind, tuple(int(size) for size in sizes.split(",") if size), bool(re.search(r"S\([1-9]", layout or "")))
        for kind, sizes, layout in _ARRAY.findall(text)
    )
