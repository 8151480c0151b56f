"""Merging experts of a head whose weight is the embedding's: the embedding stays as it is."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peft_routing import RoutedLoraConfig, UserError
from tests.conftest import TINY
from tests.peft_routing.adapters import make_base, save_lora

IDS = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in ("Input and output", "Model has `tie_word", "Setting `save_embedding", "fan_in")
]
FAMILIES = {
    "llama": ["lm_head", "q_proj"],
    "gemma": ["lm_head", "q_proj"],
    "gpt2": ["lm_head", "c_attn"],
}


def tied(family):
    return make_base(family, tie_word_embeddings=True)


def save_expert(path, seed, base, **config):
    """A LoRA adapter alone: PEFT saves the weight of a head beside the factors by itself."""
    save_lora(path, seed, base, **config)
    file = path / "adapter_model.safetensors"
    factors = {key: value for key, value in load_file(file).items() if ".lora_" in key}
    save_file(factors, file, {"format": "pt"})
    return str(path)


def routed(tmp_path, family="llama"):
    targets = FAMILIES[family]
    experts = {}
    for seed, name in enumerate(("one", "two")):
        experts[name] = save_expert(tmp_path / name, seed, tied(family), target_modules=targets)
    return get_peft_model(tied(family), RoutedLoraConfig(experts=experts, router="uniform")).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_adapter_and_so_is_what_is_saved_of_it(tmp_path, family):
    model = routed(tmp_path, family)
    before, embedding = logits(model), tied(family).get_input_embeddings().weight
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert merged.config.tie_word_embeddings is False
    merged.tie_weights()  # as many functions of transformers do
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))


def test_unmerging_ties_again_bit_for_bit(tmp_path):
    model = routed(tmp_path)
    model.load_adapter(_saved(model, tmp_path / "routed"), "other")
    before = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-4)
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    base = model.get_base_model()
    head, embedding = base.lm_head.get_base_layer().weight, base.get_input_embeddings().weight
    assert head is embedding
    assert torch.equal(embedding, tied("llama").get_input_embeddings().weight)
    assert torch.allclose(logits(model), before, atol=1e-5)
    names = {name for name, _ in model.named_parameters()}
    assert not any("shared" in name for name in names)


def _saved(model, path):
    model.save_pretrained(path)
    return path


def test_an_encoder_decoder_is_refused_before_anything_is_changed(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = AutoConfig.for_model("t5", vocab_size=TINY["vocab_size"], **sizes)

    def base():
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(config).eval()

    targets = {"target_modules": ["lm_head"], "task_type": "SEQ_2_SEQ_LM"}
    path = save_expert(tmp_path / "one", 1, base(), **targets)
    model = get_peft_model(base(), RoutedLoraConfig(experts=[path] * 2, router="uniform"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match=r"lm_head shares its weight .* with to_lora"):
            merge()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
