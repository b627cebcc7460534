"""Preflight: the reading of HLO on hand-made programs, its refusals, and whole commands compiled for a TPU (slow)."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from policies import untrained

from ckl_jax import evaluate
from ckl_jax.checkpoint.store import Model, load_model, save_model
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.evaluate import EvaluateCommand
from ckl_jax.finetune import FinetuneCommand
from ckl_jax.model import num_parameters
from ckl_jax.preflight import __main__ as preflight
from ckl_jax.preflight import chips, costs, hlo, programs
from ckl_jax.preflight.__main__ import PreflightCommand, _cells, split
from ckl_jax.preflight.chips import CHIPS, GIB, GPUS
from ckl_jax.preflight.verdict import EXIT_CODE, Verdict, _said, judged
from ckl_jax.presets import finetune_preset, pretrain_preset
from ckl_jax.pretrain import PretrainCommand
from ckl_jax.rl.setup import set_up
from ckl_jax.rollout.decoding import rollout
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import cli, targets
from ckl_jax.runtime.targets import Call
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION

GOLDEN = pathlib.Path(__file__).parent / "data" / "tpu_programs.json"
CHIP = CHIPS["v5e"]


def _cost(function, *shapes):
    return costs.cost(jax.jit(function).lower(*shapes).compile().as_text(), CHIP.passes)


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_counts_two_operations_a_multiplication_and_its_arrays():
    found = _cost(jnp.matmul, _array(64, 32), _array(32, 16))
    assert found.flops == 2 * 64 * 32 * 16
    assert found.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert not found.guessed


def test_a_loop_counts_as_often_as_it_turns_and_one_in_another_with_both():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    def outer(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: inner(x, w), x)

    shapes = _array(32, 32), _array(32, 32)
    assert _cost(inner, *shapes).flops == 7 * 2 * 32**3
    assert _cost(outer, *shapes).flops == 35 * 2 * 32**3
    assert not _cost(outer, *shapes).guessed


def test_a_loop_that_data_ends_counts_with_all_its_turns_and_says_so():
    def until_large(x, w):
        def goes_on(carry):
            return (carry[0] < 9) & (carry[1].max() < 1e3)

        return jax.lax.while_loop(goes_on, lambda carry: (carry[0] + 1, carry[1] @ w), (0, x))[1]

    found = _cost(until_large, _array(32, 32), _array(32, 32))
    assert found.flops == 9 * 2 * 32**3
    assert found.guessed


def test_answers_that_all_end_at_the_limit_turn_the_loops_of_decoding_as_often(small_model):
    """A loop for each size of the cache: together they have a turn for every character."""
    drawn = ADDITION.rl_problems(np.random.default_rng(0), 2, 2, 1)
    packed = problems_lib.pack(ADDITION, drawn, 2, 1)
    length = 300

    def written(params):
        return rollout(small_model, params, packed, jax.random.key(0), Sampling(length, greedy=True)).tokens_BxL

    text = jax.jit(written).lower(untrained(small_model)).compile().as_text()
    computations, _ = hlo.parsed(text)
    loops = [x for found in computations.values() for x in found.values() if x.opcode == "while"]
    turns = [costs._turns(loop, computations)[0] for loop in loops]
    assert len(turns) == 3
    assert sum(turns) == length


def test_a_program_that_asks_python_in_a_loop_is_told_from_one_that_does_not():
    def asks(x):
        def twice(_, x):
            return jax.pure_callback(lambda x: 2 * x, x, x)

        return jax.lax.fori_loop(0, 3, twice, x)

    asking, quiet = (jax.jit(f).lower(_array(4)).compile().as_text() for f in (asks, jnp.cumsum))
    assert hlo.calls_the_host(asking)
    assert not hlo.calls_the_host(quiet)


def test_a_branch_counts_as_the_costliest():
    def either(x, w, first):
        return jax.lax.cond(first, lambda: x @ w @ w, lambda: x @ w)

    assert _cost(either, _array(16, 16), _array(16, 16), _array(dtype=jnp.bool_)).flops == 2 * 2 * 16**3


KERNEL = """HloModule made

