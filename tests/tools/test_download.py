"""--pretrained and --resume https://...: the file comes once, and only with the sha256 that the address gives."""

import functools
import hashlib
import http.server
import threading

import pytest
import torch

from common import weights
from common.errors import UserError
from tests.helpers import assert_refused, imported, run_script, small


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address below which the folder `tmp_path / "files"` stands; its requests are counted in `server.asked`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder, asked = tmp_path / "files", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *words):
            asked.append(self.path)

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()  # seconds that its end takes
    yield "http://127.0.0.1:{}/".format(serving.server_port), folder, asked
    serving.shutdown()
    serving.server_close()


def test_a_file_comes_once_and_under_the_sum_that_its_name_or_the_address_has(server):
    address, folder, asked = server
    (folder / "x.pth").write_bytes(b"weights")
    digits = hashlib.sha256(b"weights").hexdigest()
    (folder / "net-{}.pth.tar".format(digits[:8])).write_bytes(b"weights")
    for name in (
        "x.pth#sha256=" + digits,
        "net-{}.pth.tar".format(digits[:8]),
        "x.pth?raw=1#sha256=" + digits[:12].upper(),
    ):
        for _ in range(2):
            with open(weights.download(address + name), "rb") as file:
                assert file.read() == b"weights"
    assert len(asked) == 3


@pytest.mark.parametrize(
    "name, line",
    [
        ("x.pth#sha256=" + "0" * 64, "invalid hash value"),
        ("x-00000000.pth", "invalid hash value"),
        ("x.pth", "add #sha256=HEX"),
        ("x.pth#sha256=123", "add #sha256=HEX"),
        ("missing.pth#sha256=" + "0" * 64, "404"),
    ],
)
def test_a_file_that_is_another_than_was_meant_is_refused_and_not_kept(name, line, server, tmp_path):
    address, folder, _ = server
    for file in ("x.pth", "x-00000000.pth"):
        (folder / file).write_bytes(b"weights")
    for _ in range(2):
        with pytest.raises(UserError, match=line):
            weights.download(address + name)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_official_weights_are_measured_from_an_address(server, few_digits, bundle_copy):
    address, folder, asked = server
    with imported("MnasNet") as models:
        torch.save(models.mnasnet0_5(10).state_dict(), str(folder / "official.pth"))
    digits = hashlib.sha256((folder / "official.pth").read_bytes()).hexdigest()
    options = ["--data_path={}".format(few_digits), "--device=cpu", *small("MnasNet")]
    resume = "--resume={}official.pth#sha256={}".format(address, digits)
    place = bundle_copy("MnasNet")
    assert_refused(run_script(place, "eval_1p", *options, resume[:-8] + "00000000"), 1, "invalid hash value")
    assert not (place / "test" / "output").exists()
    process = run_script(place, "eval_1p", *options, resume)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Final Train Accuracy" in process.stdout and len(asked) == 2


def test_fine_tuning_from_an_address(server, few_digits, bundle_copy, tmp_path):
    address, folder, asked = server
    with imported("MnasNet") as models:
        torch.save(models.mnasnet0_5(7).state_dict(), str(folder / "official.pth"))
    digits = hashlib.sha256((folder / "official.pth").read_bytes()).hexdigest()
    options = ["--data_path={}".format(few_digits), "--device=cpu", "--max_steps=2", "--batch_size=4", "--rank_size=2"]
    resume = "--resume={}official.pth#sha256={}".format(address, digits)
    process = run_script(bundle_copy("MnasNet"), "finetune_8p", *options, resume, *small("MnasNet"))
    assert process.returncode == 0, process.stdout + process.stderr
    assert "official.pth" in process.stdout and len(asked) == 1  # not once for each rank
    process = run_script(bundle_copy("MnasNet"), "finetune_8p", *options, resume[:-8] + "00000000", *small("MnasNet"))
    assert_refused(process, 1, "cannot be had", "invalid hash value")
