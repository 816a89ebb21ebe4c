"""Options: a wrong value is one line that names the option, whatever the bundle; what `parse` makes of right ones."""

import functools
import os

import pytest

from common import arguments, errors
from tests.helpers import BUNDLES, imported

WRONG = [  # for all bundles; where the value is None the option is a flag that does not go with --synthetic
    *(("--batch-size", value) for value in ("0", "-1", "8.5", "", "nan", "9999999999")),
    *(("--image-size", value) for value in ("0", "-1", "64.0")),
    *(("--crop-scale", value) for value in ("nan", "-0.1", "1.5", "x")),
    *(("--flip", value) for value in ("3", "-1", "nan")),
    *(("--epochs", value) for value in ("0", "-1", "", "1e3")),
    *(("--lr", value) for value in ("nan", "inf", "0", "-1", "abc")),
    *(("--weight-decay", value) for value in ("-1", "nan", "inf")),
    *(("--max-steps", value) for value in ("-1", "1.5")),
    *(("--eval-freq", value) for value in ("-1", "x")),
    *(("--workers", value) for value in ("-1", "two")),
    *(("--num-classes", value) for value in ("0", "-5")),
    *(("--max-bad-images", value) for value in ("-1", "2", "nan")),
    *(("--seed", value) for value in ("99999999999999999999999", "-1", "1.5")),
    *(("--device", value) for value in ("tpu", "")),
    *(("--opt-level", value) for value in ("O3", "")),
    ("--amp-dtype", "float8"),
    *(("--loss-scale", value) for value in ("abc", "0", "-1", "nan", "inf", "")),
    ("--memory-format", "nhwc"),
    ("--jit-compile", "yes"),
    *(("--cpu-batch-size", value) for value in ("0", "x")),
    ("--cpu-max-steps", "-1"),
    *(("--device-num", value) for value in ("0", "-1")),
    *(("--device-list", value) for value in ("", "a,b", "0,0", "-1", "0,", "1.5")),
    ("--world-size", "0"),
    *(("--rank", value) for value in ("-1", "1")),
    ("--addr", ""),
    *(("--dist-url", value) for value in ("tcp://h:65536", "tcp://h:0", "tcp://h", "tcp://:80", "http://h:80", "")),
    ("--dist-backend", "mpi"),
    ("--max-restarts", "-1"),
    *(("--resume", value) for value in ("", " ", "no/such/file")),
    *(("--pretrained", value) for value in ("", "no/such/file")),
    ("--output-dir", ""),
    ("--data", ""),
    ("--log-dir", ""),
    ("--save-steps", "-1"),
    *(("--print-freq", value) for value in ("0", "-1")),
    ("--on-save-error", "ignore"),
    *(("--export", value) for value in ("", "network.pt")),
    ("--predict", ""),
    *((flag, None) for flag in ("--evaluate", "--half", "--stock-layers", "--tensorboard", "--sheet")),
]
WRONG_OF_BUNDLE = {
    "MnasNet": [
        *(("--arch", "mnasnet2_0"), ("--warmup-epochs", "-1"), ("--momentum", "2"), ("--label-smoothing", "2")),
        *(("--dropout", "1.1"), ("--bn-momentum", "-0.1"), ("--val-resize", "222")),
    ],
    "SPNASNet_100": [
        *(("--momentum", "2"), ("--label-smoothing", "2"), ("--color-jitter", "-1"), ("--reprob", "2")),
        *(("--warmup-epochs", "x"), ("--arch", "")),
    ],
    "SPACH-SMLP": [
        *(("--image-size", "33"), ("--aa", "nonsense"), ("--aa", ""), ("--repeats", "0"), ("--mixup", "nan")),
        *(("--mixup", "-1"), ("--cutmix", "-1"), ("--ema-decay", "2"), ("--drop-path", "1"), ("--reprob", "-1")),
        ("--image-size", "100"),
        *(("--label-smoothing", "2"), ("--warmup-epochs", "-1"), ("--cooldown-epochs", "-1"), ("--world_size", "0")),
    ],
    "PnasNet5Large": [
        *(("--image-size", "64"), ("--aux-weight", "-1"), ("--drop-path", "1"), ("--dropout", "2")),
        *(("--lr-decay", "0"), ("--lr-decay", "nan"), ("--momentum", "2")),
    ],
    "ShuffleNetV2": [
        *(("--channel-shuffle", "wick"), ("--color-jitter", "-1"), ("--warm_up_epochs", "-1"), ("--momentum", "2")),
        *(("--benchmark", "2"), ("--benchmark", ""), ("--val-resize", "222")),
    ],
}
CASES = [
    pytest.param(bundle, option, value, id="{} {} {!r}".format(bundle, option, value))
    for bundle in BUNDLES
    for option, value in WRONG + WRONG_OF_BUNDLE[bundle]
]


