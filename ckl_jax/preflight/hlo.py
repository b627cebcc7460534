"""What a compiled program does, read from its optimized HLO: products, bytes of main memory, and collectives.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop turns. Where that depends on
data (answers end early), it is the most turns that the loop's condition allows, or one where it names no number.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "tf32": 32, "token": 0, "opaque": 0}
FREE = ("parameter", "constant", "iota", "partition-id", "replica-id", "tuple", "get-tuple-element", "bitcast")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
CALLS = ("calls", "body", "condition", "to_apply", "branch_computations", "true_computation", "false_computation")
PASSES = {"high": 3, "highest": 6}
"""Of bfloat16 that a TPU makes for a product of float32 numbers; else one."""
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
    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


class Cost(NamedTuple):
    """Of one device.

    Attributes:
      flops: of matrix products and convolutions, two a multiplication.
      passes: the same times the passes that their precision takes.
      bytes: read and written in main memory.
      collectives: bytes of the results by kind of collective.
      counts: how often each kind runs.
      guessed: whether a loop's turns depend on data.
    """

    flops: float = 0.0
    passes: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, float] = {}
    counts: Mapping[str, float] = {}
    guessed: bool = False

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(
            self.flops + other.flops,
            self.passes + other.passes,
            self.bytes + other.bytes,
            _added(self.collectives, other.collectives),
            _added(self.counts, other.counts),
            self.guessed or other.guessed,
        )

    def times(self, turns: float, guessed: bool) -> "Cost":
        def scaled(found: Mapping[str, float]) -> dict[str, float]:
            return {kind: turns * value for kind, value in found.items()}

        flops, passes, moved = (turns * number for number in (self.flops, self.passes, self.bytes))
        return Cost(flops, passes, moved, scaled(self.collectives), scaled(self.counts), guessed or self.guessed)


def _added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {kind: a.get(kind, 0.0) + b.get(kind, 0.0) for kind in {**a, **b}}


def cost(text: str) -> Cost:
    """Of a whole program, from ``compiled.as_text()``."""
    computations, entry = _parsed(text)
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            known[name] = sum((one(x, computations[name]) for x in computations[name].values()), Cost())
        return known[name]

    def one(instruction: Instruction, there: Computation) -> Cost:
        opcode, called = instruction.opcode, _called(instruction)
        if opcode in (*FREE, "after-all") or "AllocateBuffer" in instruction.attributes:
            return Cost()
        if opcode == "while":
            turns, guessed = _turns(computations[called["condition"][0]], computations)
            return (of(called["body"][0]) + of(called["condition"][0])).times(turns, guessed)
        if opcode == "conditional":
            branches = [of(name) for names in called.values() for name in names]
            return max(branches, key=lambda branch: (branch.flops, branch.bytes))
        if opcode in ("call", "async-start"):
            return sum((of(name) for names in called.values() for name in names), Cost())
        inside = computations[called["calls"][0]] if opcode == "fusion" else {instruction.name: instruction}
        products = [_products(x, inside if opcode == "fusion" else there, computations) for x in inside.values()]
        flops, passes = (sum(numbers) for numbers in zip(*products, strict=True))
        kind = next((kind for kind in COLLECTIVES if opcode in (kind, f"{kind}-start")), None)
        moved = _moved(instruction, there, inside if opcode == "fusion" else None, computations)
        if kind is None:
            return Cost(flops, passes, moved)
        received = float(sum(array.bytes for array in _results(instruction)))
        return Cost(flops, passes, moved, {kind: received}, {kind: 1.0})

    return of(entry)


def calls_the_host(text: str) -> bool:
    """Whether a program waits for Python or for data of its host: every turn of a loop would."""
    return bool(re.search(r"callback|\b(infeed|outfeed|send|recv)\(", text))


def _parsed(text: str) -> tuple[dict[str, Computation], str]:
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


def _called(instruction: Instruction) -> dict[str, list[str]]:
    found = {}
    for key in CALLS:
        match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.attributes)
        if match and not (key == "to_apply" and instruction.opcode != "call"):
            found[key] = _NAME.findall(match.group(1))
    return found


def _turns(condition: Computation, computations: Mapping[str, Computation]) -> tuple[int, bool]:
    """How often a loop that starts at 0 turns, at most; and whether it may end before."""
    bounds, others = list[int](), 0
    for instruction, there in _with_fused(condition, computations):
        if instruction.opcode == "compare":
            constants = [_constant(name, there) for name in instruction.operands]
            bounds += [value for value in constants if value is not None and "direction=LT" in instruction.attributes]
            others += not any(value is not None for value in constants)
        others += instruction.opcode in ("and", "or")
    return (min(bounds), others > 0) if bounds else (1, True)


def _with_fused(
    computation: Computation, computations: Mapping[str, Computation]
) -> Iterator[tuple[Instruction, Computation]]:
    for instruction in computation.values():
        yield instruction, computation
        for names in _called(instruction).values():
            for name in names:
                inside = dict(computations[name])
                # What a fusion gets from outside stands for its parameters.
                for parameter in [x for x in inside.values() if x.opcode == "parameter"]:
                    given = computation.get(instruction.operands[int(parameter.attributes)])
                    if given is not None and given.opcode == "constant":
                        inside[parameter.name] = given
                yield from _with_fused(inside, computations)


def _constant(name: str, there: Computation) -> int | None:
    found = there.get(name)
    number = found is not None and found.opcode == "constant" and re.fullmatch(r"-?\d+", found.attributes)
    return int(number.group()) if number else None


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """What an operation gives; the start of an asynchronous one also repeats its operands and has a context."""
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and len(arrays) > 1:
        return arrays[1 : len(arrays) // 2 + 1] if instruction.opcode != "copy-start" else arrays[:1]
    return arrays


def _moved(
    instruction: Instruction,
    there: Computation,
    inside: Computation | None,
    computations: Mapping[str, Computation],
) -> float:
    opcode = instruction.opcode
    if opcode.endswith("-done"):
        return 0.0
    if inside is not None:
        return _moved_by_fusion(instruction, inside, computations)
    far = float(sum(array.bytes for array in _results(instruction) if not array.near))
    if opcode in ("dynamic-slice", "slice", "gather"):
        source = there.get(instruction.operands[0])
        reads = source is not None and any(not array.near for array in source.arrays)
        return far + reads * sum(array.bytes for array in instruction.arrays)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = there.get(instruction.operands[-1 if opcode == "scatter" else 1])
        size = sum(array.bytes for array in update.arrays) if update else 0
        return float(size * 2 * any(not array.near for array in instruction.arrays))
    operands = [array for name in instruction.operands if name in there for array in there[name].arrays]
    return far + sum(array.bytes for array in operands if not array.near)


def _moved_by_fusion(fusion: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> float:
    """Its parameters, of those only sliced the slices, and its results, of those updated in place the updates."""
    parameters = [x for x in inside.values() if x.opcode == "parameter" and not all(a.near for a in x.arrays)]
    total = sum(_read(parameter, inside, computations) for parameter in parameters)
    root = next((x for x in inside.values() if x.is_root), None)
    results = [inside[name] for name in root.operands] if root and root.opcode == "tuple" else [root] if root else []
    for result, array in zip(results, fusion.arrays, strict=False):
        update = _update(result, inside, computations)
        total += 0 if array.near else array.bytes if update is None else update
    return float(total)


def _read(parameter: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes that a fused computation reads of a parameter, at most all."""
    whole, total = sum(array.bytes for array in parameter.arrays), 0
    names = [parameter.name]
    while names and total < whole:
        name = names.pop()
        for user in [x for x in inside.values() if name in x.operands]:
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "fusion":
                nested = computations[_called(user)["calls"][0]]
                given = [x for x in nested.values() if x.opcode == "parameter"]
                total += sum(_read(x, nested, computations) for x in given if user.operands[int(x.attributes)] == name)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                total += whole
    return min(total, whole)


