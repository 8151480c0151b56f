"""The pages of `usage --html` and `peft-route inspect --html`: their data against the hosts' own
results, text by text.
"""

import base64
import json
import re
from html.parser import HTMLParser

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from _mergekit_moe_ext_common.token_page import ALL_LAYERS, check_new_page, pieces
from mergekit_moe_ext import Reading, count_usage
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.mixtures.routers import PER_SEQUENCE
from peft_routing import RoutedLoraConfig
from peft_routing.cli import main as route
from tests.conftest import NAMES, document, make_model, merge
from tests.mergekit_moe_ext.mixtures.test_usage import SWITCH, make_moe, words, write
from tests.peft_routing.adapters import make_base, save_lora
from tests.tokenizers import save_tokenizer


class Scripts(HTMLParser):
    """The texts of a page's scripts, and every address that it names."""

    def __init__(self):
        super().__init__()
        self.texts, self.addresses, self._is_open = [], [], False

    def handle_starttag(self, tag, attributes):
        self._is_open = tag == "script"
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        if self._is_open:
            self.texts.append(text)
            self._is_open = False


def read(path):
    scripts = Scripts()
    scripts.feed(path.read_text(encoding="utf-8"))
    assert scripts.addresses == []
    return json.loads(scripts.texts[0])


def experts_of(text):
    """(layers, tokens), the expert that the page colours each token by."""
    numbers = np.frombuffer(base64.b64decode(text["experts"]), dtype="<u2")
    return torch.tensor(numbers.reshape(len(text["layers"]), -1).astype("int64"))


def shades_of(text):
    numbers = np.frombuffer(base64.b64decode(text["shades"]), dtype="u1")
    return torch.tensor(numbers.reshape(len(text["layers"]), -1) / 255.0) * text["highest"]


def test_pieces_join_to_the_text_even_where_a_character_has_several_tokens():
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["plain words"], vocab_size=270)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
    text = "plain words, naïve ☂ and 数学 </script>"
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == text
    assert "" in found  # of the bytes of one character, all but the last


@pytest.fixture
def mixture(tmp_path):
    make_moe(tmp_path / "moe", "mixtral", num_local_experts=4)
    write(tmp_path / "math.jsonl", words(0, 5))
    write(tmp_path / "code.jsonl", words(1, 3))
    return tmp_path


