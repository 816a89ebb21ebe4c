"""How ranks are started, meet and end: which line and which exit status, and that nobody is left."""

import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from common import arguments, distributed, errors
from tests import helpers
from tests.helpers import tiers

SCRIPT = helpers.ROOT / "tests" / "reliability" / "ranks.py"


def start(log, *words, **environment):
    """Start tests/reliability/ranks.py, and its ranks, by a Python that has imported torch already."""
    python = os.environ["PYTHON"]
    return helpers.Job([python, SCRIPT, *words], log, PYTHON_EXEC=python, **environment)


def start_for_signals(log, *words):
    """Start it as a user does: what signals do to the processes is what is tested."""
    return helpers.Job([sys.executable, SCRIPT, *words], log)


def lines_of(job):
    """Return the lines of a finished job that are errors, with what torch or the system may have added."""
    lines = job.text().splitlines()
    return [line for line in lines if line and not line.startswith(("met: ", "saved", "node "))]


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--dist-url", "tcp://127.0.0.1:{}".format(free.getsockname()[1])]


ENDS = {  # (what happens, on which rank; '': on all) -> exit status, the only line
    ("error before", ""): (1, "[Error] rank 0: wrong before the ranks have met"),
    ("error", ""): (1, "[Error] rank 0: wrong in step 5"),
    ("kill", "1"): (137, "[Error] rank 1 was killed by SIGKILL (out of memory? see dmesg)"),
    ("status 7", "1"): (7, "[Error] rank 1 ended with status 7"),
}


@pytest.mark.parametrize("what, who", ENDS)
def test_one_line_names_the_rank_that_failed_first(what, who, tmp_path):
    status, line = ENDS[what, who]
    job = start(tmp_path / "log", "--device-list", "0,1", "--what", what, "--who", who)
    assert job.end() == status, job.text()
    assert lines_of(job) == [line]


def test_a_mistake_in_the_code_is_a_line_that_names_the_file_of_its_traceback(tmp_path):
    job = start(tmp_path / "log", "--device-list", "0,1", "--what", "bug", "--who", "1", TMPDIR=str(tmp_path))
    job.process.wait(helpers.LIMIT)
    (line,) = lines_of(job)
    assert line.startswith("[Error] rank 1: ZeroDivisionError: a mistake in step 5 (traceback in ")
    assert "in main" in pathlib.Path(re.search(r"traceback in (.*)\)", line).group(1)).read_text()


@pytest.mark.parametrize("times", tiers([1], [25]))
@pytest.mark.parametrize("who", ["0", "1"])
def test_a_rank_that_fails_never_aborts_the_others(who, times, tmp_path):
    for _ in range(times):
        job = start(tmp_path / "log", "--device-list", "0,1", "--what", "error", "--who", who)
        assert job.end() == 1, job.text()
        assert lines_of(job) == ["[Error] rank {}: wrong in step 5".format(who)]


