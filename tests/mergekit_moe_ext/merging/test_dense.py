"""Dense merges of models that have tensors which mergekit's lists of architectures lack."""

import mergekit.card
import pytest
import torch
from mergekit.architecture.auto import infer_architecture_info
from mergekit.merge_methods import merge_tensors
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from mergekit_moe_ext import UserError
from tests.conftest import document, make_model, merge, read_tensors
from tests.mergekit_moe_ext.upcycling.test_wrapped import make_llava
from tests.tokenizers import save_tokenizer

NAMES = ["base", "math", "code"]
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    infer_architecture_info.cache_clear()  # it goes by the names of directories
    return tmp_path


WHOLE = {"weight": 1.0, "density": 1.0}
OF_FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
T5 = {"family": "t5", "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}


def make_vit(path, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = ViTConfig(num_attention_heads=2, image_size=16, patch_size=8, **sizes)
    ViTForImageClassification(config).save_pretrained(path)


@pytest.mark.parametrize(
    "config",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "tie_word_embeddings": True},
        {"family": "deepseek_v3", **DEEPSEEK},
        {"family": "vit"},
        # What these lack is in mergekit's lists, whose methods fail at it.
        {"family": "gpt_neox"},
        {"family": "falcon"},
        {"family": "cohere"},
        T5,
    ],
)
def test_every_tensor_is_merged(here, config):
    for seed, name in enumerate(NAMES):
        if config.get("family") == "vit":
            make_vit(here / name, seed)
        else:
            make_model(here / name, seed, **config)
    parameters = {"weight": 0.5, "density": 0.4}
    merged = read_tensors(merge(document("fast_ties", NAMES[1:], parameters=parameters)))
    sources = [read_tensors(here / name) for name in NAMES]
    assert merged.keys() == sources[0].keys()
    options = {"weight": [0.5, 0.5], "density": [0.4, 0.4]}
    for name, tensor in merged.items():
        tensors = [source[name] for source in sources]
        expected = merge_tensors(tensors, "ties", base_index=0, parameters=options)
        torch.testing.assert_close(tensor, expected, msg=name)


def test_gradients_and_filters_reach_what_is_not_listed(here):
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, attention_bias=True)
    weight = [{"filter": "k_proj.bias", "value": [0.0, 1.0]}, {"value": 2.0}]
    parameters = {"weight": weight, "density": 1.0, "normalize": False}
    merged = read_tensors(merge(document("fast_ties", ["math"], parameters=parameters)))
    base = read_tensors(here / "base")
    tuned = read_tensors(here / "math")
    for layer, expected in enumerate((0.0, 0.5, 1.0)):
        name = f"model.layers.{layer}.self_attn.k_proj.bias"
        torch.testing.assert_close(merged[name], base[name] + expected * (tuned[name] - base[name]))
        name = f"model.layers.{layer}.self_attn.q_proj.bias"
        torch.testing.assert_close(merged[name], base[name] + 2 * (tuned[name] - base[name]))


def test_the_merge_loads_and_computes_with_all_of_them(here):
    """With one fine-tune of weight 1 and density 1 the output is that fine-tune."""
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, attention_bias=True, mlp_bias=True)
    parameters = {"weight": 1.0, "density": 1.0}
    out = merge(document("dare", ["math"], parameters=parameters))
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(here / "math")(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected)


def test_slices_cannot_be_merged(here):
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, mlp_bias=True)
    config = document("dare", ["math"], parameters={"weight": 1.0, "density": 1.0})
    del config["models"]
    sources = [{"model": f"./{name}", "layer_range": [0, 3]} for name in NAMES[:2]]
    config["slices"] = [{"sources": sources}]
    with pytest.raises(UserError, match=r"lacks 9 of them, such as .*: merge whole models"):
        merge(config)
    assert not (here / "out").exists()


