"""Timing in turns, and the tables that come of it."""

import os
import statistics
import time

import torch

from common.device import processor_name


def cpu_seconds():
    """Return the processor time that this process and its children have used so far, threads and system included."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        with open("/proc/self/task/{}/children".format(task)) as file:
            for child in file.read().split():
                with open("/proc/{}/stat".format(child)) as stat:
                    total += sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return total + time.process_time()


def in_turns(forms, rounds, warm_up=1, clock=time.perf_counter):
    """Call each function of `forms` (a dict) once per round, all in turn; return {name: median seconds by `clock`}."""
    seconds = {name: [] for name in forms}
    for number in range(rounds + warm_up):
        for name, function in forms.items():
            started = clock()
            function()
            if number >= warm_up:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rates(seconds, images, ours):
    """Return rows [name, images/s, ours / theirs] of `in_turns`' result for `images` images a turn."""
    return [
        [name, "{:.1f}".format(images / value), "" if name == ours else "{:.2f}".format(value / seconds[ours])]
        for name, value in seconds.items()
    ]


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
    return text.format(processor_name(), cores, *versions)