@pytest.fixture(scope="module")
def parsers():
    """The parser of each bundle: importing main.py takes longer than all that is tested with it."""
    made = {}
    for bundle in BUNDLES:
        with imported(bundle, "main") as main:
            made[bundle] = main.build_parser()
    return made


def parse(parser, *words):
    return arguments.parse(parser, ["--device=cpu", "--synthetic", *words])


def refusal(capsys, parser, *words):
    """Return the line with which `words` are refused, as a user sees it."""
    with pytest.raises(SystemExit) as end:
        raise SystemExit(errors.run(lambda: arguments.parse(parser, list(words))))
    printed = capsys.readouterr()
    assert end.value.code in (1, 2) and printed.out == ""
    assert printed.err.startswith("[Error] ") and printed.err.count("\n") == 1
    assert "traceback" not in printed.err.lower()
    return printed.err


@pytest.mark.parametrize("bundle, option, value", CASES)
def test_a_wrong_value_is_one_line_that_names_the_option(bundle, option, value, parsers, capsys):
    words = ["--device=cpu", "--synthetic", *([option] if value is None else [option, value])]
    line = refusal(capsys, parsers[bundle], *words)
    assert option in line
    assert not value or value in line


def test_there_are_enough_of_them():
    assert len(CASES) >= 200


def test_a_restarted_rank_needs_no_pretrained_file(parsers, monkeypatch, capsys):
    """Its run has written checkpoints since, perhaps in the place of that file."""
    assert "--pretrained: there is no file gone" in refusal(
        capsys, parsers["MnasNet"], "--device=cpu", "--synthetic", "--pretrained", "gone"
    )
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse(parsers["MnasNet"], "--pretrained", "gone").pretrained == "gone"


def test_an_unknown_option_and_a_stray_word_are_named(parsers, capsys):
    assert "unrecognized arguments: --batchsize 8" in refusal(capsys, parsers["MnasNet"], "--batchsize", "8")
    assert "unrecognized arguments: wrod" in refusal(capsys, parsers["MnasNet"], "wrod")


def test_the_range_of_every_number_stands_in_the_help(parsers):
    for parser in parsers.values():
        text = " ".join(parser.format_help().split())
        for words in (
            *("per card; an integer from 1 to 1e9", "an integer from 0 to 2^63 - 1 (default: 0)"),
            *("probability of a horizontal flip; a number from 0 to 1 (default: 0.5)", "a number above 0"),
            *("of float16; dynamic or a number above 0", "tcp://HOST:PORT (1 to 65535) or env://"),
        ):
            assert words in text
        assert "None" not in text and "False" not in text


@pytest.mark.parametrize(
    "words, line",
    [
        ("--evaluate --export x.onnx --resume auto", "--evaluate, --export, --predict: one of them"),
        ("--export x.onnx --predict photos", "--evaluate, --export, --predict: one of them"),
        ("--half", "--half goes with --export"),
        ("--evaluate --synthetic", "--evaluate needs the images of --data"),
        ("--evaluate --data x", "--evaluate needs --resume FILE"),
        ("--evaluate --data x --resume auto", "--evaluate needs --resume FILE"),
        ("--evaluate --data x --pretrained {file}", "--evaluate needs --resume FILE"),
        ("--export x.onnx", "--export and --predict need --resume FILE or --pretrained FILE"),
        ("--predict {file}", "--export and --predict need --resume FILE or --pretrained FILE"),
        ("--predict photos --resume {file}", "--predict: there is no photos"),
        ("--export x.onnx --resume {file} --device-list 0,1", "for one card"),
        ("--export x.onnx --resume {file} --multiprocessing-distributed", "for one card"),
        ("--synthetic --resume {file} --pretrained {file}", "--resume FILE and --pretrained: one of them"),
        ("--synthetic --save-steps 5 --no-save", "--save-steps and --no-save: one of them"),
        ("--data x --synthetic", "--data and --synthetic: one of them"),
        ("", "--data DIR is missing"),
        ("--data no/such/folder", "--data: there is no folder no/such/folder"),
        ("--synthetic --device-num 3 --device-list 0,1", "is not a list of 3 different card numbers"),
        ("--synthetic --rank 2 --world-size 2 --addr h", "--rank 2 is not a node"),
        ("--synthetic --world-size 2", "--addr HOST"),
    ],
)
def test_options_that_need_or_exclude_each_other(words, line, parsers, capsys, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    filled = words.format(file=tmp_path / "file").split()
    assert line in refusal(capsys, parsers["MnasNet"], "--device=cpu", *filled)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to a file", "folder"])
def test_the_file_of_per_class_is_an_ordinary_one(kind, parsers, capsys, tmp_path):
    """It is replaced: for root /dev/null and /dev/stdout would become files, for every program of the machine."""
    path = str(tmp_path / "file.csv")
    (tmp_path / "log").touch()
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "link to a device": functools.partial(os.symlink, os.devnull)}
    make.get(kind, functools.partial(os.symlink, str(tmp_path / "log")))(path)
    line = refusal(capsys, parsers["MnasNet"], "--device=cpu", "--data", str(tmp_path), "--per-class", path)
    assert "--per-class {}: not a file in a folder that is there".format(path) in line


