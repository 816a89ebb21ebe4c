"""From the bytes of an image file to a uint8 crop: decode, crop, resize, flip.

Plain JPEG is decoded by `jpeg.c`, which does little more than the crop needs; where it cannot be compiled, or leaves a
file to others, by simplejpeg; everything else by PIL. Their pixels are the same. The resize is torch's antialiased one
on uint8 (equal to PIL's within one level), or PIL's where torch has none.
"""

import ctypes
import functools
import io
import math
import random
import warnings

import numpy as np
import torch
from PIL import Image

from common.compiled import library
from common.errors import UserError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# PIL warns of odd files (palettes, EXIF, sizes) that it reads all the same, once per worker and without their names.
warnings.filterwarnings("ignore", module=r"PIL\.")
_PIL_FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
INTERPOLATIONS = ("bilinear", "bicubic", "random")


def _find_torch_resize():
    """Return torch's antialiased resize functions by interpolation, {} where they are missing or refuse uint8."""
    try:
        functions = {
            "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
            "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
        }
        sample, out = (torch.zeros(1, 3, side, side, dtype=torch.uint8) for side in (4, 2))
        for function in functions.values():
            function.out(sample, [2, 2], False, None, None, out=out)
        return functions
    except (AttributeError, RuntimeError):
        return {}


_TORCH_RESIZE = _find_torch_resize()


class JpegHeader:
    """Size of a JPEG image and where its file says so; `None` from `parse` for what only PIL should decode."""

    _FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: Huffman-coded
    _OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)

    def __init__(self, height, width, height_at):
        self.height, self.width, self.height_at = height, width, height_at

    @classmethod
    def parse(cls, data):
        """Read the frame header of `data` (bytes); 8 bit grey or three components, and a complete file, or None."""
        if data[:2] != b"\xff\xd8" or data.rstrip(b"\0")[-2:] != b"\xff\xd9":
            return None
        at = 2
        while at + 9 < len(data) and data[at] == 0xFF:
            marker = data[at + 1]
            if marker in cls._FRAMES:
                height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
                usable = data[at + 4] == 8 and data[at + 9] in (1, 3) and height and width
                return cls(height, width, at + 5) if usable else None
            if marker in cls._OTHER_FRAMES or marker == 0xDA:
                return None
            at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
        return None


class EncodedImage:
    """An image file's bytes, whose size is known before its pixels are decoded.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: as PIL does for the same bytes.
    """

    def __init__(self, data):
        self._data, self._image = data, None
        self._header = JpegHeader.parse(data) if simplejpeg is not None or _jpeg_decoder() is not None else None
        if self._header is not None:
            self.height, self.width = self._header.height, self._header.width
            limit = Image.MAX_IMAGE_PIXELS
            if limit and self.height * self.width > 2 * limit:
                raise Image.DecompressionBombError("{} x {} pixels".format(self.width, self.height))
        else:
            self._image = Image.open(io.BytesIO(data))
            self.width, self.height = self._image.size

    def pixels(self, box=None):
        """Return uint8 RGB pixels [height, width, 3] of `box` (top, left, height, width), or of all, as numpy.

        They are overwritten by the next image.
        """
        top, left, height, width = box = box or (0, 0, self.height, self.width)
        rows = None
        if self._header is not None:
            part = _decode_part(self._data, box)
            if part is not None:
                return part
            rows = self._decode_rows(min(self.height, top + height + 2))
        if rows is None:  # no JPEG, or a damaged one: PIL has the last word
            rows = np.array((self._image or Image.open(io.BytesIO(self._data))).convert("RGB"))
        return rows[top : top + height, left : left + width]

    def _decode_rows(self, height):
        """Return the first `height` rows (two more than are needed give the last one its chroma context), or None."""
        if simplejpeg is None:
            return None
        pixels = _memory(height * self.width * 3).reshape(height, self.width, 3)
        try:
            if height == self.height:
                return simplejpeg.decode_jpeg(self._data, "RGB", buffer=pixels, strict=True)
            # libjpeg stops after the rows that the header promises, and warns of the rest of the file. So not strict:
            # then damage shows as a last row that nobody has written.
            data, at = bytearray(self._data), self._header.height_at
            data[at], data[at + 1] = height >> 8, height & 255
            pixels[-1] = 0
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels, strict=False)
        except ValueError:
            return None
        return pixels if pixels.shape[1] == self.width and pixels[-1].any() else None


def _memory(size):
    """Return uint8 [size], the same memory each time: fresh memory costs a tenth of the decoding."""
    if _memory.held.size < size:
        _memory.held = np.empty(size, dtype=np.uint8)
    return _memory.held[:size]


