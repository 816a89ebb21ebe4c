"""Options: types with ranges, the groups that all bundles share, and one line for what is wrong with a command line."""

import argparse
import contextlib
import math
import os
import re
import sys
from urllib.parse import urlsplit

from common import data, device, distributed, errors, weights
from common.errors import UserError

NOT_OF_THE_RUN = ("check", "dry_run", "notices", "test_batch")  # attributes of the options that no checkpoint records

MODELZOO = {  # flags of its own programs: ours; or the only value that is accepted, and the answer to any other
    "--train-batch": "--batch-size",
    "--max_step": "--max-steps",
    "--warmup": "--warmup-epochs",
    "--gamma": "--lr-decay",
    "--ls": "--label-smoothing",
    "--world_size": "--device-num",
    "-c": "--output-dir",
    "--num_workers": "--workers",
    "--model": "--arch",
    "--sched": "--schedule",
    "--npu": "--device-list",
    "--eval": "--evaluate",
    "--start-epoch": ("0", "--resume FILE goes on from the epoch of its file"),
    "--local_rank": (os.environ.get("LOCAL_RANK", "0"), "start main.py once, with --device-list for its cards"),
    "--warmup-epochs": ("0", "this recipe has no warm-up"),
    "--label-smoothing": ("0", "this recipe smooths no labels"),
    "--checkpoint-freq": ("0", "every epoch is saved; --save-steps N saves between them"),
    "--run-prof": ("", "--profile N records N steps"),
    "-log": ("", "--log-dir DIR says where train_<id>.log goes, --log-id its id"),
    "--checkpoint": ("", "--resume FILE is the checkpoint to measure, --output-dir DIR the folder of those of a run"),
    **dict.fromkeys(("--pin-mem", "--dist-eval"), (None, "it is done anyway, and has no value")),
}


class OptionType:
    """A `type` for argparse: a word is accepted if `accepts(convert(word))` is true; `name` says which words are."""

    def __init__(self, name, convert, accepts):
        self.__name__, self._convert, self._accepts = name, convert, accepts  # argparse's %(type)s is the `__name__`

    def __call__(self, word):
        with contextlib.suppress(ValueError):
            value = self._convert(word)
            if self._accepts(value):
                return value
        raise argparse.ArgumentTypeError("{!r} is not {}".format(word, self.__name__))


positive_int = OptionType("an integer from 1 to 1e9", int, lambda value: 1 <= value <= 1e9)
whole_number = OptionType("an integer from 0 to 1e9", int, lambda value: 0 <= value <= 1e9)
seed = OptionType("an integer from 0 to 2^63 - 1", int, lambda value: 0 <= value < 2**63)
share = OptionType("a number from 0 to 1", float, lambda value: 0 <= value <= 1)
rate = OptionType("a number from 0 to below 1", float, lambda value: 0 <= value < 1)
positive_float = OptionType("a number above 0", float, lambda value: 0 < value < math.inf)
nonnegative_float = OptionType("a number from 0 on", float, lambda value: 0 <= value < math.inf)
scale = OptionType("dynamic or a number above 0", str, lambda word: word == "dynamic" or 0 < float(word) < math.inf)
nonempty = OptionType("a text that is not empty (is a variable unset?)", str, lambda word: word.strip() != "")
tcp_url = OptionType(
    "tcp://HOST:PORT (1 to 65535) or env://",
    str,
    lambda word: word == "env://" or (word.startswith("tcp://") and urlsplit(word).hostname and urlsplit(word).port),
)
network_file = OptionType("FILE.onnx or FILE.safetensors", str, lambda word: word.endswith((".onnx", ".safetensors")))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the range of a number, and the default of what has one."""

    def _get_help_string(self, action):
        range_of_values = "; %(type)s" if action.type not in (None, nonempty, network_file) else ""
        has_default = action.nargs != 0 and action.default not in (None, argparse.SUPPRESS)
        return action.help + range_of_values + (" (default: %(default)s)" if has_default else "")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        hint = "the data set: --data DIR; " if re.search("^unrecognized arguments: [^-]", message) else ""
        errors.print_error("{} ({}{} --help lists all options)".format(message, hint, self.prog))
        sys.exit(2)


def build_parser(text, check=lambda args: None):
    """Return a parser with the help `text`; `check(args)` raises UserError where the bundle's options do not fit."""
    description, _, examples = text.partition("\n\n    ")
    texts = {"description": description, "epilog": "examples:\n    " + examples}
    parser = _Parser(usage="%(prog)s --data DIR [option ...]", formatter_class=_Help, allow_abbrev=False, **texts)
    parser.check = check
    parser.add_argument("--dry-run", action="store_true", help="print the value of each option, and do nothing")
    parser.add_argument("--check", action="store_true", help="look whether all that the run needs is here, do nothing")
    return parser


