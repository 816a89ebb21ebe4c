"""Photograph-like JPEG files: structure at every scale, edges, and ImageNet's 110 kB for 500x375 pixels."""

import os

import numpy as np
from PIL import Image, ImageDraw


def photograph(seed, width=500, height=375):
    """Return a PIL image: overlapping shapes of all sizes with texture on them, as in the dead-leaves model."""
    draw = np.random.RandomState(seed)
    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    for _ in range(400):
        size = 6 / draw.uniform(0.01, 1) ** 0.7
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        box = (x - size, y - size * draw.uniform(0.4, 1), x + size, y + size * draw.uniform(0.4, 1))
        (pen.ellipse if draw.rand() < 0.6 else pen.rectangle)(box, fill=tuple(draw.randint(0, 256, 3)))
    pixels = np.asarray(image, dtype=np.float32)
    for scale in (1, 2, 8, 32):
        noise = draw.normal(0, 12, (-(-height // scale), -(-width // scale), 1)).repeat(scale, 0).repeat(scale, 1)
        pixels = pixels + noise[:height, :width]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(folder, split, classes, images, files=64):
    """Write `images` JPEGs in `classes` folders of `folder`/`split`; only `files` differ, the others are links."""
    originals = os.path.join(folder, "originals")
    os.makedirs(originals, exist_ok=True)
    for number in range(files):
        path = os.path.join(originals, "{}.jpg".format(number))
        if not os.path.exists(path):
            photograph(number).save(path, quality=90)
    for number in range(images):
        place = os.path.join(folder, split, "class{:04d}".format(number % classes))
        os.makedirs(place, exist_ok=True)
        source = os.path.join(originals, "{}.jpg".format(number % files))
        os.link(source, os.path.join(place, "{}.jpg".format(number)))
