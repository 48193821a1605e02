"""The README's code runs, its commands exist, and its table is what the committed rows say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_python_of_the_first_screen_runs(capsys) -> None:  # type: ignore[no-untyped-def]
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert code is not None
    exec(compile(code[1], str(README), "exec"), {})
    assert "block:16x16" in capsys.readouterr().out


def test_table_is_generated_from_the_rows(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import readme

    assert readme.main(["--check"]) == 0
    changed = readme.README.read_text(encoding="utf-8").replace("x |", "y |")
    assert readme.updated(changed) == readme.README.read_text(encoding="utf-8")
    sys.modules.pop("bench.readme", None)


def test_make_targets_and_commands_exist() -> None:
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"\bmake (\w+)", text)) <= targets
    from sparsediff.cli import COMMANDS

    assert set(re.findall(r"^sparsediff (\w+)", text, re.M)) <= set(COMMANDS)
