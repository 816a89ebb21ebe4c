"""The documents say what the code does: tables, flags, links, order, both languages."""

import argparse
import re

import pytest

from common import distributed
from common.data import EXTENSIONS
from tests.helpers import BUNDLES, ROOT, imported
from tests.tools import arguments

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])
SECTIONS = {
    "README.md": ["Overview", "Environment", "Data", "Training", "Arguments", "Results", "Versions", "Known problems"],
    "README_zh.md": [
        "概述",
        "准备训练环境",
        "准备数据集",
        "开始训练",
        "参数说明",
        "训练结果展示",
        "版本说明",
        "已知问题",
    ],
}
# Flags of other programs, and of our own tools.
OTHERS = """
    --framework --model --output --input_format --input_shape --soc_version --nnodes --nproc_per_node --node_rank
    --master_addr --index-url --ipc --shm-size --check --fix --link --dry-run --help --compare --plot --format
    --size --quality --all --network --device
    --rm --build-arg --job-name --nodes --ntasks-per-node --exclusive --requeue
    --interpolation --signal --kill-on-bad-exit --transform --run-prof
"""


def test_tables_are_what_the_code_says():
    assert arguments.stale() == [], "python tests/tools/arguments.py --fix"


def test_the_table_of_arguments():
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("recipe")
    group.add_argument("-a", "--arch", default="small", choices=["small", "large"], help="one of %(choices)s")
    group.add_argument("--lr", type=float, default=0.1, help="rate")
    group.add_argument("--amp", action="store_true", help="mixed | half")
    group.add_argument("--sheet", nargs="?", metavar="PNG", help="draw")
    text = arguments.argument_tables(
        parser, ("option", "default", "meaning"), lambda text: text.replace("rate", "Rate")
    )
    assert text.splitlines() == [
        "**recipe**",
        "",
        "| option | default | meaning |",
        "|---|---|---|",
        "| `-a`, `--arch small\\|large` | `small` | one of small, large |",
        "| `--lr X` | `0.1` | Rate |",
        "| `--amp` |  | mixed \\| half |",
        "| `--sheet [PNG]` |  | draw |",
    ]


