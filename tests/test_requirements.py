"""The requirement files of the bundles: the same versions in all, an upper bound where a new one would break."""

import re

import pytest

from tests.bundles import BUNDLES, ROOT

KINDS = {"": "2.13.0", "1.8_": "1.8.1", "1.5_": "1.5.0", "npu_": "2.13.0+cpu"}


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
