"""Losses that are no numbers, memory that runs out, partners that end: one line that says what to do."""

import glob
import math
import os
import re
import tempfile

import pytest
import torch

from common.errors import run
from tests import helpers


def test_a_loss_that_is_not_finite(mnasnet, noise, tmp_path):
    """Said at the next log point, with the steps; what is saved is from before."""
    words = helpers.flags("MnasNet", noise, tmp_path, "--lr", "1e30", "--warmup-epochs", "0", "-p", "5")
    status, text = mnasnet.run([*words, "--save-steps", "1"], tmp_path / "log")
    assert status == 1
    line = text.splitlines()[-1]
    assert line.startswith("[Error] the ") and "Try a lower learning rate" in line
    for name in os.listdir(str(tmp_path)):
        if name.startswith("checkpoint"):
            assert all(
                math.isfinite(tensor.double().sum().item()) for tensor in helpers.weights(tmp_path, name).values()
            )
    status, text = mnasnet.run([*words, "--output-dir", tmp_path / "other"], tmp_path / "log")
    assert status == 1
    assert re.search(
        r"\[Error\] the loss is not a finite number between steps 1 and 5 of epoch 0 "
        r"\(the last checkpoint: none yet\). Try a lower learning rate, a longer warm-up, or --opt-level O0$",
        text,
    )


def test_weights_that_are_not_finite_are_not_saved(mnasnet, noise, tmp_path):
    """A checkpoint between the step that broke them and the log point that sees it."""
    words = helpers.flags("MnasNet", noise, tmp_path, "--max-steps", "4", "--save-steps", "2", "-p", "100")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 0, text
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    words = helpers.flags(
        "MnasNet", noise, tmp_path, "--resume", "auto", "--save-steps", "1", "-p", "100", "--lr", "1e38"
    )
    status, text = mnasnet.run([*words, "--warmup-epochs", "0"], tmp_path / "log")
    assert status == 1
    assert "the weights are not finite numbers and are not saved" in text.splitlines()[-1]
    assert "the last checkpoint: {}".format(tmp_path / "checkpoint.pth.tar") in text.splitlines()[-1]
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def message_of(error, capsys):
    def main():
        raise error

    assert run(main) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("[Error] ") and captured.err.count("\n") == 1 and not captured.out
    return captured.err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("NPU out of memory. Tried to allocate 1.00 GiB (NPU 0; 31.97 GiB total capacity)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
        getattr(torch, "OutOfMemoryError", RuntimeError)("out of memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_make_smaller(error, capsys):
    text = message_of(error, capsys)
    assert "a smaller --batch-size (--lr in proportion) or fewer --workers" in text and "traceback" not in text


def test_a_batch_that_is_too_small_for_batchnorm_has_a_cure(capsys):
    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    text = message_of(caught.value, capsys)
    assert "a larger --batch-size or --image-size" in text and "traceback" not in text


def test_real_allocations_that_fail(capsys):
    for allocate in (lambda: torch.empty(2**55), lambda: bytearray(2**55)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        text = message_of(caught.value, capsys)
        assert "a smaller --batch-size" in text and "traceback" not in text


def test_a_connection_that_breaks_points_to_the_other_rank(capsys):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    text = message_of(error, capsys)
    assert "another rank has ended, what it said tells why" in text and "traceback" not in text


def test_what_a_killed_compilation_has_left_has_a_cure(capsys):
    text = message_of(ImportError("/tmp/torchinductor_me/gj/cgjv.main.so: file too short"), capsys)
    assert "delete that folder torchinductor_" in text and "traceback" not in text


def test_an_unexpected_error_keeps_its_traceback(capsys):
    text = message_of(ZeroDivisionError("line one\nline two"), capsys)
    path = re.search(r"traceback in (\S+)\)", text).group(1)
    with open(path) as file:
        assert "Traceback" in file.read()
    os.remove(path)


def test_where_the_traceback_cannot_be_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert message_of(ZeroDivisionError("x"), capsys) == "[Error] ZeroDivisionError: x\n"


def test_batches_that_no_memory_can_hold(mnasnet, noise, tmp_path):
    """In this process and in shared memory: what does not fit is said before the first batch, with both sizes."""
    before = set(glob.glob(os.path.join(tempfile.gettempdir(), "traceback-*")))
    for words in (["-j", "0", "--image-size", "200000"], ["-j", "2", "--image-size", "60000"]):
        status, text = mnasnet.run(helpers.flags("MnasNet", noise, tmp_path, *words), tmp_path / "log")
        assert status == 1
        form = r"^\[Error\] batches in memory need \d+ MB, \d+ MB are free: fewer --workers, or a smaller --batch-size$"
        assert re.search(form, text.splitlines()[-1]), text
    assert set(glob.glob(os.path.join(tempfile.gettempdir(), "traceback-*"))) == before