def test_ranks_share_the_cores(tmp_path):
    variables = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, str(SCRIPT), "--device-list", "0,1"]
    output = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True).stdout.decode()
    assert output.count("threads {},".format(max(1, os.cpu_count() // 2))) == 2


@pytest.mark.parametrize("signals", tiers(["INT TERM INT TERM INT TERM"], ["INT", "HUP"]))
def test_ctrl_c_however_often_it_is_pressed(signals, tmp_path):
    """To the whole group of processes, as a terminal sends it; the scripts send a SIGTERM after each."""
    job = start_for_signals(tmp_path / "log", "--device-list", "0,1", "--what", "endless")
    job.wait_for("met(.|\n)*met")
    for name in signals.split():
        os.killpg(job.process.pid, getattr(signal, "SIG" + name))
        time.sleep(0.1)
    assert job.end() == 128 + getattr(signal, "SIG" + signals.split()[0]), job.text()
    assert job.text().count("saved") == 2
    assert lines_of(job) == []


def test_a_job_under_nohup_outlives_its_terminal(tmp_path):
    job = helpers.Job(["nohup", sys.executable, SCRIPT, "--device-list", "0,1", "--what", "endless"], tmp_path / "log")
    job.wait_for("met(.|\n)*met")
    assert [pid for pid in job.alive() if os.getpgid(pid) == job.process.pid] == [job.process.pid]
    os.killpg(job.process.pid, signal.SIGHUP)  # as the kernel and the shell do when a terminal is closed
    for pid in job.ranks(2):
        os.kill(pid, signal.SIGHUP)
    os.kill(job.process.pid, signal.SIGTERM)  # which is not the signal that the ranks would have ended with
    assert job.end() == 143, job.text()
    assert job.text().count("saved") == 2


def test_a_launcher_that_is_killed_at_once_leaves_nothing(tmp_path):
    """It has just forked the process that starts the ranks, which imports torch's launcher first."""
    job = start_for_signals(tmp_path / "log", "--device-list", "0,1", "--what", "endless")
    helpers.wait_for(lambda: len(job.alive()) > 1, job.process)
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.end() == -signal.SIGKILL


@pytest.mark.parametrize("delay", tiers([1.5], [0.5, 2.5, 4]))
def test_a_killed_launcher_leaves_no_rank(delay, tmp_path):
    """Ranks that are only importing torch, too."""
    job = start_for_signals(tmp_path / "log", "--device-list", "0,1", "--what", "endless")
    time.sleep(delay)
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.end() == -signal.SIGKILL


def test_defaults_of_torchrun_that_a_cluster_sets_do_not_count(tmp_path):
    job = start(tmp_path / "log", "--device-list", "0,1", PET_NNODES="2", PET_MAX_RESTARTS="7", PET_NO_PYTHON="1")
    assert job.end() == 0, job.text()


def test_a_restart_begins_afresh(tmp_path):
    """What the ranks of the first attempt have left in the store would end or hang those of the next."""
    words = ["--device-list", "0,1", "--max-restarts", "3", "--what", "kill twice", "--who", "1"]
    job = start(tmp_path / "log", *words)
    assert job.end() == 0, job.text()
    assert [job.text().count("attempt {}".format(attempt)) for attempt in range(4)] == [2, 2, 2, 0]


def test_restarts_end(tmp_path):
    words = ["--device-list", "0,1", "--max-restarts", "1", "--what", "kill", "--who", "1"]
    job = start(tmp_path / "log", *words)
    assert job.end() == 137, job.text()
    assert lines_of(job) == ["[Error] rank 1 was killed by SIGKILL (out of memory? see dmesg)"]
    assert job.text().count("attempt 1") == 2


def start_nodes(tmp_path, cards, *words):
    """Start a job of nodes that have so many `cards` each, on this host."""
    nodes, place = ["--world-size", len(cards)], free_address()
    return [
        start(tmp_path / "log{}".format(node), *nodes, "--rank", node, "--device-num", count, *place, *words)
        for node, count in enumerate(cards)
    ]


@pytest.mark.parametrize("cards", tiers([1], [2]))
def test_two_nodes(cards, tmp_path):
    restarts = ["--max-restarts", "3", "--what", "kill twice", "--who", "3"] if cards == 2 else []
    jobs = start_nodes(tmp_path, [cards, cards], *restarts)
    assert [job.end() for job in jobs] == [0, 0], jobs[0].text() + jobs[1].text()
    for job in jobs:
        assert "met: {}".format([str({"rank": rank}) for rank in range(2 * cards)]) in job.text()
        assert job.text().count("attempt {}".format(2 if restarts else 0)) == cards


def test_nodes_with_different_numbers_of_cards_are_refused_by_both(tmp_path):
    jobs = start_nodes(tmp_path, [1, 2])
    assert [job.end() for job in jobs] == [1, 1]
    for job, rank in zip(jobs, (0, 1)):
        (line,) = lines_of(job)
        assert line.startswith("[Error] rank {}: the nodes have different numbers of cards: 1 and 2".format(rank))


def test_a_port_of_node_0_that_is_in_use(tmp_path):
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", 0))
        other_program.listen()
        url = "tcp://127.0.0.1:{}".format(other_program.getsockname()[1])
        job = start(tmp_path / "log", "--world-size", "2", "--dist-url", url)
        assert job.end() == 1
    (line,) = lines_of(job)
    assert line.startswith("[Error] the nodes did not meet") and "address already in use" in line


@pytest.mark.slow  # waits for half a minute
def test_node_0_that_does_not_answer_is_named_within_a_minute(tmp_path):
    job = start(tmp_path / "log", "--world-size", "2", "--rank", "1", *free_address())
    assert job.end() == 1
    (line,) = lines_of(job)
    assert line.startswith("[Error] the nodes did not meet at 127.0.0.1:") and "is node 0 started" in line


REFUSED = {
    "--rank 2 --world-size 2 --addr 127.0.0.1": "--rank 2 is not a node of --world-size 2 nodes",
    "--world-size 2": "--world-size 2: give --addr HOST",
    "--device-list 0,0": "--device-list '0,0' is not a list of 2 different card numbers",
    "--device-list 0,0,1 --device-num 2": "--device-list '0,0,1' is not a list of 2 different card numbers",
    "--device-list 0,-1": "--device-list '0,-1' is not a list of 2 different card numbers",
    "--device-list 0,x": "--device-list '0,x' is not a list of 2 different card numbers",
    "--device-list 0, --device-num 1": "--device-list '0,' is not a list of 1 different card numbers",
    "--device-list 0,1 --device-num 4": "--device-list '0,1' is not a list of 4 different card numbers",
}


def parsed(text):
    parser = arguments.build_parser("text")
    arguments.add_shared(parser)
    return parser.parse_args(text.split())


@pytest.mark.parametrize("words", REFUSED)
def test_options_that_contradict_each_other(words):
    with pytest.raises(errors.UserError) as error:
        distributed.should_spawn(parsed(words))
    assert str(error.value).startswith(REFUSED[words])


@pytest.mark.parametrize(
    "words, ids, spawns",
    [
        ("", [0], False),
        ("--device-list 3", [3], False),
        ("--device-list 3 --multiprocessing-distributed", [3], True),
        ("--device-list=2,0 --device-num 2", [2, 0], True),
        ("--device-num 3", [0, 1, 2], True),
        ("--max-restarts 1", [0], True),
        ("--world-size 2 --rank 1 --addr node0", [0], True),
    ],
)
def test_which_cards_a_node_uses(words, ids, spawns, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.card_ids(parsed(words)) == ids
    assert distributed.should_spawn(parsed(words)) == spawns


@pytest.mark.parametrize(
    "words, ids", [("", [0, 1]), ("--device-list 3", [0, 1]), ("--device-list 5,4", [5, 4]), ("--device-num 8", [0, 1])]
)
def test_a_torchrun_of_the_user_decides_how_many_cards(words, ids, monkeypatch):
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert distributed.card_ids(parsed(words)) == ids
    assert not distributed.should_spawn(parsed(words))


@pytest.mark.parametrize(
    "words, where",
    [
        ("--addr no.such.host.invalid", "no.such.host.invalid:29688"),
        ("--dist-url tcp://no.such.host.invalid:1234 --rank 1", "no.such.host.invalid:1234"),
        ("--dist-url env://", "None:29688"),
    ],
)
def test_a_host_of_node_0_that_does_not_exist_is_named_at_once(words, where, tmp_path):
    job = start(tmp_path / "log", "--world-size", "2", *words.split(), MASTER_ADDR="None", MASTER_PORT="29688")
    assert job.end() == 1  # within its limit, which is less than the ranks wait for each other
    (line,) = lines_of(job)
    assert line.startswith("[Error] the nodes did not meet at " + where)


def test_all_gather_takes_what_json_can_write():
    ranks = distributed.Ranks()
    ranks.join("gloo")
    value = {"text": "ä\n", "list": [1, 2.5, None, True]}
    assert ranks.all_gather(value) == [value]


LEFT_OVER = [{"RANK": "1"}, {"WORLD_SIZE": "8"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "3"}]


@pytest.mark.parametrize("variables", LEFT_OVER, ids=str)
def test_what_a_container_sets_for_its_own_use_makes_no_rank(variables, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ranks = distributed.Ranks()
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (0, 0, 1, 1)
    assert ranks.all_gather(7) == [7]
    assert distributed.should_spawn(parsed("--device-list 0,1"))
    errors.print_error("wrong")
    assert capfd.readouterr().err == "[Error] wrong\n"


@pytest.mark.parametrize("local_rank", [None, "0,1,2,3,4,5,6,7"])
def test_half_of_what_torchrun_sets_is_one_line(local_rank, monkeypatch, capfd):
    """As in the pods of some clusters (the list is Ascend's operator's): training alone in each would be a guess."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", **({"LOCAL_RANK": local_rank} if local_rank else {})}.items():
        monkeypatch.setenv(name, value)
    assert errors.run(lambda: distributed.should_spawn(parsed("")) or distributed.Ranks()) == 1
    assert capfd.readouterr().err.startswith("[Error] RANK and WORLD_SIZE are set, LOCAL_RANK is no number: set it and")


def test_a_clock_that_is_set_takes_no_time_from_saving(monkeypatch, tmp_path):
    """As by NTP, an hour forwards while the ranks save."""

    def launcher(*job):
        signal.signal(signal.SIGTERM, lambda signum, frame: ((tmp_path / "saved").touch(), os._exit(143)))
        while not helpers.catches(os.getppid(), signal.SIGTERM):
            pass
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()

    join, waits = multiprocessing.process.BaseProcess.join, []

    def note(process, timeout=None):
        waits.append(timeout)
        return join(process, timeout)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "join", note)
    hours = itertools.count(time.time(), 3600)
    monkeypatch.setattr(distributed.time, "time", lambda: next(hours))
    monkeypatch.setattr(distributed, "_run_torchrun", launcher)
    monkeypatch.setattr(distributed, "end_with_parent", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = {"device_list": "0,1", "device_num": None, "device": "cpu", "world_size": 1, "rank": 0, "max_restarts": 0}
    before = {signum: signal.getsignal(signum) for signum in distributed.STOP_SIGNALS}
    try:
        assert distributed.spawn(types.SimpleNamespace(**args), []) == 143
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert waits[0] > distributed.SAVE_SECONDS / 2 and (tmp_path / "saved").exists()
