"""Rows that are longer than a model's table of positions."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.positions import check_positions, positions_in_table
from tests.conftest import document, make_model, merge, start
from tests.tokenizers import save_tokenizer

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 12,
}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2}
BART |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
OPT = {"word_embed_proj_dim": 16, "ffn_dim": 24}
# What makes it tiny, and how many positions it has.
FAMILIES = {
    "gpt2": ({"n_layer": 1, "n_embd": 16, "n_head": 2}, 12),
    "bert": ({}, 12),
    "roberta": ({}, 10),  # two of its rows are for padding and before it
    "opt": (OPT, 12),
    "bart": (BART, 12),
    "marian": (BART, 12),
    "llama": ({}, None),
    "t5": ({"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_positions_as_the_model_takes(family):
    values, expected = FAMILIES[family]
    config = AutoConfig.for_model(family, **{**SIZES, "pad_token_id": 1, **values})
    model = AutoModel.from_config(config).eval()
    assert positions_in_table(model) == expected
    if expected is None:
        return
    targets = {"decoder_input_ids": torch.tensor([[4]])} if config.is_encoder_decoder else {}
    model(input_ids=torch.arange(4, 4 + expected)[None], **targets)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.arange(4, 5 + expected)[None], **targets)
    check_positions(model, {"news": Dataset.from_dict({"input_ids": [[4] * expected]})}, 1024)
    with pytest.raises(UserError, match=rf"a row of news has 13 tokens.* --max-length {expected}"):
        check_positions(model, {"news": Dataset.from_dict({"input_ids": [[4], [4] * 13]})}, 1024)


@pytest.mark.parametrize("command", ["train", "usage", "adapt"])
def test_long_texts_are_refused_before_the_first_step(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    gpt2 = {"n_layer": 1, "n_embd": 32, "n_head": 4, "max_position_embeddings": 16}
    for seed, name in enumerate(("base", "math", "code")):
        make_model(tmp_path / name, seed, family="gpt2", **gpt2)
        save_tokenizer(tmp_path / name, 96)
    text = " ".join(f"w{index}" for index in range(40))
    (tmp_path / "news.jsonl").write_text(json.dumps({"text": text}) + "\n")
    method = "wemoe" if command == "adapt" else "moe_linear"
    merge(document(method, ["math", "code"]), "mixture")
    arguments = {
        "train": ["--train", "gates", "--data", "news.jsonl", "--held-out", "0", "-o", "out"],
        "usage": ["--data", "news.jsonl", "-o", "out"],
        "adapt": ["--data", "math=news.jsonl", "--data", "code=news.jsonl", "-o", "out"],
    }[command]
    ended = start("mergekit-moe-ext", command, "mixture", *arguments)
    assert ended.returncode == 1
    assert "has 40 tokens, and the model has 16 positions" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
