"""BatchNorm's statistics on several ranks: averaged for an evaluation, kept for each rank by a checkpoint."""

import signal

import pytest
import torch

from common import checkpoint, distributed
from tests import helpers
from tests.helpers import main_py


def norms(*means):
    """Return a model with two layers of BatchNorm for each rank; the means of the first are those given."""
    models = []
    for mean in means:
        models.append(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(2)))
        models[-1][0].running_mean.fill_(mean)
        models[-1][2].running_var.fill_(2 * mean)
    return models


def in_world(monkeypatch, models):
    """Return a `Ranks` that gathers what the ranks with `models` have."""
    flat = [torch.cat([b.flatten() for b in m.buffers() if b.is_floating_point()]) for m in models]
    gather = lambda gathered, own: [a.copy_(b) for a, b in zip(gathered, flat)]  # noqa: E731
    monkeypatch.setattr(distributed.dist, "all_gather", gather)
    ranks = distributed.Ranks()
    ranks.world_size = len(models)
    return ranks


def test_the_mean_of_the_ranks_is_what_each_of_them_gets(monkeypatch):
    models = norms(1.0, 2.0, 6.0)
    ranks = in_world(monkeypatch, models)
    for model in models:
        ranks.average_buffers(model)
        assert model[0].running_mean.tolist() == pytest.approx([3.0] * 3)
        assert model[2].running_var.tolist() == pytest.approx([6.0] * 2)
        assert model[0].running_var.tolist() == [1.0] * 3 and model[0].num_batches_tracked == 0


@pytest.mark.parametrize("world", [2, 3, 7, 8])
def test_equal_statistics_stay_as_they_are_digit_for_digit(monkeypatch, world):
    """So that one checkpoint has one accuracy on any number of ranks."""
    value = 0.1 + 1e-7
    models = norms(*[value] * world)
    ranks, before = in_world(monkeypatch, models), norms(value)[0].state_dict()
    ranks.average_buffers(models[0])
    assert all(
        torch.equal(values, before[name]) for name, values in models[0].state_dict().items() if "running" in name
    )


def test_one_rank_and_a_model_without_statistics_have_nothing_to_average(monkeypatch):
    ranks, model = distributed.Ranks(), torch.nn.Linear(2, 2)
    monkeypatch.setattr(distributed.dist, "all_gather", None)
    ranks.average_buffers(norms(1.0)[0])
    ranks.world_size = 2
    ranks.average_buffers(model)
    assert ranks.gather_buffers(model) == []


def test_two_ranks_that_were_stopped_go_on_with_statistics_of_their_own(noise, tmp_path):
    """The weights and the average that the evaluation takes end as those of the run that nobody has stopped."""
    outs = tmp_path / "whole", tmp_path / "stopped"
    words = [helpers.flags("MnasNet", noise, out, "--device-list", "0,1", "--resume", "auto") for out in outs]
    assert main_py("MnasNet", *words[0]).returncode == 0
    job = helpers.Job(helpers.command("MnasNet", noise, outs[1], *words[1]), tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +2/")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143, job.text()
    content = checkpoint.read(str(outs[1] / "checkpoint.pth.tar"))
    (own,) = content["rank_buffers"]
    assert content["samples"] > 0 and len(own) == 2 and not torch.equal(*own)
    assert main_py("MnasNet", *words[1]).returncode == 0
    helpers.assert_equal(*(helpers.weights(out) for out in outs))


def test_one_checkpoint_has_one_accuracy_on_one_rank_and_on_three(few_digits, tmp_path):
    flags = [*helpers.small("MnasNet"), "--data", few_digits, "-j0", "--output-dir", tmp_path, "-b8", "-p1"]
    assert main_py("MnasNet", *flags, "--epochs=1", "--device-list=0,1").returncode == 0
    lines = []
    for ranks in ("0", "0,1,2"):
        evaluate = ["--evaluate", "--resume", tmp_path / "checkpoint.pth.tar", "--device-list", ranks]
        process = main_py("MnasNet", *flags, *evaluate)
        lines.append([line for line in process.stdout.splitlines() if line.startswith(" * Acc@1")])
    assert len(lines[0]) == 1 and lines[0] == lines[1]
