"""The command lines of programs and scripts are those that the repository has promised."""

from tests.tools import command_lines


def test_no_flag_has_changed_unseen():
    found = set(command_lines.command_lines().splitlines())
    frozen = set(command_lines.FILE.read_text(encoding="utf-8").splitlines())
    gone, new = sorted(frozen - found), sorted(found - frozen)
    text = "python tests/tools/command_lines.py --fix, if that is meant:\ngone: {}\nnew: {}"
    assert not gone and not new, text.format(gone, new)


def test_every_program_and_script_is_there():
    lines = command_lines.FILE.read_text(encoding="utf-8").splitlines()
    programs = {line.partition("  ")[0] for line in lines}
    assert len([name for name in programs if name.endswith("/main.py")]) == len(command_lines.BUNDLES)
    assert len([name for name in programs if name.endswith(".sh")]) == 8 * len(command_lines.BUNDLES)
    assert "all scripts  --data_path=DIR" in lines
