"""Run a bundle's main.py, and let every rank write a checksum of its weights and how many steps it skipped.

Rank 0 also writes which modules of common/ it has loaded, to OUT/modules.

rank_weights.py OUT BUNDLE [flag ...]
"""

import os
import runpy
import sys
import zlib

OUT, BUNDLE = sys.argv[1:3]
sys.path[:1] = [BUNDLE, os.path.dirname(BUNDLE)]

from common import checkpoint  # noqa: E402  isort: skip
import torch  # noqa: E402  isort: skip

after_epoch = checkpoint.Checkpoints.after_epoch


def number(tensor):
    """Return a number that any changed bit changes; made where the tensor is, so that no tensor moves for it."""
    bits = tensor.flatten().view(torch.int32).to(torch.int64)
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum().item()


def after_epoch_and_checksum(self, acc1):
    after_epoch(self, acc1)
    model = self._parts["state_dict"]
    numbers = [number(parameter.detach()) for parameter in model.parameters()]
    with open(os.path.join(OUT, "rank{}".format(os.environ.get("RANK", 0))), "w") as file:
        file.write("{:08x} {}".format(zlib.crc32(repr(numbers).encode()), self._parts["precision"].skipped))

    if self._ranks.is_rank0:
        with open(os.path.join(OUT, "modules"), "w") as file:
            file.write("\n".join(sorted(name for name in sys.modules if name.split(".")[0] == "common")))


checkpoint.Checkpoints.after_epoch = after_epoch_and_checksum
if "RANK" in os.environ:
    sys.argv[1:] = sys.argv[3:]
    runpy.run_path(os.path.join(BUNDLE, "main.py"), run_name="__main__")
else:
    # main.py starts its ranks with the words after argv[0], so they must come through here again.
    import main

    from common import distributed

    arguments, spawn = sys.argv[3:], distributed.spawn
    distributed.spawn = lambda args, argv: spawn(args, [OUT, BUNDLE, *argv])
    main.errors.run_and_exit(lambda: main.main(arguments))
