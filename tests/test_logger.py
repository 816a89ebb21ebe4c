"""The log of a run: live line, lines of the file, metrics.jsonl, curves.png, TensorBoard, skipped steps."""

import contextlib
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
import types

import pytest
import torch
from PIL import Image

from common import logger
from common.device import Precision
from common.logger import Log
from common.metrics import Metrics
from common.ranks import Ranks
from tests.bundles import ROOT
from tests.test_scripts import small


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


def in_terminal(command, columns, path, **environment):
    """Run `command` with its output on a terminal of `columns` columns; return (exit status, what it wrote there)."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    words = [str(word) for word in command]
    variables = dict(os.environ, PYTHON=sys.executable, TERM="xterm", PYTHONPATH=str(path), **environment)
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, cwd=str(ROOT), env=variables)
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
        while True:
            written += os.read(master, 65536)
    os.close(master)
    return process.wait(), written.decode()


LIVE = """
from common.live import LiveLine, open_terminal
line = LiveLine(open_terminal())
line.start("Epoch 299/300", 0, 5004)
for step in range(5004):
    line.step()
    if step % 1000 == 0:
        line.show(epoch=299, epochs=300, loss=6.9085, acc1=72.81, fps=14413.78, lr=0.039812, wait=0.12, memory=62.13,
                  left="1h02m", run_left="12d13h", skipped="")
        line.write("hidden", live=True)