def test_the_table_of_addresses(tmp_path):
    for name, text in (
        ("Net/main.py", '"""See https://example.org/a_b.html#c, (https://example.org/d)."""'),
        ("Net/test/output/0/nohup.txt", "https://example.org/not-ours"),
        ("Net/public_address_statement.md", "https://example.org/gone"),
        ("common/x.sh", "mail a.b@example.org; url=http://example.org/a_b.html#c"),
        ("Other/main.py", "https://example.org/other"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert arguments.address_table("Net", tmp_path).splitlines()[2:] == [
        "| `a.b@example.org` | common/x.sh |",
        "| `http://example.org/a_b.html#c` | common/x.sh |",
        "| `https://example.org/a_b.html#c` | Net/main.py |",
        "| `https://example.org/d` | Net/main.py |",
    ]


def test_text_outside_the_marks_stays():
    document = "before\n" + arguments.BEGIN + "old\n" + arguments.END + "after\n"
    assert arguments.with_table(document, "new\n") == document.replace("old", "new")
    with pytest.raises(ValueError):
        arguments.with_table("no marks", "new\n")


def _anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_the_table_for_small_sets_has_each_flag_of_the_command_for_digits(bundle, name):
    text = (ROOT / bundle / name).read_text(encoding="utf-8")
    command, _, rest = text.partition("--data_path=../data/digits ")[2].partition("\n")
    rows = re.findall(r"^ *\| (`--.*?) \|", rest.partition("--predict")[0], re.MULTILINE)
    flags = [set(re.findall(r"(?<!\S)`?(--[a-z_-]+)", words)) for words in (command, " ".join(rows).replace("、", " "))]
    assert flags[0] and flags[0] <= flags[1], sorted(flags[0] - flags[1])


@pytest.mark.parametrize("name, possessive", [("README.md", "'s "), ("README_zh.md", " 的 ")])
def test_the_root_names_each_script_that_takes_few_steps_on_a_cpu(name, possessive):
    """Whoever fine-tunes on a CPU would take 20 steps for all of them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for script in ROOT.glob("*/test/train_*p.sh"):
        bundle, mode = script.parts[-3], script.stem.split("_")[1]
        if "--cpu-max-steps" in script.read_text() and mode != "performance":
            assert "{}{}`{}`".format(bundle, possessive, mode) in text, script


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_the_files_that_count_as_images_are_named(bundle, name):
    assert "`{}`".format(" ".join(EXTENSIONS)) in (ROOT / bundle / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(path.read_text(encoding="utf-8"))):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)", _prose(file.read_text(encoding="utf-8")), re.MULTILINE) if anchor else []
            assert not anchor or anchor in map(_anchor, headings), target


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_the_order_of_sections(bundle, name):
    headings = re.findall(r"^#+ (.*)", _prose((ROOT / bundle / name).read_text(encoding="utf-8")), re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS[name]] == SECTIONS[name]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_both_languages_have_the_same_figures(bundle):
    english, chinese = ((ROOT / bundle / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    published = "| NAME | Acc@1 | FPS |"
    figures = [
        re.findall(r"\d+\.\d+", text.partition(published)[2].partition("\n\n")[0]) for text in (english, chinese)
    ]
    assert figures[0] == figures[1] and len(figures[0]) >= 4
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 1000


@pytest.mark.parametrize("bundle", BUNDLES)
def test_both_languages_name_the_versions_before(bundle):
    english, chinese = ((ROOT / bundle / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    sections = english.partition("## Versions")[2], chinese.partition("# 版本说明")[2]
    parts = [section.partition("\n## Known problems")[0].partition("\n## 已知问题")[0] for section in sections]
    dates = [sorted(re.findall(r"\d{4}\.\d\d\.\d\d", part)) for part in parts]
    assert dates[0] == dates[1] and all("ModelZoo" in part for part in parts)


def test_the_root_says_the_same_in_both_languages():
    """Headings, tables, commands and figures; what lies between is prose."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert len(re.findall("^#+ ", english, re.M)) == len(re.findall("^#+ ", chinese, re.M))
    assert [row.count("|") for row in re.findall(r"^\|.*", english, re.M)] == [
        row.count("|") for row in re.findall(r"^\|.*", chinese, re.M)
    ]
    commands = [re.sub("#.*", "", "".join(re.findall("```sh\n(.*?)```", text, re.S))) for text in (english, chinese)]
    assert re.sub(r" *\n", "\n", commands[0]) == re.sub(r" *\n", "\n", commands[1])
    for pattern in (r"\d+\.\d+", r"(?<![\w-])--[a-z][\w-]*", r"[A-Z]+_[A-Z_]+"):
        found = [sorted(set(re.findall(pattern, text))) for text in (english, chinese)]
        assert found[0] == found[1]
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 1500


def test_what_an_operator_sets_for_several_nodes_stands_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Several nodes")[2].partition("\n## ")[0]
    for word in ("HCCL_SOCKET_IFNAME", "HCCL_IF_IP", "GLOO_SOCKET_IFNAME", "HCCL_HOST_SOCKET_PORT_RANGE=auto"):
        assert word in text
    assert str(distributed.DEFAULT_PORT) in text and "29700 to 29731" in text
    job = (ROOT / "two_nodes.sbatch").read_text(encoding="utf-8")
    assert "test/train_full_8p.sh" in job and "--nodes=2" in job and "--ntasks-per-node=1" in job


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_option_is_explained_in_chinese(bundle):
    """Without a line in tests/data/arguments_zh.json its English would stand in README_zh.md."""
    table = (ROOT / bundle / "README_zh.md").read_text(encoding="utf-8").partition(arguments.BEGIN)[2]
    meanings = re.findall(r"^\| `-.* \| (.*) \|$", table.partition(arguments.END)[0], re.MULTILINE)
    assert len(meanings) > 50
    names = re.compile(r"[a-z0-9_]+(, [a-z0-9_]+)*$")  # of networks
    assert [text for text in meanings if not re.search("[\u4e00-\u9fff]", text) and not names.match(text)] == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_no_status_of_modelzoo_claims_what_no_card_has_shown(bundle):
    lines = (ROOT / bundle / "modelzoo_level.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["FuncStatus", "PerfStatus", "PrecisionStatus"]
    assert "nothing here has run on one" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {line.split(":")[1] for line in lines} == {"NOK"}


@pytest.fixture(scope="module")
def flags():
    """Every flag of every bundle and of the scripts."""
    known = set(OTHERS.split()) | set(re.findall(r"--[a-z_]+(?==)", (ROOT / "common" / "launch.sh").read_text()))
    for bundle in BUNDLES:
        with imported(bundle, "main") as main:
            known.update(main.build_parser()._option_string_actions)
    return known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_and_scripts_in_the_text_are_there(document, flags):
    text = (ROOT / document).read_text(encoding="utf-8")
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert flag in flags, flag
    for script in re.findall(r"test/(train_\w+\.sh)", text):
        assert all((ROOT / bundle / "test" / script).is_file() for bundle in BUNDLES), script
    for name in re.findall(r"(?<![\w/.])(?:common|tests)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
