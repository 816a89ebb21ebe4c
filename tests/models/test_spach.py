"""sMLPNet and SPACH against microsoft/SPACH: the same keys, norms, logits and gradients.

`data/fingerprints_spach.json` holds what `fingerprint` returned for the code of microsoft/SPACH at dcede1e (with timm
1.0.31 and einops 0.8.2; smlpnet_* with the drop path rate set to 0, spach_ms_s_patch4_224_hybrid_plus as
`spach_ms_s_patch4_224_hybrid(stem_type="conv4")`).
"""

import json
import zlib

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import ROOT, fill_, images, imported

with imported("SPACH-SMLP") as models:
    pass

FINGERPRINTS = json.loads((ROOT / "tests" / "data" / "fingerprints_spach.json").read_text())
GRADIENTS = {
    "to_patch_embedding.1.0.weight",
    "token_mix.3.0.conv_merge.Conv.weight",
    "token_mix.3.1.proj_h.weight",
    "token_mix.3.1.proh_w.weight",
    "token_mix.3.1.fuse.weight",
    "channel_mix.3.2.net.3.weight",
    "mlp_head.0.weight",
    "stem.proj.weight",
    "stem.proj.9.weight",
    "head.weight",
    "blocks.1.gamma_1",
    "blocks.1.spatial_func.fc1.weight",
    "blocks.1.spatial_func.qkv.weight",
    "blocks.1.cpe_net.net.1.weight",
    "blocks.1.channel_func.fc1.weight",
    "layer2.0.net.1.0.weight",
    "layer2.1.cpe_net.net.1.weight",
    "layer3.3.gamma_1",
    "layer3.3.spatial_func.fc1.weight",
    "layer3.3.spatial_func.qkv.weight",
    "layer4.1.norm2.bias",
}


def structure(model):
    """What can be said of a network without running it."""
    state = model.state_dict()
    text = "".join("{} {}\n".format(key, tuple(value.shape)) for key, value in state.items())
    eps = {type(m).__name__: m.eps for m in model.modules() if hasattr(m, "eps")}
    return {
        "keys": len(state),
        "crc32": zlib.crc32(text.encode()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "eps": eps,
    }


def logits(model, size):
    """Every 91st of the 1000 logits of one image."""
    with torch.no_grad():
        return model.eval()(images(1, size))[0, ::91].tolist()


def gradients(model):
    """The loss and some gradients' norms in a training step on four images of 64 x 64."""
    loss = F.cross_entropy(model.train()(images(4, 64)), torch.tensor([1, 20, 300, 4]))
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if name in GRADIENTS}
    return {"loss": loss.item(), **norms}


def test_every_network_has_a_fingerprint():
    assert sorted(FINGERPRINTS) == models.__all__
    assert len(models.__all__) == 24


@pytest.mark.parametrize("name", models.__all__)
def test_network_equals_upstream(name):
    build, expected = getattr(models, name), FINGERPRINTS[name]
    with torch.device("meta"):  # no time for initial weights that nothing reads
        assert structure(build()) == expected["structure"]
        small = build(image_size=64, drop_path_rate=0.0).double()
    fill_(small.to_empty(device="cpu"))
    scale = max(abs(value) for value in expected["logits_64"])
    assert logits(small, 64) == pytest.approx(expected["logits_64"], rel=1e-8, abs=1e-8 * scale)
    found = gradients(small)
    assert len(found) >= 5
    assert found == pytest.approx(expected["gradients_64"], rel=1e-8)


@pytest.mark.parametrize("name", [name for name in FINGERPRINTS if "logits_224" in FINGERPRINTS[name]])
def test_logits_at_224(name):
    expected = FINGERPRINTS[name]["logits_224"]
    scale = max(abs(value) for value in expected)
    assert logits(fill_(getattr(models, name)().double()), 224) == pytest.approx(expected, rel=1e-8, abs=1e-8 * scale)


