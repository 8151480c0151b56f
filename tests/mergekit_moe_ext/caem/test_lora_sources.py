"""Sources that are a LoRA on a mixture of experts, on transformers' fused experts as well: the same
output as from models into which PEFT has merged the LoRA before.
"""

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext.cli import main
from tests.conftest import document, make_model, merge, read_tensors
from tests.mergekit_moe_ext.caem.test_caem import caem, make_sources
from tests.mergekit_moe_ext.mixtures.test_usage import usage_of, words, write

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_lora(base, path, seed, **config):
    torch.manual_seed(seed)
    settings = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    adapted.save_pretrained(path)


def merge_by_peft(base, lora, path):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    model.merge_and_unload().save_pretrained(path)


def same(one, other):
    expected, got = read_tensors(one), read_tensors(other)
    assert expected.keys() == got.keys()
    return all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """./news, ./lora on its attention and its fused experts, and ./whole, which is both."""
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "mixtral", ("news",))
    make_lora("news", "lora", 3, target_modules=["q_proj"], target_parameters=EXPERTS)
    merge_by_peft("news", "lora", "whole")
    AutoTokenizer.from_pretrained("news").save_pretrained("whole")
    write(tmp_path / "law.jsonl", words(5, 6))
    return tmp_path


def sources(second, **parameters):
    of_second = parameters or {"calibration": "law.jsonl"}
    return [
        {"model": "./news", "parameters": {"calibration": "news.jsonl"}},
        {"model": second, "parameters": of_second},
    ]


def test_caem_counts_and_takes_the_merged_model(adapted):
    expected = merge(caem(models=sources("./whole"), num_experts=5), "expected")
    got = merge(caem(models=sources("./news+./lora"), num_experts=5), "got")
    assert same(expected, got)
    # The LoRA changed experts, and they are in the output.
    assert not same(expected, merge(caem(models=sources("./news"), num_experts=5), "without"))


def test_a_usage_file_of_a_lora_source_is_that_of_the_merged_model(adapted):
    usage_of("whole", ["law=law.jsonl"]).write(adapted / "whole.json")
    usage_of("news", ["law=law.jsonl"]).write(adapted / "news.json")
    expected = merge(caem(models=sources("./whole", usage="whole.json")), "expected")
    got = merge(caem(models=sources("./news+./lora", usage="whole.json")), "got")
    assert same(expected, got)
    with pytest.raises(click.ClickException, match="usage of another model"):
        merge(caem(models=sources("./news+./lora", usage="news.json")), "other")
    assert not (adapted / "other").exists()


def test_plan_says_that_the_allocation_comes_with_the_merge(adapted):
    (adapted / "config.yml").write_text(yaml.safe_dump(caem(models=sources("./news+./lora"))))
    done = CliRunner().invoke(main, ["plan", "config.yml", "--plot", "figure.png"])
    assert "once each LoRA is merged" in done.output
    assert done.exit_code and "nothing to draw" in done.output
    assert not (adapted / "figure.png").exists()
    done = CliRunner().invoke(main, ["plan", "config.yml"])
    assert done.exit_code == 0


def test_moe_takes_a_lora_on_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", 0)
    parameters = ["mlp.down_proj.weight", "self_attn.v_proj.weight"]
    make_lora("base", "lora", 4, target_modules=[], target_parameters=parameters)
    merge_by_peft("base", "lora", "whole")
    expected = merge(document("moe_linear", ["base", "whole"], base=None), "expected")
    lora_models = ["base", {"model": "./base+./lora"}]
    assert same(expected, merge(document("moe_linear", lora_models, base=None), "got"))
