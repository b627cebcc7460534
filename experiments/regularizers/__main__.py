"""The loss laboratory: every regularizer on one harness, screened, and the leaders confirmed on other seeds.

    python -m experiments.regularizers
    python -m experiments.regularizers --screen-only         # then the same command without it goes on

``methods.py`` lists the methods: the standard and the prioritized KL with their controls, peers' weights of the KL,
estimators, an adapted coefficient, KL-Cov, peers' weights of the policy gradient, and other algorithms. All have the
same budget: rounds, episodes a round, passes over them, learning rate, first policy, problems (those with groups answer
an eighth of them 8 times). Two stages:

1. The screen: every method at each share of ``--grid`` of its strength (its coefficient; ``adaptive``: its target), 2
   seeds, 7 rounds with their own learning-rate decay. Kept is the share with the highest mean accuracy over the last
   three rounds, on new problems (the larger one at a tie); leaders are the methods that are highest so. A stale
   method's new problems are answered by older policies: its accuracy is that of the test after the last round, whose
   problems are among those of the confirmation's tests, and which is higher while a policy improves: a stale leader
   is one by an easier measure.
2. The confirmation: standard, prioritized, its controls (matched, shuffled, renormalized, no_kl) and the three leaders
   of the rest, each at its share, 14 rounds, 10 seeds that the screen did not use.

``--methods`` leaves some of them out; the answers are then about the others.

Written down before any run. Hypotheses: (1) prioritized ends above standard. (2) It ends above matched and no_kl: it is
not only less pressure. (3) It ends above shuffled: which tokens are spared matters. (4) Of the rest, threshold, which
is a hard J^beta, ends like prioritized. What is compared: accuracy on N + 1 digits after the last round, on common test
problems, paired by seed; the mean difference with Student's 95% interval over seeds. A pair is better if the interval
is above 0, worse if below, else undecided. Does prioritization beat its own controls? Yes if it is better than
standard, matched, shuffled and no_kl, no if it is worse than one of them, else undecided. A yes needs every interval,
so it needs no correction for their number; all else has none. All other numbers decide nothing: the old lengths
(forgetting), the exact KL to the pre-trained model and the probability of the critical comma of step 1 / operand 2,
both on the last round's episodes. Two seeds of half a run choose coefficients roughly: a method that did badly may have
had the wrong one.

Every cell of a stage is a run of its own under ``out/<stage>/<method>_<share>x``; an interrupted call goes on with the
same command, ``--plot-only`` makes table and figure again from results.json. ``--earlier`` takes over what a finished
call with the same settings has measured, of a few of the methods say, so that only the others are trained:

    python -m experiments.regularizers --earlier experiments/results/tiny/regularizers
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import tyro

from ckl_jax import finetune
from ckl_jax.checkpoint.shipped import SHIPPED_TINY, shipped
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.finetune import describe
from ckl_jax.presets import finetune_preset
from ckl_jax.rl.program import Hyper, Seeds, make_program, make_runs
from ckl_jax.runs.directory import RESUMABLE, RunDirectory
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runs.records import earlier_results
from ckl_jax.runtime import cli, reading
from ckl_jax.tasks.columns import ADDITION
from experiments.common import arms as arms_lib
from experiments.common.figure import Results, publish
from experiments.regularizers import results as results_lib
from experiments.regularizers.methods import ALWAYS, BY_NAME, METHODS, NEEDED, Cell

COMMAND = "experiments.regularizers"
SCREEN_SEEDS_FROM = 1_000


@dataclass(frozen=True)
class RegularizersCommand:
    """Screens all regularizers over a grid of coefficients and confirms the leaders against the standard KL."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the one that ships for the scale."""
    out: pathlib.Path = pathlib.Path("runs/regularizers")
    """Directory of all runs: new, empty, or of the same command interrupted."""
    methods: tuple[str, ...] = tuple(BY_NAME)
    """Which to screen; standard and prioritized must be among them."""
    grid: tuple[float, ...] = (0.2, 1.0, 5.0)
    """Shares of every method's strength."""
    screen_seeds: Seeds = 2
    """Seeds of every method and share in the screen."""
    screen_rounds: PositiveInt = 7
    """Rounds of the screen."""
    leaders: int = 3
    """How many of the other methods are confirmed."""
    seeds: Seeds = 10
    """Seeds of every method in the confirmation."""
    earlier: pathlib.Path | None = None
    """Directory of a finished call that differs in methods and leaders alone, or has more shares: what its results.json
    has is not trained again."""
    screen_only: bool = False
    """End after the screen."""
    plot_only: bool = False
    """Table and figure again from results.json."""
    logs: Annotated[LogOptions, tyro.conf.arg(name="")] = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        require_fields(self)
        unknown = sorted(set(self.methods) - set(BY_NAME))
        require(not unknown, "methods", unknown, " | ".join(BY_NAME))
        fixed = set(NEEDED) <= set(self.methods) and len(set(self.methods)) == len(self.methods)
        require(fixed, "methods", self.methods, f"different ones, {' and '.join(NEEDED)} among them")
        shares = len({f"{share:g}" for share in self.grid if 0 < share < float("inf")}) == len(self.grid) > 0
        require(shares, "grid", self.grid, "1 or more different numbers above 0")
        others = len(set(self.methods) - set(ALWAYS))
        allowed = f"0 to {others}, the methods beside {', '.join(ALWAYS)}"
        require(0 <= self.leaders <= others, "leaders", self.leaders, allowed)
        last = self.config.seed + self.seeds
        require(last <= SCREEN_SEEDS_FROM, "seeds", self.seeds, f"seed + seeds at most {SCREEN_SEEDS_FROM}")
        default = FinetuneConfig()
        for name in {name for method in METHODS for name in method.overrides} - {"kl_coefficient"}:
            value, wanted = getattr(self.config, name), getattr(default, name)
            require(value == wanted, name, value, f"{wanted}: the methods set it")
        for name in ("beta", "kl_coefficient"):
            require(getattr(self.config, name) > 0, name, getattr(self.config, name), "above 0")
        for cell in self.cells:  # Refuses here what a method cannot do.
            _ = configured(self.config, cell), configured(self.screen_config, cell)

    @property
    def cells(self) -> list[Cell]:
        """The screen's."""
        chosen = [BY_NAME[name] for name in self.methods]
        return [Cell(method, share) for method in chosen for share in (self.grid if method.strength else (1.0,))]

    @property
    def screen_config(self) -> FinetuneConfig:
        """One test after the screen's rounds; its accuracy is that of the rounds themselves."""
        return dataclasses.replace(
            self.config,
            seed=SCREEN_SEEDS_FROM,
            rounds=self.screen_rounds,
            test_every=self.screen_rounds,
            final_problems=self.config.test_problems,
        )


