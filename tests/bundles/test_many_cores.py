"""What the batches of eight ranks take on a host of 192 cores, which is simulated."""

import pathlib
import re
import signal
import sys

import pytest

from tests.benchmark import data
from tests.helpers import ROOT, Job, wait_for

RANKS, CORES, BATCH = 8, 192, 1024
IMAGE, LIMIT = 224 * 224 * 3, 16 * 2**30
# Start-up file of every Python of the run: a host with so many cores, and with memory for them. The first worker of a
# rank is stopped, so that the rank waits for its first batch, which this host could not compute with, and the other
# workers fill what they may fill.
SHIM = """
import builtins, io, os, signal
cores, forks, really_open = set(range({})), [], open
def open_(path, *args, **kwargs):
    if path == "/proc/meminfo":
        return io.StringIO("MemAvailable: 268435456 kB")
    return really_open(path, *args, **kwargs)
builtins.open = open_
os.sched_getaffinity = lambda pid: set(cores)
os.sched_setaffinity = lambda pid, some: cores.intersection_update(some)
def stop_the_first():
    if len(forks) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
if "RANK" in os.environ:
    os.register_at_fork(before=lambda: forks.append(1), after_in_child=stop_the_first)
"""


def kib(file, field):
    """Return the KiB that a line of /proc names, such as "Pss:"."""
    return int(re.search(r"^{}:\s*(\d+) kB".format(field), pathlib.Path(file).read_text(), re.MULTILINE).group(1))


def workers(rank):
    """Return the pids of the processes that the process `rank` has started."""
    return pathlib.Path("/proc/{0}/task/{0}/children".format(rank)).read_text().split()


def mapped(rank):
    """Return the bytes of memory that the process `rank` shares with its workers."""
    text = pathlib.Path("/proc/{}/maps".format(rank)).read_text()
    return sum(int(end, 16) - int(start, 16) for start, end in re.findall("^(.+)-(.+) rw-s .*/dev/zero", text, re.M))


@pytest.mark.slow  # decodes 16,000 images in 192 processes
def test_batches_of_eight_ranks_on_192_cores_stay_under_16_gib(tmp_path):
    """ShuffleNetV2's batch and images on eight ranks of a CPU; smaller network, no step of it."""
    if kib("/proc/meminfo", "MemAvailable") < 12 * 2**20:
        pytest.skip("less than 12 GiB of memory are free")
    data.write(str(tmp_path / "data"), "train", 8, 3 * RANKS * BATCH)
    data.write(str(tmp_path / "data"), "val", 8, RANKS * BATCH)
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIM.format(CORES))
    words = [sys.executable, ROOT / "ShuffleNetV2" / "main.py", "--arch=shufflenet_v2_x0_5", "--device=cpu"]
    words += ["--device-list", ",".join(map(str, range(RANKS))), "--batch-size", BATCH]
    words += ["--data", tmp_path / "data", "--no-save"]
    job = Job(words, tmp_path / "log", PYTHONPATH=str(tmp_path / "shim"))
    try:
        ranks = job.ranks(RANKS)
        rows = BATCH - -(-BATCH // (CORES // RANKS))  # of a batch, without those of the worker that is stopped
        filled = RANKS * 2 * rows * IMAGE  # two batches are worked on in advance

        def written():
            pids = [pid for rank in ranks for pid in workers(rank)]
            total = sum(1024 * kib("/proc/{}/status".format(pid), "RssShmem") for pid in pids)
            return total >= filled and len(pids)

        assert wait_for(written, job.process) == 2 * CORES  # for train/ and val/
        assert RANKS * 2 * 2 * BATCH * IMAGE < sum(map(mapped, ranks)) <= RANKS * 2**30
        taken = sum(1024 * kib("/proc/{}/smaps_rollup".format(pid), "Pss") for pid in job.alive())
        print("all processes {:.2f} GiB, batches {:.2f}".format(taken / 2**30, filled / 2**30))
        assert filled < taken < LIMIT
        assert "Epoch:" not in job.text()
        job.process.send_signal(signal.SIGTERM)
        assert job.end(120) == 128 + signal.SIGTERM, job.text()
    finally:
        job.kill()
