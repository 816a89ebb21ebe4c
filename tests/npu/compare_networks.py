"""Compare every bundle's network on the card with the CPU, forward and backward, in float32: compare_networks.py"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import common  # noqa: F401  isort: skip
import torch

from tests.helpers import BUNDLES, fill_, images, imported

ARCHITECTURES = {
    "MnasNet": lambda models: models.mnasnet0_5(10),
    "PnasNet5Large": lambda models: models.pnasnet5large(10),
    "SPACH-SMLP": lambda models: models.smlpnet_tiny(10, image_size=64),
    "SPNASNet_100": lambda models: models.spnasnet_100(10),
    "ShuffleNetV2": lambda models: models.shufflenet_v2_x1_0(10),
}


def run(model, images):
    """Return the logits and all gradients; dropout is off, BatchNorm counts."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits = model.train()(images)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(images), device=images.device)).backward()
    return [logits.detach()] + [parameter.grad for parameter in model.parameters()]


for bundle in BUNDLES:
    with imported(bundle) as models:
        model = fill_(ARCHITECTURES[bundle](models).double()).float()
    inputs = images(4, 64).float()
    on_card = copy.deepcopy(model).to("npu:0")
    for ours, theirs in zip(run(model, inputs), run(on_card, inputs.to("npu:0"))):
        assert theirs.device.type == "npu"
        assert (ours - theirs.cpu()).abs().max() <= 1e-5 * ours.abs().max() + 1e-9, bundle
    print(bundle, "equal")