def edited(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_what_a_source_lacks_is_named(here):
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, mlp_bias=True)
    edited(here / "math", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.bias"))
    parameters = {"weight": 1.0, "density": 1.0}
    with pytest.raises(UserError, match=r"\./math does not hold model\.layers\.1\.mlp\.up_proj"):
        merge(document("dare", ["math"], parameters=parameters))
    assert not (here / "out").exists()


def test_tokens_are_aligned_in_what_is_not_listed(here):
    """A head's bias has a number per token."""
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, family="phi", vocab_size=96 + seed)
        save_tokenizer(here / name, 96 + seed, ("for",)[:seed])
    parameters = {"weight": 1.0, "density": 1.0}
    out = merge(document("dare", ["math"], parameters=parameters, tokenizer_source="union"))
    merged = read_tensors(out)
    tuned = read_tensors(here / "math")
    for name in ("lm_head.weight", "lm_head.bias"):
        assert merged[name].shape == tuned[name].shape == (97, *merged[name].shape[1:])
        torch.testing.assert_close(merged[name], tuned[name])


def make_qwen2_vl(path, seed, vocab_size):
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "num_hidden_layers": 2, "rope_parameters": rope, "vocab_size": vocab_size}
    torch.manual_seed(seed)
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    Qwen2VLForConditionalGeneration(config).save_pretrained(path)


@pytest.mark.parametrize("method", ["dare", "moe_linear"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_number_of_tokens_is_that_of_the_language_model(here, family, method):
    """mergekit writes it beside the config of the language model, where nothing reads it."""
    for seed, name in enumerate(NAMES[:2]):
        if family == "llava":
            make_llava(here / name, "llama", seed, vocab_size=96 + seed)
        else:
            make_qwen2_vl(here / name, seed, 96 + seed)
        save_tokenizer(here / name, 96 + seed, ("for",)[:seed])
    parameters = WHOLE if method == "dare" else {}
    models = ["math"] if method == "dare" else ["math", "base"]
    out = merge(document(method, models, parameters=parameters, tokenizer_source="union"))
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.text_config.vocab_size == 97
    if method == "dare":
        tuned = AutoModelForImageTextToText.from_pretrained(here / "math").state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, tuned[name], msg=name)


@pytest.mark.parametrize("config", [{}, {"mlp_only_layers": [0]}])
def test_experts_that_are_stacked_in_memory_are_planned_once(here, config):
    """mergekit's list has their names in memory, and lacks the biases of attention."""
    for seed, name in enumerate(NAMES[:2]):
        sizes = {**OF_FOUR_EXPERTS, "head_dim": 8, "attention_bias": True, **config}
        make_model(here / name, seed, family="qwen3_moe", **sizes)
    out = merge(document("dare", ["math"], parameters=WHOLE))
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    expected = AutoModelForCausalLM.from_pretrained(here / "math").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_what_mergekit_lists_twice_is_written_once(here):
    """Its list of Qwen2.5-VL has four tensors a second time."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "num_hidden_layers": 2, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    for seed, name in enumerate(NAMES[:2]):
        torch.manual_seed(seed)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(here / name)
    merged = read_tensors(merge(document("dare", ["math"], parameters=WHOLE)))
    tuned = read_tensors(here / "math")
    assert merged.keys() == tuned.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, tuned[name], msg=name)


def test_gradients_go_over_the_layers_of_each_tower(here):
    text = {**TEXT, "num_hidden_layers": 5, "model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    vision["model_type"] = "clip_vision_model"
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    for seed, name in enumerate(NAMES[:2]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(config).save_pretrained(here / name)
    parameters = {"weight": [0.0, 1.0], "density": 1.0}
    merged = read_tensors(merge(document("dare", ["math"], parameters=parameters)))
    base = read_tensors(here / "base")
    tuned = read_tensors(here / "math")
    for layer in range(5):
        (name,) = [each for each in merged if f"layers.{layer}.mlp.up_proj" in each]
        expected = base[name] + layer / 4 * (tuned[name] - base[name])
        torch.testing.assert_close(merged[name], expected, msg=name)


def of_trunk(tensors):
    """Renames the tensors as in the checkpoint of a trunk alone."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


@pytest.mark.parametrize("sources", [["math"], ["base", "math"]])
def test_checkpoints_of_the_trunk_are_read(here, sources):
    """Bloom's on the Hub are such."""
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, family="bloom")
    for name in sources:
        edited(here / name, of_trunk)
    merged = AutoModelForCausalLM.from_pretrained(
        merge(document("dare", ["math"], parameters=WHOLE))
    )
    tuned = AutoModelForCausalLM.from_pretrained(here / "math").state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, tuned[name], msg=name)


