"""Run a bundle's main.py, and let every rank write the targets of each step: targets.py OUT BUNDLE [flag ...]"""

import os
import sys

OUT, BUNDLE = sys.argv[1:3]
sys.path[:1] = [BUNDLE, os.path.dirname(BUNDLE)]

import main  # noqa: E402

from common import launcher, logger  # noqa: E402

step, launch = logger.Epoch.step, launcher.launch


def step_and_write(self, loss, logits, targets, learning_rate):
    step(self, loss, logits, targets, learning_rate)
    with open(os.path.join(OUT, "targets"), "a") as file:
        file.write("".join("{}\n".format(target) for target in targets.tolist()))


logger.Epoch.step = step_and_write
launcher.launch = lambda args, argv: launch(args, [OUT, BUNDLE, *argv])  # the ranks come through here too
main.errors.run_and_exit(lambda: main.main(sys.argv[3:]))
