"""A small base model, trained from scratch on real texts, and where such models are kept."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from demo import BLOCK, DOMAINS, Recipe, blocks, train
from mergeme_tokenizers import train_tokenizer
from real_data import Domain, cache_dir, written_at_once
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True}
LLAMA_TOKENS = 4000


def make_small_base(texts: Mapping[str, Domain], recipe: Recipe, seed: int = 0) -> Path:
    """A Llama of one million parameters that has seen all three kinds of text, through a byte-level
    tokenizer that was trained on them. Its start and the order of the texts are drawn by the seed.
    """
    content = [texts[name].train for name in DOMAINS]
    folder = folder_of("base", [asdict(recipe), LLAMA, LLAMA_TOKENS, content, seed])
    if not folder.is_dir():
        documents = [document for name in DOMAINS for document in texts[name].train[:300]]
        tokenizer = train_tokenizer("byte-level", documents, LLAMA_TOKENS)
        config = LlamaConfig(vocab_size=len(tokenizer), **ends_of(tokenizer), **LLAMA)
        count = -(-recipe.steps * recipe.batch // len(DOMAINS))
        data = torch.cat([blocks(tokenizer, texts[name].train, count) for name in DOMAINS])
        train_from_scratch(folder, LlamaForCausalLM, config, tokenizer, data, recipe, seed)
    return folder


def folder_of(name: str, settings: list[Any]) -> Path:
    """Where a model that was trained from scratch with these settings is kept."""
    key = hashlib.sha256(json.dumps([*settings, BLOCK]).encode()).hexdigest()[:12]
    return cache_dir() / f"mergeme-hetero-{key}" / name


def ends_of(tokenizer: Any) -> dict[str, int]:
    """The tokens that begin and end a text, as a configuration has them."""
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def train_from_scratch(
    folder: Path,
    kind: Any,
    config: Any,
    tokenizer: Any,
    data: Tensor,
    recipe: Recipe,
    seed: int = 0,
) -> None:
    """Trains a new model of this class on the data, which the Trainer shuffles, and keeps it."""
    torch.manual_seed(seed)
    model = kind(config)
    bar = tqdm(total=recipe.steps, desc=f"{folder.name} from scratch")
    with written_at_once(folder) as partial, bar:
        train(model, data, recipe, bar, seed=seed)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
