"""The benchmark: what it measures is what it says, its tables come from results.json alone, and it can be resumed."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.model import GPT2, forward
from ckl_jax.next_character import init_state, train_step
from ckl_jax.rollout.decoding import rollout
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import cli
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.alphabet import PAD, decode
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Problem
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import against_pytorch, ours, report, speculation, timing, workload
from experiments.benchmark.enlarge import enlarge

ROOT = pathlib.Path(__file__).parents[1]
STORED = ROOT / "tests" / "data" / "benchmark_results.json"


def command(*arguments):
    return cli.parse(benchmark.BenchmarkCommand, None, arguments)


def test_sides_are_warmed_up_and_then_alternate():
    calls = []

    def side(name, seconds):
        return lambda: (calls.append(name), seconds)[1]

    found = timing.alternate({"a": side("a", 1.0), "b": side("b", 3.0)}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [1.0, 1.0], "b": [3.0, 3.0]}


def test_the_speedup_is_the_spread_of_the_ratios_pair_by_pair():
    assert timing.speedup([4.0, 6.0, 10.0], [1.0, 2.0, 2.0]) == {"median": 4.0, "low": 3.0, "high": 5.0}


def test_costs_are_those_of_a_matrix_product():
    a, b = jnp.zeros((64, 32)), jnp.zeros((32, 16))
    flops, touched = ours._cost(jnp.dot, a, b)
    assert flops == 2 * 64 * 32 * 16
    assert touched == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_the_decoding_steps_of_each_cache_size_add_up_to_every_groups_longest_episode():
    parts = list(ours._decoding(20, 400, np.array([5, 200, 300, 380]), group=2))
    assert parts == [(128, 108), (256, 92), (128, 108), (256, 128), (384, 128), (400, 16)]


def test_episodes_of_the_unending_model_run_to_the_limit():
    model = workload.unending_model(workload.QUICK, "tiny")
    packed = problems_lib.pack(ADDITION, ADDITION.short_problems(np.random.default_rng(0), 8, 1), 1, 1)
    trajectory = rollout(model.config, model.params, packed, jax.random.key(0), Sampling(50))
    assert trajectory.mask_BxT.all()
    assert len(np.unique(trajectory.answers_BxT)) > 10


@pytest.mark.parametrize("scale", ["tiny", "small", "gpt2"])
def test_the_full_plan_fits_its_models(scale):
    plan = workload.Plan()
    config = workload.pretrain_config(plan, scale, 1)
    assert (config.model.dropout, config.model.dtype, config.model.precision) == (0, "float32", "highest")
    assert (config.packing, config.optimizer) == ("stream", "adamw")
    for episodes in (*plan.episodes, plan.runs_episodes, plan.digits_episodes, plan.sizes_episodes):
        assert workload.tiny_config(plan, episodes=episodes).episodes == episodes


def test_the_text_stream_trains(small_model):
    config = workload.pretrain_config(workload.QUICK, "tiny", 2)
    stream = jax.tree.map(jnp.asarray, workload.text_stream(1, count=200))
    _, metrics = train_step(config, init_state(config), stream)
    assert np.isfinite(metrics["loss"])


def test_tables_and_figure_come_from_the_stored_results():
    results = json.loads(STORED.read_text())
    table = report.table(results)
    for section in benchmark.SECTIONS:
        assert f"## {section}\n" in table
    authors = results["sections"]["round"]["found"]["speedup"]["episodes"]
    assert f"{authors['median']:.3g}x" in table
    body = [line for line in table.splitlines() if line.startswith("|")]
    assert len(body) > 20
    assert "nan" not in table
    assert len(report.draw(results).axes) == 4


def test_a_table_of_some_sections_has_those_alone():
    results = json.loads(STORED.read_text())
    results["sections"] = {"memory": results["sections"]["memory"]}
    assert [line for line in report.table(results).splitlines() if line.startswith("##")] == ["## memory"]


def test_all_rollouts_that_are_compared_write_the_same_number_of_characters():
    model = workload.unending_model(workload.QUICK, "tiny")
    packed = problems_lib.pack(ADDITION, ADDITION.short_problems(np.random.default_rng(0), 2, 1), 1, 1)
    found = against_pytorch._compare_rollouts(model, packed, 6, 2, 1)
    assert found["characters"] == dict.fromkeys(("ours", "transformers", "speculative"), 12)
    assert set(found["speedup"]) == {"ours", "speculative"}


def test_an_enlarged_model_has_the_logits_of_the_small_one():
    small = ModelConfig(num_layers=2, num_heads=2, width=16, block_size=40, activation="gelu_erf")
    params = jax.jit(GPT2(small).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    large = ModelConfig(num_layers=3, num_heads=4, width=48, block_size=50)
    enlarged = enlarge(Model(small, 1, params), large)
    large = dataclasses.replace(large, activation="gelu_erf")
    assert enlarged.config == large
    shapes = jax.eval_shape(GPT2(large).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    chex.assert_trees_all_equal_shapes_and_dtypes(enlarged.params, shapes)
    tokens = jax.random.randint(jax.random.key(1), (3, 40), 0, small.vocab_size)
    expected = forward(small, params, tokens).logits_BxTxV
    np.testing.assert_allclose(forward(large, enlarged.params, tokens).logits_BxTxV, expected, atol=1e-3)
    assert np.std(expected) > 0.5


@pytest.mark.parametrize(("field", "value"), [("width", 40), ("num_layers", 1), ("block_size", 20)])
def test_a_model_that_cannot_hold_the_small_one_is_refused(field, value):
    small = ModelConfig(num_layers=2, num_heads=2, width=16, block_size=40)
    large = ModelConfig(**{"num_layers": 3, "num_heads": 4, "width": 48, "block_size": 50} | {field: value})
    with pytest.raises(ConfigError, match=f"{field}: got {value}"):
        enlarge(Model(small, 1, {}), large)


def test_a_drafter_that_never_drafts_again_gives_the_right_answer_whatever_is_written():
    packed = problems_lib.pack(ADDITION, [Problem(357, 68), Problem(9, 4)], 3, 2)
    wrong = np.full((2, 160), 5, np.int32)
    got = speculation.first_draft(jnp.asarray(packed.lists_Bx3x2xJ[:, 0]), wrong, jnp.array([7, 30]), 40)
    expected = [ADDITION.answer_text(Problem(357, 68))[7:47], ADDITION.answer_text(Problem(9, 4))[30:70]]
    assert [decode(row) for row in np.array(got)] == [text.ljust(40, PAD) for text in expected]


def test_near_ties_are_where_two_rollouts_begin_to_differ():
    model = workload.unending_model(workload.QUICK, "tiny")
    packed = problems_lib.pack(ADDITION, ADDITION.short_problems(np.random.default_rng(0), 3, 1), 1, 1)
    key = jax.random.key(0)
    plain = generate(model.config, model.params, packed, key, Sampling(10), how="plain")
    assert speculation._near_ties(model, packed, key, 1.0, plain, plain) == {"differing": 0, "widest_gap": None}
    tokens = plain.trajectory.tokens_BxL.at[1, -4].add(1)
    other = plain._replace(trajectory=plain.trajectory._replace(tokens_BxL=tokens))
    found = speculation._near_ties(model, packed, key, 1.0, plain, other)
    assert found["differing"] == 1
    assert found["widest_gap"] > 0


def test_without_pytorch_the_error_names_the_extra(monkeypatch, tmp_path):
    quick = command("--quick", "--sections", "rollout", "--out", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("pytorch", "authors_round", "against_pytorch"):
        monkeypatch.delitem(sys.modules, f"experiments.benchmark.{name}")
        monkeypatch.delattr(f"experiments.benchmark.{name}")
    with pytest.raises(ConfigError, match=r"torch: not installed.*\[bench\]"):
        benchmark.main(quick)


def test_an_unknown_section_is_refused():
    with pytest.raises(ConfigError, match=r"sections: got 'rolout', allowed is rollout, speculation, round"):
        command("--sections", "rolout,round")


def test_finished_sections_are_kept_and_other_settings_refused(tmp_path, monkeypatch, capsys):
    measured = []

    def section(name):
        return lambda plan, progress: measured.append(name) or {"peak_bytes": 1}

    names = ("memory", "limit")
    monkeypatch.setattr(ours, "SECTIONS", {name: section(name) for name in names})
    monkeypatch.setattr(report, "table", lambda results: " ".join(results["sections"]))
    benchmark.main(command("--quick", "--sections", "memory", "--out", str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sections"]["memory"]["found"] == {
        "peak_bytes": 1
    }
    benchmark.main(command("--quick", "--sections", "memory,limit", "--out", str(tmp_path / "out")))
    assert measured == ["memory", "limit"]
    assert "memory: done before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="out: "):
        benchmark.main(command("--repeats", "7", "--sections", "memory", "--out", str(tmp_path / "out")))
    path = tmp_path / "out" / "results.json"
    written = json.loads(path.read_text())
    elsewhere = written["environment"] | {"cpu": "another", "jax": "0.1"}
    path.write_text(json.dumps(written | {"environment": elsewhere}))
    with pytest.raises(ConfigError, match=r"^out: .*another.* of this machine: "):
        benchmark.main(command("--quick", "--sections", "memory", "--out", str(tmp_path / "out")))
    for content in ("{", "[" * 100_000, "[]", "7", '{"sections": 1}', "null"):
        (tmp_path / "out" / "results.json").write_text(content)
        with pytest.raises(ConfigError, match="damaged"):
            benchmark.main(command("--quick", "--sections", "memory", "--out", str(tmp_path / "out")))


def test_a_policy_that_was_trained_again_at_its_path_is_another(tmp_path, small_model, monkeypatch, capsys):
    monkeypatch.setattr(speculation, "SECTIONS", {"speculation": lambda plan, progress: {}})
    monkeypatch.setattr(report, "table", lambda results: "")
    words = ("--sections", "speculation", "--out", str(tmp_path / "out"), "--policies", str(tmp_path / "policy"))
    with pytest.raises(ConfigError, match=r"^policies: got '\S*policy', allowed is"):
        benchmark.main(command(*words))
    for again, seed in ((False, 0), (True, 0), (False, 1)):
        save_model(tmp_path / "policy", Model(small_model, 1, untrained(small_model, seed)), {})
        with pytest.raises(ConfigError, match=r"^out: ") if seed else contextlib.nullcontext():
            benchmark.main(command(*words))
        assert ("done before" in capsys.readouterr().out) == again


@pytest.mark.slow
def test_the_quick_benchmark_measures_every_section(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ["-m", "experiments.benchmark", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sections = json.loads((tmp_path / "out" / "results.json").read_text())["sections"]
    assert set(sections) == set(benchmark.SECTIONS)
    assert (tmp_path / "out" / "table.md").read_text() in done.stdout
    assert (tmp_path / "out" / "scaling.png").exists()
