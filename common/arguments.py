"""The parser that a bundle adds its options to: `--help` shows groups, defaults, examples; `--dry-run` all values."""

import argparse
import sys

from common import device


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the text, writes "-b, --batch-size N", and adds the default unless the help names it."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "__name__", "text").upper()

    def _format_action_invocation(self, action):
        names = ", ".join(action.option_strings)
        if action.nargs == 0:
            return names
        return names + " " + self._format_args(action, self._get_default_metavar_for_optional(action))

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 or "default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"


def parser(text):
    """Return an `argparse.ArgumentParser` without options.

    Args:
        text: the docstring of the bundle's main.py; its indented lines, the examples, end the help.
    """
    description, _, examples = text.partition("\n\n    ")
    made = argparse.ArgumentParser(
        usage="%(prog)s --data DIR [option ...]",
        description=description,
        epilog="examples:\n    " + examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--dry-run", action="store_true", help="print the value of each option here, and do nothing")
    return made


def parse(parser, argv):
    """Return the options of `argv` (None: of the command line); with `--dry-run` print them and end the process.

    Raises:
        UserError: the device that `--device` names is not there.
    """
    args = parser.parse_args(argv)
    if args.dry_run:
        print("\n".join(_values(parser, args)))
        sys.exit(0)
    return args


def _values(parser, args):
    """Return a line for each option that has a value on this machine, with its default where that is another."""
    args.device = device.choose_type(args.device)
    lines = device.fit_to_cpu(args) if args.device == "cpu" else []
    shown = {"dry_run"}
    for group in parser._action_groups:
        values = []
        for action in group._group_actions:
            value = getattr(args, action.dest, None)
            if value is None or value is False or action.dest in shown:
                continue
            shown.add(action.dest)
            default = action.default
            note = "" if default in (value, None) or default is False else "  (default: {})".format(default)
            values.append("  {} {}{}".format(max(action.option_strings, key=len), value, note))
        if values:
            lines += [group.title + ":", *values]
    return lines
