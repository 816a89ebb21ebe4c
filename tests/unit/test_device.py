"""Seeds of all generators, float32 that is float32, and the form of the optimizer that this torch and device allow."""

import contextlib
import io
import itertools
import json
import platform
import random
import sys
import types

import numpy as np
import pytest
import torch

from common import device, npu
from common.errors import UserError

GENERATORS = {
    "python": lambda: random.getrandbits(64),
    "numpy": lambda: int(np.random.randint(2**62)),
    "torch": lambda: int(torch.randint(2**62, ())),
}


@pytest.mark.parametrize("draw", GENERATORS.values(), ids=list(GENERATORS))
def test_every_number_of_a_seed_counts_and_the_same_numbers_repeat_the_draws(draw):
    positions = [(), (0,), (0, 0), (0, 0, 0, 0), (0, 1, 1048576, 0), (2**62, 2**40, 2**62, 2**31)]
    positions += [(epoch, sample, rank) for epoch in range(5) for sample in range(0, 4096, 512) for rank in range(4)]
    found = {}
    for seed, position in itertools.product([0, 1, 2**32, 5 * 10**9, 2**63 - 1], positions):
        device.seed_everything(seed, *position)
        found[seed, position] = draw()
    assert len(set(found.values())) == len(found)
    for seed, position in [*found][::97]:
        device.seed_everything(seed, *position)
        assert draw() == found[seed, position]


def test_a_number_of_numpy_seeds_as_one_of_python():
    drawn = []
    for key in ((3, 5, 7), (np.int64(3), np.int32(5), np.uint8(7))):
        device.seed_everything(*key)
        drawn.append([draw() for draw in GENERATORS.values()])
    assert drawn[0] == drawn[1]


def test_positions_share_seeds_no_more_often_than_chance(monkeypatch):
    numpys, torchs = [], []
    monkeypatch.setattr(np.random, "seed", numpys.append)
    monkeypatch.setattr(torch, "default_generator", types.SimpleNamespace(manual_seed=torchs.append))
    for epoch, sample in itertools.product(range(100), range(0, 10**6, 1000)):
        device.seed_everything(7, epoch, sample)
    assert len(set(torchs)) == 10**5  # a card's generator takes them whole, a CPU's 32 bits of them
    for seeds in (numpys, [seed % 2**32 for seed in torchs]):
        assert 10**5 - len(set(seeds)) < 8  # 1.2 of them are expected to meet


def test_cards_are_seeded_too_once_they_are_used(monkeypatch):
    seeds = []
    for is_initialized in (False, True):
        card = types.SimpleNamespace(is_initialized=lambda: is_initialized, manual_seed_all=seeds.append)  # noqa: B023
        for name in ("cuda", "npu"):
            monkeypatch.setattr(torch, name, card, raising=False)
        device.seed_everything(3, 1)
        assert len(seeds) == 2 * is_initialized
    device.seed_everything(3, 2)
    assert seeds[0] == seeds[1] != seeds[2] == torch.initial_seed()


def test_graphs_whose_memory_the_next_batch_takes_do_not_accumulate():
    options = {"jit_compile": "auto", "internal_format": "auto", "compile": "reduce-overhead", "profile": 0}
    args = types.SimpleNamespace(device="cuda", accumulate=2, **options)
    with pytest.raises(UserError, match=r"^--compile reduce-overhead: its graphs overwrite the gradients"):
        device.check(args)


def test_a_device_seeds_everything_and_turns_tf32_off():
    args = types.SimpleNamespace(device="cpu", memory_format="auto", dist_backend=None, seed=5 * 10**9)
    args.evaluate = args.export = args.predict = None
    for args.evaluate in (True, False):  # cuDNN tries its algorithms for a training alone
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        card = device.Device(args)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
        assert torch.backends.cudnn.benchmark == (not args.evaluate)
    assert (card.type, card.module, card.channels_last) == ("cpu", None, True)
    expected = torch.rand(3)
    device.seed_everything(5 * 10**9)
    assert torch.equal(torch.rand(3), expected)