_memory.held = np.empty(0, dtype=np.uint8)


@functools.lru_cache(maxsize=None)
def _jpeg_decoder():
    """Return `decode` of `jpeg.c`, or None where it cannot be compiled."""
    compiled = library("jpeg")
    if compiled is None:
        return None
    pointer = ctypes.c_void_p
    compiled.decode.argtypes = [ctypes.c_char_p, *[ctypes.c_long] * 5, pointer, pointer, ctypes.c_long]
    return compiled.decode


def _decode_part(data, box):
    """Return the pixels of `box` (top, left, height, width) of the JPEG file `data`, or None where others have to."""
    decoder = _jpeg_decoder()
    if decoder is None:
        return None
    height, width = box[2:]
    size = 3 * height * width
    start = size + size % 2  # of the memory to work in
    memory = _memory(start + len(data) + 3 * (height + 32) * (width + 32) + 4096)
    address = memory.ctypes.data
    refused = decoder(data, len(data), *box, address, address + start, memory.size - start)
    return None if refused else memory[:size].reshape(height, width, 3)


def resize(pixels, out, interpolation):
    """Write uint8 [H, W, 3] as numpy `pixels` into `out`, at its size.

    `out` is a contiguous uint8 tensor [height, width, 3].
    """
    if interpolation not in _TORCH_RESIZE:
        image = Image.fromarray(pixels).resize((out.shape[1], out.shape[0]), _PIL_FILTERS[interpolation])
        out.copy_(torch.from_numpy(np.array(image)))
        return
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))  # a slice costs the kernel 2.5 times as long as its copy
    image, result = (tensor.permute(2, 0, 1).unsqueeze(0) for tensor in (pixels, out))
    _TORCH_RESIZE[interpolation].out(image, list(out.shape[:2]), False, None, None, out=result)


class RandomResizedCrop:
    """Training transform: a random box of the image, resized to a square, perhaps flipped, perhaps augmented.

    The box is drawn as torchvision's RandomResizedCrop draws it (Szegedy et al., 2014). Randomness comes from Python's
    `random` alone; `augment` may use numpy's and torch's generators too.

    Args:
        size: side of the result in pixels.
        interpolation: "bilinear", "bicubic", or "random" for one of the two each time.
        scale, ratio: range of the box's share of the image area, and of its width / height.
        flip: probability of a horizontal flip.
        augment: function from a PIL image to a PIL image of the same size, or None.
    """

    def __init__(self, size, interpolation="bilinear", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, augment=None):
        if interpolation not in INTERPOLATIONS:
            raise UserError("interpolation {!r} is none of {}".format(interpolation, ", ".join(INTERPOLATIONS)))
        self.size, self.interpolation, self.scale, self.flip, self.augment = size, interpolation, scale, flip, augment
        self.log_ratio = (math.log(ratio[0]), math.log(ratio[1]))

    def box(self, height, width):
        """Draw (top, left, height, width) of a box in an image of `height` x `width` pixels."""
        for _ in range(10):
            area = height * width * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(*self.log_ratio))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        shortest, longest = math.exp(self.log_ratio[0]), math.exp(self.log_ratio[1])
        w = round(min(width, height * longest)) or 1
        h = round(min(height, width / shortest)) or 1
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image, out):
        """Write the transformed `image` (an `EncodedImage`) into `out`, a uint8 tensor [size, size, 3]."""
        box = self.box(image.height, image.width)
        flip = random.random() < self.flip
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = random.choice(("bilinear", "bicubic"))
        resize(image.pixels(box), out, interpolation)
        if flip:
            out.copy_(out.flip(1))
        if self.augment is not None:
            out.copy_(torch.from_numpy(np.array(self.augment(Image.fromarray(out.numpy())))))


class CenterCrop:
    """Evaluation transform: the shorter side resized to `resize` pixels, then the central square of `size` pixels."""

    def __init__(self, size, resize, interpolation="bilinear"):
        if resize < size:
            raise UserError("the shorter side ({} pixels) is smaller than the crop ({})".format(resize, size))
        self.size, self.resize, self.interpolation = size, resize, interpolation

    def __call__(self, image, out):
        """Write the transformed `image` (an `EncodedImage`) into `out`, a uint8 tensor [size, size, 3]."""
        shorter = min(image.height, image.width)
        height, width = (self.resize * side // shorter for side in (image.height, image.width))
        result = torch.empty(height, width, 3, dtype=torch.uint8)
        resize(image.pixels(), result, self.interpolation)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        out.copy_(result[top : top + self.size, left : left + self.size])
