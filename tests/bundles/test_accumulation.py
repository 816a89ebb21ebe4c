"""--accumulate: a step of several batches is one of a batch as large, on one rank and on two, and is never cut."""

import contextlib
import json
import signal
import sys
import types

import pytest
import torch

from common import checkpoint, precision
from common.data import Batch, SyntheticLoader
from tests import helpers
from tests.helpers import ROOT, card, loader, main_py

NETWORK = ["--arch", "spach_ms_xxs_patch4_224_attn", "--image-size", "32"]  # without BatchNorm
PLAIN = ["--aa=none", "--mixup=0", "--cutmix=0", "--reprob=0", "--warmup-epochs=0"]  # mixup draws for each batch


def records(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(folder):
    return [loss for record in records(folder, "train") for loss in record["losses"]]


def train(data, folder, *flags, bundle="SPACH-SMLP", network=(*NETWORK, *PLAIN)):
    """Train, and return the losses of the steps."""
    words = ["--data", data, *network, "-j0", "-p4", "--eval-freq=0", "--output-dir", folder, "--log-dir", folder]
    process = main_py(bundle, *words, *flags)
    assert process.returncode == 0, process.stdout + process.stderr
    return losses(folder)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """Twenty steps with batches of 128, beyond the end of an epoch whose last step is smaller."""
    folder = tmp_path_factory.mktemp("whole")
    return train(digits, folder, "-b128", "--max-steps=20"), folder


def test_losses_equal_those_of_a_batch_as_large(whole, digits, tmp_path):
    found = train(digits, tmp_path, "-b32", "--accumulate=4", "--max-steps=20")
    expected, folder = whole
    assert len(found) == len(expected) == 20 and max(expected) - min(expected) > 0.05
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    (ours,), (theirs,) = records(tmp_path, "run"), records(folder, "run")
    assert ours["global_batch"] == theirs["global_batch"] == 128
    for ours, theirs in zip(records(tmp_path, "train"), records(folder, "train")):
        for name in ("epoch", "step", "steps", "lr"):
            assert ours[name] == theirs[name]
        assert ours["acc1"] == pytest.approx(theirs["acc1"], abs=1)


def test_ranks_share_a_step(whole, digits, tmp_path):
    found = train(digits, tmp_path, "-b32", "--accumulate=2", "--max-steps=20", "--device-list=0,1")
    assert found == pytest.approx(whole[0], rel=0, abs=1e-5)
    assert records(tmp_path, "run")[0]["global_batch"] == 128


def test_a_run_that_is_stopped_saves_whole_steps_and_goes_on_with_the_same_losses(digits, tmp_path):
    flags = ["-b8", "--accumulate=8", "--max-steps=7", "--print-freq=1"]  # 8 batches: the signal comes within a step
    expected = train(digits, tmp_path / "whole", *flags)
    words = [sys.executable, ROOT / "SPACH-SMLP" / "main.py", "--device=cpu", "--data", digits, *NETWORK, *PLAIN, "-j0"]
    words += ["--eval-freq=0", "--output-dir", tmp_path, "--log-dir", tmp_path, *flags]
    job = helpers.Job(words, tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +4/")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143, job.text()
    content = checkpoint.read(str(tmp_path / "checkpoint.pth.tar"))
    assert content["samples"] % 64 == 0 and content["samples"] < 1497
    assert train(digits, tmp_path, *flags, "--resume", "auto") == expected


def test_gradients_of_ranks_are_summed_with_the_last_batch_of_a_step_alone():
    """DDP sums them in the backward pass of a forward pass that was not within `no_sync`."""
    entered, card = [], types.SimpleNamespace(type="cpu", module=None, channels_last=True)
    model = types.SimpleNamespace(no_sync=lambda: contextlib.nullcontext(entered.append(True)))
    args = types.SimpleNamespace(amp=False, opt_level="O1", loss_scale="dynamic", evaluate=False, clip_grad=None)
    args.torch_layers = args.compile = None
    built = precision.Precision(card, args, torch.nn.Module(), None)
    for ends_step in (False, True, True, False):
        before = len(entered)
        with built.autocast(model, Batch(None, None, 1.0, 0.0, 1, ends_step)):
            assert len(entered) - before == (not ends_step)


def test_the_gradient_is_clipped_as_that_of_a_batch_as_large(whole, digits, tmp_path):
    """Three steps; the clipped ones are not those without a bound."""
    flags = ["--max-steps=4", "--clip-grad=0.01", "--lr=0.5"]
    expected = train(digits, tmp_path / "whole", "-b128", *flags)
    found = train(digits, tmp_path / "parts", "-b32", "--accumulate=4", *flags)
    assert found == pytest.approx(expected, rel=1e-5)  # losses of 2 to 28


@pytest.mark.parametrize("world, start", [(1, 0), (1, 21), (2, 0), (3, 42)])
def test_the_batches_of_a_step_share_its_place_and_weigh_as_their_images(world, start, few_digits):
    """80 images; the last batch and the last step are smaller."""
    of_ranks = []
    for rank in range(world):
        item = loader(few_digits, True, rank, world, batch_size=7, accumulate=3)
        batches = list(item.batches(2, start))
        steps = [[]]
        for batch in batches:
            steps[-1].append(batch)
            if batch.ends_step:
                steps.append([])
        assert steps.pop() == [] and len(steps) == item.steps_from(start)
        assert [len(step) for step in steps[:-1]] == [3] * (len(steps) - 1)
        for number, step in enumerate(steps):
            assert {batch.progress for batch in step} == {2 + (start + number * 21 * world) / 80}
            assert [batch.ends_step for batch in step] == [False] * (len(step) - 1) + [True]
        of_ranks.append([[batch.weight for batch in step] for step in steps])
    for weights in zip(*of_ranks):
        assert sum(map(sum, weights)) / world == pytest.approx(1)


def test_synthetic_batches_are_parts_of_steps_too():
    args = types.SimpleNamespace(batch_size=100000, seed=1, accumulate=3)
    item = SyntheticLoader(types.SimpleNamespace(prepare=torch.Tensor.clone, **vars(card(0, 2))), 1, 7, args)
    assert (len(item), item.steps) == (1200000, 2)
    batches = list(item.batches(epoch=1, start=600000))
    assert [(b.progress, b.samples, b.weight, b.ends_step) for b in batches] == [
        (1.5, 800000, 1 / 3, False),
        (1.5, 1000000, 1 / 3, False),
        (1.5, 1200000, 1 / 3, True),
    ]
