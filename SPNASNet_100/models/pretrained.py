"""Official checkpoints of this network: timm's `spnasnet_100`, `.pth` or `.safetensors`, whose keys are ours."""


def convert(state, model):
    """Return (`state`, notes on what was changed): nothing was."""
    return state, []
