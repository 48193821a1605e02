"""The demo's report: one HTML file that needs nothing beside itself, from what the demo measured.

Pictures are PNGs inside the file; bars and tables are plain HTML; there are no scripts, no fonts and no links to load.
What went against the sparse model stands in the same tables, sentences and curves as what went for it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from sparse_kernels.nn import Plan
from sparsediff.files import write_atomically
from sparsediff.rendering import grid

NAMES = ("dense", "sparse")
COLOURS = {"dense": "#4a6fa5", "sparse": "#e4572e"}
# Of a block: absent, kept, dropped, grown. Told apart also by people who do not tell red from green.
BLOCK_COLOURS = np.array([[238, 241, 245], [82, 96, 117], [230, 129, 20], [0, 142, 116]], np.uint8)
MEMORY_COLOURS = {
    "parameters": "#34507c",
    "gradients": "#5b82b8",
    "optimizer": "#8fb0d6",
    "ema": "#c0d3ea",
    "index": "#e4572e",
}


@dataclass
class Curve:
    """How a model's loss went.

    Args:
        steps, seconds, losses: of every training step; seconds of training, all else left out.
        validation: (step, seconds, loss of the averaged model).
        regrows: (step, seconds) of changes of the topology.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float, float]] = field(default_factory=list)
    regrows: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """The active blocks of one weight, `[row_blocks, col_blocks]` bool, before and after training."""

    name: str
    before: npt.NDArray[np.bool_]
    after: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """What the demo hands over.

    Args:
        summary: see `sparsediff.demo`; the content of summary.json.
        ran: (what, value) lines of the table "What ran".
        curves: by model, "dense" and "sparse".
        drawings: by "real", "sparse", "dense": `[T, 3]` arrays.
        plan: `sparse_kernels.nn.Plan.to_json`.
        changes: of every sparse weight.
    """

    summary: dict[str, Any]
    ran: Sequence[tuple[str, str]]
    curves: dict[str, Curve]
    drawings: dict[str, list[npt.NDArray[np.float32]]]
    plan: dict[str, Any]
    changes: Sequence[Change]


def write_report(result: Result, path: Path) -> Path:
    """Writes the report as `path`, whole or not at all; returns it."""
    return write_atomically(path, report_html(result))