ENTRY %main (seeds: s32[4], x: bf16[4,96]) -> bf16[4,32] {
  %seeds = s32[4]{0} parameter(0)
  %x = bf16[4,96]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %out = bf16[4,32]{1,0:T(8,128)(2,1)} custom-call(%seeds, %x, %x, %x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"Zm9v","cost_estimate":{"flops":"7000","transcendentals":"3"}}}
}
"""


def test_a_kernel_counts_what_its_author_says_and_reads_once_what_it_is_given_several_times():
    found = costs.cost(KERNEL, CHIP.passes)
    assert found.flops == found.passes == 7000
    assert found.bytes == 4 * 4 + 2 * (4 * 96 + 4 * 32)


OF_A_GPU = (
    KERNEL.partition("custom_call_target")[0]
    + r"""custom_call_target="__gpu$xla.gpu.triton", \
backend_config={debug = false, grid_x = 5 : i32, grid_y = 4 : i32, grid_z = 3 : i32, ir = "ML\EFR\0DMLIR", name = "k", \
serialized_metadata = "{\22flops_of_a_program\22: \222000\22}"}
}
""".replace("\\\n", "")
)


def test_a_kernel_of_a_gpu_counts_what_its_author_says_of_a_program_of_its_grid():
    found = costs.cost(OF_A_GPU, CHIP.passes)
    assert found.flops == found.passes == 3 * 4 * 5 * 2000
    assert found.bytes == 4 * 4 + 2 * (4 * 96 + 4 * 32)


@pytest.mark.parametrize(("text", "flops"), [(KERNEL, 7000), (OF_A_GPU, 120_000)])
def test_a_kernel_of_float32_takes_the_passes_of_its_precision(text, flops):
    found = costs.cost(text.replace("bf16", "f32"), CHIP.passes)
    assert (found.flops, found.passes) == (flops, 6 * flops)


GROUPS = {
    "{{0,1,2,3},{4,5,6,7}}": 4,
    "[2,4]<=[8]": 4,
    "[4,2]<=[2,4]T(1,0)": 2,
    "mesh['axis_0'=8,'axis_1'=1] {'axis_0'}": 8,
    "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}": 4,
    "mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}": 8,
    "{}": 8,
}
OF_RESULT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", OF_RESULT)
@pytest.mark.parametrize("early", [False, True], ids=["at once", "started early"])
def test_what_a_device_sends_is_the_rings_part_of_all_results_of_its_group(kind, groups, early):
    given = "f32[8,16], f32[2,16]"
    result, bytes_ = "(f32[32,16], f32[8,16])", 4 * 16 * (32 + 8)
    rest = f"replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    started = f"%s = (({given}), {result}) {kind}-start(%a, %b), {rest}\n  ROOT %r = {result} {kind}-done(%s)"
    text = f"""HloModule made, num_partitions=8

ENTRY %main (a: f32[8,16], b: f32[2,16]) -> {result} {{
  %a = f32[8,16] parameter(0)
  %b = f32[2,16] parameter(1)
  {started if early else f"ROOT %r = {result} {kind}(%a, %b), {rest}"}
}}
"""
    found = costs.cost(text, CHIP.passes)
    assert found.collectives == {kind: pytest.approx(bytes_ * OF_RESULT[kind](GROUPS[groups]))}
    assert found.counts == {kind: 1}
    assert found.bytes == bytes_ + 4 * 16 * (8 + 2)


def test_turns_that_the_compiler_knows_are_taken_from_it():
    looping = TPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert costs.cost(looping, CHIP.passes).flops == 3 * 2 * 8 * 16 * 16


SLICES = """HloModule made

