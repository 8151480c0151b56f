"""Generic mixtures are counted, trained and merged as any other mixture."""

from pathlib import Path

import click
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import mergekit_moe_ext
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.mixtures.training import train
from mergekit_moe_ext.recipes import Recipe
from tests.conftest import document, merge, read_tensors
from tests.mergekit_moe_ext.mixtures.test_usage import words, write
from tests.mergekit_moe_ext.upcycling.test_generic import make
from tests.tokenizers import save_tokenizer

READING = Reading(max_length=24, quiet=True)
RECIPE = {
    "held_out": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 0.01,
    "router_aux_loss": 0.01,
}
ROUTER = ".router.weight"


def make_mixture(out, architecture="GPT2LMHeadModel", seed=0, **parameters):
    for number, name in enumerate(("base", "math", "code")):
        if not Path(name).exists():
            make(Path(name), architecture, number)
    merged = document(models=["base", "math", "code"], parameters=parameters)
    save_tokenizer(merge(merged, out, random_seed=seed), 96)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "news.jsonl", words(1, 12))
    write(tmp_path / "law.jsonl", words(2, 8))
    return tmp_path


def test_usage_is_what_a_loop_over_the_texts_counts(here):
    make_mixture("moe")
    usage = mergekit_moe_ext.count_usage("moe", ["news=news.jsonl"], reading=READING)
    model = AutoModelForCausalLM.from_pretrained("moe").eval()
    tokenizer = AutoTokenizer.from_pretrained("moe")
    counts = dict.fromkeys(usage.tasks["news"].layers, 0)
    tokens = 0
    for row in words(1, 12):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"][:, :24]
        if not ids.numel():
            continue
        tokens += ids.numel()
        with torch.no_grad():
            of_layers = model(ids, output_router_logits=True).router_logits
        for name, logits in zip(counts, of_layers, strict=True):
            counts[name] = counts[name] + torch.bincount(
                logits.topk(2).indices.flatten(), minlength=3
            )
    for name, layer in usage.tasks["news"].layers.items():
        assert layer.tokens == tokens
        assert layer.counts == counts[name].tolist()


def test_training_changes_what_it_should_and_is_loaded_back(here):
    make_mixture("moe")
    before = read_tensors(here / "moe")
    for part in ("gates", "all"):
        train("moe", part, part, ["news.jsonl", "law.jsonl"], READING, Recipe(**RECIPE))
        after = read_tensors(here / part)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        routers = {name for name in before if name.endswith(ROUTER)}
        assert changed == routers if part == "gates" else routers < changed
        model, info = AutoModelForCausalLM.from_pretrained(part, output_loading_info=True)
        assert type(model).__name__ == "UpcycledMoeGPT2LMHeadModel" and not any(info.values())


def test_one_expert_per_token_is_not_trained_without_a_balance_loss(here):
    make_mixture("moe", experts_per_token=1)
    recipe = Recipe(**{**RECIPE, "router_aux_loss": 0.0})
    with pytest.raises(click.ClickException, match="no gradient"):
        train("moe", "out", "gates", ["news.jsonl"], READING, recipe)


def test_caem_takes_experts_with_their_rows(here):
    for seed, name in ((1, "first"), (2, "second")):
        make_mixture(name, seed=seed)
    models = [
        {"model": "./first", "parameters": {"calibration": "news.jsonl"}},
        {"model": "./second", "parameters": {"calibration": "law.jsonl"}},
    ]
    merged = {"merge_method": "caem", "models": models, "parameters": {"num_experts": 4}}
    tensors = read_tensors(merge(merged, "out"))
    sources = [read_tensors(here / name) for name in ("first", "second")]
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert model.config.num_local_experts == 4 and not any(info.values())
    for layer in range(3):
        ffn = f"transformer.h.{layer}.mlp"
        # Every expert is one of a source, whole: its router's row and its matrices alike.
        for expert in range(4):
            row = tensors[f"{ffn}{ROUTER}"][expert]
            origins = [
                (source, index)
                for source in sources
                for index in range(3)
                if torch.equal(source[f"{ffn}{ROUTER}"][index], row)
            ]
            ((source, index),) = origins
            for part in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"):
                name = f"{ffn}.{part}"
                assert torch.equal(tensors[name][expert], source[name][index])


def test_an_encoder_decoder_is_counted_and_trained(here):
    make_mixture("moe", "T5ForConditionalGeneration")
    rows = [{"input": row["text"], "target": row["text"]} for row in words(3, 8)]
    write(here / "pairs.jsonl", rows)
    usage = mergekit_moe_ext.count_usage("moe", ["pairs=pairs.jsonl"], reading=READING)
    stacks = {name.split(".")[0] for name in usage.tasks["pairs"].layers}
    assert stacks == {"encoder", "decoder"}
    losses = train("moe", "out", "gates", ["pairs.jsonl"], READING, Recipe(**RECIPE))
    assert losses
    _, info = AutoModelForSeq2SeqLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values())


def test_what_is_no_language_model_is_refused_in_words(here):
    make(here / "vit", "ViTForImageClassification", 0)
    merge(document(models=["vit", "vit"], base=None), "moe")
    with pytest.raises(click.ClickException):
        mergekit_moe_ext.count_usage("moe", ["news=news.jsonl"], reading=READING)
