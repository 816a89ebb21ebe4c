"""A run may go on with another number of ranks: each image of the epoch is still seen exactly once."""

import os
import types

import pytest
import torch

from common import checkpoint
from common.errors import UserError
from common.transforms import RandomResizedCrop
from tests import helpers
from tests.helpers import ROOT, run, tiers

COUNT = 96


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A set with a class for each image, so that a target tells which image it was."""
    return helpers.make_images(tmp_path_factory.mktemp("unique"), COUNT, COUNT, classes=COUNT)


def loader(data, rank, world):
    """Return the `Loader` of one rank of `world` that are not there."""
    return helpers.loader(data, True, rank, world, RandomResizedCrop(8), batch_size=2, seed=1)


@pytest.mark.parametrize("worlds", [(4, 2, 8), (8, 1, 3), (1, 8, 4), (3, 5, 7)])
def test_each_image_once(worlds, data):
    start, seen = 0, []
    for world, steps in zip(worlds, (3, 5, None)):
        for rank in range(world):
            batches = [batch.targets for batch in loader(data, rank, world).batches(epoch=2, start=start)]
            seen += torch.cat(batches[:steps]).tolist()
        if steps:
            start += world * 2 * steps
    assert len(seen) == len(set(seen))
    # What is left for a last batch of fewer than two images a rank is left out, as without a change of ranks.
    assert COUNT - len(seen) < 2 * worlds[-1]
    if worlds == (4, 2, 8):
        assert sorted(seen) == list(range(COUNT)) or COUNT - len(seen) == (COUNT - start) % 16


@pytest.mark.parametrize("worlds, ends", tiers([((2, 1, 3), (3, 9, 0))], [((4, 2, 8), (2, 8, 0))]))
def test_each_image_once_in_real_runs(worlds, ends, data, tmp_path):
    batch = 4
    for world, end in zip(worlds, ends):
        words = [os.environ["PYTHON"], ROOT / "tests" / "reliability" / "targets.py", tmp_path, ROOT / "MnasNet"]
        words += helpers.flags("MnasNet", data, tmp_path, "--epochs", "1", "--eval-freq", "0", "--resume", "auto")
        words += ["-j", "1", "--max-steps", end, "--device-list", ",".join(map(str, range(world)))]
        process = run(words)
        assert process.returncode == 0, process.stdout + process.stderr
    assert batch * worlds[0] * ends[0] < COUNT
    seen = [int(line) for line in (tmp_path / "targets").read_text().split()]
    assert sorted(seen) == list(range(COUNT))


class Nodes:
    """This rank's view of two that share no folder: the other one has gathered what it found itself."""

    is_rank0, rank = True, 0

    def __init__(self, others):
        self._others = iter(others)

    def all_gather(self, value):
        other = next(self._others)
        return [value, value if other is None else other]


@pytest.mark.parametrize(
    "found, others",
    [
        (None, [None, [1, 8]]),  # the other node has a checkpoint, this one has none
        ((1, 8), [None, [0, 0]]),
        ((1, 8), [None, [1, 16]]),  # an older or newer one
        ((1, 8), [None, [2, 0]]),
    ],
)
def test_nodes_with_different_checkpoints_are_refused(found, others, tmp_path):
    log = types.SimpleNamespace(when_stopped=lambda save: None, line=print)
    args = types.SimpleNamespace(arch="x", resume="x" if found else None, save_steps=0, no_save=True)
    card = types.SimpleNamespace(ranks=Nodes(others))
    with pytest.raises(UserError, match="the ranks resume different files") as refused:
        item = checkpoint.Checkpoints(card, args, log, str(tmp_path), {}, {"classes": [], "order": {}})
        item.resume({"epoch": found[0], "samples": found[1], "classes": []} if found else None)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