%view (u: bf16[12,8,16]) -> bf16[12,8,16] {
  %u = bf16[12,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %c = bf16[12,8,16]{2,1,0:T(8,128)} copy(%u)
}

%layer (w: bf16[12,8,16], i: s32[]) -> bf16[1,8,16] {
  %w = bf16[12,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[12,8,16]{2,1,0:T(8,128)} fusion(%w), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%view
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = bf16[1,8,16]{2,1,0:T(8,128)} dynamic-slice(%v, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

ENTRY %main (ws: bf16[12,8,16], at: s32[]) -> bf16[1,8,16] {
  %ws = bf16[12,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[] parameter(1)
  %early = ((bf16[12,8,16]), bf16[3,8,16]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%ws), slice={[9:12], [0:8], [0:16]}
  %done = bf16[3,8,16]{2,1,0:S(1)} slice-done(%early)
  ROOT %l = bf16[1,8,16]{2,1,0:T(8,128)} fusion(%ws, %at), kind=kLoop, calls=%layer
}
"""


def test_a_slice_that_starts_early_and_one_of_a_view_are_slices():
    early, of_view = 3 * 8 * 16, 2 * 8 * 16
    assert costs.cost(SLICES, CHIP.passes).bytes == 2 * (early + of_view) + 4  # The index.


UPDATED = """HloModule made

%fused (whole: f32[5,16,16], part: f32[1,16,16], i: s32[]) -> f32[5,16,16] {
  %whole = f32[5,16,16] parameter(0)
  %part = f32[1,16,16] parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[5,16,16] dynamic-update-slice(%whole, %part, %i, %zero, %zero)
}

ENTRY %main (ws: f32[5,16,16], w: f32[1,16,16], at: s32[]) -> f32[5,16,16] {
  %ws = f32[5,16,16] parameter(0)
  %w = f32[1,16,16] parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %r = f32[5,16,16] OPERATION
}
"""


@pytest.mark.parametrize(
    ("operation", "index"),
    [
        ("dynamic-update-slice(%ws, %w, %at, %none, %none)", 0),
        ("fusion(%ws, %w, %at), kind=kLoop, calls=%fused", 4),
    ],
)
def test_an_update_in_place_moves_the_update_and_not_the_array_that_it_is_in(operation, index):
    part = 4 * 16 * 16
    assert costs.cost(UPDATED.replace("OPERATION", operation), CHIP.passes).bytes == 2 * part + index


TPU = """HloModule made

%body (p: (s32[], f32[8,16], f32[5,16,16])) -> (s32[], f32[8,16], f32[5,16,16]) {
  %p = (s32[], f32[8,16]{1,0:T(8,128)S(1)}, f32[5,16,16]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %ws = f32[5,16,16]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %y = f32[8,16]{1,0:T(8,128)S(1)} fusion(%x, %ws, %i), kind=kOutput, calls=%product
  %r = f32[8,16]{1,0:T(8,128)S(1)} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,16]{1,0:T(8,128)S(1)}, f32[5,16,16]{2,1,0:T(8,128)}) tuple(%next, %r, %ws)
}

%product (a: f32[8,16], b: f32[5,16,16], c: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0:T(8,128)S(1)} parameter(0)
  %b = f32[5,16,16]{2,1,0:T(8,128)} parameter(1)
  %c = s32[] parameter(2)
  %zero = s32[] constant(0)
  %w = f32[1,16,16]{2,1,0:T(8,128)} dynamic-slice(%b, %c, %zero, %zero), dynamic_slice_sizes={1,16,16}
  %m = f32[16,16]{1,0:T(8,128)} bitcast(%w)
  ROOT %d = f32[8,16]{1,0:T(8,128)S(1)} convolution(%a, %m), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%add (u: f32[], v: f32[]) -> f32[] {
  %u = f32[] parameter(0)
  %v = f32[] parameter(1)
  ROOT %s = f32[] add(%u, %v)
}

%condition (q: (s32[], f32[8,16], f32[5,16,16])) -> pred[] {
  %q = (s32[], f32[8,16]{1,0:T(8,128)S(1)}, f32[5,16,16]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %five), direction=LT
}

ENTRY %main (x0: f32[8,16], w0: f32[5,16,16]) -> f32[8,16] {
  %x0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w0 = f32[5,16,16]{2,1,0:T(8,128)} parameter(1)
  %c0 = s32[] constant(0)
  %near = f32[8,16]{1,0:T(8,128)S(1)} copy(%x0)
  %state = (s32[], f32[8,16]{1,0:T(8,128)S(1)}, f32[5,16,16]{2,1,0:T(8,128)}) tuple(%c0, %near, %w0)
  %end = (s32[], f32[8,16]{1,0:T(8,128)S(1)}, f32[5,16,16]{2,1,0}) while(%state), condition=%condition, body=%body
  %got = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%end), index=1
  ROOT %out = f32[8,16]{1,0:T(8,128)} copy(%got)
}
"""


def test_of_a_tpus_program_only_main_memory_counts_and_of_sliced_arrays_the_slice():
    found = costs.cost(TPU, CHIP.passes)
    assert found.flops == 5 * 2 * 8 * 16 * 16
    assert found.passes == 6 * found.flops
    copies, weights, counters = 2 * 4 * 8 * 16, 5 * 4 * 16 * 16, 5 * 32
    assert copies + weights <= found.bytes <= copies + weights + counters
    assert found.collectives == {"all-reduce": 5 * 4 * 8 * 16}  # Of two devices each sends as much as there is.
    assert found.counts == {"all-reduce": 5}


@pytest.mark.parametrize(
    ("window", "labels", "source", "kernel", "output", "products"),
    [
        ("", "bf_io->bf", "3,4", "4,5", "3,5", 3 * 4 * 5),
        ("size=3", "b0f_0io->b0f", "1,8,2", "3,2,7", "1,6,7", 6 * 3 * 2 * 7),
        ("size=3 pad=1_1", "b0f_0io->b0f", "1,8,2", "3,2,7", "1,8,7", (8 * 3 - 2) * 2 * 7),
        ("size=4 stride=3 pad=3_3 lhs_dilate=4", "0bf_0oi->0bf", "4,5,6", "4,7,6", "4,5,7", 4 * 5 * 6 * 7),
    ],
)
def test_products_of_a_convolution_are_those_inside(window, labels, source, kernel, output, products):
    text = f"""ENTRY %main (a: f32[{source}], b: f32[{kernel}]) -> f32[{output}] {{
  %a = f32[{source}] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %c = f32[{output}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""
    assert costs.cost(text, CHIP.passes).flops == 2 * products


def test_the_busiest_of_arithmetic_memory_and_links_bounds_the_time_and_the_share_of_the_peak():
    cost = costs.Cost(flops=1e12, passes=6e12, bytes=819e9 / 100, collectives={"all-reduce": 2e9, "all-gather": 2e9})
    verdict = Verdict("step", True, 1.0, {"temporary": 0}, cost, 1.0)
    assert verdict.seconds(CHIP) == {"arithmetic": 6e12 / 197e12, "memory": 0.01, "links": 0.02}
    assert verdict.share_of_peak(CHIP) == pytest.approx(1 / 6)
    assert "30.5 ms (arithmetic)" in _cells(verdict, CHIP)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 107.37G of 15.75G hbm.", 107.37 * GIB),
        ("RESOURCE_EXHAUSTED: total memory for HLO temporaries (24.73G) exceeds available HBM (15.75G)", 24.73 * GIB),
        ("RESOURCE_EXHAUSTED: 512.00M exceeds available HBM", 0.5 * GIB),
        ("RESOURCE_EXHAUSTED: too much", None),
    ],
)
def test_what_the_compiler_says_of_too_much_memory_is_read(message, size):
    assert _said(message) == size


def _doubled(beside, **options):
    """A program for this machine that needs 2 GiB, or 1 where it may have its argument's memory."""
    device = jax.devices()[0]
    x = jax.ShapeDtypeStruct((GIB // 4096, 1024), jnp.float32, sharding=SingleDeviceSharding(device))
    call = Call(jax.jit(lambda x: 2 * x, **options), jax.sharding.Mesh([device], ("data",)), (x,))
    return programs.Planned("doubled", call, beside)


def test_memory_is_what_the_program_needs_and_what_the_command_keeps_beside_it():
    found = judged(_doubled(beside=3 * GIB), CHIP)
    assert found.fits
    assert found.needed == pytest.approx(5 * GIB, rel=1e-3)
    assert not judged(_doubled(beside=15 * GIB), CHIP).fits


def test_memory_that_is_argument_and_result_at_once_counts_once():
    found = judged(_doubled(beside=0, donate_argnums=0), CHIP)
    assert found.memory["aliased"] == GIB
    assert found.needed == pytest.approx(GIB, rel=1e-3)


def test_parameters_that_are_split_over_the_devices_stay_beside_those_that_a_test_gathers(small_model):
    config = dataclasses.replace(
        pretrain_preset("tiny"), max_digits=1, model=small_model, batch_size=8, num_documents=100
    )
    text = 100 * (ADDITION.longest_episode(1, extra=0) + 4)  # Characters, and where a document starts.

    def beside(shard_state):
        command = PretrainCommand(dataclasses.replace(config, shard_state=shard_state))
        with targets.compiling_for(jax.devices()[:4]):
            return list(programs.of_pretraining(command))[-1].beside - text

    params = 4 * num_parameters(untrained(small_model))
    assert beside(True) == pytest.approx((beside(False) + params) / 4, rel=0.05)


def test_the_pre_trained_parameters_stay_beside_a_test_of_the_policies(small_model, tmp_path, monkeypatch):
    """Those whose KL it is, and those whose certainty weighs it."""
    wider, setups = dataclasses.replace(small_model, width=24), []
    numbers = {config.width: num_parameters(untrained(config)) for config in (small_model, wider)}
    for config in (small_model, wider):
        save_model(tmp_path / str(config.width), Model(config, 1, untrained(config), ADDITION), {})
    monkeypatch.setattr(programs, "set_up", lambda *words: setups.append(set_up(*words)) or setups[-1])
    config = dataclasses.replace(finetune_preset("tiny", "ours"), test_problems=2, test_every=1)
    command = FinetuneCommand(config, tmp_path / "16", certainty_checkpoint=tmp_path / "24")
    with targets.compiling_for(jax.devices()[:1]):
        *_, last = programs.of_finetuning(command)
    (setup,) = setups
    learned = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(setup.states)) - 4 * numbers[16]
    assert last.beside == learned + 4 * (numbers[16] + numbers[24])


@pytest.fixture
def preflight_of(monkeypatch):
    """Runs the command for so many of this machine's devices as v5e, with those for the programs of `evaluate`."""
    keeps = jax.config.jax_enable_compilation_cache

    def run(*planned, devices=1):
        target = CHIP, tuple(jax.devices()[:devices])
        monkeypatch.setattr(preflight, "topology", lambda name: chips.Topology(name, *target))
        command = programs.COMMANDS["evaluate"]._replace(programs=lambda options: iter(planned))
        monkeypatch.setitem(programs.COMMANDS, "evaluate", command)
        preflight.main("evaluate", [], PreflightCommand())

    yield run
    jax.config.update("jax_enable_compilation_cache", keeps)


def test_an_evaluation_is_planned_with_its_own_lengths_and_at_each_of_its_offsets():
    command = EvaluateCommand(problems=3, offsets=(0, 60, 0), extra_length=7)
    with targets.compiling_for(jax.devices()[:1]):
        planned = list(programs.of_evaluation(command))
    model = load_model(command.checkpoint)
    digits = [n for n in evaluate.lengths(model) if model.task.longest_episode(n, 7) + 60 <= model.config.block_size]
    assert len(digits) >= 2
    wanted = [(n, offset) for n in digits for offset in (0, 60)]
    assert [x.name for x in planned] == [f"evaluation, {n} digits from position {offset}" for n, offset in wanted]
    for (n, offset), (_, call, _) in zip(wanted, planned, strict=True):
        assert call.options["max_length"] == model.task.max_answer_length(n, 7)
        assert call.arguments[0].block_size == model.config.block_size - offset


def test_one_program_that_does_not_fit_is_enough_for_an_exit_code_of_its_own(preflight_of, capsys):
    preflight_of(_doubled(beside=3 * GIB))
    assert "TOO MUCH" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        preflight_of(_doubled(beside=15 * GIB), _doubled(beside=3 * GIB))
    assert stop.value.code == EXIT_CODE
    assert "17.00 GiB TOO MUCH" in capsys.readouterr().out


def test_devices_that_a_program_does_not_use_are_told(preflight_of, capsys):
    preflight_of(_doubled(beside=0))
    assert "devices compute" not in capsys.readouterr().out
    preflight_of(_doubled(beside=0), devices=2)
    assert "doubled: only 1 of 2 devices compute." in capsys.readouterr().out


def test_only_a_compiler_out_of_memory_says_that_a_program_does_not_fit(preflight_of):
    def ending(message):
        def compile_():
            raise jax.errors.JaxRuntimeError(message)

        call = SimpleNamespace(mesh=SimpleNamespace(shape={}), lower=lambda: SimpleNamespace(compile=compile_))
        return programs.Planned("step", call)

    with pytest.raises(SystemExit) as stop:
        preflight_of(ending("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."))
    assert stop.value.code == EXIT_CODE
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        preflight_of(ending("INTERNAL: Mosaic failed to compile"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--topology v6e:2x2 finetune --seeds 3", (["--topology", "v6e:2x2"], "finetune", ["--seeds", "3"])),
        ("evaluate", ([], "evaluate", [])),
        ("--help", (["--help"], "", [])),
    ],
)
def test_the_commands_name_divides_the_arguments(words, parts):
    assert split(words.split()) == parts


SAID = {
    # Tflop/s of bfloat16, GB/s of memory, and GB/s of all links in both directions together.
    "v4": (275, 1228, 600),
    "v5e": (197, 819, 400),
    "v5p": (459, 2765, 1200),
    "v6e": (918, 1640, 800),
    "h100": (989.4, 3352, 900),
    "h200": (989.4, 4800, 900),
}


def test_chips_are_what_google_clouds_pages_and_nvidias_data_sheets_say():
    found = {name: (chip.flops / 1e12, chip.bandwidth / 1e9, 2 * chip.links / 1e9) for name, chip in CHIPS.items()}
    assert found == SAID


def test_programs_may_use_what_jax_takes_of_a_gpus_memory():
    """75%, by JAX's page on it; the whole, as CUDA tells it, is that of XLA's specs."""
    whole = {"h100": 84_942_979_072, "h200": 151_397_597_184}
    assert {name: CHIPS[name].memory for name in whole} == {name: 0.75 * size for name, size in whole.items()}


def test_a_tpu_multiplies_float32_numbers_in_one_pass_for_each_pair_of_their_bfloat16_parts():
    """High has two parts of each and leaves out the pair of the last ones, highest three and leaves out three pairs."""
    assert chips.TPU_PASSES == {"default": 1, "high": 2 * 2 - 1, "highest": 3 * 3 - 3}


@pytest.mark.parametrize("kind", [kind for kind in CHIPS if kind not in chips.GPUS])
def test_google_clouds_types_are_topologies(kind):
    for accelerator, name in chips.ACCELERATOR_TYPES.items():
        chip, _, sizes = name.partition(":")
        if chip == kind:
            number = math.prod(map(int, sizes.split("x")))
            assert chips.accelerator_type(name) == accelerator
            assert int(accelerator.split("-")[1]) == number * (1 if kind in chips.FLAT else 2)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:2", "v5e:2x2x1", "v4:2x2", "v9:2x2", "v5e:0x4", "h100", "h100:1x1x1", "h100-8"]
)
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(ConfigError, match=r"^topology: got .* allowed is a chip of v4, .*, h200 with its shape"):
        chips.topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "preflight"), ("h100:8", "gpu"), ("h200:2x8", "gpu")])
def test_without_its_compiler_the_extra_is_named(monkeypatch, name, extra):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"given with pip install '\.\[{extra}\]'"):
        chips.topology(name)