def build_optimizer(kind, refuse=(), error=RuntimeError, wanted="auto", **options):
    """Return `Device.optimizer` of two groups on a CPU where torch refuses some options once it has the groups."""
    card = device.Device.__new__(device.Device)
    card.type, card._args = "cpu", types.SimpleNamespace(fused_optimizer=wanted)
    base = getattr(torch.optim, kind)

    class Refuses(base):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            if any(options.get(name) for name in refuse):
                raise error("not on this device")

    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 3}]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim, kind, Refuses if refuse else base)
        return card.optimizer(kind, iter(groups), **options), groups


@pytest.mark.parametrize("kind, options", [("SGD", {"momentum": 0.9}), ("AdamW", {"weight_decay": 0.1})])
def test_the_optimizer_is_fused_where_torch_has_that(kind, options):
    optimizer, groups = build_optimizer(kind, lr=0.1, **options)
    assert [(group["fused"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.1), (True, 3)]
    assert set(groups[0]) == {"params"}  # those of the caller are as they were


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_no_trace_stays_of_a_form_that_torch_refuses(kind, error):
    optimizer, _ = build_optimizer(kind, refuse=["fused"], error=error, lr=0.1)
    for group in optimizer.param_groups:
        assert (group["fused"], group["foreach"]) == (None, None)
        group["params"][0].grad = torch.ones(2)
    optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_form_that_was_asked_for_is_taken_or_refused(kind):
    assert build_optimizer(kind, wanted="off", lr=0.1)[0].defaults["fused"] is None
    assert build_optimizer(kind, wanted="on", lr=0.1)[0].defaults["fused"]
    with pytest.raises(UserError, match="--fused-optimizer on: not on this device"):
        build_optimizer(kind, wanted="on", refuse=["fused"], lr=0.1)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_first_step_that_overflows_leaves_no_trace(nesterov, is_resumed):
    """torch's fused SGD then keeps whatever was in the memory of its momentum, and a later step takes it."""
    trained = []
    for wanted in ("auto", "off"):
        card = device.Device.__new__(device.Device)
        card.type, card._args = "cpu", types.SimpleNamespace(fused_optimizer=wanted)
        weights = torch.nn.Parameter(torch.ones(10**5))
        optimizer = card.optimizer("SGD", [weights], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
        if is_resumed:  # from a run without momentum
            optimizer.load_state_dict(dict(optimizer.state_dict(), state={}))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        garbage = [torch.full((10**5,), float("nan")) for _ in range(20)]
        del garbage
        for factor in (1e35, 3.0, 2.0):
            scaler.scale((weights * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        trained.append(weights.detach())
    assert scaler.get_scale() == 2.0**15
    assert torch.equal(*trained)


def test_what_is_not_trained_takes_no_memory_for_a_momentum():
    card = device.Device.__new__(device.Device)
    card.type, card._args = "cpu", types.SimpleNamespace(fused_optimizer="auto")
    weights = [torch.nn.Parameter(torch.ones(3), requires_grad=is_trained) for is_trained in (True, False)]
    optimizer = card.optimizer("SGD", weights, lr=0.1, momentum=0.9)
    assert list(optimizer.state) == weights[:1]


def test_a_wrong_option_of_an_optimizer_is_an_error():
    with pytest.raises(TypeError, match="nonsense"):
        build_optimizer("SGD", lr=0.1, nonsense=1)


@pytest.mark.parametrize("name, problem, cuda, expected", [
    ("auto", None, True, "npu"), ("npu", None, False, "npu"), ("auto", "no card", True, "cuda"),
    ("auto", "no card", False, "cpu"), ("gpu", None, True, "cuda"), ("cuda", None, True, "cuda"),
    ("cpu", None, True, "cpu"),
    ("npu", "no card", True, "--device npu: no card"),
    ("gpu", None, False, "--device gpu: this torch (sees no CUDA card|is built for CPUs)"),
])  # fmt: skip
def test_the_device_is_what_was_asked_for_or_the_best_there_is(name, problem, cuda, expected, monkeypatch):
    monkeypatch.setattr(npu, "find_problem", lambda: problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if expected.startswith("--"):
        with pytest.raises(UserError, match=expected):
            device.choose_type(name, [])
    else:
        assert device.choose_type(name, []) == expected


@pytest.mark.parametrize("text, name", [
    ("processor: 0\nmodel name\t: A processor\nflags\t: avx512_bf16\n", ("A processor", True)),
    ("processor\t: 0\nFeatures\t: fp bf16\nCPU implementer\t: 0x48\n", (platform.machine(), True)),
    ("processor\t: 0\nFeatures\t: fp\nCPU implementer\t: 0x41\n", (platform.machine(), False)),
])  # fmt: skip
def test_a_processor_has_a_name(text, name, monkeypatch):
    monkeypatch.setattr(device, "open", lambda path: io.StringIO(text), raising=False)
    assert device.processor() == name


class PausedLog:
    def __init__(self):
        self.lines = []
        self.line = self.lines.append

    @contextlib.contextmanager
    def paused(self):
        yield


@pytest.mark.parametrize("batches, steps", [(12, 2), (7, 2)])
def test_a_profile_has_the_steps_that_it_says_and_costs_the_others_nothing(batches, steps, tmp_path):
    """Steps 3 and 4 of two batches each: a run that ends before has what it did, and says it."""
    card = device.Device.__new__(device.Device)
    card.type, log, seen = "cpu", PausedLog(), []
    args = types.SimpleNamespace(accumulate=2, log_dir=str(tmp_path), output_dir=None)
    for number in card.profile(range(batches), 4, steps, args, log):
        seen.append(number)
        torch.ones(200, 200).mm(torch.ones(200, 200)).tanh()
    assert seen == list(range(batches))
    (file,) = tmp_path.iterdir()
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("aten::mm") == max(0, min(batches, 8) - 4)
    assert log.lines[0] == "profile of 2 steps: https://ui.perfetto.dev opens {}".format(file)
    assert "aten::mm" in log.lines[1] and log.lines[1].count("%") <= 5


def test_a_profiler_that_writes_nothing_ends_no_training(tmp_path, monkeypatch):
    """As torch_npu's, which says on its own why it could not."""
    profiler = types.SimpleNamespace(
        profile=lambda on_trace_ready: contextlib.nullcontext(), tensorboard_trace_handler=str
    )
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(profiler=profiler))
    card = device.Device.__new__(device.Device)
    card.type, log = "npu", PausedLog()
    args = types.SimpleNamespace(accumulate=1, log_dir=str(tmp_path), output_dir=None)
    assert list(card.profile(range(5), 4, 2, args, log)) == list(range(5))
    assert log.lines == ["[Warning] --profile: the profiler has written nothing to {}".format(tmp_path)]


def test_the_profile_of_a_card_is_read_from_torch_npus_table(tmp_path, monkeypatch):
    """Time on the card counts, where there is some."""
    place = tmp_path / "host_1_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    place.mkdir(parents=True)
    (place / "trace_view.json").write_text("[]")
    header = "Name,Input Shapes,Call Stack,Host Self Duration(us),Host Total Duration(us),Device Self Duration(us)\n"
    rows = ["aten::conv2d,,,9,9,0", "aten::mm,,,1,1,30.5", "aten::mm,,,1,1,30.5", "aten::add,,,5,5,39"]
    (place / "operator_details.csv").write_text(header + "\n".join(rows) + "\n")
    profiler = types.SimpleNamespace(
        profile=lambda on_trace_ready: contextlib.nullcontext(), tensorboard_trace_handler=str
    )
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(profiler=profiler))
    card = device.Device.__new__(device.Device)
    card.type, log = "npu", PausedLog()
    list(card.profile(range(3), 2, 1, types.SimpleNamespace(accumulate=1, log_dir=str(tmp_path), output_dir=None), log))
    assert log.lines[1] == "largest operators: aten::mm 61.0 %, aten::add 39.0 %, aten::conv2d 0.0 %"