def report_html(result: Result) -> str:
    """The report as a page."""
    summary = result.summary
    notice = ""
    if summary["interrupted"]:
        trained = ", ".join(f"{name} {summary['seconds'][name]:.0f} s" for name in NAMES)
        notice = (
            f"<p class='notice'><strong>Stopped early.</strong> Training was interrupted: it ran {trained} of the "
            f"{summary['budget_seconds']:g} s each that were planned. Everything below is from that much training.</p>"
        )
    parts = [
        "<h1>A sparse diffusion model beside its dense twin</h1>",
        f"<p class='lead'>{verdict(summary)}</p>",
        notice,
        _section("What it draws", samples_html(result)),
        _section("Loss", curves_html(result)),
        _section("Speed", speed_html(summary)),
        _section("Memory", memory_html(summary)),
        _section("In numbers", numbers_html(summary)),
        _section("Where the weights are", topology_html(result)),
        _section("The plan", plan_html(result.plan)),
        _section("What ran", _table([("", ""), *result.ran], header=False)),
        _section(
            "Do it again",
            f"<pre>{html.escape(summary['command'])}</pre><p>The same seed gives the same weights, topology, order of "
            "the data and noise; how far training gets in the time depends on the machine. More samples: "
            f"<code>sparsediff sample {html.escape(summary['out'])}/sparse --n 64</code>.</p>",
        ),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>Sparse diffusion demo</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


# Sentences


def verdict(summary: dict[str, Any]) -> str:
    """The result in a sentence or two, as HTML; wins and losses in the same words."""
    step = (
        f"takes <strong>{summary['sparse_step_ms']:.1f} ms</strong> for a training step where its dense twin takes "
        f"{summary['dense_step_ms']:.1f} ms (<strong>{faster(summary['speedup'])}</strong>)"
    )
    share = summary["memory_sparse"]["total"] / summary["memory_dense"]["total"]
    text = (
        f"On {html.escape(summary['cpu'])} with {plural(summary['threads'], 'thread')}, a ChiroDiff without "
        f"{summary['sparsity_reached']:.0%} of its weights ({html.escape(summary['method'])}, "
        f"{html.escape(summary['pattern'])}) {step}, and needs <strong>{share:.0%}</strong> of the memory for "
        "parameters, gradients, optimizer and average."
    )
    sparse, dense = summary["final_loss"], summary["final_loss_dense"]
    if min(summary["steps"], summary["steps_dense"]) > 0:
        same = summary["seconds"]
        relation = "lower than" if sparse < dense else "higher than" if sparse > dense else "equal to"
        text += (
            f" After {same['sparse']:.0f} s of training each, its validation loss is {sparse:.4f}, {relation} the "
            f"dense model's {dense:.4f}."
        )
    return text


def faster(ratio: float) -> str:
    """A speedup in words: 3.2x faster, 1.4x slower."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 thread, 2 threads."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# Sections


def samples_html(result: Result) -> str:
    """Real drawings and both models' samples side by side."""
    captions = {
        "real": "Real: drawings of the validation split",
        "sparse": f"Sparse, after {plural(result.summary['steps'], 'step')}",
        "dense": f"Dense, after {plural(result.summary['steps_dense'], 'step')}",
    }
    figures = "".join(_figure(picture_png(grid(result.drawings[name])), caption) for name, caption in captions.items())
    sampling = result.summary["sampling"]
    return (
        f"<div class='three'>{figures}</div><p class='fine'>Both models draw with their averaged weights (EMA), from "
        f"the same noise and to the same lengths; {sampling['sampler'].upper()}, {sampling['steps']} steps, "
        f"η = {sampling['eta']:g}. The first {len(result.drawings['sparse'])} samples, not a selection.</p>"
    )


def curves_html(result: Result) -> str:
    """Losses against seconds and against steps, and what they say."""
    pictures = "".join(
        _figure(curve_png(result.curves, over), caption)
        for over, caption in (("seconds", "against seconds of training"), ("steps", "against training steps"))
    )
    return (
        f"<div class='two'>{pictures}</div><p class='fine'>Points: validation loss of the averaged model, on held-out "
        "drawings with fixed timesteps and noise. Pale lines: training loss, smoothed. Dotted: regrows; what they "
        "drop costs loss at first. The two models trained in turns of a few seconds, so that what else the machine did "
        "met both.</p>"
    )


def speed_html(summary: dict[str, Any]) -> str:
    """Bars of the step times."""
    times = summary["step_ms"]
    slowest = max(times.values())
    rows = []
    for name, label in (
        ("dense_packed", "dense, packed nn.GRU"),
        ("dense_padded", "dense, padded nn.GRU"),
        ("sparse", "sparse"),
    ):
        kind = "sparse" if name == "sparse" else "dense"
        bar = f"<i style='width:{100 * times[name] / slowest:.2f}%;background:{COLOURS[kind]}'></i>"
        rows.append(f"<div class='bar'><span>{label}</span><b>{bar}</b><em>{times[name]:.1f} ms</em></div>")
    low, high = summary["speedup_range"]
    return (
        f"{''.join(rows)}<p>The sparse step is <strong>{faster(summary['speedup'])}</strong> than the faster dense "
        f"form (20th to 80th percentile of the rounds: {low:.2f} to {high:.2f}).</p><p class='fine'>A step is all that "
        "a step needs: batch, loss, backward, clipping, AdamW, method, average. Measured one after the other in "
        f"{plural(summary['rounds'], 'round')} in one process, on the same batches; medians.</p>"
    )


def memory_html(summary: dict[str, Any]) -> str:
    """Stacked bars of what training keeps in memory."""
    whole = max(summary["memory_dense"]["total"], summary["memory_sparse"]["total"])
    rows = []
    for name in NAMES:
        memory = summary[f"memory_{name}"]
        pieces = "".join(
            f"<i style='width:{100 * memory[kind] / whole:.2f}%;background:{colour}' title='{kind}'></i>"
            for kind, colour in MEMORY_COLOURS.items()
        )
        rows.append(f"<div class='bar'><span>{name}</span><b>{pieces}</b><em>{_bytes(memory['total'])}</em></div>")
    legend = "".join(f"<li><i style='background:{colour}'></i>{kind}</li>" for kind, colour in MEMORY_COLOURS.items())
    table = _table(
        [
            ("", *MEMORY_COLOURS, "total"),
            *(
                (name, *(_bytes(summary[f"memory_{name}"][kind]) for kind in [*MEMORY_COLOURS, "total"]))
                for name in NAMES
            ),
        ]
    )
    return (
        f"{''.join(rows)}<ul class='legend'>{legend}</ul>{table}<p class='fine'>What training keeps between steps, "
        "counted from the tensors; activations, which are dense in both, are not in it.</p>"
    )


def numbers_html(summary: dict[str, Any]) -> str:
    """Dense beside sparse."""
    ratio = summary["params_sparse"] / summary["params_dense"]
    rows = [
        ("", "dense", "sparse", "sparse / dense"),
        ("parameters", f"{summary['params_dense']:,}", f"{summary['params_sparse']:,}", f"{ratio:.3f}"),
        (
            "training steps in the time",
            f"{summary['steps_dense']:,}",
            f"{summary['steps']:,}",
            _quotient(summary["steps"], summary["steps_dense"]),
        ),
        _loss_row("validation loss at the end", summary["final_loss_dense"], summary["final_loss"]),
        _loss_row("training loss at the end", summary["train_loss_dense"], summary["train_loss"]),
    ]
    common = summary["at_same_steps"]
    if common is not None:
        label = f"validation loss after {common['steps']:,} steps each"
        rows.append(_loss_row(label, common["dense"], common["sparse"]))
    text = _table(rows)
    reached = summary["seconds_to_dense_loss"]
    if reached is not None:
        text += (
            f"<p>The sparse model stood at the dense model's final validation loss after <strong>{reached:.0f} s"
            f"</strong>; the dense model needed {summary['seconds']['dense']:.0f} s.</p>"
        )
    elif summary["steps"] and summary["steps_dense"]:
        text += "<p>The sparse model did not reach the dense model's final validation loss in the time.</p>"
    return text


def topology_html(result: Result) -> str:
    """Every sparse weight before and after training, block by block."""
    moved = sum(int((change.after & ~change.before).sum()) for change in result.changes)
    total = sum(int(change.after.sum()) for change in result.changes)
    legend = "".join(
        f"<li><i style='background:rgb({r},{g},{b})'></i>{label}</li>"
        for (r, g, b), label in zip(
            BLOCK_COLOURS.tolist(), ("absent", "kept", "dropped (before)", "grown (after)"), strict=True
        )
    )
    figures = ""
    for change in result.changes:
        grown, active = (int(blocks.sum()) for blocks in (change.after & ~change.before, change.after))
        figures += _figure(change_png(change), f"{change.name}: {grown:,} of {active:,} moved", "pixels")
    return (
        f"<p>Left of each pair: the blocks of the weight before training; right: after it. {moved:,} of the {total:,} "
        f"blocks ended in another place than they began, after {plural(result.summary['regrows'], 'regrow')}.</p>"
        f"<ul class='legend'>{legend}</ul><div class='many'>{figures}</div>"
    )


def plan_html(plan: dict[str, Any]) -> str:
    """The table of `sparsify`: every weight, what became of it and why."""
    rows: list[tuple[str, ...]] = [
        ("layer", "shape", "pattern", "sparsity", "nonzeros", "execution", "speedup", "reason")
    ]
    for row in plan["rows"]:
        shape = "x".join(map(str, row["shape"]))
        numbers = (f"{row['sparsity']:.3f}", f"{row['nonzeros']:,}")
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.1f}x"
        rows.append((row["layer"], shape, row["pattern"], *numbers, row["execution"], speedup, row["reason"]))
    rows.append(("total", f"{plan['numel']:,}", "", f"{plan['sparsity']:.3f}", f"{plan['nonzeros']:,}", "", "", ""))
    foreseen = "".join(f"<p>Predicted: {line}.</p>" for line in Plan.from_json(plan).prediction())
    return _table(rows) + foreseen


