"""`jpeg.c` gives libjpeg-turbo's pixels, leaves to others what it must, and survives any file."""

import io
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common import decode
from common.decode import EncodedImage
from tests.bundles import ROOT
from tests.conftest import LONG
from tests.test_bad_images import encoded, mutated
from tests.test_input import photograph

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
FUZZED = 100000 if LONG else 3000
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")

# Decodes parts of the files in a folder by the library given, into memory of just the size that is asked for.
CHILD = """
import ctypes, os, random, sys
library, folder = ctypes.CDLL(sys.argv[1]), sys.argv[2]
draw, counts = random.Random(0), [0, 0]
for name in sorted(os.listdir(folder)):
    with open(os.path.join(folder, name), "rb") as file:
        data = file.read()
    file = (ctypes.c_char * len(data)).from_buffer_copy(data)
    for _ in range(2):
        height, width = draw.randint(1, 72), draw.randint(1, 96)
        top, left = draw.randint(0, 72 - height), draw.randint(0, 96 - width)
        size = len(data) + 3 * (height + 32) * (width + 32) + 4096
        rgb, scratch = ((ctypes.c_char * n)() for n in (3 * height * width, size))
        numbers = map(ctypes.c_long, (len(data), top, left, height, width))
        counts[library.decode(file, *numbers, rgb, scratch, ctypes.c_long(size))] += 1
print(*counts)
"""