def test_a_plugin_that_jax_does_not_take_is_one_line(monkeypatch):
    def failing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(chips.topologies, "get_topology_desc", failing)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")
    with pytest.raises(ConfigError, match=r"^topology: got 'h200:8', allowed is with a jax_cuda12_plugin that fits"):
        chips.topology("h200:8")


@pytest.mark.parametrize(("precision", "passes"), [("default", 2), ("high", 2), ("highest", 989.4 / 66.9)])
def test_a_product_of_float32_numbers_takes_a_gpu_as_long_as_its_units_do(precision, passes):
    said = f", operand_precision={{{precision},{precision}}}" if precision != "default" else ""
    text = TPU.replace(", operand_precision={highest,highest}", said)
    found = costs.cost(text, CHIPS["h100"].passes)
    assert found.passes == pytest.approx(passes * found.flops)
    halves = costs.cost(text.replace("f32", "bf16"), CHIPS["h100"].passes)
    assert halves.passes == halves.flops == found.flops


def _environment():
    """Without conftest's flags, which are of XLA for CPU alone: libtpu ends where it does not know one."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(GOLDEN.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    }


def _preflight(*arguments, **options):
    command, environment = [sys.executable, "-m", "ckl_jax.preflight", *map(str, arguments)], _environment()
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=environment, **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], r"^error: command: got None, allowed is pretrain \| finetune \| evaluate"),
        (["--topology", "v5e:2x4", "figure4"], "error: .*figure4"),
        (["--only", "nothing", "pretrain"], r"error: only: got 'nothing'|error: topology: .*preflight"),
        (["--json", "nowhere/found.json", "pretrain"], r"error: json: got 'nowhere/found.json', allowed is a file"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(arguments, said, tmp_path):
    found = _preflight(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert re.search(said, found.stderr)


@pytest.fixture(scope="module")
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the extra preflight)")


SMALL = ["--max-digits=2", "--batch-size=8", "--eval-problems=8", "--model.width=32", "--model.block-size=512"]
FEW = ["--episodes=8", "--minibatch-episodes=4", "--rounds=2", "--test-every=2", "--test-problems=8"]
FEW += ["--diagnostic-episodes=2", "--precision=default", "--rollout=plain"]
WHOLE = {
    "pretrain": ["pretrain", "--model.precision=default", *SMALL],
    "pretrain, fused": [
        *("pretrain", "--model.dtype=bfloat16", "--model.precision=default", "--model.dropout=0.1", *SMALL),
        "--model.width=128",
    ],
    "a2c": ["finetune", "--seeds=2", *FEW],
    "grpo": ["finetune", "--algorithm=grpo", "--group-size=4", "--kl=k3", *FEW],
    "transitions": ["finetune", "--minibatch=transitions", "--transition-batch=8", *FEW],
    "evaluate": ["evaluate", "--problems=8"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One layer, N = 2."""
    config = ModelConfig(num_layers=1, num_heads=2, width=32, block_size=512, precision="default")
    path = tmp_path_factory.mktemp("model")
    save_model(path, Model(config, 2, untrained(config), ADDITION), {})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_every_program_compiles_for_a_tpu_and_its_facts_stay(libtpu, name, checkpoint, tmp_path):
    """The golden file says which programs there are, how many collectives they run and what is aliased."""
    model = [] if "pretrain" in name else ["--checkpoint", checkpoint]
    found = _preflight("--topology", "v5e:2x2", "--json", tmp_path / "found.json", *WHOLE[name], *model)
    assert found.returncode == 0, found.stderr
    assert _facts(tmp_path / "found.json") == json.loads(GOLDEN.read_text())[name]


