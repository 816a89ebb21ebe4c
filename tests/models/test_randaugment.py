"""RandAugment of SPACH-SMLP at its strongest, where timm's posterize keeps no bit, which newer Pillow refuses."""

import numpy as np
from PIL import Image

from tests.helpers import imported


def test_the_strongest_augmentation_is_no_error():
    with imported("SPACH-SMLP", "main") as main:
        args = main.build_parser().parse_args(["--aa", "rand-m10-inc1"])
        augment = main.build_augment(args)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))
    np.random.seed(0)
    sizes = {augment(image).size for _ in range(300)}
    assert sizes == {(32, 32)}
