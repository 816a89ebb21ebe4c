"""What a checkpoint decides and what the command line decides: for every option of every bundle, in every mode."""

import argparse
import copy
import functools
import re
import types

import pytest
import torch

from common import arguments, checkpoint
from common.errors import UserError
from tests import helpers
from tests.helpers import BUNDLES, imported

LINE = "the command line"  # on --resume a value other than the file's is also named in a line of the log
FILE = (
    "the file"  # where the command line is silent; a contradiction is refused on --resume, else the command line wins
)
PLACE = "the command line, and a difference from the file is expected"
UNUSED = "nothing uses it, which a line says"
MODE = "says what to do"

# Option: who decides on (--resume, --evaluate, --pretrained); when a training starts it is always the command line.
TABLE = {
    "arch": (FILE, FILE, FILE),
    "image_size": (FILE, FILE, FILE),
    "zero_pad": (FILE, FILE, FILE),
    "channel_shuffle": (FILE, FILE, FILE),
    "eval_ema": (FILE, FILE, LINE),
    "val_size": (FILE, FILE, FILE),
    "val_resize": (FILE, FILE, FILE),
    "num_classes": (FILE, FILE, LINE),  # on --resume the lists of classes must agree, not the options
}
RECIPE = (
    "crop_scale flip epochs lr warmup_epochs momentum weight_decay label_smoothing dropout bn_momentum eval_freq "
    "max_steps aux_weight drop_path lr_decay aa reprob mixup cutmix repeats cooldown_epochs ema_decay color_jitter "
    "amp opt_level amp_dtype loss_scale compile cpu_max_steps fused_optimizer synthetic max_restarts save_steps "
    "on_save_error no_save train_only class_weights trivial_augment schedule warmup_method "
    "warmup_start optimizer norm_weight_decay accumulate clip_grad profile"
)
MACHINE = (
    "batch_size cpu_batch_size data workers max_bad_images classes_by_position device seed memory_format torch_layers "
    "jit_compile internal_format benchmark multiprocessing_distributed device_list device_num world_size rank addr "
    "dist_url dist_backend print_freq per_class"
)
MODES_OF_A_RUN = "help dry_run check resume pretrained evaluate export predict half"
for names, row in (
    (RECIPE, (LINE, UNUSED, LINE)),
    (MACHINE, (LINE, LINE, LINE)),
    ("output_dir log_dir log_id", (PLACE, PLACE, PLACE)),
    (MODES_OF_A_RUN, (MODE, MODE, MODE)),
):
    TABLE.update(dict.fromkeys(names.split(), row))
OTHERS = {
    "aa": "rand-m5",
    "dist_url": "env://",
    "loss_scale": "32",
    "drop_path": "0.125",
    "val_resize": "300",
}  # values that are none of the defaults
# What cannot be given alone, on a CPU and beside --data.
UNSPOKEN = ("data", "synthetic", "device", "output_dir", "jit_compile", "internal_format", "world_size", "rank")
MODES = ("--resume", "--evaluate", "--pretrained")


@functools.lru_cache(None)
def options_of(bundle):
    """Return {name: action of argparse} of a bundle's options."""
    with imported(bundle, "main") as main:
        shown = [action for action in main.build_parser()._actions if action.help != argparse.SUPPRESS]
        return {action.dest: action for action in reversed(shown)}


def _cases():
    """Yield (bundle, option) for what decides about the networks, and for every other option in one bundle."""
    seen = set()
    for bundle in BUNDLES:
        for name, action in options_of(bundle).items():
            row = TABLE.get(name, (LINE,))
            has_another = action.choices is None or len(action.choices) > 1
            if row[0] != MODE and has_another and (name not in seen or row[0] == FILE):
                yield bundle, name
            seen.add(name)


CASES = list(_cases())


def test_every_option_has_a_row():
    assert {name for bundle in BUNDLES for name in options_of(bundle)} == set(TABLE)