def preset(scale: str = "tiny", recipe: str = "ours") -> RegularizersCommand:
    return RegularizersCommand(finetune_preset(scale, recipe), shipped(scale=scale))


def configured(config: FinetuneConfig, cell: Cell) -> tuple[FinetuneConfig, dict[str, Any]]:
    """A cell's config, and what of it may differ between runs of one compiled program, as overrides of it."""
    overrides = dict(cell.method.overrides)
    if cell.method.strength:
        whole = overrides.get(cell.method.strength, getattr(config, cell.method.strength))
        overrides[cell.method.strength] = cell.share * whole
    traced = {name: overrides.pop(name) for name in Hyper._fields if name in overrides}
    made = dataclasses.replace(config, **overrides)
    _ = dataclasses.replace(made, **traced)
    return made, traced


def run_stage(
    command: RegularizersCommand, model: Model, stage: str, config: FinetuneConfig, cells: Iterable[Cell], seeds: int
) -> arms_lib.Run:
    """Trains what is missing of the cells, each in its own directory; all their records as one run's."""
    cells, records, seconds = list(cells), [], 0.0
    for number, cell in enumerate(cells, 1):
        if number > 1 and cell.method != cells[number - 2].method:
            # Of all methods' programs together the memory maps would exceed what Linux allows a process.
            jax.clear_caches()
        made, traced = configured(config, cell)
        arms = {cell.name: traced}
        settings = {"config": dataclasses.asdict(made), "arms": arms, "seeds": seeds}
        path, title = command.out / stage / cell.name, f"{stage} {number}/{len(cells)}: {cell.name}"
        directory = finetune.run(path, {"command": COMMAND, **settings}, made, model, arms, seeds, command.logs, title)
        records += directory.metrics()
        seconds += directory.seconds()
    digits = model.max_pretrain_digits + config.extra_digits
    described = {"config": dataclasses.asdict(config), "seeds": seeds}
    return arms_lib.Run(described, records, {"wall_seconds": seconds}, digits, model.task)


