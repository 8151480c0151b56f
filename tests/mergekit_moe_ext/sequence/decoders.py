"""Tiny decoders of many architectures, each with a tokenizer of its own, to be merged into one
mixture.
"""

import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import SPECIAL_TOKENS, TINY
from tests.tokenizers import save_words

SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
# Where a family's defaults are beyond tiny, or where what sets it apart is off by default.
SETTINGS = {
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 20},
}


def vocabulary(size=96, shuffled=None, without=(), also=()):
    """The tokens `<unk>`, `</s>` and words: `size` in all, `also` among them; in a random order if
    `shuffled` is a seed.
    """
    words = [f"w{i}" for i in range(size) if f"w{i}" not in without]
    words = ["<unk>", "</s>", *words[: size - 2 - len(also)], *also]
    if shuffled is not None:
        random.Random(shuffled).shuffle(words)
    return words


def save_source(path, family="llama", seed=0, words=None, special=SPECIAL, **config):
    """A decoder with weights so large, and norms and biases so uneven, that no two predict
    alike."""
    words = words or vocabulary()
    values = {
        **TINY,
        **SPECIAL_TOKENS,
        "num_hidden_layers": 2,
        "vocab_size": len(words),
        **SETTINGS.get(family, {}),
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**values, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(path)
    save_words(Path(path), words, **special)
    return model.eval()


def only(expert, number):
    """Coefficients that choose one expert."""
    return torch.eye(number)[[expert]]
