"""A checkpoint that carries code is refused in one line and nothing of it runs, on every version of torch."""

import collections
import io
import os
import pickle
import subprocess
import tarfile

import pytest
import torch

from common import checkpoint, weights
from common.errors import UserError
from tests import helpers
from tests.helpers import BUNDLES, ROOT


class Bomb:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class State:
    """Runs code by way of an object's state."""

    def __init__(self, path):
        self.items = Bomb(path)


def write_bombs(folder):
    """Write every kind of file that runs code; return their paths, and the path that must not come into being."""
    target = folder / "ran"
    weights = {"a.weight": torch.zeros(2, 3)}
    contents = {
        "plain": {"state_dict": weights, "x": Bomb(target)},
        "nested": {"state_dict": dict(weights, more=[{"y": (Bomb(target),)}])},
        "state": {"state_dict": weights, "x": State(target)},
        "key": {"state_dict": weights, "x": collections.OrderedDict([("z", Bomb(target))])},
    }
    paths = []
    for name, content in contents.items():
        for zipped in (True, False):
            path = folder / "{}-{}.pth.tar".format(name, zipped)
            torch.save(content, str(path), _use_new_zipfile_serialization=zipped)
            paths.append(path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = folder / "pickle{}.pth".format(protocol)
        path.write_bytes(pickle.dumps(contents["plain"], protocol=protocol))
        paths.append(path)
    begins_well = folder / "begins_well.pth"
    begins_well.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(Bomb(target)))
    with tarfile.open(str(folder / "old.pth"), "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            data = pickle.dumps(Bomb(target), protocol=2)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    scripted = folder / "scripted.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(scripted))
    return [*paths, begins_well, folder / "old.pth", scripted], target


@pytest.fixture(params=["weights_only", "restricted unpickler"])
def way(request, monkeypatch):
    """Both ways of reading; the second is that of a torch whose `load` has no `weights_only`."""
    if request.param == "restricted unpickler":
        load = torch.load

        def older_load(f, map_location=None, pickle_module=pickle, **options):
            return load(f, map_location=map_location, pickle_module=pickle_module, **options)

        monkeypatch.setattr(torch, "load", older_load)
    return request.param


def test_no_file_runs_its_code(way, tmp_path):
    paths, target = write_bombs(tmp_path)
    for path in paths:
        with pytest.raises(UserError) as caught:
            checkpoint.read(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not target.exists(), path
        if "plain-" in path.name or "nested-" in path.name:
            assert "holds more than tensors and plain values (" in str(caught.value)
            assert "mkdir" in str(caught.value)


def test_the_bombs_are_live(tmp_path):
    """What the test above refuses does run where nobody refuses it."""
    paths, target = write_bombs(tmp_path)
    for path in paths[:8]:
        try:
            torch.load(str(path), weights_only=False)
        except Exception:
            assert target.exists(), path
        assert target.exists(), path
        target.rmdir()


def test_what_is_harmless_is_read(way, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "plain": [1, 2.5, "three", None, True, (4,), {"five": b"6"}, "\udcff"],
        "types": [torch.zeros(2, dtype=d) for d in (torch.float16, torch.bfloat16, torch.int64, torch.bool)],
        "more": [torch.Size([1, 2]), torch.float32, torch.nn.Parameter(torch.ones(2))],
    }
    for zipped in (True, False):
        path = tmp_path / str(zipped)
        torch.save(content, str(path), _use_new_zipfile_serialization=zipped)
        found = checkpoint.read(str(path))
        assert found["plain"] == content["plain"] and found["more"][:2] == content["more"][:2]
        for key, value in content["state_dict"].items():
            assert torch.equal(found["state_dict"][key], value)
        for one, other in zip(found["types"], content["types"]):
            assert one.dtype == other.dtype and torch.equal(one, other)
        assert found["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]


def test_damage_is_damage(way, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {"w": torch.arange(4000)}}, str(path))
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
        try:
            assert torch.equal(checkpoint.read(str(path))["state_dict"]["w"], torch.arange(4000))
        except UserError as error:
            assert "damaged" in str(error) or "more than tensors" in str(error)
    for length in range(0, len(data), 997):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(str(path))


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes checksums")
def test_a_file_without_checksums_is_read(way, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"w": torch.arange(4000)}}, str(tmp_path / "x.pth"))
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(checkpoint.read(str(tmp_path / "x.pth"))["state_dict"]["w"], torch.arange(4000))


@pytest.mark.parametrize("content", [[1], torch.zeros(3), 5, "text"])
def test_what_holds_no_weights(content, tmp_path):
    torch.save(content, str(tmp_path / "x"))
    with pytest.raises(UserError, match="holds no state dict"):
        checkpoint.read(str(tmp_path / "x"))


@pytest.mark.parametrize("name", ["layers.0.weight", "classifier.1.bias"])
def test_a_tensor_without_a_shape_is_of_another_network(name):
    with helpers.imported("MnasNet") as models:
        model = models.mnasnet0_5(10)
    with helpers.imported("MnasNet", "models.pretrained") as pretrained:
        content = {"state_dict": dict(model.state_dict(), **{name: torch.tensor(1.0)})}
        with pytest.raises(UserError, match=r"^x.pth is of another network: "):
            weights.load(model, content, "x.pth", pretrained.convert, may_replace_head=True)


def test_main_refuses_in_one_line(mnasnet, tmp_path):
    paths, target = write_bombs(tmp_path)
    data = helpers.make_images(tmp_path / "data", 4, 4)
    for path in (paths[0], paths[1], paths[-1], paths[8]):
        for words in (["--resume", path], ["--pretrained", path], ["--evaluate", "--resume", path]):
            status, text = mnasnet.run(helpers.flags("MnasNet", data, tmp_path / "out", *words), tmp_path / "log")
            assert status == 1 and len(text.splitlines()) == 1 and text.startswith("[Error] "), text
            assert not target.exists() and not (tmp_path / "out").exists()


def test_nothing_else_unpickles():
    """The one call that reads a file of torch.save is in weights.py, and nobody switches `weights_only` off."""
    found = subprocess.run(
        ["grep", "-rnE", r"torch\.load\(|pickle\.load|weights_only *= *False|import pickle", "--include=*.py", "common"]
        + BUNDLES,
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        universal_newlines=True,
    ).stdout.splitlines()
    assert found and {line.split(":")[0] for line in found} == {"common/weights.py"}, found
