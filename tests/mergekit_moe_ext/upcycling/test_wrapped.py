"""Dense models that also see, with their language models merged into a mixture: against the dense
model, with and without images, and loaded by transformers alone.
"""

import click
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import mergekit_moe_ext
from tests.conftest import document, merge, read_tensors
from tests.tokenizers import save_tokenizer

IMAGE = 90  # the token in whose place a patch of an image comes
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STOCK = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "phi3": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}
GENERIC = ("gemma", "gemma2", "starcoder2")


def make_llava(path, inner, seed=0, wrapper="llava", **changes):
    """A tiny wrapper around a language model of the type `inner`; seeds other than 0 are fine-tunes
    of the first.
    """
    text = AutoConfig.for_model(inner, **{**TEXT, "head_dim": 8, **changes})
    config = AutoConfig.for_model(
        wrapper,
        text_config=text.to_dict(),
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(path)


def inputs(with_images):
    ids = torch.arange(1, 31).reshape(2, 15) * 7 % 89 + 1
    if not with_images:
        return {"input_ids": ids}
    ids[:, 3:7] = IMAGE  # the four patches of one image in each text
    pixels = torch.linspace(-3, 3, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
    return {"input_ids": ids, "pixel_values": pixels}


@torch.inference_mode()
def logits(path, with_images):
    model, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()(**inputs(with_images)).logits


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_computes_the_same(first, second):
    for with_images in (False, True):
        wanted = logits(first, with_images)
        largest = wanted.abs().max().item()
        assert torch.allclose(logits(second, with_images), wanted, atol=1e-5 * largest)
    images, texts = logits(first, True), logits(first, False)
    assert not torch.allclose(images[:, -1], texts[:, -1], atol=1e-3)  # it does see


@pytest.mark.parametrize("inner", [*STOCK, *GENERIC])
def test_equal_sources_give_the_dense_model_with_images_too(here, inner):
    make_llava(here / "base", inner, 1)
    out = merge(document("moe_linear", ["base"] * 3))
    check_computes_the_same("base", out)
    config = AutoConfig.from_pretrained(out)
    if inner in STOCK:
        assert config.architectures == ["LlavaForConditionalGeneration"]
        assert config.text_config.model_type == STOCK[inner]
        assert not list(out.glob("*.py"))
    else:
        assert config.architectures == ["UpcycledMoeLlavaForConditionalGeneration"]


@pytest.mark.parametrize("architecture", ["stock", "upcycled"])
def test_what_is_not_of_the_language_model_is_the_base_s(here, caplog, architecture):
    for seed, name in enumerate(("base", "math", "code")):
        make_llava(here / name, "llama", seed)
    parameters = {"architecture": architecture}
    out = read_tensors(merge(document("moe_linear", ["math", "code"], parameters=parameters)))
    sources = {name: read_tensors(here / name) for name in ("base", "math", "code")}
    outside = [name for name in sources["base"] if "language_model" not in name]
    assert len(outside) > 30
    for name in outside:
        assert torch.equal(out[name], sources["base"][name]), name
    assert "outside the language model" in caplog.text
    # Attention is the mean of the two, and the FFNs are theirs.
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    mean = (sources["math"][name] + sources["code"][name]) / 2
    assert torch.allclose(out[name], mean, atol=1e-6)
    ffn = "language_model.model.layers.1.mlp.up_proj.weight"
    expert = "language_model.model.layers.1.block_sparse_moe.experts.1.w3.weight"
    got = out[expert] if architecture == "stock" else out[ffn][1]
    assert torch.equal(got, sources["code"][ffn])


def test_other_wrappers(here):
    for wrapper in ("vipllava", "llava_next", "aya_vision"):
        extra = {}
        make_llava(here / wrapper, "llama", 1, wrapper=wrapper, **extra)
        out = merge(document("moe_linear", [wrapper] * 2, base=wrapper), f"{wrapper}-moe")
        config = AutoConfig.from_pretrained(out)
        assert config.model_type == wrapper and config.text_config.model_type == "mixtral"
        wanted, got = logits(wrapper, False), logits(out, False)
        assert torch.allclose(got, wanted, atol=1e-5 * wanted.abs().max().item())


def test_language_models_of_two_kinds_are_refused(here):
    make_llava(here / "base", "llama")
    make_llava(here / "other", "qwen2")
    for architecture in ("auto", "stock", "upcycled"):
        parameters = {"architecture": architecture}
        with pytest.raises(click.ClickException, match=r"qwen2|llama"):
            merge(document("moe_linear", ["base", "other"], parameters=parameters))
        assert not (here / "out").exists()


@pytest.mark.parametrize("architecture", ["stock", "upcycled"])
@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_gates_of_prompts(here, architecture, mode):
    make_llava(here / "base", "llama")
    make_llava(here / "math", "llama", 1)
    save_tokenizer(here / "base", 96)
    models = []
    for name, prompt in (("base", "w3 w4 w5"), ("math", "w20 w21")):
        models.append({"model": f"./{name}", "parameters": {"positive_prompts": [prompt]}})
    parameters = {"architecture": architecture, "gate_mode": mode, "experts_per_token": 1}
    merge(document("moe_linear", models, parameters=parameters))
    data = here / "data.jsonl"
    data.write_text('{"text": "w3 w4 w5"}\n{"text": "w3 w4 w5"}\n')
    usage = mergekit_moe_ext.count_usage(
        "out", [f"a={data}"], reading=mergekit_moe_ext.Reading(quiet=True)
    )
    layers = usage.tasks["a"].layers
    assert len(layers) == 2
    first = next(iter(layers.values()))
    assert sum(first.counts) == 6
    if mode == "hidden":  # the last token of each text, which the prompt ends with
        assert first.counts[0] >= 2


@pytest.mark.parametrize("architecture", ["stock", "upcycled"])
def test_it_grows_and_trains(here, architecture):
    for seed, name in enumerate(("base", "math", "law")):
        make_llava(here / name, "llama", seed)
    save_tokenizer(here / "base", 96)
    parameters = {"architecture": architecture}
    merge(document("moe_linear", ["base", "math"], parameters=parameters), "moe")
    at_once = read_tensors(
        merge(document("moe_linear", ["base", "math", "law"], parameters=parameters), "at_once")
    )
    mergekit_moe_ext.add_expert("moe", ["law"], "grown", names=["law"])
    grown, old = read_tensors(here / "grown"), read_tensors(here / "moe")
    assert grown.keys() == at_once.keys()
    for name, tensor in grown.items():
        if "gate.weight" in name or "router" in name:
            assert torch.equal(tensor[:2], old[name])
        elif "mlp" in name or "experts" in name:
            assert torch.equal(tensor, at_once[name]), name
        else:
            assert torch.equal(tensor, old[name]), name
    mergekit_moe_ext.remove_expert("grown", ["law"], "back")
    assert all(torch.equal(each, old[name]) for name, each in read_tensors(here / "back").items())
    data = here / "data.jsonl"
    data.write_text('{"text": "w3 w4 w5 w6"}\n' * 4)
    recipe = mergekit_moe_ext.Recipe(max_steps=1, held_out=0, learning_rate=0.1)
    reading = mergekit_moe_ext.Reading(quiet=True)
    mergekit_moe_ext.train("grown", [f"a={data}"], "gates", recipe=recipe, reading=reading)
    trained = read_tensors(here / "grown-trained")
    changed = {name for name in grown if not torch.equal(grown[name], trained[name])}
    assert len(changed) == 2 and all("gate" in name or "router" in name for name in changed)