def test_a_source_is_never_passed_over(here):
    """mergekit calls all tensors optional whose names it has to infer."""
    for seed, name in enumerate(NAMES[:2]):
        make_model(here / name, seed, family="opt")
    edited(here / "math", lambda tensors: tensors.pop("model.decoder.layers.1.fc1.weight"))
    with pytest.raises(UserError, match=r"\./math does not hold it, and \./base does"):
        merge(document("dare", ["math"], parameters=WHOLE))
    assert not (here / "out").exists()


@pytest.mark.parametrize("family", ["vit", "opt"])
def test_loras_of_families_that_mergekit_has_no_list_of(here, family):
    if family == "vit":
        make_vit(here / "base", 0)
    else:
        make_model(here / "base", 0, family=family)
    kind = ViTForImageClassification if family == "vit" else AutoModelForCausalLM
    names = ["q_proj", "query"]  # a ViT has the one or the other, by the version of transformers
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapted = get_peft_model(kind.from_pretrained(here / "base"), config)
    adapted.save_pretrained(here / "lora")
    expected = adapted.merge_and_unload().state_dict()
    source = {"model": "./base+./lora", "parameters": WHOLE}
    merge(document("dare", [source], base_model="./base"))
    got = kind.from_pretrained(here / "out").state_dict()
    assert any(
        not torch.equal(tensor, expected[name])
        for name, tensor in kind.from_pretrained(here / "base").state_dict().items()
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


def test_what_a_model_reads_images_with_comes_along(here, caplog):
    for seed, name in enumerate(NAMES[:2]):
        make_vit(here / name, seed)
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        processor.save_pretrained(here / name)
    out = merge(document("dare", ["math"], parameters=WHOLE))
    classify = pipeline("image-classification", str(out))
    expected = pipeline("image-classification", str(here / "math"))
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    assert classify(image) == expected(image)
    assert "tokenizer" not in caplog.text  # there is none to be missed


SMALL_BERT = {**TEXT, "num_hidden_layers": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2}
UNDESCRIBED = {
    "bert": (BertModel, BertConfig(**SMALL_BERT)),  # optional tensors with other names
    "clip": (
        CLIPModel,
        CLIPConfig(
            text_config={**TOWER, "vocab_size": 96},
            vision_config={**TOWER, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        ),
    ),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    ),
}


@pytest.mark.parametrize("method", ["dare", "fast_ties"])
@pytest.mark.parametrize("family", UNDESCRIBED)
def test_families_that_mergekit_cannot_describe(here, family, method):
    kind, config = UNDESCRIBED[family]
    for seed, name in enumerate(NAMES[:2]):
        torch.manual_seed(seed)
        model = kind(config)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("num_batches_tracked"):
                buffer.fill_(5 + seed)
        model.save_pretrained(here / name)
    models = [{"model": "./math", "parameters": WHOLE}]
    out = merge(document(method, models, dtype="float32"))
    merged, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    tuned = kind.from_pretrained(here / "math").state_dict()
    for name, tensor in merged.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.item() == 5 and read_tensors(out)[name].dtype == torch.int64
        else:
            torch.testing.assert_close(tensor, tuned[name], msg=name)


def test_two_architectures_are_not_mixed(here):
    make_model(here / "base", 0)
    make_model(here / "math", 1, family="qwen2")
    with pytest.raises(UserError, match="--allow-crimes"):
        merge(document("dare", ["math"], parameters=WHOLE))


def test_the_card_does_not_ask_the_hub_for_a_directory(here, monkeypatch):
    """mergekit's does, of `base` though not of `./base`, and fails without a network."""

    def unreachable(*_, **__):
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.repo_exists", unreachable)
    for name in ("base", "math"):
        make_model(here / name, 0)
    config = {
        "merge_method": "dare",
        "base_model": "base",
        "models": [{"model": "math", "parameters": {"weight": 1.0}}],
    }
    out = merge(config)
    card = (out / "README.md").read_text()
    assert "* math" in card and "using base as a base" in card
    with pytest.raises(OSError, match="no network"):
        mergekit.card.is_hf("math")  # of a stock merge
