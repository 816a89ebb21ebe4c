"""The benchmark of a GPU runs everywhere; without one at a size that shows no speed."""

import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command takes minutes")
def test_gpu_benchmark_runs_without_a_gpu():
    command = [sys.executable, "-m", "tests.benchmark", "cuda.ShuffleNetV2"]
    printed = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    rows = dict(re.findall(r"^\| ([\w ]+) \| ([\d.]+) \|", printed, re.MULTILINE))
    assert set(rows) == {"ours", "torchvision", "in memory", "JPEG files", "pack"}
    assert all(float(rate) > 0 for rate in rows.values())
    assert "no GPU: toy sizes, which show no speed" in printed
