"""SIGTERM and Ctrl-C at any moment, through the shell scripts too: a checkpoint, the right status, nothing left."""

import fcntl
import os
import random
import re
import signal
import subprocess
import time

import pytest

from common import checkpoint, parse_log
from tests import helpers
from tests.helpers import BUNDLES, tiers

RANKS = tiers([1, 2], [8])
MOST = 8  # ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return helpers.make_images(tmp_path_factory.mktemp("noise"), train=20 * MOST)


def script(bundle, data, out, ranks, *more):
    """Return the command line of a full training by the bundle's script."""
    name = "train_full_{}.sh".format("8p" if ranks > 1 else "1p")
    words = ["--rank_size={}".format(ranks), "--epochs=9", "--batch_size=4", *more]
    return ["bash", bundle / "test" / name, *helpers.flags("MnasNet", data, out), *words]


def assert_saved(job, out):
    """Check the checkpoint of a training that was stopped: where the log says, and loadable."""
    epoch, samples, path = re.search(r"in epoch (\d+), (\d+) samples done: --resume (\S+) goes on", job.text()).groups()
    content = checkpoint.read(path)
    assert os.path.dirname(path) == str(out)
    assert (content["epoch"], content["samples"]) == (int(epoch), int(samples))
    return int(epoch), int(samples)


