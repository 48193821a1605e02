"""The benchmark harness end to end on tiny problems: list, run, compare, report; and that it refuses wrong results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not a part of the installed packages

from bench import __main__ as cli  # noqa: E402
from bench import compare, costs, figures, harness, peers, readme, registry, report, roofline, rows  # noqa: E402
from bench.cases import conv, linear  # noqa: E402
from sparse_kernels import backends, parse_pattern  # noqa: E402
from sparse_kernels.topology import Topology  # noqa: E402

VARIANTS = (
    registry.Variant("block:16x16", 0.5, {"D2": 1e-6}),
    registry.Variant("unstructured", 0.75, {"D2": 1e9}),
)


@pytest.fixture
def tiny() -> Iterator[registry.Case]:
    """A registered case of one small linear layer: one goal that anything meets, one that nothing can."""
    registry.all_cases()
    problem = registry.Problem("P=48 K=64", VARIANTS, partial(linear.prepare, 48, 64, True), quick=True)
    case = registry.register(registry.Case("tiny", "a test", (problem,)))
    yield case
    del registry._CASES["tiny"]


def run(*arguments: str) -> int:
    return cli.main(["run", "tiny", "--threads", "1", "--quick", "--seconds", "0.01", *arguments])


def test_list_names_cases_variants_and_absent_peers(tiny, capsys) -> None:  # type: ignore[no-untyped-def]
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert "tiny/P=48 K=64 (quick): block:16x16 S=0.5; unstructured S=0.75" in text
    for case in ("conv", "gru", "linear", "bf16", "scores", "regrow", "memory", "step", "forward"):
        assert f"\n{case}: " in f"\n{text}"
    assert "stk: CUDA only" in text and "scipy.sparse, one thread: present" in text


def test_run_writes_rows_with_everything_a_reader_needs(tiny, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "rows.jsonl"
    assert run("--out", str(out)) == 0
    text = capsys.readouterr().out
    measured = rows.read(out)
    dense = [row for row in measured if not row.rival.startswith("peer ")]
    assert [(row.pattern, row.rival.split()[0]) for row in dense] == [
        ("block:16x16", "D1"), ("block:16x16", "D2"), ("unstructured", "D1"), ("unstructured", "D2"),
    ]  # fmt: skip
    assert any(row.rival == "peer torch CSR (MKL)" for row in measured)
    for row in measured:
        assert row.density == {"block:16x16": 0.5, "unstructured": 0.25}[row.pattern]
        assert row.efficiency == pytest.approx(row.density * row.speedup, abs=2e-3)
        assert row.speedup_p20 <= row.speedup <= row.speedup_p80 and row.ours_p20 <= row.ours_ms * 1.001
        assert row.flops == 3 * 2.0 * 48 * 64 * 64 * row.density
        assert row.roofline == pytest.approx(min(row.roofline_compute, row.roofline_memory), rel=0.01)
        assert row.rounds >= 3 and row.threads == 1
        assert {"cpu", "isa", "torch", "commit", "date"} <= set(row.machine)
    met, impossible = (next(row for row in dense if row.goal == goal) for goal in (1e-6, 1e9))
    assert met.verdict == "met" and not met.forbidden
    assert impossible.verdict == "forbidden" and "take" in impossible.forbidden and impossible.forbidden in text
    assert "1 met, 0 missed, 1 forbidden" in text
    assert "scipy.sparse, one thread not in block:16x16 S=0.5, unstructured S=0.75: scipy.sparse has no product" in text


def test_filters(tiny, tmp_path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "rows.jsonl"
    assert run("--pattern", "unstructured", "--out", str(out)) == 0
    assert {row.pattern for row in rows.read(out)} == {"unstructured"}
    chosen = registry.select(["tiny/P=*", "gru"], sparsities=[0.5])
    assert {case.name for case, _ in chosen} == {"tiny", "gru"}
    assert all(variant.sparsity == 0.5 for _, problem in chosen for variant in problem.variants)
    with pytest.raises(ValueError, match="no case or problem of device cpu fits nothing"):
        registry.select(["tiny", "nothing"])
    with pytest.raises(ValueError, match="no variant"):
        registry.select(["tiny"], sparsities=[0.123])


@pytest.mark.parametrize("what", ["spmm", "product_backward"])
def test_a_wrong_kernel_fails_the_case_and_has_no_speedup(what, tiny, tmp_path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    backend = backends.get("cpu")
    right = getattr(backend, what)

    def wrong(*args, **kwargs):  # type: ignore[no-untyped-def]
        result = right(*args, **kwargs)
        if args[3 if what == "product_backward" else 2].pattern.area > 1:
            one = result if isinstance(result, torch.Tensor) else result[1]
            one.view(-1)[one.numel() // 2] += 0.1
        return result

    monkeypatch.setattr(backend, what, wrong)
    out = tmp_path / "rows.jsonl"
    assert run("--out", str(out)) == 1
    assert {row.pattern for row in rows.read(out)} == {"unstructured"}
    text = capsys.readouterr().out
    assert re.search(r"FAILED tiny/P=48 K=64 block:16x16 S=0.5, 1 thread\(s\): wrong result: linear .* is off by", text)


def test_rows_survive_the_file_and_old_ones_are_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    row = example(1.5)
    path = tmp_path / "rows.jsonl"
    rows.write([row], path)
    assert rows.read(path) == [row]
    old = {"case": "linear", "shape": "P=1 K=1", "pattern": "unstructured", "sparsity": 0.5, "density": 0.5,
           "threads": 1, "rival": "D1 F.linear", "ours_ms": 1.0, "rival_ms": 2.0, "speedup": 2.0, "speedup_p20": 1.9,
           "speedup_p80": 2.1, "efficiency": 1.0, "later": 7}  # fmt: skip
    path.write_text(json.dumps(old) + "\n")
    (read,) = rows.read(path)
    assert (read.unit, read.passes, read.extra, read.verdict) == ("ms", "forward + backward", {"later": 7}, "")
    path.write_text(json.dumps(old) + "\n{}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2 is not a row"):
        rows.read(path)
    for committed in rows.RESULTS.glob("*.jsonl"):
        assert rows.read(committed)


def example(speedup: float, spread: float = 0.1, **changes: object) -> rows.Row:
    row = rows.Row(
        "linear", "P=1 K=1", "block:16x16", 0.5, 0.5, 1, "D2 packed", 1.0, speedup, speedup, speedup - spread,
        speedup + spread, 0.5 * speedup, machine={"cpu": "x", "isa": "avx2", "commit": "aaa", "date": "2026-01-01"},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_compare_flags_what_lies_beyond_noise(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    after = {"cpu": "x", "isa": "avx2", "commit": "bbb", "date": "2026-01-02"}
    before = [example(2.0), example(2.0, shape="noisy"), example(2.0, shape="better"), example(1.0, shape="gone")]
    later = [
        example(1.7, machine=after, rival="D2 padded"),
        example(1.9, shape="noisy", machine=after),
        example(3.0, shape="better", machine=after),
    ]
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows.write(before, one)
    rows.write([*before, *later], two)
    assert cli.main(["compare", str(one), f"{two}@bbb"]) == 1
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()] == ["regression", "improvement", "3"]
    assert "1 regressions and 1 improvements" in text and "only in A: 1, only in B: 0" in text
    # Within one file, the newest row of a key counts.
    assert compare.load(str(two))[later[0].key].speedup == 1.7
    assert cli.main(["compare", f"{two}@bbb", f"{two}@bbb"]) == 0
    for nonsense in ("ccc", "missing.jsonl", f"{two}@ccc"):
        with pytest.raises(SystemExit):
            cli.main(["compare", nonsense, str(two)])


def test_compare_tells_the_rival_from_ours() -> None:
    def timed(ours: float, rival: float) -> rows.Row:
        spans = {f"{side}_p{share}": ms * (1 + sign * 0.01) for side, ms in (("ours", ours), ("rival", rival))
                 for share, sign in ((20, -1), (80, 1))}  # fmt: skip
        return example(rival / ours, 0.02, ours_ms=ours, rival_ms=rival, **spans)

    before = timed(1.0, 2.0)
    for after, kind in (
        (timed(1.0, 1.6), "rival changed"),
        (timed(0.9, 1.4), "rival changed"),  # ours did not become slower
        (timed(1.2, 2.0), "regression"),
        (timed(1.2, 1.6), "regression"),
        (timed(1.2, 2.4), ""),  # all of the machine
        (timed(0.8, 2.0), "improvement"),
        (timed(1.0, 2.5), "rival changed"),
    ):
        assert compare.Change(before, after).kind == kind, after
    # A wide span of ratios hides what our own time says.
    wide = dataclasses.replace(timed(1.2, 2.0), speedup_p80=2.1)
    assert compare.Change(before, wide).kind == "regression"


def test_report_shows_losses_goals_and_peers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "rows.jsonl"
    made = [
        example(0.5, sparsity=0.75, goal=1.0, met=False, forbidden="1x means <too little>"),
        example(2.0, goal=1.0, met=True),
        example(3.0, rival="peer SparseProp", note="the peer is 0.67x as fast as dense"),
        example(4.0, shape="kept", unit="KiB"),
    ]
    rows.write(made, path)
    page = report.write_report([path], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0.50x (slower)" in page and "1x means &lt;too little&gt;" in page and "1 are met" in page
    assert page.count("data:image/svg+xml") == 2 and "http" not in re.sub(r"data:[^']*", "", page)
    assert "SparseProp" in page and "cuSPARSELt" in page
    with pytest.raises(ValueError, match="no rows"):
        report.report_html([])


def test_figures_take_patterns_without_a_style() -> None:
    made = [example(2.0, pattern=pattern) for pattern in ("block:16x1", "unstructured", "block:4x4", "block:32x32")]
    assert figures.patterns_of(made) == ["block:32x32", "unstructured", "block:16x1", "block:4x4"]
    for draw in (figures.speedup_svg, figures.saved_svg):
        assert "<svg" in draw("title", made)


def test_rows_of_other_machines_or_of_memory_do_not_compete() -> None:
    two, four = ({"cpu": "x", "cores": cores, "isa": "avx2", "date": "2026-01-01"} for cores in (2, 4))
    slow, quick = example(1.5, machine=two), example(2.0, machine=two, rival="D1 F.linear")
    other = example(0.5, machine=four)
    memory = example(0.9, machine=two, rival="limit of 16 MiB", unit="MiB")
    assert figures.strongest([quick, slow, other, memory]) == [slow, other]
    assert slow.key != other.key and len(rows.newest([slow, other])) == 2


def made_up(name: str, **changes: object) -> registry.Case:
    """A case of one problem with one variant, which does nothing; `changes` are fields of its `Prepared`."""
    variant = registry.Variant("block:16x16", 0.5)
    ours = registry.Ours(variant, 0.5, lambda: None)
    rivals = (registry.Rival("D1", "D1", ("dense",)),)
    prepared = registry.Prepared({"dense": lambda: None}, rivals, {variant: ours})
    prepared = dataclasses.replace(prepared, **changes)  # type: ignore[arg-type]
    return registry.Case(name, "a test", (registry.Problem("P", (variant,), lambda variants: prepared),))


def broken(*arguments: object) -> registry.Samples:
    raise MemoryError("no room")


@pytest.mark.parametrize("changes", [{"dense": {"dense": broken}}, {"measure": broken}], ids=["dense", "measure"])
def test_a_call_that_fails_while_timed_ends_its_problem_alone(changes, capsys) -> None:  # type: ignore[no-untyped-def]
    registry.all_cases()
    cases = [made_up("tiny1", **changes), made_up("tiny2")]
    for case in cases:
        registry.register(case)
    try:
        assert cli.main(["run", "tiny1", "tiny2", "--threads", "1", "--seconds", "0.01", "--out", os.devnull]) == 1
    finally:
        for case in cases:
            del registry._CASES[case.name]
    text = capsys.readouterr().out
    assert "FAILED tiny1/P as a whole, 1 thread(s): not timed: MemoryError: no room" in text
    assert re.search(r"^tiny2 +P ", text, re.M)


def test_memory_that_cannot_be_measured_leaves_the_times(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(harness, "allocated_mib", broken)
    case = made_up("made up")
    outcome = harness.measure_problem(case, case.problems[0], seconds=0.01)
    assert [row.ours_mib for row in outcome.rows] == [None]
    assert outcome.failures == {"allocated memory": "not measured: MemoryError: no room"}


@pytest.mark.parametrize(("predicted", "verdict"), [(1.1, "met"), (1.3, "MISSED")])
def test_predictions_stand_beside_what_was_measured(predicted, verdict) -> None:  # type: ignore[no-untyped-def]
    case = made_up("made up")
    (problem,) = case.problems
    prepared = problem.prepare(problem.variants)
    (ours,) = prepared.ours.values()
    ours = dataclasses.replace(ours, extra={"predicted": predicted, "flop_bound": 4.0}, note="other")
    samples = {"dense": {0: 1.0}, ours.variant.name: {0: 1.0}}
    (row,) = harness._rows(case, problem, prepared, ours, samples, {})
    assert row.extra["prediction_error"] == pytest.approx(1 / predicted - 1, abs=1e-4)
    assert row.note == f"{row.prediction}; other" and f"(at most 15%: {verdict})" in row.note
    assert row.prediction in rows.table([row])
    assert f"{int(verdict == 'met')} of 1 within 15%" in report.report_html([row])
    assert figures.flops_saved(row) == 0.75 and figures.flops_saved(example(2.0)) == 0.5
    assert example(2.0, extra={"predicted": None}).prediction == ""  # without measured times, as in old rows


def test_cost_rows_keep_the_commit_that_measured_them() -> None:
    rows_ = [{"op": op, "dtype": "float32", "threads": 1} for op in ("linear", "conv", "gru")]
    before = {"machine": {"commit": "a", "date": "1"}, "measured": {"conv float32 1": {"commit": "b", "date": "2"}}}
    stamps = costs.measured(before, rows_, {"gru float32 1"}, {"commit": "c", "date": "3", "cpu": "x"})
    assert {group: stamp["commit"] + stamp["date"] for group, stamp in stamps.items()} == {
        "linear float32 1": "a1", "conv float32 1": "b2", "gru float32 1": "c3",
    }  # fmt: skip


def test_restricted_costs_start_again_with_the_given_arguments(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    started: list[list[str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        assert environment["SPARSE_KERNELS_ISA"] == "portable" and environment["ONEDNN_MAX_CPU_ISA"] == "SSE41"
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    arguments = ["--isa", "portable", "--ops", "linear"]
    with pytest.raises(SystemExit):
        costs.main(arguments)
    assert [command[-4:] for command in started] == [arguments]


@pytest.mark.parametrize(("isa", "goal"), [("avx512", 4.0), ("avx2", 2.0), ("portable", None)])
def test_goals_depend_on_the_instruction_set(isa, goal, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(harness, "machine", lambda: {"isa": isa})
    case = dataclasses.replace(made_up("made up"), without_avx512=0.5)
    assert harness._goal(case, registry.Variant("block:16x16", 0.5, {"D1": 4.0}), "D1") == goal
    if isa != "avx512":
        assert harness._goal(made_up("made up"), registry.Variant("block:16x16", 0.5, {"D1": 4.0}), "D1") is None


def test_pytest_times_dense_with_freed_memory_kept(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("pytest_benchmark")
    from bench import test_cases

    kept: list[bool] = []
    monkeypatch.setattr(test_cases, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(test_cases, "_time", lambda *arguments: None)
    for keeps in (False, True):
        case = dataclasses.replace(made_up("made up"), keeps_freed_memory=keeps)
        test_cases.test_dense(None, case, case.problems[0])
        assert kept == [True] * keeps


def test_a_peer_is_held_against_the_median_of_dense() -> None:
    variant = registry.Variant("block:16x16", 0.5)
    samples = {"dense": {0: 1.0, 1: 4.0, 2: 5.0}, variant.name: {0: 1.0, 1: 1.0, 2: 1.0}}
    samples[f"{variant.name} peer other"] = {0: 2.0, 1: 2.0, 2: 2.0}
    ours = registry.Ours(variant, 0.5, lambda: None, peers={"other": lambda: None})
    prepared = registry.Prepared({"dense": lambda: None}, (registry.Rival("D1", "D1", ("dense",)),), {variant: ours})
    problem = registry.Problem("P", (variant,), lambda variants: prepared)
    case = registry.Case("made up", "a test", (problem,))
    _, peer = harness._rows(case, problem, prepared, ours, samples, {})
    assert peer.note == "the peer is 2.00x as fast as dense"


def test_readme_has_the_lines_that_rows_exist_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = [
        example(speedup, case=case, shape=shape, pattern="block:32x32", rival=rival, sparsity=s, threads=2,
                machine={"cpu": "x", "isa": isa, "torch": "2", "date": "2026-01-01"})
        for case, shape, rival, s, speedup, isa in (
            ("conv", "3x3 N=4 C=224 64x64", "D1 oneDNN channels_last", 0.5, 2.04, "avx512"),
            ("conv", "3x3 N=4 C=224 64x64", "D1 oneDNN channels_last", 0.9, 7.96, "avx512"),
            ("bf16", "linear P=4096 K=1024", "D1 torch bf16", 0.75, 3.5, "avx512"),
            ("end_to_end", "ResNet-18 32x32 N=16", "dense twin", 0.75, 1.7, "avx512"),
            ("end_to_end", "UNet2D 224-448-672-896 64x64 N=1", "dense twin", 0.75, 1.9, "avx512"),
            ("conv", "3x3 N=4 C=224 64x64", "D1 oneDNN channels_last", 0.5, 1.0, "avx2"),
        )
    ]  # fmt: skip
    rows.write(made, tmp_path / "cpu-x.jsonl")
    text = readme.section(folder=tmp_path)
    lines = [line for line in text.splitlines() if line.startswith(("| `", "| ResNet", "| UNet"))]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "– | 2.0x | – | 8.0x |", "– | – | 1.7x | – |", "– | – | 1.9x | – |", "– | – | 3.5x | – |",
    ]  # fmt: skip
    assert "forward, bf16" in text and "Median speedup over dense on x, 2 threads, avx512, torch 2." in text
    with pytest.raises(SystemExit, match="no row of any line"):
        readme.section(folder=tmp_path / "none")


def test_seldom_functions_take_part_in_fewer_rounds_but_enough() -> None:
    calls = {"often": 0, "seldom": 0}

    def count(name: str, work: int) -> None:
        calls[name] += 1
        sum(range(work))

    functions = {"often": partial(count, "often", 1000), "seldom": partial(count, "seldom", 400_000)}
    samples = harness.interleave(functions, seconds=5, fewest=3, most=12, seldom=["seldom"], shortest_ms=0)
    assert len(samples["often"]) == 12 and 3 <= len(samples["seldom"]) < 12
    assert set(samples["seldom"]) < set(samples["often"])


def test_allocated_memory_and_the_roofline() -> None:
    assert harness.allocated_mib(lambda: torch.ones(2**19).add_(1)) == pytest.approx(2.0, abs=0.01)
    limit = roofline.Limits(2.0, 3.0, 100.0, 10.0, 2e8, 3e7)
    assert limit.forbids(4.0, 16.0) == ""
    assert "30 MB at the measured 10 GB/s take 3 ms (ceiling 5.33x)" in limit.forbids(6.0, 16.0)
    assert "0.2 GFLOP at the measured 100 GFLOP/s" in limit.forbids(9.0, 16.0)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_flops_of_a_convolution_leave_its_padding_out(kernel, pattern) -> None:  # type: ignore[no-untyped-def]
    n, h, w, out, in_, taps = 2, 3, 4, 6, 5, kernel**2  # a tap of 5x5 sees one row of the three at most
    generator = torch.Generator().manual_seed(0)
    topology = Topology.random(out, in_, parse_pattern(pattern), 3 * taps, taps=taps, generator=generator)
    weight = topology.scatter(torch.ones(topology.nnzb, topology.bh, topology.bw)).view(out, taps, in_)
    assert conv.tap_nonzeros(topology) == weight.count_nonzero((0, 2)).tolist()
    # Each product of a present weight and a pixel adds one to the output.
    kept = conv.kernel_of(weight, topology, kernel)
    counted = torch.nn.functional.conv2d(torch.ones(n, in_, h, w), kept, padding=kernel // 2).sum()
    assert conv.products(torch.empty(n, in_, h, w), conv.tap_nonzeros(topology)) == int(counted)
    if kernel == 1:
        assert conv.products(torch.empty(7, in_), conv.tap_nonzeros(topology)) == 7 * topology.nnz


def test_a_peer_that_computes_wrongly_is_named_and_not_timed(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    x, weight = torch.randn(8, 4), torch.randn(6, 4)
    job = peers.Job("unstructured", peers.FORWARD, weight, x, torch.randn(8, 6))
    wrong = peers.Peer("wrong", "torch", "", lambda job: None, lambda job: lambda: (job.dense() * 1.1,))
    right = peers.Peer("right", "torch", "", lambda job: None, lambda job: lambda: (job.dense(),))
    absent = peers.Peer("absent", "no_such_package", "pip install it", lambda job: None, lambda job: lambda: ())
    monkeypatch.setattr(peers, "PEERS", (wrong, right, absent))
    functions, reasons = peers.contenders(job)
    assert list(functions) == ["right"]
    assert "is off by 0.1" in reasons["wrong"] and "not installed: pip install it" in reasons["absent"]


def test_pytest_runs_the_cases() -> None:
    """`pytest bench/` knows every quick problem, and one of them passes."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = "test_ours and scores and linear and block and 32x32"
    # pytest-benchmark takes the variables of a worker of xdist for xdist itself.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, "-k", chosen], capture_output=True, text=True, cwd=ROOT, env=outside, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
