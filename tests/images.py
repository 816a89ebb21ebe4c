"""Images of every kind, and loaders of them without a run around."""

import functools
import io
import types

import numpy as np
import torch
from PIL import Image

from common.data import ImageFolder, Loader
from common.distributed import Ranks
from common.transforms import CenterCrop, RandomResizedCrop


def photograph(width, height, seed=0):
    """Return a PIL image with structure at every scale, as photographs have."""
    generator = np.random.RandomState(seed)
    layers = np.zeros((height, width, 3))
    for size in (4, 16, 64, 256):
        noise = Image.fromarray(generator.randint(0, 256, (size, size, 3)).astype(np.uint8))
        layers += np.asarray(noise.resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((layers / 4).astype(np.uint8))


def pattern(mode="RGB", size=(96, 72)):
    """Return a PIL image of smooth waves."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 2 + y, 255 - x, 128 + 60 * np.sin(x / 9.0) * np.cos(y / 7.0)], 2)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="JPEG", **options):
    """Return the bytes of `image` as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pil_pixels(data):
    """Return numpy [H, W, 3] as PIL decodes `data`."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@functools.lru_cache(maxsize=None)
def odd_images():
    """Return {name: bytes} of files that are unusual and fine, or broken."""
    rgb, grey = pattern(), pattern("L")
    jpeg = encoded(rgb, quality=90)
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    frames = [rgb, rgb.rotate(90), grey.convert("RGB")]
    header = jpeg.index(b"\xff\xc0")
    bomb = jpeg[: header + 5] + (20000).to_bytes(2, "big") * 2 + jpeg[header + 9 :]
    sixteen = Image.fromarray((np.arange(96 * 72).reshape(72, 96) * 9).astype(np.uint16))
    return {
        "plain.jpg": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated_with_end.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "zero.jpg": b"",
        "text.jpg": b"this is a web page",
        "zeros.jpg": bytes(5000),
        "png_called.jpg": encoded(rgb, "PNG"),
        "jpeg_called.png": jpeg,
        "cmyk.jpg": encoded(pattern("CMYK")),
        "grey.jpg": encoded(grey),
        "rgb.jpg": encoded(rgb, keep_rgb=True),
        "progressive.jpg": encoded(rgb, progressive=True),
        "trailing.jpg": jpeg + b"\0" * 100,
        "rotated.jpg": encoded(rgb, exif=exif),
        "444.jpg": encoded(rgb, subsampling=0),
        "restart.jpg": encoded(rgb, restart_marker_blocks=2),
        "sixteen_bit.png": encoded(sixteen, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "palette_bytes.png": encoded(palette, "PNG", transparency=bytes(range(16))),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "one_bit.png": encoded(pattern("1"), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "float.tiff": encoded(pattern("F"), "TIFF"),
        "one_pixel.jpg": encoded(pattern(size=(1, 1))),
        "one_column.png": encoded(pattern(size=(1, 300)), "PNG"),
        "one_row.jpg": encoded(pattern(size=(300, 1))),
        "bomb.jpg": bomb,
        "bomb.png": encoded(Image.new("1", (20000, 20000)), "PNG"),
    }


def mutated(draw, data):
    """Return `data` with flipped bytes, a cut, a repeated piece, or a changed header."""
    data = bytearray(data)
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        start = draw.randrange(len(data))
        del data[start : start + draw.randrange(1, 50)]
    elif kind == 3:
        start = draw.randrange(len(data))
        data[start:start] = data[start : start + draw.randrange(1, 200)]
    else:
        data[draw.randrange(2, min(700, len(data)))] = draw.randrange(256)
    return bytes(data)


def write_set(folder, files, splits=("train", "val")):
    """Write {"class/name": bytes, or "name": bytes of the one class} to each split of `folder`; return it as text."""
    for split in splits:
        for name, data in files.items():
            path = folder / split / (name if "/" in name else "class/" + name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return str(folder)


class LonelyRanks(Ranks):
    """Rank `rank` of `world_size` ranks of which the others are not there."""

    def __init__(self, rank=0, world_size=1):
        super().__init__()
        self.rank, self.world_size, self.local_world_size = rank, world_size, world_size

    def all_gather(self, value):
        """Return this rank's value alone."""
        return [value]


def card(rank=0, world_size=1):
    """Stand in for the CPU's `Device` of rank `rank`."""
    members = {"type": "cpu", "torch_device": torch.device("cpu"), "channels_last": True, "upload": torch.Tensor.clone}
    return types.SimpleNamespace(ranks=LonelyRanks(rank, world_size), **members)


def loader(folder, training, rank=0, world_size=1, transform=None, images=None, **options):
    """Return a `Loader` of `folder`, or of `images`, as rank `rank` sees it; `options` replace those of the run."""
    values = {"batch_size": 7, "workers": 0, "seed": 5, "max_bad_images": 0.0, "notices": []}
    args = types.SimpleNamespace(**dict(values, **options))
    images = images or ImageFolder(str(folder), "train" if training else "val")
    transform = transform or (RandomResizedCrop(32) if training else CenterCrop(32, 36))
    return Loader(card(rank, world_size), images, transform, args, (0.5,) * 3, (0.25,) * 3, training)


def seen(loader, epoch=0, start=0):
    """Return (images, targets) of a whole epoch."""
    batches = list(loader.batches(epoch, start))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])