def taken_over(command: RegularizersCommand, described: Mapping[str, Any]) -> dict[str, Any]:
    """The results of ``--earlier``, or empty ones.

    Raises:
      ConfigError: it is no finished call, or one whose cells were trained otherwise.
    """
    if command.earlier is None:
        return {"screen": {}, "best": {}, "confirmation": {"arms": {}}, "wall_seconds": 0.0}
    found = earlier_results(command.earlier, COMMAND)
    require(found is not None, "earlier", str(command.earlier), "a directory with a finished call's results.json")
    assert found is not None
    with reading.only_read(command.earlier / "results.json", "earlier", applies=True):
        theirs = {"task": ADDITION.name, **found["config"]}
        grid = theirs["grid"]
        require(set(command.grid) <= set(grid), "grid", command.grid, f"of {grid}, that of --earlier")
        free = {"command", "methods", "grid", "leaders", "earlier"}
        theirs, ours = ({name: config[name] for name in config.keys() - free} for config in (theirs, described))
        for name, (before, now) in RESUMABLE.differing(theirs, ours).items():
            require(False, name.removeprefix("config."), now, f"{before}, that of --earlier")
        return {"confirmation": {"arms": {}}, **found}


def measure(command: RegularizersCommand) -> Results:
    """Both stages, what was chosen between them, config and wall seconds.

    Raises:
      ConfigError: what cannot be trained or taken over; ``screen_only`` where a confirmation would be overwritten.
    """
    before = earlier_results(command.out, COMMAND) if command.screen_only else None
    loses = before is not None and "confirmation" in before
    require(not loses, "screen_only", True, f"no: {command.out} has the confirmation too, which would be lost")
    model = load_model(command.checkpoint)
    for config, seeds in ((command.screen_config, command.screen_seeds), (command.config, command.seeds)):
        make_program(config, model)
        make_runs(config, {"standard": {}}, seeds)
    own = ("methods", "grid", "screen_seeds", "screen_rounds", "leaders")
    described = {"command": COMMAND, **{name: getattr(command, name) for name in own}, **describe(command, model)}
    described = json.loads(json.dumps(described))
    earlier = taken_over(command, described)
    kept = {cell.name: earlier["screen"][cell.name] for cell in command.cells if cell.name in earlier["screen"]}
    if kept:
        described["earlier"] = {"cells": sorted(kept), "platform": earlier["platform"]}
    whole = RunDirectory(command.out, described)
    cells = [cell for cell in command.cells if cell.name not in kept]
    run = run_stage(command, model, "screen", command.screen_config, cells, command.screen_seeds)
    screen = kept | results_lib.screened(run, cells)
    best = results_lib.best_shares(screen)
    chosen = results_lib.choose(best, command.leaders)
    results = {"digits": run.digits, "screen": screen, "best": best, "chosen": chosen, **run.made}
    if not command.screen_only:
        at = earlier["best"]
        known = {
            name: arm
            for name, arm in earlier["confirmation"]["arms"].items()
            if name in chosen and at[name]["share"] == best[name]["share"]
        }
        cells = [Cell(BY_NAME[name], best[name]["share"]) for name in chosen if name not in known]
        run = run_stage(command, model, "confirmation", command.config, cells, command.seeds)
        results["confirmation"] = results_lib.confirmed(run, cells, chosen, earlier["confirmation"])
        results["wall_seconds"] += run.made["wall_seconds"]
    whole.record_config()
    whole.close()
    results["wall_seconds"] += earlier["wall_seconds"]
    return results | {"config": described}


def main(command: RegularizersCommand) -> None:
    publish(command, COMMAND, "regularizers", measure, results_lib.text, results_lib.draw)


if __name__ == "__main__":
    cli.run(main, RegularizersCommand, preset)
