"""Full disks, read-only folders, links, second runs: the checkpoints that are there stay, and one line says what is."""

import argparse
import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import types

import pytest
import torch

from common import checkpoint
from common.errors import UserError
from tests import helpers

MB = 1000000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return helpers.make_images(tmp_path_factory.mktemp("noise"))


@pytest.fixture
def saved(mnasnet, data, tmp_path):
    """A folder with the checkpoints of a short run, of about 8 MB each."""
    out = tmp_path / "saved"
    words = helpers.flags("MnasNet", data, out, "--max-steps", "4", "--save-steps", "2")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 0, text
    return out


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("reaction", ["stop", "continue"])
def test_a_file_size_limit(reaction, mnasnet, data, saved, tmp_path):
    before = bytes_of(saved)
    words = helpers.flags("MnasNet", data, saved, "--resume", "auto", "--save-steps", "2", "--epochs", "1")
    words += ["--on-save-error", reaction]
    status, text = mnasnet.run(words, tmp_path / "log", file_size=4 * MB)
    assert bytes_of(saved) == before
    assert "no checkpoint could be written to {}: File too large".format(saved) in text
    if reaction == "stop":
        assert status == 1 and text.splitlines()[-1].startswith("[Error] no checkpoint")
    else:
        assert status == 0 and "training goes on" in text and "=> result" in text
    assert "traceback" not in text.lower()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 20 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)], stderr=subprocess.DEVNULL):
        pytest.skip("needs the right to mount; the file-size limit above covers the same code")
    yield folder
    subprocess.check_call(["umount", "-l", str(folder)])


def test_a_full_disk(mnasnet, data, small_disk, tmp_path):
    """Two checkpoints fit, the third does not; when there is room again the run goes on from the second."""
    words = helpers.flags("MnasNet", data, small_disk, "--save-steps", "2", "--eval-freq", "0", "--resume", "auto")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 1
    assert "No space left on device" in text.splitlines()[-1]
    assert sorted(os.listdir(str(small_disk))) == ["checkpoint.prev.pth.tar", "checkpoint.pth.tar"]
    assert helpers.position(small_disk) == (0, 16)
    assert helpers.position(small_disk, "checkpoint.prev.pth.tar") == (0, 8)
    subprocess.check_call(["mount", "-o", "remount,size=60m", str(small_disk)])
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 0 and "epoch 0, 16 samples done" in text


def test_a_read_only_folder(mnasnet, data, small_disk, tmp_path):
    subprocess.check_call(["mount", "-o", "remount,ro", str(small_disk)])
    status, text = mnasnet.run(helpers.flags("MnasNet", data, small_disk), tmp_path / "log")
    assert status == 1
    last = "[Error] checkpoints cannot be written to {}: Read-only file system".format(small_disk)
    assert text.splitlines()[-1] == last


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"])
@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "pipe"])
def test_what_is_no_ordinary_file_is_renamed_not_replaced(kind, name, tmp_path):
    path, target = tmp_path / "out" / name, tmp_path / "target"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
        (path / "precious").write_text("precious")
    elif kind == "pipe":
        os.mkfifo(str(path))
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("precious")
    before = os.lstat(str(path))
    item = checkpoints(path.parent)
    save(item, 1, best=True)
    save(item, 2)
    assert helpers.position(path.parent) == (2, 0) and helpers.position(path.parent, "checkpoint.prev.pth.tar") == (
        1,
        0,
    )
    (kept,) = [entry for entry in path.parent.iterdir() if entry.name.startswith(name + ".prev-")]
    assert os.lstat(str(kept)).st_ino == before.st_ino
    assert (kind == "link") == target.exists() and (kind != "link" or target.read_text() == "precious")


class Part:
    """Something with a state, whatever it is."""

    def state_dict(self):
        return {"w": torch.zeros(1)}


def checkpoints(folder, **values):
    """Return the `Checkpoints` of a run without a network; `values` replace options."""
    ranks = types.SimpleNamespace(is_rank0=True, all_gather=lambda value: [value])
    args = {"arch": "none", "save_steps": 0, "on_save_error": "stop", "resume": None, "no_save": False}
    args["log_dir"] = None
    log = types.SimpleNamespace(line=print, last_checkpoint=None, best_acc1=0.0, is_complete=True)
    log.paused, log.when_stopped = contextlib.nullcontext, lambda save: None
    parts = {"state_dict": Part(), "optimizer": Part()}
    metadata = {"classes": [], "order": {"seed": 0, "images": 10}}
    card = types.SimpleNamespace(ranks=ranks)
    return checkpoint.Checkpoints(card, argparse.Namespace(**dict(args, **values)), log, folder, parts, metadata)


def save(item, epoch, best=False):
    """Have `item` save the end of `epoch` (from 1), which was the `best` or was not measured."""
    item.epoch = epoch - 1
    item.after_epoch(acc1=1.0 if best else None)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    item = checkpoints(tmp_path)
    for epoch, best in ((1, True), (2, False), (3, False)):
        save(item, epoch, best)
    epochs = {path.name: checkpoint.read(str(path))["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"checkpoint.pth.tar": 3, "checkpoint.prev.pth.tar": 2, "model_best.pth.tar": 1}


def test_a_power_failure_loses_nothing(tmp_path, monkeypatch):
    """The bytes are on the disk before a file gets its name, and the name before the training goes on."""
    events, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), events.append(os.path.basename(new))))

    def sync(handle):
        fsync(handle)
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", sync)
    item = checkpoints(tmp_path)
    save(item, 1, best=True)
    save(item, 2)
    first = ["file", "model_best.pth.tar", "folder", "checkpoint.pth.tar", "folder"]
    assert events == [*first, "file", "checkpoint.prev.pth.tar", "folder", "checkpoint.pth.tar", "folder"]


