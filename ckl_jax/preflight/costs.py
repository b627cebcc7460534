"""What a program computes and moves: products, bytes of main memory, and collectives.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop turns. Where that depends on
data (answers end early), it is the most turns that the loop's condition allows, or one where it names no number.
Attention of one query is no matrix product for XLA, and is not counted as one.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ckl_jax.preflight import hlo, traffic

_NUMBERS, _NAMES = ("constant", "iota", "partition-id", "replica-id"), ("parameter", "tuple", "get-tuple-element")
FREE = (*_NUMBERS, *_NAMES, "bitcast", "after-all")


class Cost(NamedTuple):
    """What a program costs one device.

    Attributes:
      flops: of matrix products and convolutions, two a multiplication.
      passes: the same times the passes that their precision takes.
      bytes: read and written in main memory.
      collectives: bytes that the device sends, by kind of collective.
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


def cost(text: str, of_float32: Mapping[str, float]) -> Cost:
    """The cost of a whole program, from ``compiled.as_text()``.

    Args:
      of_float32: passes of a product of float32 numbers by its precision.
    """
    computations, entry = hlo.parsed(text)
    header = text.partition("\n")[0]
    known: dict[str, Cost] = {}

    def of(name: str) -> Cost:
        if name not in known:
            known[name] = sum((one(x, computations[name]) for x in computations[name].values()), Cost())
        return known[name]

    def one(instruction: hlo.Instruction, there: hlo.Computation) -> Cost:
        opcode, called = instruction.opcode, instruction.called()
        if opcode in FREE or "AllocateBuffer" in instruction.attributes:
            return Cost()
        if opcode == "while":
            turns, guessed = _turns(instruction, computations)
            return (of(called["body"][0]) + of(called["condition"][0])).times(turns, guessed)
        inside = [of(name) for names in called.values() for name in names] if opcode != "fusion" else []
        if opcode == "conditional":
            return max(inside, key=lambda branch: (branch.flops, branch.bytes))
        if opcode in ("call", "async-start"):
            return sum(inside, Cost())
        flops, passes = _products(instruction, there, computations, of_float32)
        moved = traffic.moved(instruction, there, computations)
        kind = opcode.removesuffix("-done")  # The start of an asynchronous one names its operands among its results.
        if kind not in traffic.SENT:
            return Cost(flops, passes, moved)
        started = instruction if opcode == kind else there[instruction.operands[0]]
        sent = instruction.bytes * traffic.SENT[kind](traffic.devices(started, header))
        return Cost(flops, passes, moved, {kind: float(sent)}, {kind: 1.0})

    return of(entry)


def _turns(loop: hlo.Instruction, computations: Mapping[str, hlo.Computation]) -> tuple[int, bool]:
    """How often a loop turns, at most, by the compiler or else if it starts at 0; and whether it may end before."""
    known = loop.numbers(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return known[0], False
    bounds, others = list[int](), 0
    for instruction, there in _with_fused(computations[loop.called()["condition"][0]], computations):
        if instruction.opcode == "compare":
            constants = [_constant(name, there) for name in instruction.operands]
            bounds += [value for value in constants if value is not None and "direction=LT" in instruction.attributes]
            others += not any(value is not None for value in constants)
        others += instruction.opcode in ("and", "or")
    return (min(bounds), others > 0) if bounds else (1, True)


def _with_fused(
    computation: hlo.Computation, computations: Mapping[str, hlo.Computation]
) -> Iterator[tuple[hlo.Instruction, hlo.Computation]]:
    for instruction in computation.values():
        yield instruction, computation
        for names in instruction.called().values():
            for name in names:
                inside = dict(computations[name])
                # What a fusion gets from outside stands for its parameters.
                for number, parameter in hlo.parameters(computations[name]):
                    given = computation.get(instruction.operands[number])
                    if given is not None and given.opcode == "constant":
                        inside[parameter.name] = given
                yield from _with_fused(inside, computations)


def _constant(name: str, there: hlo.Computation) -> int | None:
    found = there.get(name)
    number = found is not None and found.opcode == "constant" and re.fullmatch(r"-?\d+", found.attributes)
    return int(number.group()) if number else None


def _products(
    instruction: hlo.Instruction,
    inside: hlo.Computation,
    computations: Mapping[str, hlo.Computation],
    of_float32: Mapping[str, float],
) -> tuple[float, float]:
    """Operations of matrix products, and the same times the passes that their precision takes."""
    if instruction.opcode == "fusion":
        nested = computations[instruction.called()["calls"][0]]
        found = [_products(x, nested, computations, of_float32) for x in nested.values()]
        return sum(flops for flops, _ in found), sum(passes for _, passes in found)
    if instruction.opcode == "custom-call":
        flops = _kernel_flops(instruction)
        given = (array for name in instruction.operands for array in inside[name].arrays)
        largest = max(given, key=lambda array: array.bytes, default=None)
        exact = flops > 0 and largest is not None and largest.kind == "f32"
        return flops, flops * (of_float32["highest"] if exact else 1)
    if instruction.opcode == "dot":
        left = inside[instruction.operands[0]].arrays[0]
        contracted = instruction.numbers(r"lhs_contracting_dims=\{([\d,]*)\}")
        flops = 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(left.shape[axis] for axis in contracted)
    elif instruction.opcode == "convolution":
        flops = _convolution_flops(instruction, inside)
    else:
        return 0.0, 0.0
    precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
    kinds = {inside[name].arrays[0].kind for name in instruction.operands[:2]}
    return flops, flops * (of_float32[precision.group(1) if precision else "default"] if kinds == {"f32"} else 1)


def _kernel_flops(call: hlo.Instruction) -> float:
    """Of a kernel of Pallas, as its author says: of the whole on a TPU, of a program of the grid on a GPU."""
    of_whole = call.numbers(r'"cost_estimate":\{"flops":"(\d+)"')
    of_program = call.numbers(r"flops_of_a_program\\22: \\22(\d+)")
    grid = math.prod(call.numbers(rf"\bgrid_{axis} = (\d+)")[0] for axis in "xyz") if of_program else 0
    return float(sum(of_whole) + grid * sum(of_program))


def _convolution_flops(instruction: hlo.Instruction, inside: hlo.Computation) -> float:
    """Products of an input and a kernel that both lie inside: TPUs write batched products as padded convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    of_input, of_kernel, of_output = labels.groups()
    source, kernel = (inside[name].arrays[0].shape for name in instruction.operands[:2])
    output = instruction.arrays[0].shape
    spatial = [label for label in of_output if label.isdigit()]
    total = 2.0 * output[of_output.index("b")] * output[of_output.index("f")] * kernel[of_kernel.index("i")]
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = re.findall(r"(\w+)=([\d_x\-]+)", found.group(1)) if found else []
    window = {key: values.split("x") for key, values in settings}
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
    return total / math.prod(instruction.numbers(r"batch_group_count=(\d+)"))