def test_usage_shows_the_expert_with_the_highest_weight(mixture):
    page = mixture / "page.html"
    sources = [f"--data={name}={mixture / name}.jsonl" for name in ("math", "code")]
    arguments = ["usage", str(mixture / "moe"), *sources, "--html", str(page), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    data = read(page)
    model = AutoModelForCausalLM.from_pretrained(mixture / "moe").eval()
    tokenizer = AutoTokenizer.from_pretrained(mixture / "moe")
    rows = [row["text"] for row in words(0, 5)] + [row["text"] for row in words(1, 3)]
    assert [text["task"] for text in data["texts"]] == ["math"] * 5 + ["code"] * 3
    for row, text in zip(rows, data["texts"], strict=True):
        inputs = tokenizer(row, return_tensors="pt")
        assert "".join(text["tokens"]) == tokenizer.decode(inputs["input_ids"][0])
        with torch.no_grad():
            logits = model(**inputs, output_router_logits=True).router_logits
        assert text["layers"][0] == ALL_LAYERS and len(text["layers"]) == 1 + len(logits)
        total = 0
        for layer, scores in enumerate(logits, 1):
            highest = scores.topk(2, dim=-1)
            weights = highest.values.softmax(dim=-1)
            assert torch.equal(experts_of(text)[layer], scores.argmax(dim=-1))
            assert torch.allclose(shades_of(text)[layer], weights[:, 0].double(), atol=3e-3)
            total = total + torch.zeros_like(scores).scatter(-1, highest.indices, weights)
        mean = (total / len(logits)).max(dim=-1)
        assert torch.allclose(shades_of(text)[0], mean.values.double(), atol=3e-3)
    for name in ("math", "code"):
        for shares in data["shares"][name].values():
            assert sum(shares) == pytest.approx(1)


def test_inputs_and_targets_of_an_encoder_decoder_are_shown_apart(tmp_path):
    make_moe(tmp_path / "moe", "switch_transformers", **SWITCH)
    rows = words(0, 3, ("input", "target"))
    write(tmp_path / "data.jsonl", rows)
    page = tmp_path / "page.html"
    count_usage(
        str(tmp_path / "moe"),
        [f"news={tmp_path / 'data.jsonl'}"],
        reading=Reading(quiet=True),
        batch_size=2,
        html=page,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    usage = count_usage(
        str(tmp_path / "moe"), [f"news={tmp_path / 'data.jsonl'}"], reading=Reading(quiet=True)
    )
    for stack, column in (("encoder", "input"), ("decoder", "target")):
        texts = [text for text in read(page)["texts"] if text["stack"] == stack]
        for row, text in zip(rows, texts, strict=True):
            assert "".join(text["tokens"]) == tokenizer.decode(tokenizer(row[column])["input_ids"])
        # One expert per token: the colours of all texts add up to the counts.
        for index, layer in enumerate(texts[0]["layers"][1:], 1):
            coloured = torch.cat([experts_of(text)[index] for text in texts])
            counts = torch.bincount(coloured, minlength=4).tolist()
            assert counts == usage.tasks["news"].layers[layer].counts


def test_a_text_of_a_sequence_moe_has_one_colour(here):
    for name in ("base", *NAMES):
        make_model(here / f"a-{name}", len(name))
        save_tokenizer(here / f"a-{name}", 96)
    options = {"routing": "perplexity", "experts_per_sequence": 1, "embedding": "separate"}
    models = [f"a-{name}" for name in NAMES]
    merge(document("seq_moe", models, "./a-base", parameters=options), "moe")
    write(here / "math.jsonl", words(0, 4))
    usage = count_usage("moe", ["math.jsonl"], reading=Reading(quiet=True), html="page.html")
    colours = []
    for text in read(here / "page.html")["texts"]:
        assert text["layers"] == [ALL_LAYERS, PER_SEQUENCE]
        (expert,) = experts_of(text)[1].unique().tolist()
        colours.append(expert)
    (task,) = usage.tasks.values()
    counts = torch.bincount(torch.tensor(colours), minlength=len(NAMES)).tolist()
    assert counts == task.layers[PER_SEQUENCE].counts


def test_inspect_shows_the_expert_with_the_highest_coefficient(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 96)
    experts = {name: str(save_lora(tmp_path / name, seed)) for seed, name in enumerate("ab")}
    config = RoutedLoraConfig(experts=experts, router="arrow")
    get_peft_model(make_base(), config).save_pretrained(tmp_path / "routed")
    write(tmp_path / "math.jsonl", words(0, 4))
    arguments = ["inspect", str(tmp_path / "routed"), "--base", str(tmp_path / "base")]
    arguments += [f"--data=math={tmp_path / 'math.jsonl'}", "--html", str(tmp_path / "p.html")]
    result = CliRunner().invoke(route, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    data = read(tmp_path / "p.html")
    assert data["experts"] == ["a", "b"]
    model = PeftModel.from_pretrained(make_base(), tmp_path / "routed").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for row, text in zip(words(0, 4), data["texts"], strict=True):
        # The first module reads nothing that an expert has changed: its router computes alone.
        name = text["layers"][1]
        module = model.get_submodule(f"base_model.model.{name}")
        hidden = []
        hook = module.register_forward_pre_hook(lambda _, given, kept=hidden: kept.append(given[0]))
        with torch.no_grad():
            model(**tokenizer(row["text"], return_tensors="pt"))
            router = module.routed_lora_router["default"]
            coefficients = router.coefficients(router.scores(hidden[0]))[0]
        hook.remove()
        assert torch.equal(experts_of(text)[1], coefficients.argmax(dim=-1))
        highest = coefficients.max(dim=-1).values.double()
        assert torch.allclose(shades_of(text)[1], highest, atol=3e-3)


def test_a_page_is_refused_before_any_work(tmp_path):
    with pytest.raises(click.ClickException, match=re.escape("a page is written as *.html")):
        check_new_page(tmp_path / "page.png")
