"""What has a number per token besides the embeddings at the two ends, where tokens are aligned."""

import json

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mergekit_moe_ext import UserError
from tests.conftest import document, make_model, merge
from tests.tokenizers import save_words

TOKENS = 48
WORDS = ["<unk>", "</s>", *(f"w{index}" for index in range(TOKENS - 2))]
SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
MARIAN = MarianConfig(
    vocab_size=TOKENS,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    pad_token_id=1,
    eos_token_id=1,
    decoder_start_token_id=1,
)

T5 = T5Config(
    vocab_size=384, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with ./base, and with ./math, which is the same model and tokenizer with
    other numbers for the words.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = MarianMTModel(MARIAN)
    base.final_logits_bias.normal_()  # as in models that were trained in another library
    base.save_pretrained("base")
    save_words(tmp_path / "base", WORDS, **SPECIAL)
    order = torch.cat([torch.arange(2), 2 + torch.randperm(TOKENS - 2)])
    state = base.state_dict()
    for name in ("model.shared.weight", "model.encoder.embed_tokens.weight"):
        state[name] = state[name][order]
    state["model.decoder.embed_tokens.weight"] = state["model.shared.weight"]
    state["lm_head.weight"] = state["model.shared.weight"]
    state["final_logits_bias"] = state["final_logits_bias"][:, order]
    base.load_state_dict(state)
    base.save_pretrained("math")
    save_words(tmp_path / "math", [WORDS[index] for index in order], **SPECIAL)
    return tmp_path


def logits_by_word(path):
    """Logits of the same words, in the order of WORDS, whatever their numbers are."""
    vocabulary = AutoTokenizer.from_pretrained(path).get_vocab()
    numbers = torch.tensor([vocabulary[word] for word in WORDS])
    model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = {"input_ids": numbers[None, 3:12], "decoder_input_ids": numbers[None, 7:20]}
    with torch.no_grad():
        return model(**texts).logits[..., numbers]


@pytest.mark.parametrize("padding", [{}, {"pad_to_multiple_of": 32}])
@pytest.mark.parametrize("method", ["dare", "fast_ties", "moe_linear", "wemoe"])
def test_the_bias_of_the_logits_is_aligned(here, method, padding):
    parameters = {
        "dare": {"weight": 1.0},
        "fast_ties": {"weight": 1.0},
        "moe_linear": {},
        "wemoe": {"router_layers": 0, "init_lambda": 1.0, "lambda": 1.0},
    }[method]
    models = ["math", "base"] if method == "moe_linear" else ["math"]
    tokenizer = {"source": "union", **padding}
    out = merge(document(method, models, parameters=parameters, tokenizer=tokenizer))
    expected = logits_by_word(here / "base")
    torch.testing.assert_close(logits_by_word(out), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_by_word(here / "math"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dare", "moe_linear"])
def test_embeddings_per_layer_are_not_aligned(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    words = [f"w{index}" for index in range(96)]
    for seed, name in enumerate(("base", "math")):
        path = make_model(tmp_path / name, seed)
        config = json.loads((path / "config.json").read_text())
        config["hidden_size_per_layer_input"] = 8
        (path / "config.json").write_text(json.dumps(config))
        save_words(path, words, unk_token="w0")
    models = ["math"] if method == "dare" else ["math", "base"]
    parameters = {"weight": 1.0} if method == "dare" else {}
    config = document(method, models, parameters=parameters, tokenizer_source="union")
    merge(config)  # all have the same tokens
    save_words(tmp_path / "math", [*words[1:], "w0"], unk_token="w0")
    with pytest.raises(UserError, match="embeddings per layer, which cannot be aligned"):
        merge(config, "other")


def dense_or_mixture(method, **keys):
    parameters = {"weight": 1.0} if method == "dare" else {}
    models = ["math"] if method == "dare" else ["base", "math"]
    return document(method, models, parameters=parameters, **keys)


@pytest.mark.parametrize("method", ["dare", "moe_linear"])
def test_a_tokenizer_may_be_in_no_file(tmp_path, monkeypatch, method):
    """ByT5 reads bytes, so that its configuration says everything."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        torch.manual_seed(seed)
        T5ForConditionalGeneration(T5).save_pretrained(name)
        ByT5Tokenizer().save_pretrained(name)
    out = merge(dense_or_mixture(method, tokenizer_source="base"))
    text = "And it came to pass."
    tokens = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")
    assert tokens["input_ids"].tolist() == [[*(byte + 3 for byte in text.encode()), 1]]
    inputs = {**tokens, "decoder_input_ids": tokens["input_ids"]}
    merged = AutoModelForSeq2SeqLM.from_pretrained(out, trust_remote_code=True)
    logits = merged(**inputs).logits
    if method == "dare":
        fine_tune = AutoModelForSeq2SeqLM.from_pretrained("math")
        torch.testing.assert_close(logits, fine_tune(**inputs).logits, atol=1e-5, rtol=1e-5)

    with pytest.raises(UserError, match="base: its tokenizer, a ByT5Tokenizer, is not a fast"):
        merge(dense_or_mixture(method, tokenizer_source="union"), "union")


@pytest.mark.parametrize("method", ["dare", "moe_linear"])
def test_tokenizers_that_cannot_be_aligned_are_found_first(here, method):
    """mergekit takes a model without a tokenizer to have the base's, and goes on."""
    config = dense_or_mixture(method, tokenizer_source="union")
    save_words(here / "base", [*WORDS, "more"], **SPECIAL)
    with pytest.raises(UserError, match=f"has the token {TOKENS}, and the model only {TOKENS} row"):
        merge(config)
    save_words(here / "base", WORDS, **SPECIAL)
    for path in (here / "math").glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="math has no tokenizer, and aligning vocabularies takes"):
        merge(config)
    assert sorted(path.name for path in here.iterdir()) == ["base", "math"]
