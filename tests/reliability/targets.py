"""Run a bundle's main.py, and let every rank write the targets of each step: targets.py OUT BUNDLE [flag ...]"""

import os
import sys

OUT, BUNDLE = sys.argv[1:3]
sys.path[:1] = [BUNDLE, os.path.dirname(BUNDLE)]

import main  # noqa: E402

from common import distributed, logger  # noqa: E402

step, spawn = logger.Log.step, distributed.spawn


def step_and_write(self, loss, logits, batch, learning_rate):
    stop_signal = step(self, loss, logits, batch, learning_rate)
    with open(os.path.join(OUT, "targets"), "a") as file:
        file.write("".join("{}\n".format(target) for target in batch.targets.tolist()))
    return stop_signal


logger.Log.step = step_and_write
distributed.spawn = lambda args, argv: spawn(args, [OUT, BUNDLE, *argv])  # the ranks come through here too
main.errors.run_and_exit(lambda: main.main(sys.argv[3:]))