def _facts(path):
    """By program, after the checks that hold for every one."""
    facts = {}
    for program in json.loads(path.read_text())["programs"]:
        assert program["fits"]
        assert not program["has_float64"]
        assert not program["calls_the_host"]
        donated = program["memory"]["aliased"] > 0
        counted = {"collectives": program["cost"]["counts"], "kernels": program["kernels"]}
        facts[program["name"]] = counted | {"state is aliased": donated}
    return facts


@pytest.fixture(scope="module")
def cuda():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("XLA for NVIDIA's GPUs is not installed (the extra gpu)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "pretrain, fused", "a2c", "transitions"])
def test_every_program_compiles_for_gpus(cuda, name, checkpoint, tmp_path):
    """Two hosts of two. As on a TPU the same programs have kernels (here each layer its own), alias and send anything.

    The other commands' programs are of the same kinds.
    """
    model = [] if "pretrain" in name else ["--checkpoint", checkpoint]
    found = _preflight("--topology", "h100:2x2", "--json", tmp_path / "found.json", *WHOLE[name], *model)
    assert found.returncode == 0, found.stderr
    facts, on_tpu = _facts(tmp_path / "found.json"), json.loads(GOLDEN.read_text())[name]
    assert list(facts) == list(on_tpu)
    for program, found_here in facts.items():
        assert found_here["kernels"] == pretrain_preset("tiny").model.num_layers * on_tpu[program]["kernels"]
        assert found_here["state is aliased"] == on_tpu[program]["state is aliased"]
        assert bool(found_here["collectives"]) == bool(on_tpu[program]["collectives"])


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_every_program_lowers_for_a_gpu(name, checkpoint, monkeypatch):
    """To StableHLO, as XLA for CUDA gets it: no kernel of a TPU, no float64, no call to Python."""
    if name == "pretrain, fused" and jax.__version_info__ > (0, 10, 2):
        pytest.skip("this JAX makes kernels for a GPU that it has been given alone")
    monkeypatch.setattr(targets, "platform", lambda: "gpu")
    command, *words = WHOLE[name]
    planned = programs.COMMANDS[command]
    model = [] if command == "pretrain" else ["--checkpoint", str(checkpoint)]
    with targets.compiling_for(jax.devices()[:4]):
        options = cli.parse(planned.options, planned.preset, [*words, *model])
        for program in planned.programs(options):
            call = program.call
            with jax.set_mesh(call.mesh):
                lowered = call.function.trace(*call.arguments, **call.options).lower(lowering_platforms=("cuda",))
            text = lowered.as_text()
            assert "stablehlo" in text
            assert not re.findall(r"tpu|f64|callback", text), program.name


TOO_MUCH = """
import jax, jax.numpy as jnp
from ckl_jax.preflight import chips
topology = chips.topology({name!r})
there = jax.sharding.SingleDeviceSharding(topology.devices[0])
print(len(topology.devices), topology.hosts)
x = jax.ShapeDtypeStruct((2**25, 2**12), jnp.float32, sharding=there)
jax.jit(lambda x: (x.T @ x, x[::-1] + 1)).lower(x).compile()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices", "hosts"), [("v4-16", 8, 2), ("v5litepod-8", 8, 1), ("v5p-8", 4, 1), ("v6e:4x4", 16, 4)]
)
def test_chips_have_the_memory_that_their_compiler_allows_and_one_device_each(libtpu, name, devices, hosts):
    environment = _environment() | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TOO_MUCH.format(name=name)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert found.stdout.split() == [str(devices), str(hosts)], found.stderr
    (allowed,) = set(re.findall(r"exceeds available HBM \(([\d.]+)G\)", found.stderr))
    kind = chips.ACCELERATOR_TYPES.get(name, name).partition(":")[0]
    assert float(allowed) == pytest.approx(CHIPS[kind].memory / GIB)


KERNEL_FITS = """
import jax, jax.numpy as jnp
from ckl_jax.attention import fused
from ckl_jax.attention.kernel import Settings
from ckl_jax.preflight import chips
chips.HOPPER = chips.HOPPER.replace("shared_memory_per_block_optin: 232448", "shared_memory_per_block_optin: 101376")
there = jax.sharding.SingleDeviceSharding(chips.topology({name!r}).devices[0])
settings = Settings({heads}, 0.2, jax.lax.Precision.HIGHEST, there.device_set.pop().platform)
def gradient(qkv, segments, seeds):
    return jax.value_and_grad(lambda x: fused.attention(x, segments, seeds, settings).astype(jnp.float32).sum())(qkv)
shapes = (({positions}, 384), jnp.{dtype}), (({positions},), jnp.int32), (({heads},), jnp.int32)
arrays = [jax.ShapeDtypeStruct((1, *shape), dtype, sharding=there) for shape, dtype in shapes]
text = jax.jit(gradient).lower(*arrays).compile().as_text()
print(text.count('"tpu_custom_call"') + text.count('"__gpu$xla.gpu.triton"'))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "positions", "heads", "dtype"),
    [
        ("v5e:1x1", 1024, 2, "float32"),
        ("v4:2x2x1", 200, 2, "float32"),
        ("v5p:2x2x1", 200, 4, "bfloat16"),
        ("v6e:1x1", 256, 1, "bfloat16"),
    ],
)
def test_fused_attention_compiles_for_every_tpu_up_to_its_most_positions(libtpu, name, positions, heads, dtype):
    _compiles_the_kernels(name, positions, heads, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_attention_compiles_for_gpus_with_less_fast_memory_and_the_widest_heads(cuda, name, dtype):
    _compiles_the_kernels(f"{name}:1", 1024, 1, dtype)


def _compiles_the_kernels(name, positions, heads, dtype):
    environment = _environment() | {"JAX_PLATFORMS": "cpu"}
    script = KERNEL_FITS.format(name=name, positions=positions, heads=heads, dtype=dtype)
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert found.stdout.strip() == "2", found.stderr


@pytest.mark.slow
def test_a_program_that_does_not_fit_ends_with_its_code_and_what_makes_it_smaller(libtpu, tmp_path):
    large = ["--max-digits", "2", "--batch-size", "1536", "--eval-problems", "8", "--packing", "stream"]
    shape = ["--model.num-layers", "1", "--model.num-heads", "16", "--model.width", "64", "--model.block-size", "512"]
    shape += ["--model.precision", "default"]
    found = _preflight(
        "--topology", "v5e:1x1", "--json", tmp_path / "found.json", "--only", "step", "pretrain", *large, *shape
    )
    assert found.returncode == EXIT_CODE, found.stderr
    assert "training step does not fit. With --shard-state it does not fit either" in found.stdout
    advice = json.loads((tmp_path / "found.json").read_text())["advice"]["training step"]
    assert [line for line in advice if "it fits" in line] == advice[-1:]