def test_right_values_at_the_ends_of_the_ranges(parsers):
    words = "--seed 9223372036854775807 --flip 0 --max-bad-images 1 --workers 0 --loss-scale 0.5 --crop-scale 1"
    args = parse(parsers["MnasNet"], *words.split(), "--dist-url", "tcp://[::1]:65535")
    assert args.seed == 2**63 - 1 and args.flip == 0.0 and args.max_bad_images == 1.0 and args.workers == 0
    assert (args.loss_scale, args.dist_url) == ("0.5", "tcp://[::1]:65535")


def test_on_a_cpu_the_sizes_for_a_cpu_count_and_the_log_says_so(parsers):
    args = parse(parsers["MnasNet"], "--cpu-batch-size", "16", "--cpu-max-steps", "30", "--epochs", "300")
    assert (args.batch_size, args.max_steps, args.device) == (16, 30, "cpu")
    assert args.notices == [
        "--batch-size is 16, in place of 256, on this CPU",
        "--max-steps is 30, in place of 0, on this CPU",
    ]
    assert parse(parsers["MnasNet"], "-b", "4", "--cpu-batch-size", "4").notices == []


def test_a_warm_up_as_long_as_the_run_is_shortened_in_all_bundles(parsers):
    for bundle in BUNDLES:
        if bundle == "PnasNet5Large":  # no warm-up
            continue
        args = parse(parsers[bundle], "--epochs", "4", "--warmup-epochs", "20")
        assert args.warmup_epochs == 2.0
        assert args.notices == ["--warmup-epochs is 2, in place of 20, since --epochs is 4"]
        args = parse(parsers[bundle], "--epochs", "5", "--warmup-epochs", "5")
        assert args.warmup_epochs == 2.5  # the rate would end at its highest
        assert parse(parsers[bundle], "--epochs", "21", "--warmup-epochs", "20").warmup_epochs == 20
    args = parse(parsers["SPACH-SMLP"], "--epochs", "4", "--warmup-epochs", "20", "--cooldown-epochs", "10")
    assert args.warmup_epochs == pytest.approx(4 / 3) and args.cooldown_epochs == pytest.approx(2 / 3)
    assert len(args.notices) == 2


def test_dry_run_needs_neither_device_nor_checkpoint_nor_data(parsers, capsys):
    for words in ("--device npu --resume no/such/file", "--data no/such/folder --evaluate --device npu", ""):
        with pytest.raises(SystemExit) as end:
            arguments.parse(parsers["MnasNet"], ["--dry-run", "--lr", "0.5", *words.split()])
        assert end.value.code == 0
        assert "  --lr 0.5  (default: 0.1)\n" in capsys.readouterr().out


def test_check_says_nothing_where_all_is_there_and_refuses_what_a_run_would(parsers, capsys):
    with pytest.raises(SystemExit) as end:
        parse(parsers["MnasNet"], "--check")
    printed = capsys.readouterr()
    assert (end.value.code, printed.out, printed.err) == (0, "", "")
    assert "--jit-compile" in refusal(capsys, parsers["MnasNet"], "--device=cpu", "--synthetic", "--jit-compile=on")
    assert "--device npu" in refusal(capsys, parsers["MnasNet"], "--check", "--synthetic", "--device", "npu")


def test_what_a_checkpoint_records_of_the_options(parsers):
    recorded = arguments.as_dict(parse(parsers["MnasNet"], "--lr", "0.5"))
    assert (recorded["lr"], recorded["device"]) == (0.5, "cpu")
    assert not {"notices", "dry_run", "check"} & set(recorded)


