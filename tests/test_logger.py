"""The log of a run: live line, lines of the file, metrics.jsonl, curves.png, TensorBoard, skipped steps."""

import types

import torch

from common.device import Precision
from common.logger import Log
from common.ranks import Ranks


def float16_precision():
    """A `Precision` with a loss scaler, on the CPU."""
    precision = Precision.__new__(Precision)
    precision._device = types.SimpleNamespace(torch_device=torch.device("cpu"))
    precision._scaler = torch.amp.GradScaler("cpu")
    precision._overflows = precision._apex = None
    return precision


def test_skipped_steps_are_counted_also_after_a_resume():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision = float16_precision()
    for factor in (1.0, float("inf"), 1.0, float("inf")):
        precision.step(weight.sum() * factor, optimizer)
    assert precision.skipped == 2
    resumed = float16_precision()
    resumed.load_state_dict(precision.state_dict())
    assert resumed.skipped == 2
    resumed.step(weight.sum() * float("inf"), optimizer)
    resumed.step(weight.sum(), optimizer)
    assert resumed.skipped == 3
    torch.testing.assert_close(weight.data, torch.tensor([0.7, 0.7]))


def test_a_run_that_waits_for_its_data_says_so_once(capsys):
    log = Log(types.SimpleNamespace(ranks=Ranks()), types.SimpleNamespace(print_freq=1, log_dir=None), "Network")
    log.timed(images=160, seconds=10.0, steps=10, wait=8.0)
    assert "waiting for data" not in capsys.readouterr().out  # too early to tell
    for _ in range(3):
        log.timed(images=160, seconds=10.0, steps=10, wait=4.0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert "takes 60 % of the time: raise --workers, or pack the data set" in line
    quiet = Log(log.device, types.SimpleNamespace(print_freq=1, log_dir=None), "Network")
    quiet.timed(images=160, seconds=10.0, steps=100, wait=2.4)
    assert "waiting" not in capsys.readouterr().out