@pytest.mark.parametrize("name", tiers(["TERM", "INT"], ["HUP"]))
@pytest.mark.parametrize("ranks", RANKS)
def test_the_scripts_pass_signals_on(name, ranks, data, bundle_copy, tmp_path):
    """INT as a terminal sends it: to the whole group of processes."""
    folder = bundle_copy("MnasNet")
    job = helpers.Job(script(folder, data, tmp_path, ranks), tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +2/")
    with open(str(folder / "test/output/0/nohup.out")) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no other run may take its folder
    send = os.killpg if name == "INT" else os.kill
    send(job.process.pid, getattr(signal, "SIG" + name))
    assert job.end() == 128 + getattr(signal, "SIG" + name), job.text()
    assert_saved(job, tmp_path)
    assert "Final" not in job.text()


def test_a_group_wide_sigterm_kills_no_decoding_process(data, tmp_path):
    """As job schedulers send it: to launcher, ranks and decoding processes alike, ours ending by the ranks' will."""
    job = helpers.Job(
        helpers.command("MnasNet", data, tmp_path, "--epochs", "9", "--device-list", "0,1"), tmp_path / "log"
    )
    job.wait_for(r"Epoch: \[0\]\[ +2/")
    for pid in job.alive():
        os.kill(pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    assert_saved(job, tmp_path)


def children(job, parent):
    """Return the pids of the processes of `job` that the process `parent` has started, in this order."""
    found = []
    for pid in job.alive():
        with open("/proc/{}/stat".format(pid)) as file:
            fields = file.read().rsplit(")", 1)[1].split()
        if int(fields[1]) == parent:
            found.append((int(fields[19]), pid))  # when it started
    return [pid for _, pid in sorted(found)]


def wait_until_silent(job):
    """Wait until `job` has printed nothing for two seconds."""
    written = [None]

    def stands_still():
        time.sleep(2)
        written.append(job.text())
        return written[-1] == written[-2]

    helpers.wait_for(stands_still, job.process)


@pytest.mark.parametrize("ranks", [1, 2])
def test_while_the_data_hangs(ranks, data, tmp_path):
    """The decoding processes of one rank are frozen.

    One rank saves where it is, and logs the losses until there. Of two the other one is within its next step, and its
    BatchNorm statistics are ahead of its weights: nothing is saved but what --save-steps had saved, and the job ends
    all the same.
    """
    more = ["--device-list", "0,1"[: 2 * ranks - 1], "--epochs", "9", "--save-steps", "2", "--log-dir", tmp_path]
    more += ["-p", "1" if ranks == 2 else "1000"]
    job = helpers.Job(helpers.command("MnasNet", data, tmp_path, *more), tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +4/")
    for pid in children(job, job.ranks(2)[1] if ranks == 2 else job.process.pid):
        os.kill(pid, signal.SIGSTOP)
    wait_until_silent(job)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    if ranks == 1:
        assert_saved(job, tmp_path)
    epoch, samples = helpers.position(tmp_path)
    lost = len(parse_log.Run(tmp_path).losses) - (20 * MOST * epoch + samples) / (4 * ranks)
    assert lost == 0 if ranks == 1 else 0 <= lost < 2


def test_a_stall_of_the_data_that_passes_loses_nothing(data, tmp_path):
    """The other rank has its batch, and waits in the step."""
    words = ["--device-list", "0,1", "--epochs", "9", "-p", "1"]
    job = helpers.Job(helpers.command("MnasNet", data, tmp_path, *words), tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +4/")
    frozen = children(job, job.ranks(2)[1])
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    wait_until_silent(job)
    os.kill(job.process.pid, signal.SIGTERM)
    time.sleep(3)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert job.end() == 143, job.text()
    epoch, samples = assert_saved(job, tmp_path)
    assert (epoch, samples) >= (0, 4 * 8)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_though_the_reader_of_the_output_ends_first(ranks, data, tmp_path):
    """As in `python main.py ... 2>&1 | tee log`, where the terminal sends it to both."""
    words = ["--device-list", "0,1"[: 2 * ranks - 1], "--epochs", "9", "-p", "1", "--log-dir", tmp_path]
    words = [str(word) for word in helpers.command("MnasNet", data, tmp_path, *words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(words, env=dict(os.environ, OMP_NUM_THREADS="1"), **options)
    try:
        while b"[   2/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(helpers.LIMIT) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "train_0.log").read_text()
    epoch, samples = re.search(r"SIG(?:INT|TERM) in epoch (\d+), (\d+) samples done: --resume", text).groups()
    assert helpers.position(tmp_path) == (int(epoch), int(samples))


def test_while_the_data_of_an_evaluation_hangs(data, tmp_path):
    """One rank has measured its share; of the other the decoding process is frozen, and the signal ends its wait."""
    command = helpers.command("MnasNet", data, tmp_path, "--device-list", "0,1", "--epochs", "1", "-j", "1")
    job = helpers.Job(command, tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +1/")
    rank = job.ranks(2)[1]
    os.kill(children(job, rank)[-1], signal.SIGSTOP)  # of val/, which begins after that of train/
    helpers.wait_for((tmp_path / "checkpoint.pth.tar").exists, job.process)  # what it saves before it measures
    wait_until_silent(job)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    assert assert_saved(job, tmp_path) == (0, 20 * MOST)


def test_during_evaluation(data, tmp_path):
    """The epoch is not repeated; its evaluation is."""
    many = helpers.make_images(tmp_path / "many", train=16, val=1500)
    command = helpers.command("MnasNet", many, tmp_path, "--epochs", "1", "--resume", "auto", "-j", "1")
    job = helpers.Job(command, tmp_path / "log")
    helpers.wait_for((tmp_path / "checkpoint.pth.tar").exists, job.process)  # what it saves before it measures
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    assert assert_saved(job, tmp_path) == (0, 16)
    assert "* Acc@1" not in job.text()
    job = helpers.Job(command, tmp_path / "log")
    assert job.end() == 0, job.text()
    assert "* Acc@1" in job.text() and "Epoch: [0]" not in job.text()


def test_during_an_evaluation_alone(data, tmp_path):
    """Nothing is to be saved: the file that is measured stays as it is."""
    job = helpers.Job(helpers.command("MnasNet", data, tmp_path, "--max-steps", "1"), tmp_path / "log")
    assert job.end() == 0, job.text()
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    many = helpers.make_images(tmp_path / "many", train=2, val=1500)
    words = ["--evaluate", "--resume", tmp_path / "checkpoint.pth.tar"]
    job = helpers.Job(helpers.command("MnasNet", many, tmp_path, *words), tmp_path / "log")
    job.wait_for("=> run")
    helpers.wait_for(lambda: helpers.catches(job.process.pid, signal.SIGTERM), job.process)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_while_saving(data, tmp_path):
    """The file that is being written is finished."""
    job = helpers.Job(helpers.command("MnasNet", data, tmp_path, "--save-steps", "1"), tmp_path / "log")
    helpers.wait_for(lambda: any(".tmp-" in name for name in os.listdir(str(tmp_path))), job.process)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    assert_saved(job, tmp_path)
    assert not any(".tmp-" in name for name in os.listdir(str(tmp_path)))


@pytest.mark.parametrize("delays", tiers([[0.02, 1, 4]], [[0.3, 2]]))
@pytest.mark.parametrize("ranks", RANKS)
def test_during_start_up(ranks, delays, data, bundle_copy, tmp_path):
    """There is nothing to save, and no need to wait for the first step."""
    for delay in delays:
        out = tmp_path / str(delay)
        out.mkdir()
        job = helpers.Job(script(bundle_copy("MnasNet"), data, out, ranks), out / "log")
        time.sleep(delay)
        os.kill(job.process.pid, signal.SIGTERM)
        status = job.end()
        # Before it has read its options the script ends as bash ends: by the signal.
        assert status in (143, -signal.SIGTERM), job.text()
        if "Epoch: " in job.text():
            assert_saved(job, out)


@pytest.mark.parametrize("times", tiers([2], [50]))
@pytest.mark.parametrize("ranks", RANKS)
def test_sigterm_at_any_moment(ranks, times, data, tmp_path):
    """Random moments of one training that goes on each time: start-up, loading, steps, saving, evaluation."""
    draw = random.Random(ranks)
    more = ["--device-list", ",".join(map(str, range(ranks))), "--resume", "auto", "--epochs", "1000"]
    more += ["--save-steps", "3"]
    saved = (0, 0)
    for _ in range(times):
        job = helpers.Job(helpers.command("MnasNet", data, tmp_path, *more), tmp_path / "log")
        time.sleep(draw.uniform(0, 6 if ranks == 1 else 4 * ranks))
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.end() in (143, -signal.SIGTERM), job.text()
        if "Epoch: " in job.text():
            assert assert_saved(job, tmp_path) >= saved
        if (tmp_path / "checkpoint.pth.tar").exists():
            now = helpers.position(tmp_path)
            assert now >= saved
            saved = now


def test_the_elastic_launcher_saves_too(data, tmp_path):
    more = ["--device-list", "0,1", "--max-restarts", "3", "--epochs", "9"]
    job = helpers.Job(helpers.command("MnasNet", data, tmp_path, *more), tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +2/")
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == 143, job.text()
    assert_saved(job, tmp_path)


def test_a_killed_script_leaves_no_process(data, bundle_copy, tmp_path):
    """As a job scheduler does that has lost patience."""
    job = helpers.Job(script(bundle_copy("MnasNet"), data, tmp_path, 2, "--epochs=1000"), tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +2/")
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.end() == -signal.SIGKILL


def test_a_script_that_is_killed_at_once_leaves_no_process(data, bundle_copy, tmp_path):
    """Its main.py is still importing torch."""
    folder = bundle_copy("MnasNet")
    job = helpers.Job(script(folder, data, tmp_path, 1, "--epochs=1000"), tmp_path / "log")
    helpers.wait_for(lambda: (folder / "test/output/0/nohup.out").exists(), job.process)
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.end() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_killed_launcher_leaves_no_rank(bundle, data, tmp_path):
    words = helpers.command(bundle, data, tmp_path, "--device-list", "0,1", "--epochs", "1000")
    job = helpers.Job(words, tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +2/")
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.end() == -signal.SIGKILL
