"""Sources that are a LoRA on a base model: logits are PEFT's own, and what a cache holds is of the
files that lie there now.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import click
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mergekit_moe_ext.merging import loras as loras_module
from tests.conftest import document, make_model, merge, read_tensors, same_files

IDS = torch.arange(4, 30)[None]


def make_lora(base, path, seed, **config):
    """A random LoRA of PEFT's on the model in `base`; the adapted model comes back."""
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **config}
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    adapted.save_pretrained(path)
    return adapted


def logits(model):
    if isinstance(model, (str, Path)):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def loras(here):
    """./lora-a and ./lora-b on ./base."""
    for seed, name in enumerate(("lora-a", "lora-b")):
        make_lora(here / "base", here / name, seed)
    return here


@pytest.fixture
def tied(here):
    """./tied, whose head is its embedding."""
    return make_model(here / "tied", 0, tie_word_embeddings=True)


LORA_MODELS = ["base", {"model": "./base+./lora-a"}, {"model": "./base+./lora-b"}]


def entries(cache):
    return [path for path in Path(cache).iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("cache", [None, "cache"])
def test_lora_sources_equal_merged_ones(loras, cache):
    for name in ("lora-a", "lora-b"):
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), name)
        model.merge_and_unload().save_pretrained(f"{name}-merged")
    parameters = {"density": 0.8, "weight": 1.0}
    before = {path.name for path in loras.iterdir()}
    loras_out = merge(
        document("moe_ties", LORA_MODELS, parameters=parameters), "loras", lora_merge_cache=cache
    )
    new = {path.name for path in loras.iterdir()} - before
    assert new == ({"loras", "cache"} if cache else {"loras"})
    merged_out = merge(
        document("moe_ties", ["base", "lora-a-merged", "lora-b-merged"], parameters=parameters)
    )
    expected, got = read_tensors(merged_out), read_tensors(loras_out)
    assert expected.keys() == got.keys() and all(
        torch.equal(expected[name], got[name]) for name in expected
    )
    assert "loras" not in (loras_out / "config.json").read_text()


def test_an_interrupted_lora_merge_does_not_spoil_the_cache(loras, monkeypatch):
    config = document("moe_linear", LORA_MODELS)
    save = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(config, lora_merge_cache="cache")
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    # what a merge that was killed leaves behind
    (loras / "cache" / ".partial-killed").mkdir()
    (loras / "cache" / ".partial-killed" / "model.safetensors").write_bytes(b"half")
    assert merge(config, lora_merge_cache="cache").exists()
    assert len(entries("cache")) == 2 and not list((loras / "cache").glob(".partial-*"))
    first, second = (entry / "model.safetensors" for entry in entries("cache"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    assert same_files(merge(config, "again", lora_merge_cache="cache"), loras / "out")


def test_the_cache_goes_by_what_files_hold(loras):
    """A LoRA that was trained again, a base that was, and one that only moved."""
    config = document("moe_linear", [{"model": "./base+./lora-a"}, "base"])
    merge(config, "first", lora_merge_cache="cache")
    shutil.rmtree("lora-a")
    make_lora(loras / "base", loras / "lora-a", 7)
    got = read_tensors(merge(config, "second", lora_merge_cache="cache"))
    right = read_tensors(merge(config, "right"))
    assert all(torch.equal(got[name], right[name]) for name in right)
    assert len(entries("cache")) == 2
    (loras / "base").unlink()
    make_model(loras / "base", 5)
    got = read_tensors(merge(config, "third", lora_merge_cache="cache"))
    right = read_tensors(merge(config, "right-third"))
    assert all(torch.equal(got[name], right[name]) for name in right)
    assert len(entries("cache")) == 3
    shutil.move("lora-a", "moved")
    moved = document("moe_linear", [{"model": "./base+./moved"}, "base"])
    merge(moved, "fourth", lora_merge_cache="cache")
    assert len(entries("cache")) == 4  # named after the LoRA, too, for people


def test_merges_that_share_a_cache_wait_for_each_other(loras, monkeypatch):
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

    merging = loras_module._merge
    at_work = []
    most = []

    def slowly(*arguments):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.3)
        merging(*arguments)
        at_work.pop()

    monkeypatch.setattr(loras_module, "_merge", slowly)
    model, options = ModelReference.parse("./base+./lora-a"), MergeOptions()
    places = []

    def use():
        places.append(loras_module._from_cache(model, options, Path("cache")))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]  # one of them merged, and the other found what it had made
    assert places[0] == places[1] == entries("cache")[0]


TARGETS = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied adapters": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("targets", TARGETS)
def test_a_lora_on_a_tied_head_or_embedding_gives_pefts_logits(here, tied, targets):
    adapted = make_lora(tied, "lora", 3, **TARGETS[targets])
    if targets in ("whole head", "tokens"):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name or "trainable_tokens_delta" in name:
                    parameter.add_(1.0)
        adapted.save_pretrained("lora")
    expected = logits(adapted)
    assert (expected - logits(tied)).abs().max() > 0.1
    source = {"model": "./tied+./lora"}
    out = merge(document(models=[source, source], base="./tied"))
    torch.testing.assert_close(logits(out), expected, atol=1e-4, rtol=0)
    is_tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert is_tied == (targets in ("tied adapters", "tokens"))


