"""Models that read images or sound beside a text, or sound by its samples: what their modules see
is not what the attention mask is of.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from peft_routing import RoutedLoraConfig, UserError
from peft_routing.calls import reads_of
from tests.conftest import TINY
from tests.peft_routing.adapters import save_lora

TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGES = {"image_size": 8, "patch_size": 4}  # four patches, and the token of the class
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
PADDED = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def clip() -> Any:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 96, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**TOWER, **IMAGES}, projection_dim=16)
    return CLIPModel(config).eval()


def llava() -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**TINY),
        vision_config=CLIPVisionConfig(**TOWER, **IMAGES),
        image_token_index=95,
    )
    return LlavaForConditionalGeneration(config).eval()


def wav2vec2() -> Any:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **TOWER,
        num_labels=3,
        conv_dim=(16, 16),
        conv_stride=(4, 4),
        conv_kernel=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return Wav2Vec2ForSequenceClassification(config).eval()


def routed(make: Any, folder: Path, targets: list[str], **config: Any) -> Any:
    experts = {}
    for seed, name in enumerate(("first", "second")):
        save_lora(folder / name, seed, make(), target_modules=targets, task_type=None)
        experts[name] = str(folder / name)
    settings = {"router": "arrow", "router_temperature": 0.05, **config}
    return get_peft_model(make(), RoutedLoraConfig(experts=experts, **settings))


def with_images(length: int) -> Tensor:
    """Prompts in which each image has its four tokens."""
    images = torch.full((2, 4), 95)
    words = torch.randint(3, 90, (2, length - 4), generator=torch.Generator().manual_seed(3))
    return torch.cat([images, words], dim=1)


def test_what_modules_read() -> None:
    model = llava()
    places = {
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": "media",
        "model.multi_modal_projector.linear_1": "either",
        "model.language_model.layers.0.self_attn.q_proj": "text",
        "lm_head": "text",
    }
    for module, expected in places.items():
        assert reads_of(model, module) == expected
    assert reads_of(clip(), "vision_model.encoder.layers.0.mlp.fc1") == "media"
    assert reads_of(clip(), "text_model.encoder.layers.0.mlp.fc1") == "text"
    # Sound is all that this one reads, and the mask is of it.
    assert reads_of(wav2vec2(), "wav2vec2.encoder.layers.0.attention.q_proj") == "text"


@torch.no_grad()
def test_the_mask_of_the_text_says_nothing_of_an_image(tmp_path: Path) -> None:
    """The text has as many tokens as the image."""
    model = routed(clip, tmp_path, ["q_proj", "fc1"], granularity="sequence")
    inputs = {"input_ids": IDS, "pixel_values": PIXELS}
    whole = model(**inputs, attention_mask=torch.ones_like(IDS))
    padded = model(**inputs, attention_mask=PADDED)
    assert torch.equal(whole.image_embeds, padded.image_embeds)
    assert not torch.allclose(whole.text_embeds, padded.text_embeds, atol=1e-4)
    # The tower alone, and each image alone.
    alone = model.get_image_features(pixel_values=PIXELS).pooler_output
    normalized = alone / alone.norm(dim=-1, keepdim=True)
    assert torch.allclose(normalized, whole.image_embeds, atol=1e-5)
    for row in range(2):
        one = model.get_image_features(pixel_values=PIXELS[row : row + 1]).pooler_output
        assert torch.allclose(one[0], alone[row], atol=1e-5)


@torch.no_grad()
def test_an_image_is_routed_by_the_mean_over_its_tokens(tmp_path: Path) -> None:
    model = routed(clip, tmp_path, ["q_proj"], granularity="sequence")
    layer = model.base_model.model.vision_model.encoder.layers[0].self_attn.q_proj
    seen: dict[str, Tensor] = {}

    def keep(module: Any, arguments: Any, output: Tensor) -> None:
        seen.update(x=arguments[0], update=output - module.base_layer(arguments[0]))

    layer.register_forward_hook(keep)
    model(input_ids=IDS, pixel_values=PIXELS, attention_mask=PADDED)
    router = layer.router_of("default")
    for row, x in enumerate(seen["x"]):
        coefficients = router.coefficients(router.scores(x).mean(dim=0))
        expected = layer.routed_lora_experts["default"](x, coefficients)
        assert torch.allclose(seen["update"][row], expected, atol=1e-5)


@torch.no_grad()
def test_a_tower_and_a_decoder_that_generates(tmp_path: Path) -> None:
    model = routed(llava, tmp_path, ["q_proj", "v_proj", "linear_1"], granularity="sequence")
    ids = with_images(14)
    inputs = {"input_ids": ids, "pixel_values": PIXELS}
    mask = torch.ones_like(ids)
    assert torch.equal(model(**inputs).logits, model(**inputs, attention_mask=mask).logits)
    settings: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**inputs, attention_mask=mask, **settings)
    for row in range(2):
        alone = model.generate(
            input_ids=ids[row : row + 1], pixel_values=PIXELS[row : row + 1], **settings
        )
        assert torch.equal(alone[0], together[row])


@torch.no_grad()
def test_padded_sound_is_routed_as_without_its_padding(tmp_path: Path) -> None:
    model = routed(wav2vec2, tmp_path, ["q_proj", "v_proj"], granularity="sequence")
    sound = torch.randn(1, 320, generator=torch.Generator().manual_seed(4))
    sound[:, 160:] = 0
    mask = torch.ones(1, 320, dtype=torch.long)
    mask[:, 160:] = 0
    layer = model.base_model.model.wav2vec2.encoder.layers[0].attention.q_proj
    seen = []
    layer.register_forward_hook(
        lambda module, arguments, output: seen.append((arguments[0], output))
    )
    model(input_values=sound, attention_mask=mask)
    ((x, output),) = seen
    router = layer.router_of("default")
    frames = int(model.base_model.model._get_feat_extract_output_lengths(torch.tensor(160)))
    assert 0 < frames < x.shape[1]
    coefficients = router.coefficients(router.scores(x[0, :frames]).mean(dim=0))
    expected = layer.base_layer(x[0]) + layer.routed_lora_experts["default"](x[0], coefficients)
    assert torch.allclose(output[0], expected, atol=1e-5)


def deberta() -> Any:
    torch.manual_seed(0)
    config = DebertaV2Config(
        **TOWER,
        vocab_size=96,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        share_att_key=True,
    )
    return DebertaV2ForMaskedLM(config).eval()


@pytest.mark.parametrize("kind", ["clip", "llava", "wav2vec2", "deberta"])
def test_experts_are_balanced_where_modules_see_other_tokens(kind: str, tmp_path: Path) -> None:
    ids = with_images(14)
    inputs: dict[str, Any] = {
        "clip": {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": PADDED},
        "llava": {"input_ids": ids, "pixel_values": PIXELS, "labels": ids},
        "wav2vec2": {"input_values": torch.randn(2, 320), "labels": torch.tensor([0, 1])},
        "deberta": {"input_ids": IDS, "labels": IDS, "attention_mask": PADDED},
    }[kind]
    if kind == "clip":
        inputs["return_loss"] = True
    if kind == "llava":
        inputs["attention_mask"] = torch.ones_like(ids)
    if kind == "wav2vec2":
        inputs["attention_mask"] = torch.ones(2, 320, dtype=torch.long)
    make = {"clip": clip, "llava": llava, "wav2vec2": wav2vec2, "deberta": deberta}[kind]
    targets = ["query_proj", "key_proj"] if kind == "deberta" else ["q_proj", "v_proj"]
    losses = []
    for weight in (0.0, 0.01):
        model = routed(
            make,
            tmp_path / str(weight),
            targets,
            router="linear",
            init="arrow",
            router_temperature=1.0,
            router_aux_loss_coef=weight,
        ).train()
        torch.manual_seed(0)
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
    if kind != "wav2vec2":  # which masks spans at random
        assert losses[1] > losses[0]


def test_images_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    model = routed(clip, tmp_path, ["q_proj"], granularity="sequence")
    layer = model.base_model.model.vision_model.encoder.layers[0].self_attn.q_proj
    with pytest.raises(UserError, match=r"cannot tell the images.*\(7, 32\)"):
        layer(torch.randn(7, 32))


@torch.no_grad()
def test_a_language_model_that_sees_other_tokens_than_the_mask_is_refused(tmp_path: Path) -> None:
    """Tokens of its own are no image, by which an answer would choose, too."""
    model = routed(llava, tmp_path, ["v_proj"], granularity="sequence")
    language_model = model.base_model.model.model.language_model

    def prepend(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        embeds = keywords["inputs_embeds"]
        longer = torch.cat([embeds[:, :2], embeds], dim=1)
        return arguments, {"inputs_embeds": longer, "use_cache": False}

    language_model.register_forward_pre_hook(prepend, with_kwargs=True)
    ids = with_images(14)
    with pytest.raises(UserError, match=r"attention mask of shape.*\(2, 16\).*it is \(2, 14\)"):
        model(input_ids=ids, pixel_values=PIXELS, attention_mask=torch.ones_like(ids))
