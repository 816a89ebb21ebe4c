"""Write a bundle's logits for weights and images that are the same everywhere: logits.py BUNDLE SIZE OUT.npy."""

import sys

import numpy as np
import torch

from tests.helpers import fill_, images, imported

bundle, size, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with imported(bundle, "main") as main:
    parser = main.build_parser()
    arch = parser.get_default("arch")
    options = {"image_size": size} if bundle == "SPACH-SMLP" else {}
    model = fill_(getattr(main.models, arch)(1000, **options).double()).float().eval()
with torch.no_grad():
    np.save(out, model(images(2, size).float()).numpy())
