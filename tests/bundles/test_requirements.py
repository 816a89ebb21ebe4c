"""The requirement files of the bundles: the same versions in all, an upper bound where a new one would break."""

import re
import subprocess

import pytest

from tests.helpers import BUNDLES, ROOT

KINDS = {"": "2.13.0", "1.8_": "1.8.1", "1.5_": "1.5.0", "npu_": "2.12.0+cpu"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines(bundle, kind):
    text = (ROOT / bundle / "{}requirements.txt".format(kind)).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("kind", KINDS)
def test_bundles_agree(kind):
    common = lines("MnasNet", kind)
    assert "torch=={}".format(KINDS[kind]) in common
    for bundle in BUNDLES:
        own = [line for line in lines(bundle, kind) if line not in common]
        assert [line for line in lines(bundle, kind) if line not in own] == common
        assert [line.split("==")[0] for line in own] == (["timm"] if bundle == "SPACH-SMLP" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_break_is_bounded(kind):
    for line in lines("SPACH-SMLP", kind):
        name = re.match(r"[\w-]+", line).group()
        if name in ("torch", "torchvision", "torch_npu", "timm"):
            assert "==" in line
        elif name in ("numpy", "pillow", "simplejpeg", "safetensors", "protobuf"):
            assert "<" in line, line


def test_the_checks_need_what_the_bundles_need_and_what_onnx_needs():
    text = (ROOT / "tests" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {"-r ../{}/requirements.txt".format(bundle) for bundle in BUNDLES} < set(text)
    named = [line[len("-r ") :] for line in text if line.startswith("-r ")]
    assert all((ROOT / "tests" / name).is_file() for name in named)
    assert {"onnx", "onnxruntime"} <= {re.split(r"[=<>]", line)[0] for line in text}


@pytest.mark.parametrize("place", ["", *BUNDLES])
def test_onnx_comes_to_an_ascend_host_together_with_the_file_that_bounds_numpy_and_protobuf(place):
    """Alone it brings newer ones than CANN can use."""
    for name in ("README.md", "README_zh.md"):
        text = (ROOT / place / name).read_text(encoding="utf-8")
        assert re.search(
            r"pip install -r \S*requirements.txt \S*onnx\S* \S*onnxruntime.*npu_requirements|"
            r"pip install -r npu_requirements.txt onnx onnxruntime",
            text,
        )


def test_an_aarch64_host_finds_a_torchvision_for_torch_1_5():
    versions = [line for line in lines("MnasNet", "1.5_") if line.startswith("torchvision")]
    assert versions == [  # of 0.6.0 there are wheels for x86_64 only
        'torchvision==0.6.0; platform_machine != "aarch64"',
        'torchvision==0.2.2.post3; platform_machine == "aarch64"',
    ]


def test_the_versions_for_an_npu_are_the_row_that_ascend_recommends():
    (row,) = re.findall(r"^\| (.*recommended by Ascend.*) \|$", README, re.MULTILINE)
    torch, torchvision, torch_npu, cann, _, _ = row.split(" | ")
    pinned = lines("MnasNet", "npu_")
    assert {"torch=={}+cpu".format(torch), "torchvision==" + torchvision} < set(pinned)
    assert torch_npu == "2.12.0 (Python 3.14: 2.12.0.post3)"  # of 2.12.0 there is no wheel for Python 3.14
    assert 'torch_npu==2.12.0; python_version < "3.14"' in pinned
    assert 'torch_npu==2.12.0.post3; python_version >= "3.14"' in pinned
    assert ", for CANN {};".format(cann) in (ROOT / "MnasNet" / "npu_requirements.txt").read_text()


def test_the_readmes_command_for_another_row_changes_all_versions():
    (words,) = re.findall(r"`sed '(.*)' MnasNet/npu_requirements.txt", README)
    command = ["sed", words, str(ROOT / "MnasNet" / "npu_requirements.txt")]
    text = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    pinned = re.findall(r"^(torch\w*==[^;\n]*)", text, re.MULTILINE)
    assert pinned == ["torch==2.13.0+cpu", "torch_npu==2.13.0", "torch_npu==2.13.0", "torchvision==0.28.0"]
    assert "| 2.13.0 | 0.28.0 | 2.13.0 |" in README


def test_the_image_has_the_cann_of_the_versions_that_it_installs():
    text = (ROOT / "Dockerfile").read_text()
    (cann,) = re.findall(r"^ARG BASE=\S+/cann:([\d.]+)-", text, re.MULTILINE)
    (copied,) = re.findall(r"^COPY (\S+requirements.txt) ", text, re.MULTILINE)
    assert "FROM ${BASE}" in text and "pip install --no-cache-dir -r npu_requirements.txt" in text
    assert ", for CANN {};".format(cann) in (ROOT / copied).read_text()
    needed = [set((ROOT / bundle / "npu_requirements.txt").read_text().splitlines()) for bundle in BUNDLES]
    assert set((ROOT / copied).read_text().splitlines()) == set.union(*needed)


def test_the_line_that_runs_the_image_passes_all_in_that_the_readme_asks_for():
    (line,) = re.findall(r"^docker run .*?[^\\]$", README, re.MULTILINE | re.DOTALL)
    for word in (
        *("--ipc=host", "--network=host", "--device=/dev/davinci%d ' 0 1 2 3 4 5 6 7", "--device=/dev/davinci_manager"),
        *("--device=/dev/devmm_svm", "--device=/dev/hisi_hdc", "-v /usr/local/Ascend/driver:", "/bin/npu-smi:"),
        *("-v /usr/local/dcmi:", "-v /etc/hccn.conf:", "-v /etc/ascend_install.info:"),
    ):
        assert word in line
