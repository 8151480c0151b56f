"""LoRA adapters as experts, against `moe` with sources on their base and PEFT's own merge."""

import click
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import document, make_model, merge, read_tensors


@pytest.fixture
def adapters(here):
    """A working directory with ./base and the adapters ./one, ./two and ./attention on it."""
    targets = {
        "one": ["down_proj", "gate_proj"],
        "two": ["up_proj", "q_proj"],
        "attention": ["q_proj"],
    }
    for seed, (name, modules) in enumerate(targets.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained("base")
        config = peft.LoraConfig(target_modules=modules, init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(name)
    return here


def moe_lora(models=("one", "two", "base"), out="out", base="./base", **parameters):
    settings = {"merge_experts": True, **parameters}
    return merge(document("moe_lora", models=models, base=base, parameters=settings), out)


def test_experts_are_the_base_with_an_adapter_each(adapters):
    ours = read_tensors(moe_lora())
    models = [{"model": f"./base+./{name}"} for name in ("one", "two")] + ["base"]
    expected = read_tensors(merge(document("moe", models=models), "expected"))
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    base = AutoModelForCausalLM.from_pretrained("base")
    merged = peft.PeftModel.from_pretrained(base, "two").merge_and_unload()
    for layer in range(3):
        place = f"model.layers.{layer}.block_sparse_moe.experts.1.w3.weight"
        assert torch.allclose(ours[place], merged.model.layers[layer].mlp.up_proj.weight)


def test_what_it_cannot_make_is_refused(adapters):
    for arguments, message in (
        (
            {"merge_experts": False},
            r"peft-route compose ./base --expert ./one --expert ./two --router",
        ),
        ({"base": None}, "needs `base_model`"),
        ({"models": ["one", "attention"]}, "LoRA ./attention changes no FFN"),
        ({"models": ["one", "math"]}, "is no LoRA: it has no adapter_config"),
        ({"models": ["one", {"model": "./math+./two"}]}, "LoRA on another model"),
    ):
        with pytest.raises(click.ClickException, match=message):
            moe_lora(**arguments)
    assert not (adapters / "out").exists()


def test_where_no_stock_mixture_fits_it_is_generic(here):
    """Against `moe` on the same sources; an adapter without FFNs is refused there, too."""
    make_model(here / "small", 0, family="gpt2", n_embd=32, n_layer=2, n_head=4)
    for name, target in (("fc", "c_fc"), ("attention", "c_attn")):
        base = AutoModelForCausalLM.from_pretrained("small")
        config = peft.LoraConfig(
            target_modules=[target], init_lora_weights=False, fan_in_fan_out=True
        )
        peft.get_peft_model(base, config).save_pretrained(name)
    ours = read_tensors(moe_lora(["fc", "small"], base="./small"))
    models = [{"model": "./small+./fc"}, "small"]
    expected = merge(document("moe", models=models, base="./small"), "expected")
    assert all(torch.equal(ours[name], each) for name, each in read_tensors(expected).items())
    with pytest.raises(click.ClickException, match="changes no FFN"):
        moe_lora(["fc", "attention"], base="./small", out="other")
