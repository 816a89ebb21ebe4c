"""The log of a run: lines, FPS, what ranks tell each other, the live line, metrics.jsonl."""

import contextlib
import fcntl
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import types

import pytest
import torch
from PIL import Image

from common import logger, parse_log
from common.data import Batch
from common.errors import Stopped, UserError
from common.logger import count_classes, find_correct
from tests.helpers import LINE, ROOT, FakeLoader, FakeRanks, make_log, run_script, small, train


def in_ranks(world, function):
    """Return [function(ranks) for each of `world` ranks], each rank a thread of its own."""
    results, shared = [None] * world, (threading.Barrier(world), [None] * world)

    def call(rank):
        try:
            results[rank] = function(FakeRanks(rank, world, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Clock:
    """perf_counter that a test moves on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(logger.time, "perf_counter", lambda: self.now)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_log_line_has_the_fields_of_the_old_logs_in_their_order(capsys):
    train(make_log(print_freq=3), FakeLoader())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert [line.split("\t")[0] for line in lines] == ["Epoch: [0][{:4d}/10]".format(n) for n in (3, 5, 6, 9, 10)]
    assert all(LINE.fullmatch(line) for line in lines), lines


def test_correct_counts():
    logits = torch.tensor([[0.1, 0.9, 0.0, 0.2, 0.3, 0.4], [0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [9, 0, 0, 0, 0, 0]])
    assert find_correct(logits, torch.tensor([1, 4, -1])).sum(dim=0).tolist() == [1, 2, 2]
    assert find_correct(logits[:, :2], torch.tensor([1, 1, 0])).sum(dim=0).tolist() == [2, 3, 3]


def test_correct_counts_of_each_class():
    logits = torch.tensor([[0.1, 0.9, 0.0, 0.2, 0.3, 0.4], [0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [9, 0, 0, 0, 0, 0]])
    logits = torch.cat([logits, logits[:1], torch.full((1, 6), float("nan"))])
    counts = count_classes(logits, torch.tensor([1, 4, -1, 1, 5]))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[0, 0, 0], [2, 2, 2], [0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]]
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(999, 40, generator=generator), torch.randint(-2, 40, (999,), generator=generator)
    total = count_classes(logits, targets)
    assert total.sum(dim=0).tolist() == find_correct(logits, targets).sum(dim=0).tolist()
    hits = logits.argmax(dim=1) == targets
    assert total[:, 0].tolist() == [int((hits & (targets == c)).sum()) for c in range(40)]


def test_logits_that_are_not_numbers_are_wrong():
    logits = torch.tensor([[float("nan"), 0.0], [1.0, 0.0], [1.0, float("nan")]])
    assert find_correct(logits, torch.zeros(3, dtype=torch.int64)).sum(dim=0).tolist() == [1, 1, 3]


@pytest.mark.parametrize("world, slow", [(1, False), (2, False), (2, True)])
def test_fps_is_images_by_wall_time_between_log_points_whatever_lies_between(world, slow, tmp_path, monkeypatch):
    """First steps of 9 s, then 0.5 s a step (slow: 3 s, so that every step is a sync point), a checkpoint of 100 s."""
    clock, step_seconds = Clock(monkeypatch), 3.0 if slow else 0.5
    ranks = FakeRanks(world=world)
    # All ranks have done the same; the clock is rank 0's.
    ranks.sum = lambda tensor: torch.cat([tensor[:1], tensor[1:] * world])
    log = make_log(ranks, print_freq=10, log_dir=str(tmp_path))
    loader = FakeLoader(steps=25, world=world)
    for number, batch in enumerate(log.steps(loader, 0, 0)):
        clock.now += 9.0 if number < 5 else step_seconds
        log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1)
        if number == 12:
            with log.paused():
                clock.now += 100.0
    log.finish()
    result = records(tmp_path)[-1]
    assert result["fps"] == pytest.approx(4 * world / step_seconds)
    assert result["step_seconds"] == pytest.approx(step_seconds)
    rates = [record["fps"] for record in records(tmp_path) if record["kind"] == "train"]
    assert rates == pytest.approx([4 * world / 9.0] + [4 * world / step_seconds] * 3)


def test_a_checkpoint_does_not_count_though_the_other_ranks_wait_for_it(monkeypatch):
    """Rank 0 alone writes, and its clock alone counts: that of the others has gone on."""
    clock, ranks, told = Clock(monkeypatch), FakeRanks(rank=1, world=2), []
    ranks.sum = lambda tensor: told.append(tensor[0].item()) or tensor + torch.tensor([2.0] + [0.0] * (len(tensor) - 1))
    log = make_log(ranks, print_freq=1)
    for batch in log.steps(FakeLoader(steps=3, world=2), 0, 0):
        clock.now += 50.0
        log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1)
    assert told == [0.0, 0.0, 0.0]


def test_a_run_in_which_no_step_was_left_reports_the_throughput_of_the_one_that_it_goes_on_with(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    log = make_log(print_freq=10, log_dir=str(tmp_path))
    for batch in log.steps(FakeLoader(steps=20), 0, 0):
        clock.now += 0.5
        log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1)
    resumed = make_log(log_dir=str(tmp_path / "second"))
    elsewhere = make_log(log_dir=str(tmp_path / "third"), batch_size=8)
    for made in (resumed, elsewhere):
        made.load_state_dict(json.loads(json.dumps(log.state_dict())))
    for made in (log, resumed, elsewhere):
        made.finish()
    assert "fps" not in records(tmp_path / "third")[-1]
    first, second = records(tmp_path)[-1], records(tmp_path / "second")[-1]
    assert (first["fps"], first["step_seconds"], first["loss"]) == pytest.approx((8.0, 0.5, 2.0))
    assert [second[key] for key in ("fps", "step_seconds", "loss")] == [
        first[key] for key in ("fps", "step_seconds", "loss")
    ]


def test_the_logged_loss_is_the_mean_over_images_also_where_the_last_batch_is_unequal(tmp_path):
    """Ranks with 3 and 2 images in the last step: weights 1.2 and 0.8 of the rank means 10 and 20 are 14."""

    def rank(ranks):
        log = make_log(ranks, log_dir=str(tmp_path), batch_size=4)
        loader = FakeLoader(steps=3, world=2)
        last, weight, losses = (3, 1.2, [0.0, 1.0, 10.0]) if ranks.rank == 0 else (2, 0.8, [0.0, 3.0, 20.0])

        def batches(epoch, start):
            yield Batch(None, torch.zeros(4, dtype=torch.int64), 1.0, 0.0, 8)
            yield Batch(None, torch.zeros(4, dtype=torch.int64), 1.0, 0.0, 16)
            yield Batch(None, torch.zeros(last, dtype=torch.int64), weight, 0.0, 21)

        loader.batches = batches
        return train(log, loader, losses=losses)

    assert in_ranks(2, rank) == [[0, 0, 0]] * 2
    _, last = [record for record in records(tmp_path) if record["kind"] == "train"]
    assert last["losses"] == pytest.approx([2.0, 14.0])
    assert last["loss"] == pytest.approx((2.0 * 8 + 14.0 * 5) / 13)


def test_the_parts_of_an_accumulated_step_are_one_step(tmp_path):
    """Weights 0.75 and 0.25 of losses 2 and 6: the step's loss is 3; an epoch's last step may have fewer parts."""
    log, loader = make_log(log_dir=str(tmp_path), print_freq=1), FakeLoader(steps=2)
    log._args.accumulate = 2
    parts = [(0.75, False), (0.25, True), (1.0, True)]

    def batches(epoch, start):
        for weight, ends in parts:
            yield Batch(None, torch.zeros(4, dtype=torch.int64), weight, 0.0, 0, ends)

    loader.batches = batches
    assert train(log, loader, losses=[2.0, 6.0, 5.0]) == [0, 0, 0]
    found = [record for record in records(tmp_path) if record["kind"] == "train"]
    assert [(record["step"], record["losses"]) for record in found] == [(1, [3.0]), (2, [5.0])]
    assert log.is_complete and log.is_final


def test_one_rank_learns_of_a_signal_at_once_and_logs_the_steps_before_it(capsys):
    log = make_log(print_freq=1000)
    loader, signals = FakeLoader(steps=30), []
    for number, batch in enumerate(log.steps(loader, 0, 0)):
        log._ranks.stop_signal = 15 if number == 7 else 0
        signals.append(log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1))
        if signals[-1]:
            break
    assert signals == [0] * 7 + [15]
    assert log._ranks.sums == 2  # after the first steps, which are not timed, and at the signal
    assert "Epoch: [0][   8/30]" in capsys.readouterr().out


@pytest.mark.parametrize("step_seconds, at_most", [(0.01, 6), (0.5, 30), (5.0, 100)])
def test_all_ranks_learn_of_a_signal_within_two_seconds_in_the_same_step(step_seconds, at_most, monkeypatch):
    """Few reductions where steps are short; one each step only where a step is longer than two seconds."""
    clock, steps = Clock(monkeypatch), 100

    def rank(ranks):
        log, signals = make_log(ranks, print_freq=1000), []
        for number, batch in enumerate(log.steps(FakeLoader(steps=steps, world=2), 0, 0)):
            if ranks.rank == 0:
                clock.now += step_seconds
            if ranks.rank == 1 and number == 60:
                ranks.stop_signal = signal.SIGTERM
            signals.append(log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1))
            if signals[-1]:
                break
        return signals, ranks.sums

    (first, sums), (second, _) = in_ranks(2, rank)
    assert first == second and first[-1] == signal.SIGTERM and set(first[:-1]) == {0}
    assert len(first) - 61 <= max(1, 2 / step_seconds * 2.1)  # this clock serves two threads
    assert sums <= at_most


def test_bad_images_of_one_rank_are_shared_by_all_at_the_next_sync_point():
    def rank(ranks):
        log, loader = make_log(ranks, print_freq=4), FakeLoader(steps=8, world=2)
        shared = []
        for number, batch in enumerate(log.steps(loader, 0, 0)):
            loader.new_bad += ["a.jpg cannot be read: broken"] * 2 if ranks.rank == 1 and number == 5 else []
            log._sync_every = 1000
            log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1)
            shared.append(loader.shared)
        return shared

    assert in_ranks(2, rank) == [[0] * 7 + [1]] * 2


def test_bad_images_of_a_single_rank_are_named_in_the_same_step(capsys):
    log, loader = make_log(), FakeLoader(steps=20)
    loader.new_bad = ["a.jpg cannot be read: broken"]
    batch = next(log.steps(loader, 0, 0))
    log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1)
    assert "[Warning] a.jpg cannot be read: broken" in capsys.readouterr().out.splitlines()
    assert loader.shared == 1


def test_a_loss_that_is_not_finite_ends_all_ranks_and_names_the_checkpoint():
    def rank(ranks):
        log = make_log(ranks, print_freq=5)
        log.last_checkpoint = "a.pth.tar"
        return train(log, FakeLoader(steps=10, world=2), losses=[1.0] * 7 + [float("nan") if ranks.rank else 1.0] * 3)

    errors = in_ranks(2, rank)
    assert all(isinstance(error, UserError) for error in errors)
    for error in errors:
        assert re.match(r"the loss is not a finite number between steps \d+ and \d+ of epoch 0 \(the last", str(error))
        assert "(the last checkpoint: a.pth.tar). Try a lower learning rate" in str(error)


def test_max_steps_ends_the_epoch_and_the_run():
    log = make_log(max_steps=14, epochs=3)
    assert len(train(log, FakeLoader(), 0)) == 10
    assert log.is_complete and not log.is_final
    assert len(train(log, FakeLoader(), 1)) == 4
    assert not log.is_complete and log.is_final


def test_an_epoch_that_is_done_has_no_steps_left():
    log = make_log(epochs=2)
    assert train(log, FakeLoader(), 0, samples=40) == []
    assert log.is_complete and not log.is_final
    with log.paused():  # its checkpoint
        pass


def test_a_signal_ends_an_evaluation_and_the_wait_for_a_batch():
    log, saved = make_log(), []
    log.when_stopped(saved.append)
    seen = 0
    with pytest.raises(Stopped) as stopped:
        for _ in log.batches(FakeLoader()):
            seen += 1
            log._ranks.stop_signal = signal.SIGTERM if seen == 3 else 0
    assert (seen, stopped.value.args, saved) == (3, (signal.SIGTERM,), [signal.SIGTERM])
    loader = FakeLoader()

    def hanging(epoch, start):
        yield Batch(None, torch.zeros(4, dtype=torch.int64), 1.0, 0.0, 4)
        log._ranks.stop_signal = signal.SIGINT
        raise Stopped(signal.SIGINT)

    loader.batches = hanging
    with pytest.raises(Stopped) as stopped:
        train(log, loader)
    assert (stopped.value.args, saved) == ((signal.SIGINT,), [signal.SIGTERM, signal.SIGINT])


def test_a_signal_that_another_rank_has_followed_ends_an_evaluation():
    """This one has measured all of its batches, and waits for the counts of the other."""
    ranks, saved = FakeRanks(), []
    log = make_log(ranks)
    log.when_stopped(saved.append)

    def lonely(counts):
        raise Stopped(signal.SIGTERM)

    ranks.sum = lonely
    with pytest.raises(Stopped):
        log.evaluation(0, FakeLoader(), torch.tensor([[40, 40, 40]]))
    assert saved == [signal.SIGTERM] and log.best_acc1 == 0.0


def test_a_signal_ends_an_evaluation_alone_too_where_nothing_is_to_be_saved():
    log = make_log(evaluate=True)
    log._ranks.stop_signal = signal.SIGTERM
    with pytest.raises(Stopped):
        list(log.batches(FakeLoader(steps=1)))


def test_an_evaluation_counts_every_image_once_and_the_best_is_kept(capsys, tmp_path):
    log, loader = make_log(log_dir=str(tmp_path)), FakeLoader()
    assert log.best_acc1 == 0.0
    assert log.evaluation(3, loader, torch.tensor([[10, 20, 40], [0, 0, 0]])) == (25.0, 50.0)
    assert log.best_acc1 == 25.0
    loader.bad = {1, 2}
    assert log.evaluation(4, loader, torch.tensor([[8, 39, 38], [0, 0, 0]])) == (20.0, 97.5)
    assert log.best_acc1 == 25.0
    lines = capsys.readouterr().out.splitlines()
    assert " * Acc@1 25.000 Acc@5 50.000" in lines
    assert "[Warning] 2 validation images could not be read; they count as wrong" in lines
    with pytest.raises(AssertionError, match="37 of 40 validation images were counted"):
        log.evaluation(5, loader, torch.tensor([[8, 20, 37], [0, 0, 0]]))
    resumed = make_log()
    resumed.load_state_dict(log.state_dict())
    resumed.finish()
    assert resumed.best_acc1 == 25.0
    assert '=> result {"acc1": 25.0, "acc5": 50.0, ' in capsys.readouterr().out


def test_the_accuracy_of_each_class_stands_in_a_file(tmp_path):
    """Unreadable images count as wrong, a class without images has no row, and the last evaluation stays."""
    log, loader = make_log(per_class=str(tmp_path / "classes.csv")), FakeLoader()
    loader.images = types.SimpleNamespace(classes=["b", "a, c", "empty", "d"])
    loader.images.targets = torch.tensor([0] * 3 + [1] * 36 + [3]).numpy()
    loader.bad = {39: "broken"}
    log.evaluation(0, loader, torch.tensor([[0, 3, 3], [36, 36, 36], [0, 0, 0], [0, 0, 0]]))
    log.evaluation(1, loader, torch.tensor([[2, 3, 3], [35, 36, 36], [0, 0, 0], [0, 0, 0]]))
    text = (tmp_path / "classes.csv").read_text()
    assert text == 'class,images,correct,Acc@1\nb,3,2,66.667\n"a, c",36,35,97.222\nd,1,0,0.000\n'
    log._args.per_class = str(tmp_path / "nowhere" / "x.csv")
    with pytest.raises(UserError, match=r"nowhere/x.csv cannot be written: No such file or directory"):
        log.evaluation(1, loader, torch.tensor([[2, 3, 3], [35, 36, 36], [0, 0, 0], [0, 0, 0]]))


def test_the_old_scripts_read_fps(tmp_path):
    """MnasNet's script took the last but one field of lines with FPS: the rate, and no other line has the word."""
    log = make_log(log_dir=str(tmp_path), print_freq=5)
    train(log, FakeLoader(steps=20))
    log.evaluation(0, FakeLoader(), torch.tensor([[10, 20, 40]]))
    log.finish()
    command = "grep FPS {}/train_0.log | awk '{{print $(NF-1)}}'".format(tmp_path)
    shown = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True).stdout.decode().split()
    rates = [record["fps"] for record in records(tmp_path) if record["kind"] == "train"]
    assert shown == ["{:.2f}".format(rate) for rate in rates] and len(shown) == 4


def test_the_state_of_earlier_versions_is_taken(capsys):
    log = make_log()
    log.load_state_dict({"best": None, "metrics": {"folder": "/x", "bytes": 1, "sha256": "0"}})
    assert log.best_acc1 == 0.0
    log.load_state_dict({"best": (50.0, 90.0), "metrics": None})
    assert log.best_acc1 == 50.0


def test_skipped_steps_get_a_line_when_new_ones_come(capsys):
    log = make_log(print_freq=2)
    for number, batch in enumerate(log.steps(FakeLoader(steps=8), 0, 0)):
        log._precision.skipped += number in (0, 1, 5)
        log.step(torch.tensor(2.0), torch.zeros(4, 8), batch, 0.1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert lines == [
        "skipped 2 steps: a gradient overflowed (2 so far)",
        "skipped 1 steps: a gradient overflowed (3 so far)",
    ]


def test_the_time_of_a_run_begins_with_the_script(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRIPT_STARTED", str(logger.time.time() - 60))
    log = make_log(log_dir=str(tmp_path))
    log.finish()
    assert 60 <= records(tmp_path)[-1]["e2e_seconds"] < 62
    assert 60 <= records(tmp_path)[0]["time"] < 62


def test_a_run_that_is_resumed_goes_on_in_its_metrics(tmp_path, capsys):
    log = make_log(log_dir=str(tmp_path), print_freq=5)
    train(log, FakeLoader())
    state = log.state_dict()
    resumed = make_log(log_dir=str(tmp_path), print_freq=5, resume="a.pth.tar", epochs=2)
    resumed.load_state_dict(state)
    train(resumed, FakeLoader(), 1)
    found = [(record["kind"], record.get("epoch"), record.get("step")) for record in records(tmp_path)]
    again = [("run", None, None), ("train", 1, 5), ("train", 1, 10)]
    assert found == [("run", None, None), ("train", 0, 5), ("train", 0, 10), *again]
    assert resumed.state_dict()["began"] == state["began"]
    assert "metrics.jsonl" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.prev-*"))


def test_the_metrics_of_another_run_are_told_apart(tmp_path):
    first, other = make_log(), make_log(log_dir=str(tmp_path), print_freq=5)
    train(other, FakeLoader())
    resumed = make_log(log_dir=str(tmp_path), print_freq=5, resume="a.pth.tar", epochs=2)
    resumed.load_state_dict(first.state_dict())
    train(resumed, FakeLoader(), 1)
    assert [(record["epoch"], record["step"]) for record in parse_log.Run(str(tmp_path)).train] == [(1, 5), (1, 10)]
    text = (tmp_path / "metrics.jsonl").read_text()
    make_log(log_dir=str(tmp_path))  # a new training
    assert [path.read_text() for path in tmp_path.glob("metrics.jsonl.prev-*")] == [text]
    assert [record["kind"] for record in records(tmp_path)] == ["run"]


def test_a_disk_that_was_full_for_a_moment_costs_no_line(tmp_path, capsys):
    class Flaky(io.StringIO):
        def flush(self):
            if self.getvalue().count("\n") in (2, 3):
                raise OSError(28, "No space left on device")

    log = make_log(log_dir=str(tmp_path))
    file = log._files["train_0.log"] = Flaky()
    for number in range(6):
        log.line("line {}".format(number))
    warning = "[Warning] train_0.log cannot be written now: No space left on device"
    assert file.getvalue().splitlines() == ["line 0", "line 1", warning, *("line {}".format(n) for n in range(2, 6))]
    assert capsys.readouterr().out.count(warning) == 1


def test_a_full_disk_ends_the_files_not_the_training(tmp_path, capsys):
    log = make_log(log_dir=str(tmp_path))
    for name in ("metrics.jsonl", "train_0.log"):
        log._files[name] = open("/dev/full", "w")
        log._record("eval")
        log.line("something")
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("[Warning] metrics.jsonl cannot be written now: No space left on device") == 1
    assert lines.count("[Warning] train_0.log cannot be written now: No space left on device") == 1
    assert lines.count("something") == 2 and len(train(log, FakeLoader())) == 10


def test_a_log_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--log-dir .*file/x: Not a directory"):
        make_log(log_dir=str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match=r"--log-dir .*/train_a/b.log: No such file or directory"):
        make_log(log_dir=str(tmp_path), log_id="a/b")


def in_terminal(command, columns, **environment):
    """Run `command` with its output on a terminal of `columns` columns; return (exit status, what it wrote there)."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    words = [str(word) for word in command]
    variables = dict(os.environ, PYTHON=sys.executable, TERM="xterm", **environment)
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, cwd=str(ROOT), env=variables)
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
        while True:
            written += os.read(master, 65536)
    os.close(master)
    return process.wait(), written.decode()


LIVE = """
from tests.helpers import LINE
from tests.helpers import FakeLoader, make_log, train
log = make_log(print_freq=100, epochs=300)
train(log, FakeLoader(steps=1000), 299)
log.line("a line below")
for _ in log.batches(FakeLoader()):
    pass
log.line("the last line")
"""


@pytest.mark.parametrize("columns", [80, 200])
def test_the_live_line_never_wraps_and_shows_where_the_run_stands(columns):
    status, text = in_terminal([sys.executable, "-c", LIVE], columns)
    assert status == 0, text
    pieces = [piece for piece in re.split(r"[\r\n]+|\x1b\[[A-Z]", text) if piece.strip()]
    assert max(len(piece) for piece in pieces if not piece.startswith("=>")) <= columns
    assert "Epoch: [" not in text
    last = [piece for piece in pieces if piece.startswith("299/300")][-1]
    words = ["1000/1000", "loss 2.00", "acc 100.0", "/s", "LR 0.1", "ETA 0:00:00"]
    assert [word for word in words if word not in last] == [], last
    assert "a line below" in pieces and pieces[-1] == "the last line"


def test_on_a_terminal_the_screen_has_the_live_line_and_nohup_out_the_plain_ones(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    script = folder / "test" / "train_full_8p.sh"
    options = ["--data_path={}".format(few_digits), "--rank_size=2", "--batch_size=8", "--epochs=2", "--workers=1"]
    options += ["--print-freq=3", "--device=cpu", *small("MnasNet")]
    status, screen = in_terminal(["bash", script, *options], 100, PYTHONPATH="")
    assert status == 0, screen
    assert "Epoch: [" not in screen
    assert re.search(r"\r1/2 5/5", screen)
    output = folder / "test" / "output" / "0"
    plain = (output / "nohup.out").read_text()
    assert "\r" not in plain and "\x1b" not in plain
    assert set((output / "train_0.log").read_text().splitlines()) <= set(plain.splitlines())
    lines = [line for line in plain.splitlines() if line.startswith("Epoch: [")]
    assert len(lines) == 4 and all(LINE.fullmatch(line) for line in lines)
    for line in plain.splitlines():
        if line.startswith(" * "):
            assert line in screen.replace("\r", "\n").splitlines()
    assert Image.open(str(output / "curves.png")).size == (1200, 800)
    run = [record for record in records(output) if record["kind"] == "run"]
    assert run[0]["args"]["print_freq"] == 3 and run[0]["torch"] == torch.__version__ and run[0]["date"]
    steps = [(record["epoch"], record["step"]) for record in records(output) if record["kind"] == "train"]
    assert steps == [(0, 3), (0, 5), (1, 3), (1, 5)]


def test_a_missing_matplotlib_is_a_line_and_the_run_is_complete(bundle_copy):
    folder = bundle_copy("MnasNet")
    (folder.parent / "matplotlib.py").write_text("raise ImportError(\"No module named 'matplotlib'\")\n")
    options = ["--max_steps=4", "--batch_size=2", "--print-freq=2", "--device=cpu", *small("MnasNet")]
    process = run_script(folder, "performance_1p", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("no curves.png: No module named 'matplotlib' (pip install matplotlib)") == 1
    assert "Final Performance" in process.stdout and "Traceback" not in process.stdout + process.stderr
    assert not (folder / "test" / "output" / "0" / "curves.png").exists()


def test_losses_of_several_ranks_do_not_depend_on_how_many_steps_are_added_up_together(tmp_path):
    """A library that adds up for several ranks does so in an order that depends on the place: here from either end."""

    def losses(freq):
        def run(ranks):
            barrier, tensors = ranks._shared

            def from_either_end(tensor):
                FakeRanks.sum(ranks, tensor)
                total = [sum(t[i] for t in tensors[:: 1 - i // 4 % 2 * 2]) for i in range(len(tensor))]
                barrier.wait(60)
                return torch.stack(total)

            ranks.sum, rank = from_either_end, ranks.rank
            log = make_log(ranks, print_freq=freq, log_dir=str(tmp_path / str(freq) / str(rank)))
            train(log, FakeLoader(40, world=3), losses=[1.1 ** (step + 9 * rank) for step in range(40)])

        assert in_ranks(3, run) == [None] * 3
        return parse_log.Run(tmp_path / str(freq) / "0").losses

    assert losses(1) == losses(40)
