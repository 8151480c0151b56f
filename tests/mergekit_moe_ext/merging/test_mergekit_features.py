"""What mergekit offers keeps working: tokenizers, chat templates, mergekit-multi, the
card.
"""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext import UserError, plan
from tests.conftest import document, make_model, merge, read_tensors, run
from tests.tokenizers import save_tokenizer


@pytest.fixture
def with_tokenizers(tmp_path, monkeypatch):
    """base and math of 96 words, code of 98: the last two its own."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, extra) in enumerate(
        {"base": (), "math": (), "code": ("for", "while")}.items()
    ):
        make_model(tmp_path / name, seed, vocab_size=96 + len(extra))
        save_tokenizer(tmp_path / name, 96 + len(extra), extra)
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ({"tokenizer_source": "union"}, 98),
        ({"tokenizer_source": "base"}, 96),
        ({"tokenizer": {"source": "union", "pad_to_multiple_of": 16}}, 112),
        ({"tokenizer": {"source": "union", "tokens": {"for": {"source": "./code"}}}}, 98),
        ({"tokenizer": {"source": "./code"}}, 98),
    ],
)
def test_tokenizers_are_aligned_as_mergekit_does_it(with_tokenizers, keys, size):
    models = ["base", "math", "code"]
    parameters = {"weight": 1.0}
    ours = merge(document("moe_linear", models, parameters=parameters, **keys))
    stock = merge(document("linear", models, parameters=parameters, **keys), "stock")
    got, expected = read_tensors(ours), read_tensors(stock)
    vocabulary, stock_vocabulary = (
        AutoTokenizer.from_pretrained(path).get_vocab() for path in (ours, stock)
    )
    assert vocabulary.keys() == stock_vocabulary.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert got[name].shape == (size, 32)
        for token, row in vocabulary.items():  # mergekit's union has no fixed order of new tokens
            assert torch.equal(got[name][row], expected[name][stock_vocabulary[token]])
    assert json.loads((ours / "config.json").read_text())["vocab_size"] == size
    assert AutoModelForCausalLM.from_pretrained(ours).lm_head.weight.shape[0] == size


@pytest.mark.parametrize("method", ["moe", "wemoe"])
def test_a_head_s_bias_is_aligned_with_it(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        make_model(tmp_path / name, seed, family="phi", vocab_size=96 + seed)
        save_tokenizer(tmp_path / name, 96 + seed, ("for", "while")[2 - seed :])
    models = ["math", "code"]
    parameters = {"shared": "linear"}
    out = merge(document(method, models, parameters=parameters, tokenizer_source="union"))
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    assert AutoModelForCausalLM.from_pretrained(out).vocab_size == len(vocabulary) == 98
    merged = read_tensors(out)
    for name in ("lm_head.weight", "lm_head.bias"):
        total, counts = torch.zeros_like(merged[name]), torch.zeros_like(merged[name])
        for model in models:
            tensor = read_tensors(tmp_path / model)[name]
            for token, row in AutoTokenizer.from_pretrained(model).get_vocab().items():
                total[vocabulary[token]] += tensor[row]
                counts[vocabulary[token]] += 1
        torch.testing.assert_close(merged[name], total / counts)


def of_token(source):
    return {"tokenizer": {"source": "union", "tokens": {"for": source}}}


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ({"tokenizer": {"source": "nope"}}, ["tokenizer: source: 'nope'", "known here: union"]),
        ({"tokenizer": {"source": "unoin"}}, ["'unoin'", "did you mean `union`?"]),
        ({"tokenizer_source": "./cdoe"}, ["tokenizer_source: './cdoe'", "did you mean `./code`?"]),
        ({"tokenizer_source": "./empty"}, ["tokenizer_source: ./empty has no tokenizer"]),
        ({"tokenizer_source": "owner/name"}, ["'owner/name'", "(cannot read the tokenizer of"]),
        ({"tokenizer": {"pad_to_multiple_of": -8}}, ["pad_to_multiple_of: -8 is below 1"]),
        (
            of_token({"source": "./cdoe"}),
            ["tokenizer: tokens: 'for': source: './cdoe'", "did you mean `./code`?"],
        ),
        (of_token({"source": "./math"}), ["'for': source: ./math has no token 'for'"]),
        (of_token({}), ["'for' needs a `source:`"]),
        (
            of_token({"source": {"kind": "model_token", "model": "./code", "token": "forr"}}),
            ["'for': source: ./code has no token 'forr'"],
        ),
        (
            of_token({"source": {"kind": "model_token", "model": "./code", "token_id": 98}}),
            ["'for': source: ./code has 98 tokens, and none 98"],
        ),
    ],
)
def test_mistakes_about_tokenizers_are_found_first(with_tokenizers, keys, fragments):
    (with_tokenizers / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        plan(document("moe_linear", ["base", "math", "code"], **keys))
    for fragment in fragments:
        assert fragment in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message


def test_a_model_that_is_not_merged_gives_the_tokenizer(with_tokenizers):
    """Its path may be like one of mergekit's own words."""
    (with_tokenizers / "code").rename("bases")
    out = merge(document("moe_linear", ["base", "math"], tokenizer_source="./bases"))
    assert len(AutoTokenizer.from_pretrained(out)) == 98
    tensors = read_tensors(out)
    assert tensors["model.embed_tokens.weight"].shape == (98, 32)