def add_shared(parser, opt_level="O1", loss_scale="dynamic", originals=()):
    """Declare the options that the bundles share; the recipe gives the defaults of the precision.

    `originals` has more entries as in `MODELZOO`, of the program that the bundle replaces.
    """
    add = parser.add_argument_group("data").add_argument
    add("--data", "--data-path", "--data_path", type=nonempty, metavar="DIR", help="folder with train/ and val/")
    add("--synthetic", action="store_true", help="random images held in memory instead of --data")
    add("-j", "--workers", type=whole_number, metavar="N", help="decoding processes per rank (default: cores)")
    add("--num-classes", type=positive_int, metavar="N", help="default: the folders of train/; 1000 without")
    add("--max-bad-images", type=share, default=0.001, metavar="SHARE", help="of the set, see README")
    add("--classes-by-position", action="store_true", help="--evaluate: class i of the file is class i of val/")

    add = parser.add_argument_group("device and precision").add_argument
    devices = ["auto", "npu", "gpu", "cuda", "cpu"]
    add("--device", default="auto", choices=devices, help="auto: an NPU, else CUDA, else the CPU")
    add("--seed", type=seed, default=0, metavar="N", help="one seed gives one run: order, crops, weights")
    add("--amp", action="store_true", help="mixed precision, unless --opt-level is O0")
    add("--opt-level", default=opt_level, choices=["O0", "O1", "O2"], help="O0: float32 throughout")
    add("--amp-dtype", default="auto", choices=["auto", "float16", "bfloat16"], help="auto: float16 on cards")
    add("--loss-scale", "--loss_scale", type=scale, default=loss_scale, metavar="N|dynamic", help="of float16")
    add("--memory-format", default="auto", choices=["auto", "contiguous"], help="auto: channels last, not on NPU")
    add("--torch-layers", action="store_true", help="on CPU and CUDA: torch's own layers, not the faster forms")
    modes = {"nargs": "?", "const": "default", "choices": ["default", "reduce-overhead", "max-autotune"]}
    add("--compile", **modes, help="torch.compile: a minute or more once, then faster steps (%(choices)s)")
    add("--cpu-batch-size", type=positive_int, metavar="N", help="replaces --batch-size on a CPU")
    add("--cpu-max-steps", type=whole_number, metavar="N", help="replaces --max-steps on a CPU")
    switch = {"default": "auto", "choices": ["auto", "on", "off"]}
    add("--fused-optimizer", nargs="?", const="on", **switch, help="auto: where it is faster with the same results")
    add("--jit-compile", **switch, help="NPU: compile operators; auto: as the chip does")
    add("--internal-format", **switch, help="NPU: private memory layouts; auto: as the chip does")
    add("--accumulate", type=positive_int, default=1, metavar="N", help="batches for each step of the optimizer")
    add("--clip-grad", type=positive_float, metavar="X", help="greatest norm of the gradient (default: any)")

    add = parser.add_argument_group("ranks").add_argument
    add("--multiprocessing-distributed", action="store_true", help="start one process per card (so do several cards)")
    add("--device-list", type=nonempty, metavar="IDS", help="cards of this node, e.g. '0,1,2,3' (CPU: one rank each)")
    add("--device-num", "--device_num", type=positive_int, metavar="N", help="number of cards of this node")
    add("--world-size", type=positive_int, default=1, metavar="NODES", help="number of nodes")
    add("--rank", type=whole_number, default=0, metavar="NODE", help="number of this node")
    add("--addr", type=nonempty, metavar="HOST", help="address of node 0 (default: 127.0.0.1 on one node)")
    add("--dist-url", type=tcp_url, metavar="URL", help="meeting point (replaces --addr)")
    add("--dist-backend", choices=["hccl", "nccl", "gloo"], help="default: what the device needs")
    add("--max-restarts", type=whole_number, default=0, metavar="N", help="restart all ranks after a failure")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", type=nonempty, metavar="FILE|auto", help="go on from it (auto: the newest of --output-dir)")
    add("--pretrained", type=nonempty, metavar="FILE", help="start from these weights, or those at https://...")
    add("--train-only", choices=["classifier", "classifier,norm"], help="leave the other parameters as they are")
    add("-e", "--evaluate", action="store_true", help="measure --resume FILE on val/, train nothing")
    add("--output-dir", "--output_dir", type=nonempty, metavar="DIR", help="folder of the checkpoints")
    add("--save-steps", type=whole_number, default=0, metavar="N", help="also save every N steps; 0: do not")
    add("--on-save-error", default="stop", choices=["stop", "continue"], help="when the disk is full")
    add("--no-save", action="store_true", help="write no checkpoints")

    add = parser.add_argument_group("log").add_argument
    add("-p", "--print-freq", type=positive_int, default=10, metavar="N", help="steps between two log lines")
    add("--log-dir", type=nonempty, metavar="DIR", help="folder of the files of the log (default: none)")
    add("--log-id", type=nonempty, default="0", metavar="ID", help="names train_<id>.log in it")
    add("--profile", type=whole_number, default=0, metavar="N", help="record N steps for a profile in --log-dir")
    add("--per-class", type=nonempty, metavar="FILE", help="write the Acc@1 of each class as CSV (last evaluation)")

    add = parser.add_argument_group("after training").add_argument
    add("--export", type=network_file, metavar="FILE", help="write the weights as FILE.onnx or FILE.safetensors")
    add("--half", action="store_true", help="--export in float16")
    add("--predict", type=nonempty, metavar="PATH", help="what an image shows, or all images of a folder")

    parser.add_argument("--test-batch", type=positive_int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for flag, ours in {**MODELZOO, **dict(originals)}.items():
        with contextlib.suppress(argparse.ArgumentError):  # of a recipe that has the option itself
            names = sorted({flag, flag.replace("local_", "local-")})  # torch's launchers write both
            hidden = {"dest": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(*names, nargs="?", action=_ModelZoo, ours=ours, **hidden)


class _ModelZoo(argparse.Action):
    def __init__(self, ours, **options):
        super().__init__(**options)
        self._ours = ours

    def __call__(self, parser, namespace, word, option_string=None):
        if isinstance(self._ours, str):
            parser.parse_args([self._ours] if word is None else [self._ours, word], namespace)
        elif word != self._ours[0]:
            raise argparse.ArgumentError(self, self._ours[1])


def parse(parser, argv):
    """Return the options of `argv` (None: of the command line), or end the process after `--dry-run` and `--check`.

    `args.device` is "npu", "cuda" or "cpu"; `args.notices` is a list of lines for the log. Raises UserError where
    options contradict each other, or a device, file or folder that they name is not there.
    """
    args = parser.parse_args(argv)
    args.notices = []
    for is_one, text in _problems(args):
        if is_one:
            raise UserError(text)
    parser.check(args)
    with contextlib.suppress(UserError if args.dry_run else ()):  # a dry run may be for another machine
        args.device = device.choose_type(args.device, args.notices)
        device.check(args)
    _fit(args)
    for option in ("resume", "pretrained"):
        if "://" in (getattr(args, option) or "") and not args.dry_run:
            setattr(args, option, weights.download(getattr(args, option)))
    if args.dry_run:
        for notice in args.notices:
            print(notice)
        for option, value in as_dict(args).items():
            default = parser.get_default(option)
            note = "" if default in (value, None) else "  (default: {})".format(default)
            if value is not None and value is not False:
                print("  --{} {}{}".format(option.replace("_", "-"), value, note))
    if args.dry_run or args.check:
        sys.exit(0)
    return args


def _problems(args):
    """Yield (whether it is one, text) for what contradicts each other, and without `--dry-run` for what is missing."""
    file, network_alone = args.resume if args.resume != "auto" else None, args.export or args.predict
    yield sum(map(bool, (args.evaluate, args.export, args.predict))) > 1, "--evaluate, --export, --predict: one of them"
    several_ranks = distributed.should_spawn(args) or distributed.is_distributed()
    yield several_ranks and network_alone, "--export and --predict are for one card, not for several"
    yield args.half and not args.export, "--half goes with --export"
    yield args.evaluate and args.synthetic, "--evaluate needs the images of --data, not --synthetic ones"
    yield args.data and args.synthetic, "--data and --synthetic: one of them"
    yield args.pretrained and file, "--resume FILE and --pretrained: one of them"
    measures = args.evaluate or (args.eval_freq and not (args.synthetic or network_alone))
    yield args.per_class and not measures, "--per-class needs an evaluation of --data"
    yield args.train_only and not (file or args.pretrained), "--train-only needs --pretrained FILE, or --resume FILE"
    yield getattr(args, "class_weights", None) and args.synthetic, "--class-weights needs the images of --data"
    yield args.save_steps and args.no_save, "--save-steps and --no-save: one of them"
    text = "--test-batch: val/ is measured in batches of --batch-size, which is {}".format(args.batch_size)
    yield getattr(args, "test_batch", args.batch_size) != args.batch_size, text
    if args.dry_run:
        return
    has_weights = file or args.pretrained
    yield args.evaluate and not file, "--evaluate needs --resume FILE"
    yield network_alone and not has_weights, "--export and --predict need --resume FILE or --pretrained FILE"
    yield not (network_alone or args.data or args.synthetic), "--data DIR is missing (or --synthetic for random images)"
    for option, path in (("resume", file), ("pretrained", args.pretrained)):
        is_needed = option == "resume" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # a restart resumes
        is_missing = path and "://" not in path and not os.path.isfile(path)
        yield is_needed and is_missing, "--{}: there is no file {}".format(option, path)
    yield args.predict and not os.path.exists(args.predict), "--predict: there is no {}".format(args.predict)
    table = os.path.abspath(args.per_class or "")
    is_file = os.path.isfile(table) and not os.path.islink(table)  # root would replace /dev/stdout, or a device
    no_file = args.per_class and (os.path.lexists(table) != is_file or not os.path.isdir(os.path.dirname(table)))
    yield no_file, "--per-class {}: not a file in a folder that is there".format(args.per_class)
    yield os.path.isfile(args.output_dir or ""), "--output-dir {}: a file is in the way".format(args.output_dir)
    if args.data and not network_alone:
        yield not os.path.isdir(args.data), "--data: there is no folder {}".format(args.data)
        needed = {"train": not args.evaluate, "val": args.evaluate or args.eval_freq}
        for split in filter(needed.get, needed):
            data.find_classes(args.data, split)


def _fit(args):
    """Fit sizes to a CPU, and warm-up and cool-down to a run that is no longer: they take half of it; say so."""
    fitting = {}
    if args.device == "cpu":
        fitting = {"batch_size": (args.cpu_batch_size, "on this CPU"), "max_steps": (args.cpu_max_steps, "on this CPU")}
    ramps = {option: getattr(args, option, 0) for option in ("warmup_epochs", "cooldown_epochs")}
    if sum(ramps.values()) >= args.epochs:  # else the rate would never fall
        share_of_ramps = args.epochs / (2 * sum(ramps.values()))
        for option, epochs in ramps.items():
            fitting[option] = epochs * share_of_ramps, "since --epochs is {}".format(args.epochs)
    for option, (value, reason) in fitting.items():
        if value not in (None, getattr(args, option, 0)):
            text = "--{} is {:g}, in place of {:g}, {}"
            args.notices.append(text.format(option.replace("_", "-"), value, getattr(args, option), reason))
            setattr(args, option, value)


def as_dict(args):
    """Return the options as checkpoints and metrics record them: a dict of plain values."""
    return {option: value for option, value in vars(args).items() if option not in NOT_OF_THE_RUN}
