"""Fine-tuning on its devices: what its rounds are computed from, beside their states and problems, and the calls."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.rl.program import Arms, Hyper, Program, Run, draw_rounds, make_mesh, make_program, make_runs
from ckl_jax.rl.updates import AnyRunState, planned_states, train_rounds
from ckl_jax.runtime import sharding
from ckl_jax.runtime.targets import Call


class Setup(NamedTuple):
    """Runs, and where their arrays lie.

    Attributes:
      ref_params: of the pre-trained model, on all devices.
      certainty_params: of the other model whose certainty weighs the KL, on all devices, if there is one.
      states: shapes of the runs' states.
      create: makes the first ones.
    """

    program: Program
    runs: list[Run]
    mesh: Mesh
    hypers: Hyper
    ref_params: Any
    certainty_params: Any | None
    states: AnyRunState
    create: Call

    def train(self, states: AnyRunState, rounds: Sequence[int]) -> Call:
        """These rounds of all runs, as ``train_rounds`` computes them: the states after them, and metrics."""
        drawn = sharding.put(draw_rounds(self.program, self.runs, rounds), sharding.by_run(self.mesh))
        others = () if self.certainty_params is None else (self.certainty_params,)
        arguments = (self.program, self.mesh, self.ref_params, states, self.hypers, drawn, *others)
        return Call(train_rounds, self.mesh, arguments)


def set_up(config: FinetuneConfig, model: Model, arms: Arms, seeds: int, certainty_from: Model | None = None) -> Setup:
    """All arms x seeds on the devices at hand, or on those that are only compiled for.

    Args:
      model: the pre-trained one; its parameters may be shapes alone where nothing is computed.
      certainty_from: another model whose certainty weighs the KL.

    Raises:
      ConfigError: what ``make_program``, ``make_runs`` and ``make_mesh`` refuse.
    """
    program = make_program(config, model, certainty_from)
    runs, hypers = make_runs(config, arms, seeds)
    mesh = make_mesh(config, len(runs))
    everywhere = sharding.everywhere(mesh)
    hypers, ref_params = sharding.put(hypers, sharding.by_run(mesh)), sharding.put(model.params, everywhere)
    other = None if certainty_from is None else sharding.put(certainty_from.params, everywhere)
    states, create = planned_states(program, mesh, ref_params, hypers)
    return Setup(program, runs, mesh, hypers, ref_params, other, states, create)