def _update(result: Instruction | None, inside: Computation, computations: Mapping[str, Computation]) -> int | None:
    """Bytes of an update in place, or None where a whole array is written."""
    while result is not None and result.opcode in ("bitcast", "convert") and result.operands[0] in inside:
        result = inside[result.operands[0]]
    if result is None:
        return None
    if result.opcode == "fusion":
        nested = computations[_called(result)["calls"][0]]
        return _update(next((x for x in nested.values() if x.is_root), None), nested, computations)
    if result.opcode != "dynamic-update-slice" or result.operands[1] not in inside:
        return None
    return sum(array.bytes for array in inside[result.operands[1]].arrays)


def _products(
    instruction: Instruction, inside: Computation, computations: Mapping[str, Computation]
) -> tuple[float, float]:
    """Operations of matrix products, and the same times the passes that their precision takes."""
    if instruction.opcode == "fusion":
        nested = computations[_called(instruction)["calls"][0]]
        found = [_products(x, nested, computations) for x in nested.values()]
        return sum(flops for flops, _ in found), sum(passes for _, passes in found)
    if instruction.opcode == "dot":
        left = inside[instruction.operands[0]].arrays[0]
        contracted = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        flops = 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(left.shape[axis] for axis in contracted)
    elif instruction.opcode == "convolution":
        flops = _convolution_flops(instruction, inside)
    else:
        return 0.0, 0.0
    precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
    kinds = {inside[name].arrays[0].kind for name in instruction.operands[:2]}
    passes = PASSES.get(precision.group(1), 1) if precision and kinds == {"f32"} else 1
    return flops, passes * flops


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    return [int(number) for number in match.group(1).split(",") if number] if match else []


def _convolution_flops(instruction: Instruction, inside: Computation) -> float:
    """Products of an input and a kernel that both lie inside: TPUs write batched products as padded convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    of_input, of_kernel, of_output = labels.groups()
    source, kernel = (inside[name].arrays[0].shape for name in instruction.operands[:2])
    output = instruction.arrays[0].shape
    spatial = [label for label in of_output if label.isdigit()]
    total = 2.0 * output[of_output.index("b")] * output[of_output.index("f")] * kernel[of_kernel.index("i")]
    window = {
        key: values.split("x") for key, values in re.findall(r"(\w+)=([\d_x\-]+)", _window(instruction.attributes))
    }
    for index, label in enumerate(spatial):

        def setting(key: str, default: str, index: int = index) -> str:
            return window[key][index] if key in window else default

        stride, dilated = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
        spread, low = int(setting("rhs_dilate", "1")), int(setting("pad", "0_0").split("_")[0])
        length = (source[of_input.index(label)] - 1) * dilated + 1
        places = (
            out * stride - low + at * spread
            for out in range(output[of_output.index(label)])
            for at in range(kernel[of_kernel.index(label)])
        )
        total *= sum(0 <= place < length and place % dilated == 0 for place in places)
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return total / (int(groups.group(1)) if groups else 1)


def _window(attributes: str) -> str:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    return match.group(1) if match else ""
