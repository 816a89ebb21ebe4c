"""Official checkpoints of ShuffleNetV2, torchvision's and the authors' (megvii), for the networks of this bundle."""

import copy
import re
from collections import OrderedDict

import torch
from torch import nn

from .shufflenetv2 import REPEATS, STEM, MegviiFirstBlock

BLOCKS = ["{}.{}".format(stage, index) for stage, repeats in REPEATS.items() for index in range(repeats)]


def convert(state, model):
    """Return `state` with the keys of `model`, and notes on what was changed.

    Args:
        state: dict of name to tensor, from torchvision or megvii, or saved by this bundle; with any number of classes:
            the rows of `model.classifier_keys` are the caller's to adapt.
        model: a network of this bundle, in either form of the channel shuffle. A file of megvii's, and one saved after
            loading such a file, turn it in place into megvii's form (`use_megvii_form`), which replaces parameters:
            build the optimizer afterwards.

    Raises RuntimeError, and leaves the model alone, when it is megvii's file of another width.
    """
    notes = []
    if "first_conv.0.weight" in state:
        state = _renamed(state)
        state["megvii_form"] = torch.ones((), dtype=torch.long)
        whole = copy.deepcopy(model).use_megvii_form()  # refuses what cannot be reordered
        if "fc.weight" in state:
            whole.fc = nn.Linear(whole.fc.in_features, len(state["fc.weight"])).to(state["fc.weight"])
            if "fc.bias" not in state:
                state["fc.bias"] = torch.zeros(len(state["fc.weight"]))
                notes.append("megvii's classifier has no bias: it starts at zero")
        whole.load_state_dict(state)
        state = _reordered(whole.state_dict(), whole.widths)
        notes.append("converted megvii's names and order of channels")
    if "megvii_form" in state:
        model.use_megvii_form()
        notes.append("the model is now in megvii's form: it takes its images back to BGR in 0..255 itself")
    return state, notes


def _renamed(state):
    renamed = OrderedDict()
    for key, value in state.items():
        name = re.sub("^first_conv", "conv1", re.sub("^conv_last", "conv5", re.sub("^classifier.0", "fc", key)))
        match = re.match(r"features\.(\d+)\.branch_(proj|main)(.*)", name)
        if match and int(match.group(1)) < len(BLOCKS):
            branch = "branch1" if match.group(2) == "proj" else "branch2"
            name = "{}.{}{}".format(BLOCKS[int(match.group(1))], branch, match.group(3))
        renamed[name] = value
    return renamed


def _reordered(state, widths):
    """Return megvii's weights, already under our names, in the order of our channels.

    megvii's blocks move the even channels to the first half and append what branch2 makes of the odd ones. Ours, as
    torchvision's, move the first half to the even channels and put between what branch2 makes of the second. In the
    lists below entry j is megvii's index of our channel j.
    """
    state = OrderedDict(state)

    def take(layer, outputs=None, inputs=None):
        for key in state:
            if key.startswith(layer + ".") and state[key].dim() > 0:
                state[key] = state[key][outputs] if inputs is None else state[key][:, inputs]

    incoming = list(range(STEM))
    for (stage, repeats), width in zip(REPEATS.items(), widths):
        half, kept = width // 2, len(incoming)
        matching = _matching(width)
        order = list(matching) if kept == half else MegviiFirstBlock.megvii_order(width)
        for index in range(repeats):
            branch1, branch2 = ("{}.{}.branch{}.".format(stage, index, branch) for branch in (1, 2))
            if index == 0:
                inputs = incoming
                outputs = [channel - kept for channel in order if channel >= kept]
                for layer in ("0", "1"):  # depthwise convolution and its batch norm
                    take(branch1 + layer, outputs=incoming)
                take(branch1 + "2", inputs=incoming)
                for layer in ("2", "3"):
                    take(branch1 + layer, outputs=[channel for channel in order if channel < kept])
            else:
                inputs = [channel // 2 for channel in order[half:]]
                outputs = [channel - half for channel in matching[1::2]]
                order[::2], order[1::2] = [channel // 2 for channel in order[:half]], matching[1::2]
            take(branch2 + "0", inputs=inputs)
            for layer in ("5", "6"):
                take(branch2 + layer, outputs=outputs)
        incoming = order
    take("conv5.0", inputs=incoming)
    return state


def _matching(width):
    """Return a permutation that both wirings carry over from block to block, apart from the wirings' own moves.

    It has to satisfy p[2 * j] == p[j] // 2 for our first half, and to give odd channels to our second half. Each run
    odd, 2 * odd, 4 * odd, ... below `width`, taken backwards, does.
    """
    matching = list(range(width))
    for odd in range(1, width, 2):
        run = [odd]
        while 2 * run[-1] < width:
            run.append(2 * run[-1])
        for ours, theirs in zip(run, reversed(run)):
            matching[ours] = theirs
    return matching
