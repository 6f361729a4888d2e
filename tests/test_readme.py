"""Every command of the README runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.nets import residual

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
INDENTED = re.findall(r"^    (onnx-lwdf .*)$", README, re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]


def test_the_commands_run_one_after_the_other(tmp_path):
    onnx.save(residual(), tmp_path / "model.onnx")
    lines = [*(line for line in COMMANDS if line.startswith("onnx-lwdf")), *INDENTED]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line, comments=True)
        if "out.onnx" in words and (tmp_path / "out.onnx").exists():
            words.append("--force")
        done = subprocess.run(
            [sys.executable, "-m", "onnx_lwdf", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_the_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    onnx.save(residual(), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "bytes" in capsys.readouterr().out


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert named == {"demo", "test"}
    assert named | {"bench"} <= set(targets)