@pytest.mark.parametrize("embedding", ["merged", "separate"])
def test_a_lora_on_a_tied_head_in_a_sequence_moe(here, tied, embedding):
    adapted = make_lora(tied, "lora", 3, **TARGETS["head"])
    source = {"model": "./tied+./lora"}
    parameters = {"routing": "uniform", "embedding": embedding}
    out = merge(document("seq_moe", [source, source], base="./tied", parameters=parameters))
    torch.testing.assert_close(logits(out), logits(adapted), atol=1e-4, rtol=0)
    # one of them tied: the mean of the two heads, or each its own
    mixed = document("seq_moe", [source, "tied"], base="./tied", parameters=parameters)
    got = logits(merge(mixed, "mixed"))
    heads = read_tensors(here / "mixed")
    if embedding == "merged":
        adapted_head = adapted.merge_and_unload().lm_head.weight  # in place, on the one weight
        assert not torch.equal(heads["lm_head.weight"], heads["embed_tokens.weight"])
        of_both = (adapted_head + read_tensors(tied)["model.embed_tokens.weight"]) / 2
        torch.testing.assert_close(heads["lm_head.weight"], of_both.detach())
    else:
        mean = (logits(adapted) + logits(tied)) / 2
        torch.testing.assert_close(got, mean, atol=1e-4, rtol=0)


def test_a_head_of_its_own_unties_a_weight_ensembling_model(here, tied):
    base = AutoModelForCausalLM.from_pretrained(tied)
    tuned = LlamaForCausalLM._from_config(
        type(base.config)(**{**base.config.to_dict(), "tie_word_embeddings": False})
    )
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.lm_head.weight.add_(0.1 * torch.randn(96, 32))
    tuned.save_pretrained("tuned")
    out = merge(document("wemoe", ["tuned"], base="./tied", parameters={"lambda": 1.0}))
    got = read_tensors(out)
    torch.testing.assert_close(got["lm_head.weight"], tuned.lm_head.weight.detach())
    torch.testing.assert_close(got["model.embed_tokens.weight"], base.lm_head.weight.detach())


def test_a_lora_of_another_base_is_explained(loras):
    make_model(loras / "wide", 0, hidden_size=64)
    make_lora(loras / "wide", loras / "lora-wide", 0)
    models = ["base", {"model": "./base+./lora-wide"}]
    with pytest.raises(
        click.ClickException, match=r"cannot merge the LoRA \./lora-wide .*: .*size mismatch"
    ):
        merge(document(models=models), lora_merge_cache="cache")
    assert not entries("cache") and not (loras / "out").exists()


def test_a_lora_of_a_grown_vocabulary_says_how_to_go_on(here):
    grown = LlamaForCausalLM.from_pretrained("base")
    grown.resize_token_embeddings(100)
    grown.save_pretrained("grown")
    adapted = make_lora("grown", "lora", 0)
    adapted.save_pretrained("lora", save_embedding_layers=True)
    models = ["base", {"model": "./base+./lora"}]
    with pytest.raises(
        click.ClickException,
        match=r"100 tokens, and \./base has 96: resize.*embeddings\(100",
    ):
        merge(document(models=models))


def test_a_lora_that_lacks_a_tensor_is_refused(loras):
    file = loras / "lora-a" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, file)
    with pytest.raises(
        click.ClickException, match=r"LoRA \./lora-a .* missing adapter keys.*layers\.1\.self_attn"
    ):
        merge(document(models=LORA_MODELS))


def test_what_cannot_be_merged_into_weights_is_refused(loras):
    from peft import PromptTuningConfig

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(LlamaForCausalLM.from_pretrained("base"), prompts).save_pretrained("prompts")
    with pytest.raises(click.ClickException, match=r"\./prompts is of type PROMPT_TUNING"):
        merge(document(models=["base", {"model": "./base+./prompts"}]))


DENSE = {"density": 1.0, "weight": 0.5, "lambda": 1.0}


@pytest.mark.parametrize("method", ["fast_ties", "dare"])
def test_a_dense_merge_takes_a_lora_as_it_lies_there_now(loras, method):
    config = document(method, [{"model": "./base+./lora-a"}, "code"], parameters=DENSE)
    merge(config, "first", lora_merge_cache="cache")
    shutil.rmtree("lora-a")
    make_lora(loras / "base", loras / "lora-a", 7).merge_and_unload().save_pretrained("merged")
    got = read_tensors(merge(config, "second", lora_merge_cache="cache"))
    uncached = read_tensors(merge(config, "third"))
    expected = read_tensors(
        merge({**config, "models": [{"model": "./merged"}, {"model": "./code"}]})
    )
    assert len(entries("cache")) == 2 and not list(loras.glob("*.loras"))
    assert got.keys() == uncached.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) and torch.equal(uncached[name], tensor), name


@pytest.mark.parametrize("method", ["fast_ties", "dare"])
def test_a_dense_merge_into_a_tied_base_refuses_a_head(here, tied, method):
    make_lora(tied, here / "lora", 0, target_modules=["lm_head"])
    adapted = document(method, [{"model": "./tied+./lora"}], base="./tied", parameters=DENSE)
    plain = document(method, ["math"], base="./tied", parameters=DENSE)
    for config, name in ((adapted, "./tied"), (plain, "./math")):
        with pytest.raises(click.ClickException, match="has a head of its own") as error:
            merge(config)
        assert name in error.value.message and "tie_word_embeddings" in error.value.message
        assert not (here / "out").exists()
    # An embedding that is changed alike in both places stays one tensor.
    make_lora(tied, here / "within", 0, target_modules=["q_proj"])
    config = document(
        method, [{"model": "./tied+./within"}], base="./tied", parameters={**DENSE, "weight": 1.0}
    )
    expected = make_lora(tied, here / "again", 0, target_modules=["q_proj"])
    assert torch.allclose(logits(merge(config)), logits(expected), atol=1e-5)