def test_chat_template(with_tokenizers):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + " " * 200
    out = merge(document(models=["base", "math"], chat_template=template))
    assert AutoTokenizer.from_pretrained(out).chat_template == template


def test_truncated_embeddings(with_tokenizers):
    for donor in ("./base", "./code"):  # of 96 words and of 98
        config = document(models=["base", "math", "code"], base=donor)
        out = merge(config, f"out-{donor[2:]}", unsafe_truncate_embeddings=True)
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert model.lm_head.weight.shape == (96, 32) and not any(info.values())


def test_multi_chains_our_methods_with_stock_ones(here):
    dense = {"name": "averaged", **document("linear", ["math", "code"], parameters={"weight": 1.0})}
    moe = document("moe_ties", ["base", "law"], parameters={"density": 0.5})
    moe["models"].append({"model": "averaged"})
    (here / "chain.yml").write_text(yaml.safe_dump_all([dense, moe]))
    result = run("mergekit-multi", "chain.yml", "--out-path", "out", "-I", "between")
    assert result.returncode == 0, result.stderr
    got, averaged = read_tensors(here / "out"), read_tensors(here / "between" / "averaged")
    for layer in range(3):
        expert = got[f"model.layers.{layer}.block_sparse_moe.experts.2.w2.weight"]
        assert torch.equal(expert, averaged[f"model.layers.{layer}.mlp.down_proj.weight"])


def test_the_card_says_how_it_was_made_and_never_asks_the_hub(here, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda *_args, **_kwargs: 1 / 0)
    config = document("moe_ties", parameters={"density": 0.8})
    config["models"][1]["model"] = (
        "math"  # a relative path with no slash, which mergekit's card looks up
    )
    out = merge(config, random_seed=11)
    card = (out / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {
        "base_model": [],
        "library_name": "transformers",
        "tags": ["mergekit", "merge", "moe"],
    }
    for fact in (
        "moe_ties",
        "density: 0.8",
        "arxiv.org/abs/2502.00997",
        "Seed 11",
        "# out",
        "1. math",
        "ties",
    ):
        assert fact in card
    assert yaml.safe_load((out / "mergekit_config.yml").read_text()) == config
    assert not (merge(config, "bare", write_model_card=False) / "README.md").exists()


def test_the_card_links_what_is_on_the_hub():
    from mergekit.common import ModelReference

    from mergekit_moe_ext.merging.card import _linked

    reference = ModelReference.parse("org/model@main+org/lora")
    assert _linked(reference) == (
        "[org/model@main](https://huggingface.co/org/model) + [org/lora](https://huggingface.co/org/lora)"
    )
    assert _linked(ModelReference.parse("./local/model")) == "model"


def test_the_plan_command_merges_nothing(here):
    from click.testing import CliRunner

    from mergekit_moe_ext.cli import main

    (here / "config.yml").write_text(
        yaml.safe_dump(document("moe_ties", parameters={"density": 0.8}))
    )
    before = {path.name for path in here.iterdir()}
    result = CliRunner().invoke(main, ["plan", "config.yml"])
    assert result.exit_code == 0, result.output
    for fact in (
        "MixtralForCausalLM",
        "4 experts per layer, 2 of them per token",
        "21 tensors by fast_ties",
        "36 tensors",
        "./law",
    ):
        assert fact in result.output
    assert {path.name for path in here.iterdir()} == before


def test_the_methods_command_shows_every_option():
    from click.testing import CliRunner

    from mergekit_moe_ext.cli import main

    result = CliRunner().invoke(main, ["methods", "moe", "ties"])
    for fact in (
        "experts_per_token (int, optional)",
        "positive_prompts (list[str] | str, optional, per model)",
        "random | uniform_random | zeros",
        "shared (str",
        "density",
    ):
        assert fact in result.output
    everything = CliRunner().invoke(main, ["methods"]).output
    assert all(f"\n{name}: " in everything for name in ("linear", "moe_linear", "moe_ties"))
    assert CliRunner().invoke(main, ["methods", "no"]).exit_code == 1


def test_differing_rope_settings_are_warned_about(here, caplog):
    make_model(here / "far", 1, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    out = merge(document(models=["base", "far"]))
    assert "`rope_parameters` of ./far" in caplog.text and "that of ./base" in caplog.text
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["rope_theta"] == 10_000
