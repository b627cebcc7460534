"""The benchmark's tables (Markdown) and figure, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ckl_jax.analysis import plots
from experiments.common.figure import markdown

AXES = {
    "runs": "runs in one program",
    "episodes": "episodes per round",
    "digits": "digits of the target length",
    "parameters": "parameters",
}
STAGES = ("rollout", "values", "updates")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values: Mapping[str, float], unit: str = "") -> str:
    median, low, high = (_number(values[name]) for name in ("median", "low", "high"))
    return f"{median}{unit} [{low}, {high}]"


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:.1f}M"


def _rollout(found: dict[str, Any]) -> str:
    rows = []
    for values in found.values():
        what = f"{_millions(values['parameters'])}, {values['digits']} digits, {values['episodes']} episodes"
        for name, rate in values["characters_per_second"].items():
            faster = values["speedup"].get(name)
            episodes = _spread(values["episodes_per_second"][name])
            rows.append([what, name, episodes, _spread(rate), _spread(faster, "x") if faster else "1x"])
    return markdown(["rollout", "side", "episodes/s", "characters/s", "faster than transformers"], rows)


def _speculation(found: dict[str, Any]) -> str:
    header = [
        "policy",
        "accuracy",
        "characters a window accepts",
        "without re-drafting",
        "plain",
        "speculative",
        "auto",
    ]
    rows = [
        [
            title,
            f"{100 * values['accuracy']:.0f}%",
            f"{values['characters_per_window']:.1f}",
            f"{values['characters_per_window_without_redrafting']:.1f}",
            f"{_spread(values['seconds']['plain'])} s",
            _spread(values["speedup"]["speculative"], "x"),
            _spread(values["speedup"]["auto"], "x") + (" (gave up)" if values["gave_up"] else ""),
        ]
        for title, values in found.items()
    ]
    episodes = sum(values["episodes"] for values in found.values())
    differing = sum(values["differing"] for values in found.values())
    gaps = [values["widest_gap"] for values in found.values() if values["widest_gap"] is not None]
    tie = f", from where the two best perturbed logits are closer than {max(gaps):.1g}" if gaps else ""
    return markdown(header, rows) + f"\n\n{differing} of {episodes:,} episodes differ from step-by-step decoding{tie}."


def _round(found: dict[str, Any]) -> str:
    rows = []
    for name, values in found["seconds"].items():
        seconds = {"median": float(np.median(values)), "low": min(values), "high": max(values)}
        faster = found["speedup"].get(name)
        rows.append([name, _spread(seconds), _spread(faster, "x") if faster else "1x"])
    stages = {s: np.median([timed["seconds"][s] for timed in found["authors_stages"]]) for s in STAGES}
    last = found["authors_stages"][-1]
    parts = ", ".join(
        f"{name} {_number(float(seconds))} s (timed {last['timed_items'][name]} of {last['items'][name]:,} passes)"
        for name, seconds in stages.items()
    )
    values = _number(found["authors_values_in_large_batches"])
    notes = [
        f"{found['episodes']} episodes, {found['transitions']:,} transitions. The authors' procedure and our "
        f"transition mode are timed in part and scaled up; theirs: {parts}.",
        f"With values in batches of {found['large_value_batch']} instead of {last['value_batch']}: {values} s.",
    ]
    return markdown(["a round", "seconds", "faster than the authors' procedure"], rows) + "\n\n" + " ".join(notes)


def _pretraining(found: dict[str, Any]) -> str:
    rows = [
        [f"{_millions(values['parameters'])}, batch {values['batch']} x {values['window']}"]
        + [_spread(values["characters_per_second"][name]) for name in ("ours", "pytorch")]
        + [_spread(values["speedup"]["ours"], "x")]
        for values in found.values()
    ]
    return markdown(["pre-training", "ours, characters/s", "PyTorch, characters/s", "faster"], rows)


def _scaling(found: dict[str, Any]) -> str:
    rows = [[AXES[axis], value, _spread(seconds)] for axis in AXES for value, seconds in found[axis].items()]
    held = (
        f"Episodes per round: {found['runs_episodes']} of each run, {found['digits_episodes']} for the target lengths, "
        f"{found['parameters_episodes']} for the model sizes (random weights, every episode as long as allowed)."
    )
    return markdown(["against", "value", "seconds per round"], rows) + f"\n\n{held}"


def _compile(found: dict[str, Any]) -> str:
    rows = [
        [work, cache, *(_spread(values[name]) for name in ("compile_seconds", "from_start_seconds", "second_seconds"))]
        for work, by_cache in found.items()
        for cache, values in by_cache.items()
    ]
    columns = ["compilation, s", "process start to the first one's end, s", "the next one, s"]
    return markdown(["work", "compilation cache", *columns], rows)


def _memory(found: dict[str, Any]) -> str:
    def megabytes(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e6:,.0f}"

    rows = [[work, megabytes(v["peak_bytes"]), megabytes(v["device_peak_bytes"])] for work, v in found.items()]
    return markdown(["process", "peak memory, MB", "of the device's own, MB"], rows)


def _limit(found: dict[str, Any]) -> str:
    stages = {name: values for name, values in found.items() if isinstance(values, dict) and "flops_share" in values}
    rows = [
        [
            name,
            _spread(values["seconds"]),
            f"{values['flops'] / 1e9:,.3g}",
            f"{values['bytes'] / 1e9:,.3g}",
            f"{100 * values['flops_share']:.0f}%",
            f"{100 * values['bytes_share']:.0f}%",
        ]
        for name, values in stages.items()
    ]
    rates = found["rates"]
    return (
        markdown(["stage", "seconds", "GFLOP", "GB touched", "of the matmul rate", "of the copy rate"], rows)
        + f"\n\nMeasured: {rates['flops_per_second'] / 1e9:,.0f} GFLOP/s in float32 matrix products, "
        f"{rates['bytes_per_second'] / 1e9:,.3g} GB/s in copies. Bytes that the processor's caches hold "
        "cost less than a copy, so that share can pass 100%."
    )


def _settings(found: dict[str, Any]) -> str:
    rows = [
        [
            work,
            name,
            *(_spread(values[column]) for column in ("seconds", "page_faults")),
            _spread(values["speedup"], "x"),
        ]
        for work, by_variant in found.items()
        for name, values in by_variant.items()
    ]
    return markdown(
        ["step or round", "settings", "seconds", "page faults of the process", "faster than with none"], rows
    )


_SECTIONS = {
    "rollout": _rollout,
    "speculation": _speculation,
    "round": _round,
    "pretraining": _pretraining,
    "scaling": _scaling,
    "compile": _compile,
    "memory": _memory,
    "limit": _limit,
    "settings": _settings,
}


def table(results: dict[str, Any]) -> str:
    """All finished sections as Markdown; every cell with brackets is a median [lowest, highest] over the repeats."""
    environment = results["environment"]
    head = (
        f"{environment['device']}, {environment['cpu']}, {environment['cpu_count']} CPUs, "
        f"{environment['torch_threads']} PyTorch threads, jax {environment['jax']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}. Median [lowest, highest] of the repeats; sides measured in turn."
    )
    parts = [
        f"## {name}\n\n{render(results['sections'][name]['found'])}"
        for name, render in _SECTIONS.items()
        if name in results["sections"]
    ]
    return "\n\n".join([head, *parts]) + "\n"


def draw(results: dict[str, Any]) -> Figure:
    """Seconds of a round against runs, episodes, target length and model size."""
    found = results["sections"]["scaling"]["found"]
    figure = Figure(figsize=(9, 6.5))
    panels = figure.subplots(2, 2)
    for panel, (axis, label) in zip(panels.flat, AXES.items(), strict=True):
        x = np.array([float(value) for value in found[axis]])
        median, low, high = (np.array([s[name] for s in found[axis].values()]) for name in ("median", "low", "high"))
        errors = [median - low, high - median]
        panel.errorbar(x, median, errors, fmt="o-", color=plots.COLORS["standard"], label="a round")
        if axis == "runs":
            panel.plot(x, median[0] / x[0] * x, ":", color="gray", label="as many rounds one after another")
            panel.legend()
        if axis != "digits":
            panel.set(xscale="log", yscale="log")
            plots.plain_ticks(panel.yaxis)
        panel.set_xticks(x, [_millions(v) if axis == "parameters" else f"{v:g}" for v in x])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(xlabel=label, ylabel="seconds per round")
    return figure
