"""A run that was killed and resumed ends as the run that was not: same weights, bit by bit."""

import contextlib
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch

from common import arguments, checkpoint, parse_log
from tests import helpers
from tests.helpers import imported, tiers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return helpers.make_images(tmp_path_factory.mktemp("noise"))


def files(folder):
    return sorted(name for name in os.listdir(str(folder)) if "pth.tar" in name)


@pytest.fixture(scope="module")
def whole(mnasnet, data, tmp_path_factory):
    """The folder of the run that nobody has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    status, text = mnasnet.run(helpers.flags("MnasNet", data, out, "--save-steps", "1"), out / "log")
    assert status == 0, text
    assert files(out) == ["checkpoint.prev.pth.tar", "checkpoint.pth.tar", "model_best.pth.tar"]
    return out


@pytest.mark.parametrize("times", tiers([6], [100]))
def test_sigkill_at_any_moment(times, mnasnet, data, whole, tmp_path):
    """Every second time while a file is being written; all files load, nothing before the last save is repeated."""
    draw = random.Random(1)
    kills = during_save = runs = 0
    expected = helpers.weights(whole)
    while kills < times or during_save < times // 4:
        out = tmp_path / "run{}".format(runs)
        out.mkdir()
        status, saved = None, (0, 0)
        while status != 0:
            log = tmp_path / "log"
            pid = mnasnet.start(helpers.flags("MnasNet", data, out, "--save-steps", "1", "--resume", "auto"), log)
            if kills < times or during_save < times // 4:
                if kills % 2:
                    deadline = time.time() + 10
                    while not any(".tmp-" in name for name in files(out)) and time.time() < deadline:
                        time.sleep(0.0005)
                    time.sleep(draw.uniform(0, 0.02))
                else:
                    time.sleep(draw.uniform(0.1, 1.5))
                with contextlib.suppress(ProcessLookupError):  # it may have done all its steps
                    os.kill(pid, signal.SIGKILL)
            status = mnasnet.end()
            assert status in (0, -signal.SIGKILL), log.read_text()
            kills += status != 0
            during_save += any(".tmp-" in name for name in files(out))
            resumed = re.search(r"epoch (\d+), (\d+) samples done", log.read_text())
            if resumed:
                assert tuple(map(int, resumed.groups())) == saved
            for name in files(out):
                if ".tmp-" not in name:
                    checkpoint.read(str(out / name))
            if (out / "checkpoint.pth.tar").exists():
                now = helpers.position(out)
                assert now >= saved
                saved = now
        helpers.assert_equal(helpers.weights(out), expected)
        helpers.assert_equal(helpers.weights(out, "model_best.pth.tar"), helpers.weights(whole, "model_best.pth.tar"))
        assert not [name for name in files(out) if ".tmp-" in name]
        runs += 1


def test_the_losses_before_a_checkpoint_survive_a_kill(mnasnet, data, tmp_path):
    """Also those behind the last line of the log, which a run that goes on does not repeat."""
    words = ["--epochs", "9", "--save-steps", "3", "-p", "100", "--eval-freq", "9", "--log-dir", tmp_path / "files"]
    words = helpers.flags("MnasNet", data, tmp_path, *words, "--resume", "auto")
    pid = mnasnet.start(words, tmp_path / "log")
    helpers.wait_for((tmp_path / "checkpoint.pth.tar").exists)
    os.kill(pid, signal.SIGKILL)
    assert mnasnet.end() == -signal.SIGKILL
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 0 and "resumed" in text, text
    run = parse_log.Run(tmp_path / "files")
    assert len(run.losses) == 90 and run.state == "complete"


@pytest.mark.parametrize("bundle", tiers(["MnasNet", "SPACH-SMLP"], ["ShuffleNetV2"]))
def test_sigterm_in_the_middle_of_an_epoch(bundle, data, tmp_path):
    """Without --save-steps: the signal itself makes the checkpoint. SPACH-SMLP has AdamW, mixup and an average."""
    server = helpers.Server(bundle)
    outs = tmp_path / "whole", tmp_path / "stopped"
    words = [helpers.flags(bundle, data, out, "--resume", "auto") for out in outs]
    status, text = server.run(words[0], tmp_path / "log")
    assert status == 0, text
    assert "no checkpoint to go on from" in text
    for epoch in (0, 1):
        pid = server.start(words[1], tmp_path / "log")
        server.wait_for(tmp_path / "log", r"Epoch: \[{}\]\[ +4/".format(epoch))
        os.kill(pid, signal.SIGTERM)
        assert server.end() == 143
        at_epoch, samples = helpers.position(outs[1])
        assert at_epoch == epoch and 0 < samples < 40
    status, text = server.run(words[1], tmp_path / "log")
    server.close()
    assert status == 0, text
    helpers.assert_equal(*(helpers.weights(out) for out in outs))
    best = [checkpoint.read(str(out / "checkpoint.pth.tar"))["log"]["best"] for out in outs]
    assert best[0] == best[1]


def test_a_link_to_the_folder_of_the_checkpoints_is_that_folder(mnasnet, data, tmp_path):
    """And a locale that cannot write its name ends nothing."""
    place, link = tmp_path / "é", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    for more in (["--max-steps", "2"], ["--max-steps", "4", "--resume", place / "checkpoint.pth.tar"]):
        command = helpers.command("MnasNet", data, link, *more)
        process = helpers.run(command, PYTHONIOENCODING="ascii")
        assert process.returncode == 0, process.stderr
    assert "resumed {}".format(str(place).replace("é", "\\xe9")) in process.stdout
    assert files(place) == ["checkpoint.prev.pth.tar", "checkpoint.pth.tar", "model_best.pth.tar"]


@pytest.mark.parametrize("bundle", tiers(["MnasNet"], ["SPACH-SMLP"]))  # SGD, AdamW
def test_a_resume_in_another_memory_layout_takes_the_same_steps(bundle, data, tmp_path):
    """As from an NPU: fused optimizers read weights and momentum in the order of memory, others by their places."""
    save, losses = tmp_path / "first", []
    words = ["--opt-level", "O0", "--max-steps"]
    process = helpers.run(helpers.command(bundle, data, save, *words, "3", "--memory-format", "contiguous"))
    assert process.returncode == 0, process.stderr
    for form in ("on", "off"):
        out = tmp_path / form
        more = ["8", "--resume", save / "checkpoint.pth.tar", "--fused-optimizer", form, "--log-dir", out]
        process = helpers.run(helpers.command(bundle, data, out, *words, *more))
        assert process.returncode == 0, process.stderr
        losses.append(parse_log.Run(out).losses)
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_state_is_complete(whole):
    content = checkpoint.read(str(whole / "checkpoint.pth.tar"))
    expected = {
        "arch",
        "args",
        "best_acc1",
        "classes",
        "epoch",
        "log",
        "optimizer",
        "order",
        "precision",
        "rank_buffers",
        "run",
        "samples",
    }
    assert set(content) == expected | {"state_dict"}
    assert not [key for key, value in content["state_dict"].items() if value.device.type != "cpu"]


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 1
    data = data[: {"flipped": len(data), "cut": len(data) // 3, "empty": 0}[kind]]
    path.unlink()  # it may share its bytes with the best one
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty"])
def test_auto_falls_back_and_says_so(kind, mnasnet, data, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(str(whole), str(out))
    damage(out / "checkpoint.pth.tar", kind)
    before = helpers.position(out, "checkpoint.prev.pth.tar")
    status, text = mnasnet.run(helpers.flags("MnasNet", data, out, "--resume", "auto"), tmp_path / "log")
    assert status == 0, text
    assert "checkpoint.pth.tar is damaged" in text and "resumed {}".format(out / "checkpoint.prev.pth.tar") in text
    assert "epoch {}, {} samples done".format(*before) in text
    helpers.assert_equal(helpers.weights(out), helpers.weights(whole))
    assert [name for name in files(out) if name.startswith("checkpoint.pth.tar.prev-")]  # nothing is deleted


def test_auto_with_damaged_files_only(mnasnet, data, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(str(whole), str(out))
    for name in files(out):
        damage(out / name, "cut")
    status, text = mnasnet.run(helpers.flags("MnasNet", data, out, "--resume", "auto"), tmp_path / "log")
    assert status == 1
    assert "no valid checkpoint in" in text.splitlines()[-1]


def test_an_explicit_damaged_file_is_refused(mnasnet, data, whole, tmp_path):
    shutil.copy(str(whole / "checkpoint.pth.tar"), str(tmp_path / "x.pth.tar"))
    damage(tmp_path / "x.pth.tar", "flipped")
    words = helpers.flags("MnasNet", data, tmp_path / "out", "--resume", tmp_path / "x.pth.tar")
    status, text = mnasnet.run(words, tmp_path / "log")
    assert status == 1 and len(text.splitlines()) == 1 and "wrong checksum of " in text


def test_the_files_of_another_run_are_kept(mnasnet, data, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(str(whole), str(out))
    status, text = mnasnet.run(helpers.flags("MnasNet", data, out, "--max-steps", "2", "--lr", "0.5"), tmp_path / "log")
    assert status == 0, text
    for name in ("checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"):
        (kept,) = [kept for kept in files(out) if kept.startswith(name + ".prev-")]
        helpers.assert_equal(helpers.weights(out, kept), helpers.weights(whole, name))


def test_megviis_form_is_resumed(data, tmp_path):
    """Files in the form of megvii's network change the model, which has to happen before the optimizer is built."""
    with imported("ShuffleNetV2") as models:
        model = models.shufflenet_v2_x1_0(2)
        state = model.use_megvii_form().state_dict()
    torch.save(state, str(tmp_path / "megvii.pth"))
    words = helpers.flags("ShuffleNetV2", data, tmp_path / "out", "--arch", "shufflenet_v2_x1_0", "--epochs", "1")
    process = helpers.main_py("ShuffleNetV2", *words, "--max-steps", "2", "--pretrained", tmp_path / "megvii.pth")
    assert process.returncode == 0, process.stderr
    process = helpers.main_py("ShuffleNetV2", *words, "--resume", "auto")
    assert process.returncode == 0, process.stderr
    assert "resumed " in process.stdout and "megvii_form" in helpers.weights(tmp_path / "out")


