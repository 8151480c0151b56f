"""Checkpoints that hold more than transformers 5 writes, or hold it under the names of old."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from mergekit_moe_ext import UserError
from tests.conftest import document, merge

SIZES = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 64}
IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def small_bert():
    config = BertConfig(**SIZES, num_hidden_layers=2, num_attention_heads=2)
    model = BertForMaskedLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def in_old_names(tensors):
    """The tensors by the names of the first BERT, which transformers still reads."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return renamed


@pytest.mark.parametrize("method", ["moe_linear", "wemoe", "dare", "fast_ties"])
@pytest.mark.parametrize("kind", ["copies", "old names"])
def test_berts_of_old(here, method, kind):
    """With all names of what is tied, as transformers 4 wrote them, and by the first names."""
    bert = small_bert()
    for name in ("base", "math"):
        bert.save_pretrained(here / name)
        file = here / name / "model.safetensors"
        if kind == "copies":
            torch.save(bert.state_dict(), here / name / "pytorch_model.bin")
            file.unlink()
        else:
            save_file(in_old_names(load_file(file)), file, {"format": "pt"})
    models = ["base", "math"] if method == "moe_linear" else ["math"]
    parameters = {"weight": 1.0} if method in ("dare", "fast_ties") else {}
    out = merge(document(method, models, parameters=parameters))
    torch.testing.assert_close(
        logits(AutoModelForMaskedLM.from_pretrained(out)), logits(bert), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("method", ["dare", "fast_ties"])
def test_old_names_beside_those_of_today(here, method):
    """As a fine-tune beside the first BERT."""
    small_bert().save_pretrained(here / "base")
    file = here / "base" / "model.safetensors"
    save_file(in_old_names(load_file(file)), file, {"format": "pt"})
    tuned = small_bert()
    tuned.save_pretrained(here / "math")
    out = merge(document(method, ["math"], parameters={"weight": 1.0}))
    merged = AutoModelForMaskedLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), logits(tuned), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_stored", [True, False])
def test_what_goes_by_no_known_name_is_refused(here, caplog, is_stored):
    missing = "cls.predictions.transform.LayerNorm.weight"  # no list has it
    for name in ("base", "math"):
        small_bert().save_pretrained(here / name)
        file = here / name / "model.safetensors"
        tensors = load_file(file)
        tensor = tensors.pop(missing)
        if is_stored and name == "math":
            tensors["cls.predictions.transform.norm.weight"] = tensor
        save_file(tensors, file, {"format": "pt"})
    config = document("dare", ["math"], parameters={"weight": 1.0})
    if is_stored:
        with pytest.raises(UserError, match=r"no source holds\. It may be what .*norm\.weight"):
            merge(config)
    else:
        merge(config)
        assert f"no source holds {missing} (1 tensors in all)" in caplog.text


def test_a_bias_that_differs_from_what_it_is_tied_to_is_named(here):
    bert = small_bert()
    bert.save_pretrained(here / "base")
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    state["cls.predictions.decoder.bias"] += 1
    torch.save(state, here / "base" / "pytorch_model.bin")
    (here / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"decoder\.bias of \./base differs from cls\.predictions"):
        merge(document("moe_linear", ["base", "base"]))


def test_masks_that_transformers_computes_are_passed_over(here):
    """EleutherAI's GPT-Neos hold them."""
    config = GPTNeoConfig(
        **SIZES,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    )
    model = GPTNeoForCausalLM(config)
    model.save_pretrained(here / "base")
    file = here / "base" / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        attention = f"transformer.h.{layer}.attn.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, file, {"format": "pt"})
    out = merge(document("moe_linear", ["base", "base"]))
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_lora", [True, False])
def test_a_tied_bert_beside_one_with_a_head_of_its_own(here, is_lora):
    """The bias of the head is tied as the head is."""
    bert = small_bert()
    bert.save_pretrained(here / "base")
    if is_lora:
        config = LoraConfig(r=2, target_modules=["word_embeddings"], init_lora_weights=False)
        adapted = get_peft_model(BertForMaskedLM.from_pretrained(here / "base"), config)
        adapted.save_pretrained(here / "lora")
        source = "./base+./lora"
        expected = logits(adapted)
    else:
        config = BertConfig(**{**bert.config.to_dict(), "tie_word_embeddings": False})
        apart = BertForMaskedLM(config)
        state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
        state["cls.predictions.decoder.bias"] += 1
        apart.load_state_dict(state)
        apart.save_pretrained(here / "math")
        source = "./math"
        expected = logits(apart)
    models = [{"model": source}, {"model": source}]
    out = merge(document("moe_linear", models, base=None))
    merged = logits(AutoModelForMaskedLM.from_pretrained(out))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    both = merge(document("moe_linear", ["base", {"model": source}], base=None), "both")
    state = AutoModelForMaskedLM.from_pretrained(both).state_dict()
    mean = bert.cls.predictions.bias + (0 if is_lora else 0.5)
    torch.testing.assert_close(state["cls.predictions.decoder.bias"], mean.detach())
