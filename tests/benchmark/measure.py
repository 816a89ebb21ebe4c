"""Timing in turns, each form in a process of its own, and the tables that come of it."""

import collections
import multiprocessing
import os
import statistics
import time

import torch

from common.device import processor

Turn = collections.namedtuple("Turn", "seconds cpu_seconds result")


def _cpu_seconds():
    """Return the processor time that this process and its children have used so far, threads and system included."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        with open("/proc/self/task/{}/children".format(task)) as file:
            for child in file.read().split():
                with open("/proc/{}/stat".format(child)) as stat:
                    total += sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return total + time.process_time()


def _serve(connection, build, arguments):
    multiprocessing.set_start_method("fork", force=True)  # for data-loading workers, as in any other program
    form = build(*arguments)
    while True:
        connection.recv()
        started, cpu_started = time.perf_counter(), _cpu_seconds()
        result = form()
        connection.send(Turn(time.perf_counter() - started, _cpu_seconds() - cpu_started, result))


def in_turns(forms, rounds, warm_up=1):
    """Time `forms`, a dict {name: (build, *arguments)}; return {name: `Turn`}: median times and the last result.

    `build(*arguments)` is called in a new process and returns the function to time, which is called once a round, all
    in turn. So what a form changes in its process, such as what malloc does with freed memory, helps no other.
    """
    spawn, served, turns = multiprocessing.get_context("spawn"), {}, {name: [] for name in forms}
    for name, (build, *arguments) in forms.items():
        connection, its_end = spawn.Pipe()
        served[name] = connection, spawn.Process(target=_serve, args=(its_end, build, arguments))
        served[name][1].start()
        its_end.close()
    try:
        for _ in range(warm_up + rounds):
            for name, (connection, _) in served.items():
                connection.send("your turn")
                turns[name].append(connection.recv())
    finally:
        for _, process in served.values():
            process.kill()
    medians = {}
    for name, taken in turns.items():
        seconds, cpu_seconds, results = zip(*taken[warm_up:])
        medians[name] = Turn(statistics.median(seconds), statistics.median(cpu_seconds), results[-1])
    return medians


def rates(turns, images, ours):
    """Return rows [name, images/s, ours / theirs] of `in_turns`' result for `images` images a turn."""
    rows = []
    for name, turn in turns.items():
        faster_by = "" if name == ours else "{:.2f}".format(turn.seconds / turns[ours].seconds)
        rows.append([name, "{:.1f}".format(images / turn.seconds), faster_by])
    return rows


def table(headers, rows):
    """Return a Markdown table."""
    lines = [headers, ["---"] * len(headers)] + rows
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine():
    """Return one line about what the numbers were measured on."""
    import PIL
    import timm
    import torchvision

    text = "{}, {} cores, torch {}, {} threads, torchvision {}, timm {}, Pillow {}"
    cores = len(os.sched_getaffinity(0))
    versions = torch.__version__, torch.get_num_threads(), torchvision.__version__, timm.__version__, PIL.__version__
    return text.format(processor()[0], cores, *versions)