# Pictures


def curve_png(curves: dict[str, Curve], over: str) -> bytes:
    """The losses of both models over "seconds" or "steps" as PNG."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    lowest, highest, needed = np.inf, 0.0, 0.0
    for name in NAMES:
        curve, colour = curves[name], COLOURS[name]
        x = np.asarray(curve.seconds if over == "seconds" else curve.steps, dtype=np.float64)
        losses = smooth(np.asarray(curve.losses, dtype=np.float64))
        axes.plot(x[-len(losses) :] if len(losses) else x, losses, color=colour, alpha=0.35, linewidth=1)
        for step, seconds in curve.regrows:
            axes.axvline(seconds if over == "seconds" else step, color=colour, linewidth=0.8, linestyle=":")
        points = np.array(curve.validation, dtype=np.float64).reshape(-1, 3)
        at = points[:, 1 if over == "seconds" else 0]
        axes.plot(at, points[:, 2], color=colour, marker="o", markersize=3.5, linewidth=1.8, label=name)
        seen = np.concatenate([losses, points[:, 2]])
        lowest = min(lowest, float(seen.min(initial=np.inf)))
        highest = max(highest, float(points[:, 2].max(initial=0.0)))
        needed = max(needed, float(points[-1, 2]))
    # The first moments of training are far above what comes after; the axis is for the latter.
    axes.set_ylim(0.95 * lowest, min(1.05 * highest, max(2.2 * lowest, 1.3 * needed)))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training" if over == "seconds" else "training steps")
    axes.set_ylabel("loss")
    axes.grid(color="#e3e7ed", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure_png(figure)


def smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Running mean over a fortieth of the values (at least 5); shorter by the window less one."""
    window = min(len(values), max(5, len(values) // 40))
    return values if window < 2 else np.convolve(values, np.full(window, 1 / window), mode="valid")


def change_png(change: Change, side: int = 8) -> bytes:
    """Before and after beside each other; a block is a square of up to `side` pixels."""
    before, after = change.before.astype(np.int64), change.after.astype(np.int64)
    before[change.before & ~change.after] = 2
    after[change.after & ~change.before] = 3
    side = max(1, min(side, 400 // max(before.shape)))
    gap = np.full((before.shape[0] * side, 12, 3), 255, np.uint8)
    left, right = (BLOCK_COLOURS[kinds].repeat(side, 0).repeat(side, 1) for kinds in (before, after))
    return picture_png(Image.fromarray(np.concatenate([left, gap, right], 1)))


def figure_png(figure: Figure) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170)
    return buffer.getvalue()


def picture_png(image: Image.Image) -> bytes:
    """A Pillow picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# HTML


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _figure(png: bytes, caption: str, kind: str = "") -> str:
    data = base64.b64encode(png).decode()
    caption = html.escape(caption, quote=True)
    return (
        f"<figure class='{kind}'><img alt='{caption}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(rows: Sequence[Sequence[str]], header: bool = True) -> str:
    lines = []
    for number, row in enumerate(rows):
        if number == 0 and not header:
            continue
        cell = "th" if number == 0 else "td"
        lines.append("<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row) + "</tr>")
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _loss_row(label: str, dense: float | None, sparse: float | None) -> tuple[str, ...]:
    if dense is None or sparse is None:
        return (label, *("–" if loss is None else f"{loss:.4f}" for loss in (dense, sparse)), "–")
    return label, f"{dense:.4f}", f"{sparse:.4f}", f"{sparse / dense:.3f}"


def _quotient(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "–"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d2633; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid #e3e7ed; }
.lead { font-size: 1.12rem; }
.notice { background: #fff4e5; border-left: 4px solid #e68114; padding: .7rem 1rem; }
.fine { color: #5b6675; font-size: .86rem; }
.two, .three, .many { display: grid; gap: 1rem; }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); align-items: end; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
.pixels img { width: auto; max-width: 100%; image-rendering: pixelated; }
figcaption { font-size: .84rem; color: #5b6675; margin-top: .3rem; overflow-wrap: anywhere; }
.bar { display: grid; grid-template-columns: 11rem 1fr 6rem; gap: .7rem; align-items: center; margin: .35rem 0; }
.bar b { display: flex; height: 1.35rem; background: #f2f4f7; border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.bar em { font-style: normal; font-variant-numeric: tabular-nums; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; font-size: .86rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #edf0f4; vertical-align: top; }
th { font-weight: 600; }
pre { background: #f2f4f7; padding: .8rem 1rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  .bar { grid-template-columns: 1fr 5.5rem; }
  .bar span { grid-column: 1 / -1; margin-bottom: -.5rem; font-size: .9rem; }
}
"""