@pytest.mark.parametrize(
    "bundle, words, ours",
    [  # the command lines of ModelZoo's scripts, without the paths
        (
            "PnasNet5Large",
            "--start-epoch 0 --epochs 1 --wd 4e-5 --gamma 0.96 --world_size 1 --train-batch 4 --test-batch 4 "
            "--opt-level O2 --max_step 7 --warmup 0 --loss_scale 32 --local_rank 0 -c out",
            {
                "lr_decay": 0.96,
                "batch_size": 4,
                "max_steps": 7,
                "device_num": 1,
                "loss_scale": "32",
                "output_dir": "out",
            },
        ),
        (
            "MnasNet",
            "--device-list 0 --dist-url env:// --dist-backend hccl --world-size 1 --rank 0 --lr 0.7 "
            "--weight-decay 1e-5 --batch-size 8 --epochs 6 --warmup=5 --ls 0.2 --local_rank 0 --print-freq 10",
            {"warmup_epochs": 5, "label_smoothing": 0.2, "lr": 0.7},
        ),
        ("PnasNet5Large", "--wd-all --use_aux --npu 3", {"aux_weight": 0.4, "device_list": "3"}),
        ("SPNASNet_100", "--model spnasnet_100 --sched cosine --remode pixel", {"schedule": "cosine"}),
        ("SPACH-SMLP", "--num_workers 3 --pin-mem --dist-eval", {"workers": 3}),
        ("ShuffleNetV2", "--start-epoch 0 --checkpoint-freq 0 --train-batch=16 --warmup 1", {"batch_size": 16}),
    ],
)
def test_the_flags_of_modelzoos_programs_mean_ours(bundle, words, ours, parsers):
    args = vars(parse(parsers[bundle], *words.split()))
    assert {name: args[name] for name in ours} == ours
    assert not {"start_epoch", "local_rank", "max_step", "train_batch", "warmup", "gamma", "ls"} & set(args)
    assert "test_batch" not in arguments.as_dict(parse(parsers[bundle], *words.split()))


@pytest.mark.parametrize(
    "words, line",
    [
        ("--start-epoch 3", "--start-epoch: --resume FILE"),
        ("--local_rank 1", "start main.py once, with --device-list"),
        ("--local-rank=1", "start main.py once, with --device-list"),
        ("--test-batch 3", "--test-batch: val/ is measured in batches of --batch-size, which is 32"),
        ("--warmup 5", "--warmup-epochs: this recipe has no warm-up"),
        ("--ls 0.1", "--label-smoothing: this recipe smooths no labels"),
        ("--checkpoint-freq 5", "--checkpoint-freq: every epoch is saved; --save-steps N"),
        ("--run-prof", "--run-prof: --profile N"),
        ("-log x", "-log: --log-dir DIR"),
        ("--train-batch 0", "--batch-size: '0' is not"),
        ("--gamma x", "--lr-decay: 'x' is not"),
        ("--num_workers -1", "--workers: '-1' is not"),
        ("--checkpoint-freq 1", "--checkpoint-freq: every epoch is saved"),
        ("--checkpoint x", "--checkpoint: --resume FILE"),
        ("--wd-all x", "--wd-all: all parameters decay"),
        ("--pin-mem x", "--pin-mem: it is done anyway"),
        ("--remode pixel", "unrecognized arguments: --remode"),
        ("/data/imagenet", "unrecognized arguments: /data/imagenet (the data set: --data DIR;"),
    ],
)
def test_a_flag_of_modelzoos_programs_without_a_meaning_names_ours(words, line, parsers, capsys):
    assert line in refusal(capsys, parsers["PnasNet5Large"], "--device=cpu", "--synthetic", *words.split())


def test_a_launcher_of_old_torch_may_pass_the_rank_that_it_has_set(monkeypatch):
    monkeypatch.setitem(arguments.MODELZOO, "--local_rank", ("3", ""))  # read from LOCAL_RANK at the import
    with imported("MnasNet", "main") as main:
        parser = main.build_parser()
    for flag in ("--local_rank=3", "--local-rank=3"):
        assert parse(parser, flag).device == "cpu"


def test_the_help_shows_none_of_them(parsers):
    for parser in parsers.values():
        for flag in ("--train-batch", "--max_step ", "--start-epoch", "--local_rank", "--run-prof", "--gamma"):
            assert flag not in parser.format_help()