def test_initial_weights_are_upstreams():
    state = models.spach_ms_xxs_patch4_224_mlp().state_dict()
    assert state["head.weight"].abs().max() == 0 and state["head.bias"].abs().max() == 0
    assert torch.equal(state["layer2.1.gamma_1"], torch.full((1, 1, 128), 1e-4))
    weight = state["layer3.1.channel_func.fc1.weight"]  # xavier: uniform
    assert weight.abs().max().item() == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=1e-3)
    assert state["layer3.0.net.1.0.weight"].std().item() == pytest.approx((2 / (4 * 256)) ** 0.5, rel=0.02)  # fan-out
    biases = [key for key in state if key.endswith("bias") and state[key].abs().max() > 0]
    assert biases == []
    weight = models.smlpnet_tiny().state_dict()["channel_mix.0.2.net.0.weight"]  # torch's default
    assert weight.abs().max().item() == pytest.approx(80**-0.5, rel=1e-2)


def _drop_probs(model):
    return [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]


@pytest.mark.parametrize(
    "name, default",
    [("smlpnet_tiny", 0.0), ("smlpnet_small", 0.2), ("smlpnet_base", 0.3), ("spach_ms_s_patch4_224_mlp", 0)],
)
def test_drop_path_rate_rises_linearly_to_the_one_passed(name, default):
    build = getattr(models, name)
    blocks = len(_drop_probs(build()))
    assert blocks == {"smlpnet_tiny": 26, "spach_ms_s_patch4_224_mlp": 22}.get(name, 38)
    for rate, model in ((default, build()), (0.5, build(drop_path_rate=0.5)), (0.0, build(drop_path_rate=0.0))):
        assert _drop_probs(model) == pytest.approx([rate * i / (blocks - 1) for i in range(blocks)])


def test_drop_path_rate_of_single_scale_spach_is_the_same_in_all_blocks():
    assert _drop_probs(models.spach_xs_patch16_224_attn()) == [0.0] * 12
    assert _drop_probs(models.spach_xs_patch16_224_attn(drop_path_rate=0.1)) == [0.1] * 12


def test_drop_path_drops_branches_of_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = models.spach_xxs_patch16_224_conv(drop_path_rate=0.25).blocks[0].drop_path
    out = drop(torch.ones(4000, 2, 3))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize("name", ["smlpnet_tiny", "spach_xxs_patch16_224_attn", "spach_ms_xxs_patch4_224_mlp"])
def test_drop_path_rate_that_is_passed_is_used(name):
    x = images(2, 64)
    for rate, differs in ((0.0, False), (0.5, True)):
        model = fill_(getattr(models, name)(num_classes=10, image_size=64, drop_path_rate=rate).double()).train()
        with torch.no_grad():
            assert torch.equal(model(x), model(x)) is not differs
            assert torch.equal(model.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "name, branches",
    [("smlpnet_tiny", 2 * 26), ("spach_xxs_patch16_224_attn", 2 * 12), ("spach_ms_xxs_patch4_224_mlp", 2 + 2 * 10)],
)
def test_drop_path_covers_every_branch_but_the_convolution_beside_token_mixing(name, branches):
    model, dropped = getattr(models, name)(num_classes=10, image_size=64), []
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.register_forward_hook(lambda *call: dropped.append(call))
    model.eval()(torch.zeros(1, 3, 64, 64))
    assert len(dropped) == branches


@pytest.mark.parametrize("name", ["smlpnet_tiny", "spach_xxs_patch16_224_attn", "spach_ms_xxs_patch4_224_mlp"])
def test_bf16_autocast_trains_with_drop_path(name):
    model = getattr(models, name)(num_classes=10, drop_path_rate=0.3, image_size=64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images(2, 64).float()), torch.tensor([1, 2]))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["smlpnet_tiny", "spach_xxs_patch16_224_mlp", "spach_ms_xxs_patch4_224_conv"])
def test_impossible_arguments_are_refused(name):
    build = getattr(models, name)
    for arguments, text in (
        ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"drop_path_rate": 1.0}, r"the drop path rate must be in \[0, 1\), not 1.0"),
        ({"image_size": 100}, "the image size 100 is no multiple of the patch size"),
    ):
        with pytest.raises(ValueError, match=text):
            build(**arguments)
    with pytest.raises(TypeError):
        build(drop_path=0.1)
    with pytest.raises(ValueError, match=r"the images have shape \(1, 3, 96, 64\), the network takes 64 x 64"):
        build(image_size=64)(torch.zeros(1, 3, 96, 64))
