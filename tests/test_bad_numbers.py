"""Losses that are no numbers, memory that runs out, partners that end: one line that says what to do."""

import glob
import math
import os
import re
import tempfile

import pytest
import torch

from common import errors
from common.errors import run
from tests import chaos


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chaos.make_images(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def mnasnet():
    server = chaos.Server("MnasNet")
    yield server
    server.close()


def test_a_loss_that_is_not_finite(mnasnet, data, tmp_path):
    """Said at the next log point, with the steps; what is saved is from before."""
    words = chaos.flags("MnasNet", data, tmp_path, "--lr", "1e30", "--warmup-epochs", "0", "-p", "5")
    status, text = mnasnet.run([*words, "--save-steps", "1"], tmp_path / "log")
    assert status == 1
    line = text.splitlines()[-1]
    assert line.startswith("[Error] the ") and "Try a lower learning rate" in line
    for name in os.listdir(str(tmp_path)):
        if name.startswith("checkpoint"):
            assert all(math.isfinite(tensor.double().sum().item()) for tensor in chaos.weights(tmp_path, name).values())
    status, text = mnasnet.run([*words, "--output-dir", tmp_path / "other"], tmp_path / "log")
    assert status == 1
    assert re.search(
        r"\[Error\] the loss is not a finite number between steps 1 and 5 of epoch 0. No checkpoint was written yet. "
        "Try a lower learning rate, a longer warm-up, or --opt-level O0.$",
        text,
    )


def test_weights_that_are_not_finite_are_not_saved(mnasnet, data, tmp_path):
    """A checkpoint between the step that broke them and the log point that sees it."""
    words = chaos.flags("MnasNet", data, tmp_path, "--max-steps", "4", "--save-steps", "2", "-p", "100")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 0, text
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    words = chaos.flags("MnasNet", data, tmp_path, "--resume", "auto", "--save-steps", "1", "-p", "100", "--lr", "1e38")
    status, text = mnasnet.run([*words, "--warmup-epochs", "0"], tmp_path / "log")
    assert status == 1
    assert "the weights are not finite numbers and are not saved" in text.splitlines()[-1]
    assert "the last checkpoint is {}".format(tmp_path / "checkpoint.pth.tar") in text.splitlines()[-1]
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def message_of(error, capsys, batch_size=64):
    def main():
        errors.batch_size = batch_size
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
    ],
)
def test_out_of_memory_names_the_batch_to_try(error, capsys):
    assert "out of memory: try --batch-size 32 (--lr in proportion)" in message_of(error, capsys)
    assert "try a smaller --batch-size" in message_of(error, capsys, batch_size=None)


def test_real_allocations_that_fail(capsys):
    for allocate in (lambda: torch.empty(2**55), lambda: bytearray(2**55)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        text = message_of(caught.value, capsys)
        assert "memory" in text and "--batch-size 32" in text and "traceback" not in text


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "/dev/shm is full"),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "/dev/shm is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "a decoding process was killed"),
        (OSError(12, "Cannot allocate memory"), "the machine has no memory left"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
            "another rank has ended",
        ),
    ],
)
def test_other_errors_in_words_of_our_own(error, words, capsys):
    text = message_of(error, capsys)
    assert words in text and "traceback" not in text


def test_an_unexpected_error_keeps_its_traceback(capsys):
    text = message_of(ZeroDivisionError("line one\nline two"), capsys)
    path = re.search(r"traceback in (\S+)\)", text).group(1)
    with open(path) as file:
        assert "Traceback" in file.read()
    os.remove(path)


def test_where_the_traceback_cannot_be_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "could not be kept: No such file or directory" in message_of(ZeroDivisionError("x"), capsys)


def test_a_real_shortage_of_memory(mnasnet, data, tmp_path):
    """Batches for which no machine has the memory."""
    before = set(glob.glob(os.path.join(tempfile.gettempdir(), "traceback-*")))
    words = chaos.flags("MnasNet", data, tmp_path, "-j", "0", "--image-size", "200000")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 1
    assert re.search(r"^\[Error\] .*memory.*--batch-size 2 ", text.splitlines()[-1])
    assert set(glob.glob(os.path.join(tempfile.gettempdir(), "traceback-*"))) == before


def test_too_little_shared_memory(mnasnet, data, tmp_path):
    status, text = mnasnet.run(chaos.flags("MnasNet", data, tmp_path, "--image-size", "30000"), tmp_path / "log")
    assert status == 1
    assert re.search("batches in shared memory need .* MB, /dev/shm has .* MB free: fewer --workers", text)