@pytest.fixture(scope="module")
def whole_of_two(data, tmp_path_factory):
    """The folder of a run on two ranks that nobody has interrupted."""
    out = tmp_path_factory.mktemp("two")
    words = helpers.flags("MnasNet", data, out, "--save-steps", "2", "--device-list", "0,1")
    process = helpers.main_py("MnasNet", *words)
    assert process.returncode == 0, process.stderr
    return out


@pytest.mark.parametrize("restarts", [0, 2])
def test_sigkill_of_one_of_two_ranks(restarts, data, whole_of_two, tmp_path):
    """The job ends within a minute, or starts again from its last checkpoint; the end is the same."""
    out = tmp_path / "out"
    words = helpers.command("MnasNet", data, out, "--save-steps", "2", "--device-list", "0,1")
    job = helpers.Job([*words, "--max-restarts", restarts], tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +1/")
    victim = job.ranks(2)[1]  # looked for early: the steps take milliseconds
    job.wait_for(r"Epoch: \[1\]\[ +3/")
    os.kill(victim, signal.SIGKILL)
    status = job.end()
    if restarts == 0:
        assert status == 137, job.text()
        assert "rank 1 was killed by SIGKILL" in job.text()
        job = helpers.Job([*words, "--resume", "auto"], tmp_path / "log")
        status = job.end()
    assert status == 0, job.text()
    assert re.search(r"resumed .*: epoch 1, (8|16|32) samples done", job.text()), job.text()
    helpers.assert_equal(helpers.weights(out), helpers.weights(whole_of_two))


def test_a_restart_does_not_take_another_runs_checkpoint(data, whole, tmp_path):
    """Killed before its first save, a restarted run starts afresh although there is a newer file of another run."""
    out = tmp_path / "out"
    shutil.copytree(str(whole), str(out))
    words = helpers.command("MnasNet", data, out, "--epochs", "1", "--device-list", "0,1", "--max-restarts", "1")
    job = helpers.Job(words, tmp_path / "log")
    job.wait_for(r"Epoch: \[0\]\[ +1/")
    os.kill(job.ranks(2)[1], signal.SIGKILL)
    assert job.end() == 0, job.text()
    assert "resumed" not in job.text() and "starting afresh" in job.text()


@pytest.mark.parametrize(
    "resume, own, expected",
    [
        ("auto", False, "checkpoint.pth.tar"),  # what the run had gone on from before it was killed
        ("auto", True, "checkpoint.pth.tar"),
        (None, False, None),
        (None, True, "checkpoint.pth.tar"),
        ("model_best.pth.tar", False, "model_best.pth.tar"),
        ("model_best.pth.tar", True, "checkpoint.pth.tar"),
    ],
)
def test_what_a_restarted_rank_resumes(resume, own, expected, data, whole, tmp_path, monkeypatch):
    """By the elastic launcher: the newest file of its own run, else what the command line says."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = tmp_path / "out"
    shutil.copytree(str(whole), str(out))
    content = checkpoint.read(str(out / "checkpoint.pth.tar"))
    content["run"] = ["another node's", checkpoint.RUN] if own else ["another run's"]
    torch.save(content, str(out / "checkpoint.pth.tar"))
    words = helpers.flags("MnasNet", data, out)
    if resume is not None:
        words += ["--resume", resume if resume == "auto" else str(out / resume)]
    with imported("MnasNet", "main") as main:
        parser = main.build_parser()
        args = arguments.parse(parser, words)
        args, content = checkpoint.load(parser, words, args, main.models.__all__, main.NETWORK_OPTIONS, "none")
    assert args.resume == (expected and str(out / expected))
    assert (content is None) == (expected is None)
    assert any("starting afresh" in line for line in args.notices) == (expected is None)


def test_three_ranks_take_the_step_after_a_resume_as_they_would_have_without_it(data, tmp_path):
    """Their sums depend on the order in which torch packs the gradients, which is another one in its first step."""
    words = ["--device-list", "0,1,2", "--max-steps", "3", "--save-steps", "2", "--eval-freq", "0"]
    outs = tmp_path / "whole", tmp_path / "resumed"
    for out, resume in zip(outs, ([], ["--resume", outs[0] / "checkpoint.prev.pth.tar"])):
        process = helpers.main_py("MnasNet", *helpers.flags("MnasNet", data, out, *words, *resume))
        assert process.returncode == 0, process.stderr
    assert "resumed {}: epoch 0, 24 samples done".format(outs[0] / "checkpoint.prev.pth.tar") in process.stdout
    helpers.assert_equal(*(helpers.weights(out) for out in outs))


def test_an_evaluation_within_an_epoch_changes_nothing_of_what_follows(data, tmp_path):
    """At the end of --max-steps, of two ranks: it measures the mean of their BatchNorm statistics, the best so far."""
    ranks, none = ["--device-list", "0,1", "--max-steps"], ["--eval-freq", "0"]
    resume = ["--resume", tmp_path / "parts" / "checkpoint.pth.tar"]
    for out, words in (("whole", ["4", *none]), ("parts", ["2"]), ("parts", ["4", *none, *resume])):
        process = helpers.main_py("MnasNet", *helpers.flags("MnasNet", data, tmp_path / out, *ranks, *words))
        assert process.returncode == 0, process.stderr
    assert "resumed" in process.stdout
    helpers.assert_equal(*(dict(helpers.weights(tmp_path / out), best=torch.zeros(1)) for out in ("whole", "parts")))
