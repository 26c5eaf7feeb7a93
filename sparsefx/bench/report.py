"""Rows of the model benchmark as text, as a JSON file, and as a plot."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20


def text(row: dict[str, Any]) -> str:
    """A few lines about one network."""
    head = f"{row['model']} batch {row['batch']} density {row['density']:.3g} {row['masks']} threads {row['threads']}"
    if "error" in row:
        return f"{head}: not timed, {row['error']}"
    ours, best = row["sparse"], row["best_dense"]
    promised = f" (at least {row['at_least']:g} is promised)" if row["at_least"] else ""
    lines = [
        f"{head}",
        "  dense   "
        + ", ".join(f"{name} {one['ms']:.1f} ms ±{one['spread']:.0%}" for name, one in row["dense"].items()),
        f"  sparse  {ours['step']:.1f} ms a step over {ours['interval']}: {ours['outside']:.1f} ±{ours['spread']:.0%} "
        f"outside the window, {ours['inside']:.1f} in its {ours['window']} steps, update {ours['update']:.0f}, "
        f"new lists {ours['rebuild']:.0f}",
        f"  ratio   {row['ratio']:.2f} against {best}{promised}; {row['ratio_without_window']:.2f} without the window",
    ]
    lines += [f"  not run {name}: {why}" for name, why in row["failed"].items()]
    if "memory" in row:
        memory = row["memory"]
        lines.append("  memory  " + ", ".join(f"{k.replace('_', ' ')} {_mib(v)}" for k, v in memory.items()))
    for name, parts in row.get("breakdown", {}).items():
        if parts:
            ordered = sorted(parts.items(), key=lambda item: -item[1])
            lines.append(f"  {name}: " + ", ".join(f"{kind} {value:.1f}" for kind, value in ordered) + " ms")
    for size, one in row.get("inference", {}).items():
        lines.append(
            f"  inference {size}: dense {one[one['best_dense']]['ms']:.2f} ms ({one['best_dense']}), "
            f"{one['best_sparse']} {one[one['best_sparse']]['ms']:.2f} ms, ratio {one['ratio']:.2f}"
        )
    if "epoch" in row:
        epoch = row["epoch"]
        lines.append(f"  epoch   dense {epoch['dense_ms'] / 1e3:.1f} s, sparse {epoch['sparse_ms'] / 1e3:.1f} s, "
                     f"ratio {epoch['ratio']:.2f}")  # fmt: skip
    return "\n".join(lines)


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / MIB:.1f} MiB"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of whole training steps."""
    lines = [
        "| network | density | batch | threads | best dense ms | bf16 ms | sparse ms | ratio | without window |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            continue
        half = [one["ms"] for name, one in row["dense"].items() if "bf16" in name]
        best = row["dense"][row["best_dense"]]["ms"]
        lines.append(
            f"| {row['model']} | {row['density']:.3g} | {row['batch']} | {row['threads']} | {best:.1f} | "
            f"{f'{min(half):.1f}' if half else ''} | {row['sparse']['step']:.1f} | {row['ratio']:.2f} | "
            f"{row['ratio_without_window']:.2f} |"
        )
    return "\n".join(lines)


def save(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with open(handle, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw ratios by network, and step times by density and by batch where rows differ in these.

    Of rows alike the last counts in a sweep, and the first in the ratios.

    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    first = {(row["model"], row["threads"]): row for row in reversed(rows)}
    names = [f"{model}\n{threads} threads" for model, threads in first]
    axes[0].bar(names, [row["ratio"] for row in first.values()], label="with window and update")
    axes[0].plot(names, [row["ratio_without_window"] for row in first.values()], "k_", ms=18, label="without")
    axes[0].axhline(1, color="gray", lw=0.8)
    axes[0].set_ylabel("dense step / sparse step")
    axes[0].tick_params(axis="x", labelrotation=90)
    axes[0].legend()
    for axis, key, fixed in ((axes[1], "density", "batch"), (axes[2], "batch", "density")):
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault((row["model"], row["threads"], row["masks"], row[fixed]), []).append(row)
        for (model, threads, masks, other), members in groups.items():
            points = sorted({row[key]: row["sparse"]["outside"] for row in members}.items())
            if len(points) > 1:
                label = f"{model}, {masks}, {fixed} {other:.3g}, {threads} threads"
                axis.plot(*zip(*points, strict=True), "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel=key, ylabel="sparse step, ms")
        if axis.lines:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))  # below: lines are everywhere
    figure.savefig(path, dpi=120)
    plt.close(figure)
