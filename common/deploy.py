"""After training: the options of `--export` and `--predict`, and what a checkpoint says about its own network."""

import os

from common import files
from common.errors import UserError
from common.folder import class_names as names_of_folders
from common.launcher import needs_launch
from common.ranks import are_started
from common.safe_load import read

EXPORTS = (".onnx", ".safetensors")


def add_arguments(parser):
    """Declare the options of using a trained network."""
    group = parser.add_argument_group("after training")
    group.add_argument(
        "--export", metavar="FILE", help="the weights of --resume or --pretrained as FILE.onnx or .safetensors"
    )
    group.add_argument("--half", action="store_true", help="--export in float16")
    group.add_argument("--predict", metavar="PATH", help="what an image shows, or all images of a folder")
    group.add_argument("--sheet", nargs="?", const="predictions.png", metavar="PNG", help="--predict also draws it")


def is_asked_for(args):
    """Return whether the run uses a trained network, in place of training or measuring one."""
    return args.export is not None or args.predict is not None or args.half or args.sheet is not None


def read_weights(parser, argv, architectures, *network_options):
    """Return (args, content): the options, and what the file of `--resume` or `--pretrained` holds.

    Where the command line is silent, `--arch` and the `network_options` (names of attributes) are those of the run that
    wrote the file.

    Raises:
        UserError: an option is missing or contradicts another, or the file is damaged or of another bundle.
    """
    args = parser.parse_args(argv)
    _check(args)
    path = args.resume or args.pretrained
    content = read(path)
    if isinstance(content.get("arch"), str) and isinstance(content.get("args"), dict):  # a bundle wrote it
        if content["arch"] not in architectures:
            raise UserError("{} is of {}, which this bundle does not have".format(path, content["arch"]))
        known = {name: content["args"][name] for name in network_options if name in content["args"]}
        parser.set_defaults(arch=content["arch"], **known)
        args = parser.parse_args(argv)
    args.resume = path  # not `--pretrained`, which starts a head of other classes afresh
    return args, content


def _check(args):
    if (args.export is not None) + (args.predict is not None) + args.evaluate > 1:
        raise UserError("--evaluate, --export and --predict: one at a time")
    for option, needed in (("half", "export"), ("sheet", "predict")):
        if getattr(args, option) and getattr(args, needed) is None:
            raise UserError("--{} goes with --{}".format(option, needed))
    wanted = "predict" if args.export is None else "export"
    if are_started() or needs_launch(args):
        raise UserError("--{} takes one card: leave out torchrun and --multiprocessing-distributed".format(wanted))
    if not (args.resume or args.pretrained) or args.resume == "auto":
        raise UserError("--{} needs --resume FILE or --pretrained FILE".format(wanted))
    if args.export is not None and not args.export.endswith(EXPORTS):
        raise UserError("--export {}: the name must end in {}".format(args.export, " or ".join(EXPORTS)))
    if args.sheet is not None and not args.sheet.endswith(".png"):
        raise UserError("--sheet {}: the name must end in .png".format(args.sheet))


def class_names(args, content):
    """Return the names of the classes: those in the checkpoint, else the folders of `--data`, else numbers.

    Without either there are `--num-classes`, by default 1000.
    """
    if isinstance(content.get("classes"), list):
        return content["classes"]
    if args.data:
        return names_of_folders(args.data, "train")
    return [str(number) for number in range(args.num_classes or 1000)]


def save(path, data):
    """Write the bytes `data` to the file `path`, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        temporary = files.write_beside(path, data)
        try:
            os.replace(temporary, path)
        finally:
            files.remove(temporary)
    except OSError as error:
        raise UserError("{} cannot be written: {}".format(path, error.strerror)) from None
