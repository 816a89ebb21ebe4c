"""Write an ImageFolder of real handwritten digits: python tests/tools/sample_data.py OUT

1797 digits of 8 x 8 pixels (UCI optical recognition of handwritten digits, E. Alpaydin and C. Kaynak, CC BY 4.0), the
first 1497 to OUT/train/<digit>/, the last 300 to OUT/val/<digit>/, as RGB JPEG files of 64 x 64 pixels.
"""

import pathlib
import sys

from PIL import Image

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
TILE, PER_ROW, TRAIN, SIDE = 8, 43, 1497, 64


def write(out):
    """Write the folder `out`; returns (train, val) counts."""
    out = pathlib.Path(out)
    sheet = Image.open(DATA / "digits.png").convert("L")
    labels = (DATA / "digits_labels.txt").read_text().strip()
    for index, label in enumerate(labels):
        left, top = index % PER_ROW * TILE, index // PER_ROW * TILE
        tile = sheet.crop((left, top, left + TILE, top + TILE)).resize((SIDE, SIDE), Image.BICUBIC).convert("RGB")
        folder = out / ("train" if index < TRAIN else "val") / label
        folder.mkdir(parents=True, exist_ok=True)
        tile.save(folder / "{:04d}.jpg".format(index), quality=95)
    return TRAIN, len(labels) - TRAIN


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("{} training and {} validation images in {}".format(*write(sys.argv[1]), sys.argv[1]))