def another_value(action):
    """Return a value that is not the default, and the words that ask for it."""
    if action.nargs == 0:
        return not action.default, [action.option_strings[0]]
    word, default = OTHERS.get(action.dest, "3"), action.default
    if action.choices:
        word = next(str(choice) for choice in action.choices if choice != default)
    elif isinstance(default, (int, float)):
        word = str(default + 32 if isinstance(default, int) else default / 2 or 0.25)
    return (action.type or str)(word), [action.option_strings[0], word]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Words that every run here has."""
    folder = tmp_path_factory.mktemp("base")
    return [
        "--device",
        "cpu",
        "--data",
        helpers.make_images(folder / "data", 4, 2),
        "--output-dir",
        str(folder / "out"),
    ]


def load(bundle, words):
    """Return the options as `checkpoint.load` leaves them."""
    with imported(bundle, "main") as main:
        parser = main.build_parser()
        args = arguments.parse(parser, words)
        return checkpoint.load(parser, words, args, main.models.__all__, main.NETWORK_OPTIONS, "none")[0]


def words_of(mode, path):
    return ["--evaluate", "--resume", path] if mode == "--evaluate" else [mode, path]


def write(path, recorded):
    """Write what a run with the options `recorded` might have saved, without its weights."""
    content = {"arch": recorded["arch"], "args": recorded, "classes": ["a", "b"], "state_dict_ema": {}}
    torch.save(content, path)


def test_files_of_two_runs_that_stand_at_the_same_step_are_refused(base, tmp_path):
    args = load("MnasNet", [*base, "--no-save"])
    args.resume = "x.pth.tar"

    def of_two(value):
        return [value, [*value[:2], *(7.0 for _ in value[2:])]] if isinstance(value, list) else [value]

    card = types.SimpleNamespace(ranks=types.SimpleNamespace(is_rank0=True, all_gather=of_two))
    log = types.SimpleNamespace(line=print, when_stopped=lambda save: None)
    metadata = {"classes": ["a"], "order": {"seed": 0, "images": 40}}
    content = {"epoch": 1, "samples": 0, "classes": ["a"], "log": {"began": 5.0}}
    with pytest.raises(UserError, match="the ranks resume different files"):
        checkpoint.Checkpoints(card, args, log, args.output_dir, {}, metadata).resume(content)


def test_what_was_asked_for_and_never_averaged_is_not_looked_for(base, tmp_path):
    """--eval-ema without --ema-decay: the file has no average to measure."""
    path = str(tmp_path / "x.pth.tar")
    recorded = dict(vars(load("MnasNet", base)), eval_ema=True)
    torch.save({"arch": recorded["arch"], "args": recorded, "classes": ["a", "b"]}, path)
    assert load("MnasNet", [*base, *words_of("--evaluate", path)]).eval_ema is False


def lines_of_resuming(args, content, **metadata):
    """Return the lines of the log when a training with the options `args` resumes `content`."""
    lines, ranks = [], types.SimpleNamespace(is_rank0=False, all_gather=lambda value: [value])
    log = types.SimpleNamespace(line=lines.append, when_stopped=lambda save: None)
    args.resume = "x.pth.tar"
    metadata = dict({"classes": ["a", "b"], "order": {"seed": 0, "images": 40}}, **metadata)
    card = types.SimpleNamespace(ranks=ranks)
    checkpoints = checkpoint.Checkpoints(card, args, log, args.output_dir, {}, metadata)
    checkpoints.resume(dict({"epoch": 1, "samples": 0, "classes": ["a", "b"]}, **content))
    return lines[1:]


@pytest.mark.parametrize("bundle, name", CASES)
def test_where_the_command_line_is_silent(bundle, name, base, tmp_path):
    own, (other, _), path = (
        vars(load(bundle, base)),
        another_value(options_of(bundle)[name]),
        str(tmp_path / "x.pth.tar"),
    )
    write(path, dict(arguments.as_dict(argparse.Namespace(**own)), **{name: other}))
    for mode, decides in zip(MODES, TABLE[name]):
        args = load(bundle, [*base, *words_of(mode, path)])
        assert getattr(args, name) == (other if decides == FILE else own[name])
        assert decides != FILE or any(path in line and str(other) in line for line in args.notices)


@pytest.mark.parametrize("bundle, name", [(bundle, name) for bundle, name in CASES if name not in UNSPOKEN])
def test_where_the_command_line_speaks(bundle, name, base, tmp_path):
    (other, words), path = another_value(options_of(bundle)[name]), str(tmp_path / "x.pth.tar")
    own = load(bundle, base)
    write(path, arguments.as_dict(own))
    for mode, decides in zip(MODES, TABLE[name]):
        spoken = [*base, *words, *words_of(mode, path)]
        if (mode, decides) == ("--resume", FILE) and name != "num_classes":
            with pytest.raises(UserError) as refused:
                load(bundle, spoken)
            option = "--" + name.replace("_", "-")
            values = "{} was trained with {} {}, not {}: ".format(path, option, getattr(own, name), other)
            assert str(refused.value).startswith(values) and "\n" not in str(refused.value)
        else:
            assert getattr(load(bundle, spoken), name) == other


@pytest.mark.parametrize("bundle, name", CASES)
def test_a_resumed_training_names_what_is_not_as_before(bundle, name, base):
    args, (other, _) = load(bundle, base), another_value(options_of(bundle)[name])
    recorded = arguments.as_dict(args)
    assert lines_of_resuming(args, {"args": recorded}) == []
    lines = lines_of_resuming(args, {"args": dict(recorded, **{name: other})})
    change = "{} {} -> {}".format(name, other, getattr(args, name))
    expected = ["other options than the checkpoint's run: " + change] if TABLE[name][0] != PLACE else []
    assert lines == expected


ORDER = {"seed": 0, "repeats": 1, "images": 40, "names_crc32": 7}


@pytest.mark.parametrize("changed", [{"seed": 1}, {"repeats": 3}, {"images": 41, "names_crc32": 8}, {"names_crc32": 8}])
@pytest.mark.parametrize("samples", [0, 8, 40])
def test_another_order_of_samples(changed, samples, base):
    """Within an epoch images would be seen twice, or never: refused. Between epochs it is a line."""
    args, content = load("MnasNet", base), {"samples": samples, "order": ORDER}
    named = ", ".join("{} {} -> {}".format(name, ORDER[name], value) for name, value in changed.items())
    if samples == 8:
        with pytest.raises(UserError) as refused:
            lines_of_resuming(args, content, order=dict(ORDER, **changed))
        text = "x.pth.tar stands within an epoch whose samples came in another order ({}): ".format(named)
        assert str(refused.value).startswith(text) and "--seed" in str(refused.value)
    else:
        lines = lines_of_resuming(args, content, order=dict(ORDER, **changed))
        assert lines == ["other options than the checkpoint's run: " + named]


def test_the_same_order_and_older_files_are_resumed_within_an_epoch(base):
    args = load("MnasNet", base)
    assert lines_of_resuming(args, {"samples": 8, "order": ORDER}, order=ORDER) == []
    assert lines_of_resuming(args, {"samples": 8}, order=ORDER) == []


def trained(build, **options):
    """Return an optimizer after two steps on a fixed problem, and its parameter."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    optimizer = build([{"params": [parameter], **options}], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (parameter.sin() * 3).sum().backward()
        optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("SGD", {"momentum": 0.9, "weight_decay": 1e-4}, {"momentum": 0.5, "weight_decay": 0.1, "nesterov": True}),
        ("SGD", {"momentum": 0.0}, {"momentum": 0.9}),
        ("AdamW", {"weight_decay": 0.05}, {"weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-4}),
    ],
)
def test_an_optimizer_keeps_its_state_and_takes_the_command_lines_options(name, before, after):
    """The step after a resume is that of the old state with the new options."""
    build = getattr(torch.optim, name)
    (old, old_parameter), (new, parameter) = trained(build, **before), trained(build, **after)
    expected = copy.deepcopy(old)
    expected.param_groups[0].update(after)
    new.load_state_dict(checkpoint._with_options_of(new, old.state_dict()))
    assert {key: new.param_groups[0][key] for key in after} == after
    with torch.no_grad():
        parameter.copy_(old_parameter)
    for optimizer in (expected, new):
        weights = optimizer.param_groups[0]["params"][0]
        optimizer.zero_grad()
        (weights.cos() * 2).sum().backward()
        optimizer.step()
    assert torch.equal(parameter, expected.param_groups[0]["params"][0])
    assert not torch.equal(parameter, old_parameter)


