"""The prepared script for whoever has a card runs, in small, on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_line_of_the_script_for_a_card_runs():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py"]
    run = subprocess.run([*command, "--tiny"], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    said = run.stdout
    assert len(re.findall(r"images/s", said)) == 3 and said.count("head, ") == 3
    assert said.count("100.0% of the first 50") == 3
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert refused.returncode == 2 and "--tiny" in refused.stderr