def parts_of(width, height, count, draw):
    """Yield boxes (top, left, height, width): the whole, its corners, its last pixels, and any others."""
    yield 0, 0, height, width
    yield from ((0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height - 1, 0, 1, width), (0, width - 1, height, 1))
    for _ in range(count):
        h, w = draw.randint(1, height), draw.randint(1, width)
        yield draw.randint(0, height - h), draw.randint(0, width - w), h, w


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 100},
        {"quality": 5},
        {"quality": 75, "optimize": True},
        {"quality": 90, "restart_marker_blocks": 3},
        {"quality": 90, "restart_marker_rows": 1},
    ],
    ids=lambda options: "-".join("{}={}".format(*item) for item in options.items()),
)
def test_any_part_has_pils_pixels(subsampling, options):
    draw = random.Random(str(options))
    for width, height in ((500, 375), (64, 48), (33, 17), (17, 95), (5, 1), (16, 16), (31, 32)):
        data = encoded(photograph(width, height, seed=width), subsampling=subsampling, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        for box in parts_of(width, height, 20, draw):
            top, left, h, w = box
            pixels = decode._decode_part(data, box)
            assert pixels is not None and np.array_equal(pixels, expected[top : top + h, left : left + w]), box


def test_noise_and_flat_areas():
    """Noise has every code and every coefficient; flat areas have none."""
    draw = np.random.RandomState(0)
    for pixels in (draw.randint(0, 256, (80, 80, 3)), draw.choice([0, 255], (80, 80, 3)), np.full((80, 80, 3), 255)):
        for quality in (30, 95, 100):
            data = encoded(Image.fromarray(pixels.astype(np.uint8)), quality=quality)
            expected = np.asarray(Image.open(io.BytesIO(data)))
            assert np.array_equal(decode._decode_part(data, (0, 0, 80, 80)), expected)
            assert np.array_equal(decode._decode_part(data, (30, 21, 40, 37)), expected[30:70, 21:58])


def others():
    """Return {name: bytes} of files that `jpeg.c` leaves to other decoders."""
    image = photograph(64, 32)
    plain, halved = encoded(image, subsampling=0), encoded(image, subsampling=1)
    frame = halved.index(b"\xff\xc0")
    rows_halved = bytearray(halved)
    rows_halved[frame + 11] = 0x12
    wild = bytearray(encoded(image, quality=100))
    table = wild.index(b"\xff\xdb") + 5
    wild[table : table + 64] = b"\xff" * 64
    return {
        "progressive": encoded(image, progressive=True),
        "grey": encoded(image.convert("L")),
        "CMYK": encoded(image.convert("CMYK")),
        "RGB": encoded(image, keep_rgb=True),
        "4:4:0": bytes(rows_halved),
        "four columns": encoded(photograph(4, 32)),
        "coefficients beyond eight bits": bytes(wild),
        "one byte more before the end": plain[:-2] + b"\0" + plain[-2:],
        "a piece is missing": plain[: len(plain) * 2 // 3] + plain[len(plain) * 2 // 3 + 40 :],
        "it ends too early": plain[: len(plain) * 2 // 3] + b"\xff\xd9",
        "a restart marker in a wrong place": plain[:-200] + b"\xff\xd0" + plain[-200:],
    }


@pytest.mark.parametrize("name", sorted(others()))
def test_what_is_not_plain_is_left_to_others(name):
    data = others()[name]
    image = EncodedImage(data)
    assert decode._decode_part(data, (0, 0, image.height, image.width)) is None
    assert np.array_equal(image.pixels(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_part_before_the_damage_is_fine():
    data = encoded(photograph(200, 150))
    half = data[: len(data) // 2] + b"\xff\xd9"
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode._decode_part(half, (0, 3, 30, 40)), expected[:30, 3:43])
    assert decode._decode_part(half, (0, 3, 140, 40)) is None


def test_boxes_outside_the_image_and_too_little_memory():
    data = encoded(photograph(64, 32))
    for box in ((0, 0, 33, 64), (0, 1, 32, 64), (-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0)):
        assert decode._decode_part(data, box) is None, box
    memory = np.zeros(100, dtype=np.uint8).ctypes.data
    assert decode._jpeg_decoder()(data, len(data), 0, 0, 4, 4, memory, memory, 100) == 1


def test_without_a_compiler_others_decode(tmp_path):
    """And the pixels are the same."""
    data = encoded(photograph(200, 150))
    (tmp_path / "image.jpg").write_bytes(data)
    code = """
import sys, numpy
from common import compiled
from common.decode import EncodedImage
with open(sys.argv[1], "rb") as file:
    pixels = EncodedImage(file.read()).pixels((20, 30, 70, 81))
print(compiled.library("jpeg"), int((pixels.astype(int) * numpy.arange(3 * 81 * 70).reshape(70, 81, 3)).sum()))
"""
    said = []
    for compiler in ("no-such-compiler", "false", "cc"):
        process = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "image.jpg")],
            cwd=str(ROOT),
            env=dict(os.environ, CC=compiler, XDG_CACHE_HOME=str(tmp_path / "cache")),
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )
        said.append(process.stdout.rstrip().rpartition(" "))
    assert said[0] == said[1] and said[0][0] == "None"
    assert "jpeg-" in said[2][0] and said[2][2] == said[0][2]


def short_segments(data):
    """Yield the JPEG file up to any byte of its headers, the last segment saying that it ends there."""
    at = 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        for end in range(2, length):
            yield data[: at + 2] + end.to_bytes(2, "big") + data[at + 4 : at + 2 + end]
        at += 2 + length


def test_damaged_files_harm_nothing(tmp_path):
    """Compiled with the checks of memory and of arithmetic that end the process at the first fault."""
    asan = subprocess.run(["cc", "-print-file-name=libasan.so"], stdout=subprocess.PIPE, universal_newlines=True).stdout
    if not os.path.isabs(asan):
        pytest.skip("the C compiler has no address sanitizer")
    source = str(ROOT / "common" / "jpeg.c")
    subprocess.run(["cc", *SANITIZERS, "-shared", "-fPIC", source, "-o", str(tmp_path / "jpeg.so")], check=True)
    draw = random.Random(7)
    image = photograph(96, 72)
    seeds = [encoded(image, quality=q, subsampling=s) for q in (60, 95) for s in (0, 1, 2)]
    seeds += [encoded(image, restart_marker_blocks=5), encoded(image, optimize=True)]
    (tmp_path / "files").mkdir()
    files = list(short_segments(seeds[0])) + [mutated(draw, draw.choice(seeds)) for _ in range(FUZZED)]
    for number, data in enumerate(files):
        (tmp_path / "files" / "{:06d}".format(number)).write_bytes(data)
    process = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "jpeg.so"), str(tmp_path / "files")],
        env=dict(os.environ, LD_PRELOAD=asan.strip(), ASAN_OPTIONS="detect_leaks=0", PYTHONMALLOC="malloc"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    assert process.returncode == 0, process.stderr
    decoded, refused = map(int, process.stdout.split())
    assert decoded + refused == 2 * len(files) and min(decoded, refused) > FUZZED / 5
