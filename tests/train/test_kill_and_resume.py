"""SIGKILL at random moments, saves and evaluations included: what comes out has the same bits.

With its defaults, the script kills ten runs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.ci  # test_checkpoints_failures.py kills a save outside of CI too
def test_a_run_killed_once():
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), "--trials", "1", "--kills", "1", "--steps", "16", "--seed", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("same bits") == 1
