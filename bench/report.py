"""`make report`: all rows as one HTML page that needs nothing beside itself.

Of each measurement the newest row counts. Losses stand in the same plots and tables as wins; every goal stands beside
the roofline of its row.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench import peers
from bench.figures import day, panel_of, saved_svg, speedup_svg, strongest
from bench.rows import PREDICTION_GOAL, Row, newest, or_dash, read
from sparsediff.files import write_atomically

PEER = "peer "

Column = tuple[str, Callable[[Row], str]]


def write_report(files: Iterable[Path], out: Path) -> Path:
    """Writes the page of the rows in `files`, whole or not at all; returns `out`.

    Raises:
        ValueError: there is no row.
    """
    return write_atomically(out, report_html([row for file in files for row in read(file)]))


def report_html(measured: Sequence[Row]) -> str:
    """The page of these rows.

    Raises:
        ValueError: there is none.
    """
    rows = list(newest(measured).values())
    if not rows:
        raise ValueError("report: no rows; measure some with python -m bench run.")
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machines.setdefault(machine_of(row), []).append(row)
    parts = ["<h1>How fast the sparse kernels are</h1>", lead(rows, machines)]
    for name, own in machines.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += machine_html(own)
    parts += [peers_html(rows), METHOD]
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>Sparse kernels: benchmarks</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def machine_of(row: Row) -> str:
    """The machine of a row, as far as speed depends on it."""
    about = row.machine
    return f"{about.get('cpu')}, {about.get('cores')} cores, {about.get('isa')}"


def lead(rows: Sequence[Row], machines: Mapping[str, Sequence[Row]]) -> str:
    """What there is, in two sentences."""
    counts = tally(rows)
    slower = sum(row.speedup < 1 for row in strongest(rows))
    days = sorted({day(row) for row in rows})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"<p class='lead'>{len(rows)} measurements on {len(machines)} "
        f"{'machine' if len(machines) == 1 else 'machine settings'}, {span}: of {sum(counts.values())} goals "
        f"<strong class='met'>{counts['met']} are met</strong>, <strong class='missed'>{counts['MISSED']} missed"
        f"</strong>, and {counts['forbidden']} lie above what the machine's own peak or bandwidth allows. In {slower} "
        f"measurements ours is slower than the best dense rival.</p>"
    )


def tally(rows: Iterable[Row]) -> dict[str, int]:
    """How many goals were met, missed, and forbidden by the roofline."""
    counts = {"met": 0, "MISSED": 0, "forbidden": 0}
    for row in rows:
        if row.verdict:
            counts[row.verdict] += 1
    return counts


def machine_html(rows: Sequence[Row]) -> list[str]:
    """Plots and tables of one machine."""
    about = rows[-1].machine
    commits = sorted({str(row.machine.get("commit")) for row in rows})
    versions = sorted({f"torch {row.machine.get('torch')}, Python {row.machine.get('python')}" for row in rows})
    peaks = {row.threads: row.peak_gflops for row in rows if row.peak_gflops and row.dtype == "float32"}
    measured = ", ".join(f"{peak:.0f} GFLOP/s with {threads} thread(s)" for threads, peak in sorted(peaks.items()))
    parts = [
        f"<p class='fine'>{html.escape('; '.join(versions))}; kernels: {html.escape(str(about.get('isa')))}; measured "
        f"fp32 peak: {measured or 'not measured'}. Commits: {html.escape(', '.join(commits))}.</p>",
        "<h3>Speedup against sparsity</h3>",
        "<p class='fine'>Median time of the strongest dense rival over ours; lines: geometric mean over the shapes, "
        "pale points: each shape. Dashed: 1/(1−S), what the saved FLOPs are worth at the dense library's rate. Short "
        "black bars: goals. Below the line at 1x ours is slower.</p>",
        _gallery(rows, speedup_svg, least_levels=2),
        "<h3>FLOPs saved against seconds saved</h3>",
        "<p class='fine'>One point a measurement. On the dashed diagonal a saved FLOP saves the time that the dense "
        "library needs for one; below it, overhead eats a part; below zero, ours is slower.</p>",
        _gallery(rows, saved_svg, least_levels=2),
        "<h3>Goals</h3>",
        goals_html(rows),
        predictions_html(rows),
        "<h3>All rows</h3>",
        "<p class='fine'>Times are medians of interleaved rounds; the span is the 20th to the 80th percentile of the "
        "rounds' ratios. Efficiency is density times speedup. GF/s and GB/s count the nonzeros' operations and the "
        "bytes that must move; ceiling: the speedup at which ours would run at the machine's limit.</p>",
    ]
    for case, own in _grouped(rows, lambda row: row.case).items():
        counts = tally(own)
        goals = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)
        summary = f"{case} <span>{len(own)} rows{': ' + goals if goals else ''}</span>"
        parts.append(f"<details><summary>{summary}</summary>{_table(own, ROW_COLUMNS)}</details>")
    return parts


def goals_html(rows: Sequence[Row]) -> str:
    """Goals by plot, pattern and thread count; then each that was not met, with its arithmetic."""
    with_goal = [row for row in rows if row.verdict]
    threads = sorted({row.threads for row in with_goal})
    head = "".join(f"<th>{count} thread{'' if count == 1 else 's'}</th>" for count in threads)
    lines = [f"<tr><th>goals</th>{head}</tr>"]
    for name, own in _grouped(with_goal, lambda row: f"{panel_of(row)}, {row.pattern}").items():
        cells = "".join(f"<td>{_tally_html([row for row in own if row.threads == count])}</td>" for count in threads)
        lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    text = f"<div class='scroll'><table>{''.join(lines)}</table></div>"
    unmet = [row for row in with_goal if not row.met]
    if not unmet:
        return text
    return (
        f"{text}<details><summary>Goals that were not met <span>{len(unmet)}</span></summary>"
        f"{_table(unmet, GOAL_COLUMNS)}</details>"
    )


def predictions_html(rows: Sequence[Row]) -> str:
    """How far measured speedups lie from the predicted ones, and the goal; empty where nothing was predicted."""
    predicted = [row for row in rows if row.prediction]
    if not predicted:
        return ""
    close = sum(abs(row.prediction_error or 0.0) <= PREDICTION_GOAL for row in predicted)
    return (
        f"<details><summary>Predicted speedups <span>{close} of {len(predicted)} within {PREDICTION_GOAL:.0%}"
        f"</span></summary>{_table(predicted, PREDICTION_COLUMNS)}</details>"
    )


def peers_html(rows: Sequence[Row]) -> str:
    """Ours beside public implementations, and which of them could not come."""
    measured = [row for row in rows if row.rival.startswith(PEER)]
    names = {row.rival.removeprefix(PEER) for row in measured}
    absent = {name: reason for name, reason in peers.roll_call().items() if reason and name not in names}
    lines = [f"<tr><td>{html.escape(name)}</td><td>{html.escape(reason)}</td></tr>" for name, reason in absent.items()]
    text = "<h2>Peers</h2><p>Public implementations of the same products, in the same process and rounds.</p>"
    for name, own in _grouped(measured, lambda row: row.rival.removeprefix(PEER)).items():
        ratios = [row.speedup for row in own]
        span = f"ours is {min(ratios):.2f}x to {max(ratios):.2f}x as fast"
        text += (
            f"<details><summary>{html.escape(name)} <span>{span}</span></summary>{_table(own, PEER_COLUMNS)}</details>"
        )
    return f"{text}<p>Not here, and why:</p><div class='scroll'><table>{''.join(lines)}</table></div>"


METHOD = """<h2>How it is measured</h2>
<p>Before anything is timed, the result and every gradient of a layer are compared with the dense computation, of a
whole model the output, the sparse weights' gradients and that it trains, of peers what they compute; a wrong variant
has no row. Dense, ours and peers run in turn in one process on the same random data, each round in another order; a
speedup is the median of the ratios within rounds. A forward and backward pass includes everything a training step
needs: packing, index reads, autograd.</p>
<pre>python -m bench run                every case at one and two threads
python -m bench run 'conv/3x3*'    one of them
python -m bench compare A B        two commits side by side
make report                        this page</pre>"""


# Tables


def _tally_html(rows: Sequence[Row]) -> str:
    counts = tally(rows)
    return ", ".join(f"<span class='{k.lower()}'>{n} {k.lower()}</span>" for k, n in counts.items() if n) or "–"


def _verdict(row: Row) -> str:
    return f"<span class='{row.verdict.lower()}'>{row.verdict.lower()}</span>" if row.verdict else ""


def _speedup(row: Row) -> str:
    text = f"{row.speedup:.2f}x"
    return f"<span class='missed'>{text} (slower)</span>" if row.speedup < 1 else text


ROW_COLUMNS: tuple[Column, ...] = (
    ("shape", lambda r: html.escape(r.shape)),
    ("pattern", lambda r: html.escape(r.pattern)),
    ("S", lambda r: f"{r.sparsity:g}"),
    ("density", lambda r: f"{r.density:.3f}"),
    ("threads", lambda r: str(r.threads)),
    ("rival", lambda r: html.escape(r.rival)),
    ("ours", lambda r: f"{r.ours_ms:.2f} {r.unit}"),
    ("rival's", lambda r: f"{r.rival_ms:.2f} {r.unit}"),
    ("speedup", _speedup),
    ("span", lambda r: f"{r.speedup_p20:.2f}–{r.speedup_p80:.2f}"),
    ("efficiency", lambda r: f"{r.efficiency:.2f}"),
    ("GF/s", lambda r: or_dash(r.gflops, ".0f")),
    ("GB/s", lambda r: or_dash(r.gbs, ".1f")),
    ("ceiling", lambda r: "–" if r.roofline is None else f"{r.roofline:.1f}x"),
    ("goal", lambda r: "–" if r.goal is None else f"{r.goal:.3g}x"),
    ("", _verdict),
    ("MiB", lambda r: "–" if r.ours_mib is None else f"{r.ours_mib:.1f} / {or_dash(r.rival_mib, '.1f')}"),
    ("note", lambda r: html.escape(r.note)),
)
GOAL_COLUMNS: tuple[Column, ...] = (
    ("what", lambda r: html.escape(f"{panel_of(r)}: {r.shape}")),
    ("pattern", lambda r: html.escape(r.pattern)),
    ("S", lambda r: f"{r.sparsity:g}"),
    ("threads", lambda r: str(r.threads)),
    ("rival", lambda r: html.escape(r.rival)),
    ("speedup", _speedup),
    ("goal", lambda r: "–" if r.goal is None else f"{r.goal:.3g}x"),
    ("ceiling", lambda r: "–" if r.roofline is None else f"{r.roofline:.1f}x"),
    ("", _verdict),
    ("arithmetic", lambda r: html.escape(r.forbidden)),
)

PREDICTION_COLUMNS: tuple[Column, ...] = (
    ("what", lambda r: html.escape(f"{panel_of(r)}: {r.shape}")),
    ("pattern", lambda r: html.escape(r.pattern)),
    ("S", lambda r: f"{r.sparsity:g}"),
    ("threads", lambda r: str(r.threads)),
    ("speedup", _speedup),
    ("prediction", lambda r: html.escape(r.prediction)),
)

PEER_COLUMNS: tuple[Column, ...] = (
    ("what", lambda r: html.escape(f"{panel_of(r)}: {r.shape}")),
    ("pattern", lambda r: html.escape(r.pattern)),
    ("S", lambda r: f"{r.sparsity:g}"),
    ("threads", lambda r: str(r.threads)),
    ("ours", lambda r: f"{r.ours_ms:.2f} {r.unit}"),
    ("peer", lambda r: f"{r.rival_ms:.2f} {r.unit}"),
    ("ours over the peer", _speedup),
    ("", lambda r: html.escape(r.note)),
)


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    lines = ["".join(f"<td>{show(row)}</td>" for _, show in columns) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table class='rows'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _gallery(rows: Sequence[Row], draw: Callable[[str, Sequence[Row]], str], *, least_levels: int) -> str:
    """A plot for each case and thread count with at least so many sparsities; only of times."""
    figures = []
    for name, own in sorted(_grouped(strongest(rows), lambda row: f"{panel_of(row)}|{row.threads}").items()):
        if len({row.sparsity for row in own}) < least_levels:
            continue
        panel, threads = name.split("|")
        title = f"{panel}, {threads} thread{'' if threads == '1' else 's'}"
        picture = base64.b64encode(draw(title, own).encode()).decode()
        figures.append(f"<figure><img alt='{html.escape(title)}' src='data:image/svg+xml;base64,{picture}'></figure>")
    return f"<div class='plots'>{''.join(figures)}</div>"


_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d2633; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; padding-bottom: .3rem; border-bottom: 1px solid #e3e7ed; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .3rem; }
.lead { font-size: 1.12rem; max-width: 60rem; }
.fine { color: #5b6675; font-size: .86rem; max-width: 60rem; overflow-wrap: anywhere; }
.plots { display: grid; gap: .8rem 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid #edf0f4; vertical-align: top; }
th { font-weight: 600; }
.rows td, .rows th { white-space: nowrap; }
.rows tbody tr:hover { background: #f6f8fa; }
details { margin: .4rem 0; border: 1px solid #e3e7ed; border-radius: 6px; padding: 0 .8rem; }
details[open] { padding-bottom: .6rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
summary span { font-weight: 400; color: #5b6675; margin-left: .5rem; }
.met { color: #17703d; }
.missed { color: #b3261e; }
.forbidden { color: #8a5a00; }
pre { background: #f2f4f7; padding: .8rem 1rem; border-radius: 4px; overflow-x: auto; }
"""