def test_a_failure_at_every_step_of_saving(tmp_path, monkeypatch):
    """Whichever call fails, each file is an old or a new one, whole, and no temporary is left."""
    calls = ("link", "replace", "fsync", "open", "rename")
    for failing in range(40):
        folder = tmp_path / str(failing)
        folder.mkdir()
        item = checkpoints(folder)
        save(item, 1, best=True)
        save(item, 2)
        left = [failing]

        def fail(function, left=left):
            def instead(*words, **options):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(errno.EDQUOT, "Disk quota exceeded")
                return function(*words, **options)

            return instead

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, fail(getattr(os, name)))
            try:
                save(item, 3, best=True)
            except Exception as error:
                assert "Disk quota exceeded" in str(error)
        epochs = {path.name: checkpoint.read(str(path))["epoch"] for path in folder.iterdir()}
        assert sorted(epochs) == ["checkpoint.prev.pth.tar", "checkpoint.pth.tar", "model_best.pth.tar"]
        assert epochs["checkpoint.pth.tar"] in (2, 3) and epochs["checkpoint.prev.pth.tar"] in (1, 2)
        if left[0] >= 0:
            assert failing > 5 and epochs == dict(dict.fromkeys(epochs, 3), **{"checkpoint.prev.pth.tar": 2})
            return
    raise AssertionError("saving makes more calls than this test expects")


def test_a_file_is_on_the_disk_before_it_takes_the_name_of_another(tmp_path, monkeypatch):
    """After a power failure a name that stands for an empty file would be worse than the old file."""
    on_disk, renamed, fsync, replace = set(), [], os.fsync, os.replace

    def note_fsync(handle):
        on_disk.add(os.fstat(handle).st_ino)
        return fsync(handle)

    def note_replace(source, target):
        renamed.append((os.path.basename(target), os.stat(source).st_ino in on_disk))
        return replace(source, target)

    item = checkpoints(tmp_path)
    save(item, 1)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(item, 2)
    assert ("checkpoint.pth.tar", True) in renamed and ("checkpoint.pth.tar", False) not in renamed


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoints cannot be written to .*: Not a directory"):
        checkpoints(tmp_path / "file" / "folder")


def test_save_steps_saves_within_an_epoch(mnasnet, data, tmp_path):
    words = helpers.flags("MnasNet", data, tmp_path, "--max-steps", "5", "--save-steps", "2", "--eval-freq", "0")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 0, text
    assert helpers.position(tmp_path) == (0, 20) and helpers.position(tmp_path, "checkpoint.prev.pth.tar") == (0, 16)


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_the_newest_two_and_the_best_are_kept(tmp_path)


def test_stale_temporaries_are_removed_and_nothing_else(tmp_path):
    for name in ("checkpoint.pth.tar.tmp-12", "model_best.pth.tar.tmp-3", "mine.tmp-1", "checkpoint.pth.tar.prev-1"):
        (tmp_path / name).write_text("x")
    checkpoints(tmp_path)
    assert sorted(os.listdir(str(tmp_path))) == ["checkpoint.pth.tar.prev-1", "mine.tmp-1"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        save(checkpoints(tmp_path), 1)
    finally:
        os.umask(before)
    assert (tmp_path / "checkpoint.pth.tar").stat().st_mode & 0o777 == 0o640


def test_a_planted_link_is_not_written_through(tmp_path):
    """The temporary's name can be guessed; what lies there is not opened."""
    item = checkpoints(tmp_path)
    (tmp_path / "checkpoint.pth.tar.tmp-{}".format(os.getpid())).symlink_to(tmp_path / "target")
    with pytest.raises(Exception, match="File exists"):
        save(item, 1)
    assert not (tmp_path / "target").exists()


def test_two_runs_in_one_folder(mnasnet, data, saved, tmp_path):
    """The second one is refused, unless it only measures."""
    handle = os.open(str(saved), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    words = helpers.flags("MnasNet", data, saved, "--max-steps", "1")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 1
    assert text.splitlines()[-1].startswith("[Error] another run writes its checkpoints to {}".format(saved))
    measure = [*words, "--evaluate", "--resume", saved / "model_best.pth.tar"]
    status, text = mnasnet.run(measure, tmp_path / "log")
    assert status == 0 and "* Acc@1" in text
    os.close(handle)
    assert mnasnet.run(words, tmp_path / "log")[0] == 0


def test_a_run_that_is_refused_leaves_the_log_of_the_other_alone(mnasnet, data, tmp_path):
    """As the same command given twice: the metrics of the first are not put aside as those of an earlier run."""
    words = helpers.flags("MnasNet", data, tmp_path / "out", "--log-dir", tmp_path / "files", "--epochs", "99")
    pid = mnasnet.start(words, tmp_path / "log")
    mnasnet.wait_for(tmp_path / "log", r"Epoch: \[0\]\[ +2/")
    process = helpers.main_py("MnasNet", *words)
    helpers.assert_refused(process, 1, "another run writes its log to {}".format(tmp_path / "files"), "--log-dir")
    os.kill(pid, signal.SIGTERM)
    assert mnasnet.end() == 143
    assert sorted(os.listdir(str(tmp_path / "files"))) == ["metrics.jsonl", "train_0.log"]


def test_closed_standard_streams(data, tmp_path):
    """As a daemon may leave them: the run goes on, and none of its files gets what is written to them."""
    words = helpers.command("MnasNet", data, tmp_path, "--max-steps", "1", "--log-dir", tmp_path)
    process = helpers.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *words])
    assert process.returncode == 0, (tmp_path / "train_0.log").read_text()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4 and helpers.position(tmp_path) == (0, 4)
