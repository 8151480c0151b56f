"""Weight-ensembling models of texts and images: which mask counts where."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    OwlViTConfig,
    OwlViTModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from tests.mergekit_moe_ext.ensembles import FAMILIES, build

SIDE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**SIDE, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 62}
IMAGE = {**SIDE, "image_size": 12, "patch_size": 4, "num_patches": 9}
# SigLIP has no token for the whole image.
TOWERS = {
    "clip": (CLIPModel, CLIPConfig, {"projection_dim": 16}, 10),
    "siglip": (SiglipModel, SiglipConfig, {}, 9),
    "siglip2": (Siglip2Model, Siglip2Config, {}, 9),
    "owlvit": (OwlViTModel, OwlViTConfig, {"projection_dim": 16}, 10),
}


def two_towers(monkeypatch, kind):
    """A model all of whose MLPs are upscaled, and how many tokens an image has in it."""
    stock_class, config_class, more, tokens = TOWERS[kind]
    config = config_class(text_config=dict(TEXT), vision_config=dict(IMAGE), **more)
    monkeypatch.setitem(FAMILIES, "two towers", (stock_class, config))
    return build("two towers"), tokens


@pytest.mark.parametrize("kind", ["clip", "siglip", "owlvit"])
@torch.no_grad()
def test_a_mask_of_texts_says_nothing_of_images(monkeypatch, kind):
    """As many text tokens as an image has, of which some are padding: image embeddings stay."""
    model, tokens = two_towers(monkeypatch, kind)
    draw = torch.Generator().manual_seed(4)
    inputs = {
        "input_ids": torch.randint(3, 60, (2, tokens), generator=draw),
        "pixel_values": torch.randn(2, 3, 12, 12, generator=draw),
        "attention_mask": torch.ones(2, tokens, dtype=torch.long),
    }
    shapes = {}
    for name in model.ensembling.groups:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: shapes.__setitem__(name, tuple(args[0].shape[:2]))
        )
    whole = model(**inputs)
    towers = {name.split(".")[0] for name, shape in shapes.items() if shape == (2, tokens)}
    assert towers == {"text_model", "vision_model"}  # so that the mask's shape fits both
    inputs["attention_mask"][0, 5:] = 0
    padded = model(**inputs)
    assert torch.equal(padded.image_embeds, whole.image_embeds)
    assert not torch.equal(padded.text_embeds, whole.text_embeds)


@torch.no_grad()
def test_an_image_s_own_mask_leaves_its_padding_out(monkeypatch):
    """SigLIP 2 pads images of few patches; what the padding holds must not choose."""
    model, _ = two_towers(monkeypatch, "siglip2")
    draw = torch.Generator().manual_seed(4)
    inputs = {
        "input_ids": torch.randint(3, 60, (2, 9), generator=draw),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
        "pixel_values": torch.randn(2, 9, 48, generator=draw),
        "pixel_attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
        "spatial_shapes": torch.tensor([[3, 3], [2, 3]]),
    }
    whole = model(**inputs).image_embeds
    inputs["pixel_values"][1, 6:] = 7.0
    torch.testing.assert_close(model(**inputs).image_embeds, whole)
    inputs["pixel_values"][1, 5] = 7.0
    assert (model(**inputs).image_embeds - whole)[1].abs().max() > 1e-3
