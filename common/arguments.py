"""Options: types with ranges, the groups that all bundles share, and one line for what is wrong with a command line."""

import argparse
import math
import os
import sys

from common import data, device, distributed, errors
from common.errors import UserError

NOT_OF_THE_RUN = ("check", "dry_run", "notices")  # attributes of the parsed options that no checkpoint records
TRAINING_OPTIONS = {"amp", "opt_level", "amp_dtype", "loss_scale", "save_steps", "max_restarts", "no_save"}


class OptionType:
    """A `type` for argparse: a word is accepted if `accepts(convert(word))` is true; `name` says which words are."""

    def __init__(self, name, convert, accepts):
        self.__name__, self._convert, self._accepts = name, convert, accepts  # argparse's %(type)s is the `__name__`

    def __call__(self, word):
        try:
            value = self._convert(word)
            if self._accepts(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError("{!r} is not {}".format(word, self.__name__))


def _is_tcp_url(word):
    return word.startswith("tcp://") and "//:" not in word and 1 <= int(word.rpartition(":")[2]) <= 65535


positive_int = OptionType("an integer from 1 to 1e9", int, lambda value: 1 <= value <= 1e9)
whole_number = OptionType("an integer from 0 to 1e9", int, lambda value: 0 <= value <= 1e9)
seed = OptionType("an integer from 0 to 2^63 - 1", int, lambda value: 0 <= value < 2**63)
share = OptionType("a number from 0 to 1", float, lambda value: 0 <= value <= 1)
positive_float = OptionType("a number above 0", float, lambda value: 0 < value < math.inf)
nonnegative_float = OptionType("a number from 0 on", float, lambda value: 0 <= value < math.inf)
scale = OptionType("dynamic or a number above 0", str, lambda word: word == "dynamic" or 0 < float(word) < math.inf)
nonempty = OptionType("a text that is not empty (is a variable unset?)", str, lambda word: word.strip() != "")
tcp_url = OptionType("tcp://HOST:PORT (1 to 65535) or env://", str, lambda word: word == "env://" or _is_tcp_url(word))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the range, and the default where it says something, as `argparse.ArgumentDefaultsHelpFormatter` does."""

    def _get_help_string(self, action):
        range_of_values = "; %(type)s" if isinstance(action.type, OptionType) and action.type is not nonempty else ""
        has_default = action.nargs != 0 and action.default not in (None, argparse.SUPPRESS)
        return action.help + range_of_values + (" (default: %(default)s)" if has_default else "")


class _Parser(argparse.ArgumentParser):
    check = None

    def error(self, message):
        errors.print_error(message)
        sys.exit(2)


def build_parser(text, check=None):
    """Return an `argparse.ArgumentParser` with the help `text`, whose indented lines are examples.

    `check(args)` raises UserError where options of the bundle contradict each other.
    """
    description, _, examples = text.partition("\n\n    ")
    texts = {"description": description, "epilog": "examples:\n    " + examples}
    parser = _Parser(usage="%(prog)s --data DIR [option ...]", formatter_class=_Help, allow_abbrev=False, **texts)
    parser.check = check
    parser.add_argument("--dry-run", action="store_true", help="print the value of each option, and do nothing")
    parser.add_argument("--check", action="store_true", help="look whether all that the run needs is here, do nothing")
    return parser


def add_shared(parser, amp=False, opt_level="O1", loss_scale="dynamic"):
    """Declare the options that the bundles share; the recipe gives the defaults of the precision."""
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
    add("--amp", action="store_true", default=amp, help="mixed precision, unless --opt-level is O0")
    add("--opt-level", default=opt_level, choices=["O0", "O1", "O2"], help="O0: float32 throughout")
    add("--amp-dtype", default="auto", choices=["auto", "float16", "bfloat16"], help="auto: float16 on cards")
    add("--loss-scale", "--loss_scale", type=scale, default=loss_scale, metavar="N|dynamic", help="of float16")
    add("--memory-format", default="auto", choices=["auto", "contiguous"], help="auto: channels last, not on NPU")
    add("--torch-layers", action="store_true", help="on a CPU: torch's own layers, not the faster forms")
    add("--compile", action="store_true", help="torch.compile: minutes once, then faster steps, not on NPU")
    add("--cpu-batch-size", type=positive_int, metavar="N", help="replaces --batch-size on a CPU")
    add("--cpu-max-steps", type=whole_number, metavar="N", help="replaces --max-steps on a CPU")
    add("--fused-optimizer", action="store_true", help="the NPU's own fused optimizer (NPU only)")
    add("--jit-compile", default="off", choices=["auto", "on", "off"], help="NPU operators; auto: as the chip does")

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
    add("--pretrained", type=nonempty, metavar="FILE", help="start from these weights (.pth, .pth.tar, .safetensors)")
    add("-e", "--evaluate", action="store_true", help="measure --resume FILE on val/, train nothing")
    add("--output-dir", "--output_dir", type=nonempty, metavar="DIR", help="folder of the checkpoints")
    add("--save-steps", type=whole_number, default=0, metavar="N", help="also save every N steps; 0: do not")
    add("--on-save-error", default="stop", choices=["stop", "continue"], help="when the disk is full")
    add("--no-save", action="store_true", help="write no checkpoints")

    add = parser.add_argument_group("log").add_argument
    add("-p", "--print-freq", type=positive_int, default=10, metavar="N", help="steps between two log lines")
    add("--log-dir", type=nonempty, metavar="DIR", help="folder of the files of the log (default: none)")
    add("--log-id", type=nonempty, default="0", metavar="ID", help="names train_<id>.log in it")

    add = parser.add_argument_group("after training").add_argument
    add("--export", type=nonempty, metavar="FILE", help="write the weights as FILE.onnx or FILE.safetensors")
    add("--half", action="store_true", help="--export in float16")
    add("--predict", type=nonempty, metavar="PATH", help="what an image shows, or all images of a folder")


def parse(parser, argv):
    """Return the options of `argv` (None: of the command line), or end the process after `--dry-run` and `--check`.

    `args.device` is "npu", "cuda" or "cpu"; `args.notices` is a list of lines for the log.

    Raises:
        UserError: options contradict each other, or a device, file or folder that they name is not there.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error("{} is no option; {} --help lists all".format(unknown[0], parser.prog))
    args.notices = []
    for is_one, text in _problems(args):
        if is_one:
            raise UserError(text)
    if parser.check:
        parser.check(args)
    try:
        args.device = device.choose_type(args.device)
        device.check(args)
    except UserError:
        if not args.dry_run:  # which may be for another machine
            raise
    if args.device == "cpu":
        _fit_to_cpu(args)
    _shorten_warmup(args)
    if args.dry_run:
        print(*args.notices, *_values(parser, args), sep="\n")
    if args.dry_run or args.check:
        sys.exit(0)
    return args


def _problems(args):
    """Yield (whether it is one, text) for what contradicts each other, and without `--dry-run` for what is missing."""
    file, uses_network = args.resume if args.resume != "auto" else None, args.export or args.predict
    yield sum(map(bool, (args.evaluate, args.export, args.predict))) > 1, "--evaluate, --export, --predict: one of them"
    several_ranks = distributed.should_spawn(args) or distributed.is_distributed()
    yield several_ranks and uses_network, "--export and --predict are for one card, not for several"
    yield args.half and not args.export, "--half goes with --export"
    is_known = (args.export or ".onnx").endswith((".onnx", ".safetensors"))
    yield not is_known, "--export {}: the name must end in .onnx or .safetensors".format(args.export)
    yield args.evaluate and args.synthetic, "--evaluate needs the images of --data, not --synthetic ones"
    yield args.data and args.synthetic, "--data and --synthetic: one of them"
    yield args.pretrained and file, "--resume FILE and --pretrained: one of them"
    yield args.save_steps and args.no_save, "--save-steps and --no-save: one of them"
    if args.dry_run:
        return
    yield args.evaluate and not file, "--evaluate needs --resume FILE"
    text = "--export and --predict need --resume FILE or --pretrained FILE"
    yield uses_network and not (file or args.pretrained), text
    yield not (uses_network or args.data or args.synthetic), "--data DIR is missing (or --synthetic for random images)"
    for option, path in (("resume", file), ("pretrained", args.pretrained)):
        yield path and not os.path.isfile(path), "--{}: there is no file {}".format(option, path)
    yield args.predict and not os.path.exists(args.predict), "--predict: there is no {}".format(args.predict)
    yield os.path.isfile(args.output_dir or ""), "--output-dir {}: a file is in the way".format(args.output_dir)
    if args.data and not uses_network:
        yield not os.path.isdir(args.data), "--data: there is no folder {}".format(args.data)
        for split in ["val"] if args.evaluate else ["train", "val"] if args.eval_freq else ["train"]:
            data.find_classes(args.data, split)


def _fit_to_cpu(args):
    for option in ("batch_size", "max_steps"):
        small, recipe = getattr(args, "cpu_" + option), getattr(args, option)
        if small not in (None, recipe):
            text = "On this CPU {} is {}, in place of the recipe's {}; --{} chooses another"
            args.notices.append(text.format(option, small, recipe or "whole epochs", option.replace("_", "-")))
            setattr(args, option, small)


def _shorten_warmup(args):
    """Have warm-up and cool-down take half of the run where they are longer than all of it."""
    ramps = {option: getattr(args, option, 0) for option in ("warmup_epochs", "cooldown_epochs")}
    share_of_them = args.epochs / (2 * max(1, sum(ramps.values())))
    for option, epochs in ramps.items():
        if epochs and share_of_them < 0.5:
            setattr(args, option, epochs * share_of_them)
            text = "--{} is {:g}, in place of {}, since --epochs is {}"
            args.notices.append(text.format(option.replace("_", "-"), epochs * share_of_them, epochs, args.epochs))


def unused(parser, args, network_options):
    """Return the options that are for a training alone and that the command line gives, as a line; "" without any."""
    shared = argparse.ArgumentParser()
    add_shared(shared)
    used = {"arch", "batch_size", *network_options, *NOT_OF_THE_RUN, *vars(shared.parse_args([]))} - TRAINING_OPTIONS
    names = [name for name, value in vars(args).items() if name not in used and value != parser.get_default(name)]
    return "of no use without a training: " + ", ".join(names) if names else ""


def _values(parser, args):
    """Yield a line for each option that has a value, with its default where that is another."""
    for option, value in as_dict(args).items():
        if value is not None and value is not False:
            default = parser.get_default(option)
            note = "" if default in (value, None) else "  (default: {})".format(default)
            yield "  --{} {}{}".format(option.replace("_", "-"), value, note)


def as_dict(args):
    """Return the options as checkpoints and metrics record them: a dict of plain values."""
    return {option: value for option, value in vars(args).items() if option not in NOT_OF_THE_RUN}
