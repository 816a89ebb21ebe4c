"""The parser that a bundle adds its options to: its help shows groups, defaults and examples."""

import argparse


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
    return argparse.ArgumentParser(
        usage="%(prog)s --data DIR [option ...]",
        description=description,
        epilog="examples:\n    " + examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