line.write("a line above")
line.stop()
"""


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_live_line_never_wraps_and_says_everything(columns, tmp_path):
    status, text = in_terminal([sys.executable, "-c", LIVE], columns, ROOT)
    assert status == 0, text
    pieces = [piece for piece in re.split(r"[\r\n]+|\x1b\[[A-Z]", text) if piece.strip()]
    assert max(len(piece) for piece in pieces) <= columns
    assert "hidden" not in text and "a line above" in pieces
    last = pieces[-1]
    words = ["299/300", "5004/5004", "72.8", "data 12%", " 62", "1h02m", "12d13h"]
    words += ["loss 6.9085", "FPS 14413.8", "LR 0.03981"] if columns == 200 else ["loss 6.91", "14414/s", "lr 0.04"]
    assert [word for word in words if word not in last] == [], last
    assert text.endswith("\n")


def metrics_of(folder, said):
    return Metrics(str(folder), False, said.append)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_runs_metrics_hold_each_step_once(tmp_path):
    """Also when the script has moved the folder of the first part, and for a restart in the same folder."""
    folder, said = tmp_path / "0", []
    folder.mkdir()
    first = metrics_of(folder, said)
    for step in (1, 2):
        first.record("train", epoch=0, step=step, steps=4)
    saved = first.state_dict()
    first.record("train", epoch=0, step=3, steps=4)  # after the checkpoint: it will be done again
    again = metrics_of(folder, said)  # a restart
    again.record("run")
    again.load_state_dict(saved)
    again.record("train", epoch=0, step=3, steps=4)
    saved = again.state_dict()
    again.record("train", epoch=0, step=4, steps=4)
    folder.rename(tmp_path / "0.prev-20260101-000000")
    folder.mkdir()
    third = metrics_of(folder, said)
    third.record("run")
    third.load_state_dict(saved)
    third.record("train", epoch=0, step=4, steps=4)
    kinds = [(record["kind"], record.get("step")) for record in records(folder)]
    assert kinds == [("train", 1), ("train", 2), ("run", None), ("train", 3), ("run", None), ("train", 4)]
    assert len(list((tmp_path / "0.prev-20260101-000000").glob("metrics.jsonl.prev-*"))) == 1
    assert said == []


def test_a_history_that_is_gone_is_one_line(tmp_path):
    said = []
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = metrics_of(tmp_path / "a", said)
    first.record("run")
    saved = first.state_dict()
    (tmp_path / "a" / "metrics.jsonl").write_text("another run's\n")
    second = metrics_of(tmp_path / "b", said)
    second.load_state_dict(saved)
    assert said == ["metrics.jsonl of {} is gone: this one begins here".format(tmp_path / "a")]


def test_a_full_disk_ends_the_record_not_the_training(tmp_path):
    said = []
    metrics = metrics_of(tmp_path, said)
    metrics._file.close()
    metrics._file = open("/dev/full", "wb", buffering=0)
    metrics.record("run")
    metrics.record("run")
    assert said == ["[Warning] metrics.jsonl ends here: No space left on device"]
    assert metrics.state_dict() is None


def test_on_a_terminal_the_screen_has_the_live_line_and_nohup_out_the_plain_ones(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    script = folder / "test" / "train_full_8p.sh"
    options = ["--data_path={}".format(few_digits), "--rank_size=2", "--batch_size=8", "--epochs=2", "--workers=1"]
    options += ["--print-freq=3", "--tensorboard", "--device=cpu", *small("MnasNet")]
    status, screen = in_terminal(["bash", script, *options], 100, "")
    assert status == 0, screen
    assert "Epoch: [" not in screen
    assert re.search(r"\r1/2 5/5", screen)
    output = folder / "test" / "output" / "0"
    plain = (output / "nohup.out").read_text()
    assert "\r" not in plain and "\x1b" not in plain
    assert set((output / "train_0.log").read_text().splitlines()) <= set(plain.splitlines())
    lines = [line for line in plain.splitlines() if line.startswith("Epoch: [")]
    mean = r" *[\d.]+ \( *[\d.]+\)"
    fields = [r"Epoch: \[\d\]\[ *\d+/5\]", "Time" + mean, "Data" + mean, r"Loss \S+e\S+ \(\S+e\S+\)", "Acc@1" + mean]
    form = "\t".join([*fields, "Acc@5" + mean, r"LR \S+", "FPS" + mean, r"ETA \d+:\d\d:\d\d"])
    assert len(lines) == 4 and all(re.fullmatch(form, line) for line in lines)
    for line in plain.splitlines():
        if line.startswith(" * ") or "TensorBoard" in line:
            assert line in screen.replace("\r", "\n").splitlines()
    assert Image.open(str(output / "curves.png")).size == (1200, 800)
    run = [record for record in records(output) if record["kind"] == "run"]
    assert run[0]["args"]["print_freq"] == 3 and run[0]["torch"] == torch.__version__ and run[0]["date"]
    steps = [(record["epoch"], record["step"]) for record in records(output) if record["kind"] == "train"]
    assert steps == [(0, 3), (0, 5), (1, 3), (1, 5)]


def test_missing_packages_are_a_line_each(bundle_copy, tmp_path):
    for name in ("tqdm", "matplotlib", "tensorboard"):
        (tmp_path / "missing").mkdir(exist_ok=True)
        (tmp_path / "missing" / (name + ".py")).write_text('raise ImportError("No module named {!r}")\n'.format(name))
    folder = bundle_copy("MnasNet")
    script = folder / "test" / "train_performance_1p.sh"
    options = ["--max_steps=4", "--batch_size=2", "--print-freq=2", "--tensorboard", *small("MnasNet")]
    status, screen = in_terminal(["bash", script, *options], 80, tmp_path / "missing")
    assert status == 0, screen
    for text in (
        "tqdm is not installed: plain lines in place of a live line (pip install tqdm)",
        "no TensorBoard files: No module named 'tensorboard' (pip install tensorboard)",
        "no curves.png: No module named 'matplotlib' (pip install matplotlib)",
    ):
        assert screen.count(text) == 1, screen
    assert screen.count("Epoch: [0]") == 2
    assert "Final Performance" in screen and "Traceback" not in screen
    assert not (folder / "test" / "output" / "0" / "curves.png").exists()


def test_tensorboard_has_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(str(tmp_path), True, print)
    for step in (1, 2):
        metrics.record("train", epoch=3, step=step, steps=2, loss=1.5 / step, acc1=10.0 * step, lr=0.1, fps=9.0)
    metrics.record("eval", epoch=3, acc1=70.0, acc5=90.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 1.5), (8, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("val/acc1")] == [(8, 70.0)]


@pytest.mark.parametrize("decoder, cure", [("compiled", ""), (None, "install a C compiler (cc) for faster decoding, ")])
def test_a_run_that_waits_for_its_data_says_so_once(decoder, cure, capsys, monkeypatch):
    monkeypatch.setattr(logger, "library", lambda name: decoder)
    args = types.SimpleNamespace(print_freq=1, log_dir=None, log_id="0", tensorboard=False)
    log = Log(types.SimpleNamespace(ranks=Ranks()), args, "Network")
    log.timed(images=160, seconds=10.0, steps=10, wait=8.0)
    assert "waiting for data" not in capsys.readouterr().out  # too early to tell
    for _ in range(3):
        log.timed(images=160, seconds=10.0, steps=10, wait=4.0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert "takes 60 % of the time: raise --workers, {}or pack the data set".format(cure) in line
    quiet = Log(log.device, args, "Network")
    quiet.timed(images=160, seconds=10.0, steps=100, wait=2.4)
    assert "waiting" not in capsys.readouterr().out
