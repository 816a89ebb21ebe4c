"""Official MnasNet checkpoints: torchvision's, of both versions."""


def convert(state, model):
    """Fit `state` and `model` to each other.

    The first checkpoints of torchvision have a stem of 32 and 16 channels at every width. They say so in metadata that
    most tools strip, so the shape of the stem decides.

    Args:
        state: flat state dict of a checkpoint file.
        model: the `MnasNet` that takes it; its stem is replaced where the file needs that.

    Returns:
        (state, notes): the state dict, and lines that say what was done.
    """
    if len(state.get("layers.0.weight", ())) == 32 != model.layers[0].out_channels:
        model.use_version_1_stem()
        return state, ["version 1 of the network: the stem has 32 and 16 channels"]
    return state, []
