"""Sources in the layout that transformers keeps in memory, and mixtures inside multimodal models:
each against the same merge, or the same model, in the usual layout.
"""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import mergekit_moe_ext
from tests.conftest import TINY, document, merge, read_tensors
from tests.mergekit_moe_ext.caem.test_caem import caem, entries, make_sources
from tests.mergekit_moe_ext.mixtures.test_usage import counts, usage_of, words, write
from tests.tokenizers import save_tokenizer

TASKS = ("news", "squad")
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
TEXT = {
    **TINY,
    "vocab_size": 300,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
WRAPPERS = {
    "Qwen3_5Moe": {
        "text_config": {
            **TEXT,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        "vision_config": VISION,
    },
    "Qwen3VLMoe": {
        "text_config": {
            **TEXT,
            "moe_intermediate_size": 16,
            "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
    },
    "Llama4": {
        "text_config": {
            **TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "image_size": 56,
            "patch_size": 14,
        },
    },
}


def make_wrapper(path, kind, seed, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WRAPPERS[kind])
    model = AutoModelForImageTextToText.from_config(config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(path, **options)
    save_byte_tokenizer(path)
    return model.eval()


def save_byte_tokenizer(path):
    """A token per byte: transformers makes a byte-level tokenizer for Qwen in any case."""
    letters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "ernie4_5_moe"])
def test_the_layout_of_memory_merges_as_that_of_the_hub(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, family, TASKS)
    usual = merge(caem(TASKS), "usual")
    model = AutoModelForCausalLM.from_pretrained("squad")
    model.save_pretrained("squad", save_original_format=False)
    assert any("gate_up_proj" in name for name in read_tensors(tmp_path / "squad"))
    other = merge(caem(TASKS), "other")
    expected, merged = read_tensors(usual), read_tensors(other)
    assert expected.keys() == merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_whole_mixtures_in_the_layout_of_memory_are_experts_of_a_sequence_moe(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "mixtral", TASKS)
    config = document("seq_moe", TASKS, base=None)
    usual = merge(config, "usual")
    AutoModelForCausalLM.from_pretrained("news").save_pretrained("news", save_original_format=False)
    other = read_tensors(merge(config, "other"))
    assert all(torch.equal(other[name], each) for name, each in read_tensors(usual).items())


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_mixture_in_a_multimodal_model(tmp_path, monkeypatch, caplog, kind):
    """One source is itself again. Of two, the vision tower is the first one's."""
    monkeypatch.chdir(tmp_path)
    for seed, task in enumerate(TASKS):
        make_wrapper(tmp_path / task, kind, seed)
        write(tmp_path / f"{task}.jsonl", words(seed, 6))
    one = merge(caem(models=entries(TASKS[:1])), "one")
    expected = read_tensors(tmp_path / "news")
    merged = read_tensors(one)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    planned = mergekit_moe_ext.plan(caem(TASKS, num_experts=6))
    assert planned.layers == TEXT["num_hidden_layers"]
    both = merge(caem(TASKS, num_experts=6), "both")
    assert "outside the language model" in caplog.text
    merged = read_tensors(both)
    model, info = AutoModelForImageTextToText.from_pretrained(both, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == f"{kind}ForConditionalGeneration"
    outside = [name for name in expected if "vis" in name or "projector" in name]
    assert outside
    assert all(torch.equal(merged[name], expected[name]) for name in outside)
    norm = next(name for name in expected if name.endswith("layers.1.input_layernorm.weight"))
    assert not torch.equal(merged[norm], expected[norm])
    text_config = model.config.text_config
    number = "num_local_experts" if kind == "Llama4" else "num_experts"
    assert getattr(text_config, number) == 6


def test_usage_of_a_multimodal_model_is_that_of_its_language_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = make_wrapper(tmp_path / "whole", "Qwen3_5Moe", 1)
    write(tmp_path / "data.jsonl", words(1, 6))
    inner = transformers.Qwen3_5MoeForCausalLM(whole.config.text_config)
    inner.model.load_state_dict(whole.model.language_model.state_dict())
    inner.lm_head.load_state_dict(whole.lm_head.state_dict())
    inner.save_pretrained("inner")
    save_byte_tokenizer(tmp_path / "inner")
    of_whole = usage_of("whole", ["a=data.jsonl"])
    of_inner = usage_of("inner", ["a=data.jsonl"])
    assert of_whole.experts_per_token == 2
    assert list(counts(of_whole, "a").values()) == list(counts(of_inner, "a").values())


def test_a_mixture_whose_modules_lie_elsewhere_than_its_tensors(tmp_path, monkeypatch):
    """Nemotron-H stores `backbone.layers` and has modules `model.layers`."""
    monkeypatch.chdir(tmp_path)
    config = transformers.NemotronHConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        layers_block_type=["attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained("news")
    save_tokenizer(tmp_path / "news", 96)
    write(tmp_path / "news.jsonl", words(0, 6))
    merged = read_tensors(merge(caem(models=entries(TASKS[:1]))))
    expected = read_tensors(tmp_path / "news")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