def test_a_whole_run_with_other_options(mnasnet, base, tmp_path):
    """Trained at 64 pixels with --num-classes 3; what follows says neither, and the optimizer takes the new --wd."""
    data, out = base[3], tmp_path / "out"
    words = ["--device", "cpu", "--data", data, "--output-dir", out, "-j", "1", "-b", "2", "--warmup-epochs", "0"]
    first = ["--arch", "mnasnet0_5", "--image-size", "64", "--num-classes", "3", "--epochs", "1", "--wd", "0.01"]
    status, text = mnasnet.run([*words, *first], tmp_path / "log")
    assert status == 0, text
    path = out / "checkpoint.pth.tar"
    status, text = mnasnet.run([*words, "--resume", path, "--epochs", "2", "--wd", "0.25"], tmp_path / "log")
    assert status == 0, text
    assert "other options than the checkpoint's run: epochs 1 -> 2, weight_decay 0.01 -> 0.25\n" in text
    content = checkpoint.read(str(path))
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == content["args"]["weight_decay"] == 0.25
    assert content["args"]["image_size"] == 64 and content["classes"][2] == "(unused 2)"
    result = re.search(r"\* Acc@1 .*", text).group()
    status, text = mnasnet.run([*words, "--evaluate", "--resume", path], tmp_path / "log")
    assert status == 0 and result in text and "--image-size 64, as in {}".format(path) in text
    status, text = mnasnet.run([*words, "--resume", path, "--image-size", "32"], tmp_path / "log")
    assert status == 1 and "was trained with --image-size 64, not 32" in text
