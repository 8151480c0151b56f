"""Rows of different tokenizers brought together: against loops over the tokens' strings, and
against the sources' own probabilities.
"""

import re

import click
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import mergekit_moe_ext
from mergekit_moe_ext.sequence.tokens import Tokens
from mergekit_moe_ext.sequence.vocabulary import rows_of
from tests.conftest import document, make_model, merge, read_tensors
from tests.mergekit_moe_ext.sequence.decoders import SPECIAL, save_source, vocabulary
from tests.mergekit_moe_ext.sequence.subwords import corpus, tokenizer_of_kind
from tests.tokenizers import save_words

# What each source has of its own: width, order and words. Its embedding may be longer than its
# tokenizer.
SOURCES = {
    "llama": {"vocab_size": 100},
    "gpt2": {"hidden_size": 24, "words": vocabulary(80, shuffled=1, also=("w2-w3",))},
    "gemma": {"hidden_size": 40, "words": vocabulary(90, shuffled=2, without=("w5", "w6", "w50"))},
    "qwen3": {"words": vocabulary(70, shuffled=3), "vocab_size": 72},
}
TIED = ("gpt2", "gemma")


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A directory with one source per family; only Llama and Qwen have a head of their own."""
    root = tmp_path_factory.mktemp("decoders")
    for seed, (family, config) in enumerate(SOURCES.items()):
        save_source(root / family, family, seed, **config)
    save_words(root / "llama", [*vocabulary(94), "w1-w2", "café"], **SPECIAL)
    return root


@pytest.fixture
def here(decoders, tmp_path, monkeypatch):
    for source in decoders.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def matrices(family):
    """Embedding and head of a source, and its row of each token's string."""
    model = AutoModelForCausalLM.from_pretrained(family)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return embedding.detach(), head.detach(), AutoTokenizer.from_pretrained(family).get_vocab()


def averaged(families, donor, part, width):
    """MergeME 3.2, token by token: rows filled with zeros to the width, averaged over the sources
    that have it.
    """
    sources = {family: matrices(family) for family in set(families)}
    expected = []
    words = {row: word for word, row in sources[donor][2].items()}
    for row in range(len(sources[donor][0])):
        found = []
        for family in families:
            embedding, head, rows = sources[family]
            its_row = rows.get(words[row]) if row in words else (row if family == donor else None)
            if its_row is not None:
                padded = torch.zeros(width)
                values = (embedding, head)[part][its_row]
                padded[: len(values)] = values
                found.append(padded)
        expected.append(sum(found) / len(found))
    return torch.stack(expected)


@pytest.mark.parametrize(
    ("families", "donor", "width"),
    [
        (["llama", "gpt2", "gemma", "qwen3"], "llama", 40),
        (["llama", "gpt2", "gemma", "qwen3"], "gpt2", 40),
        (["gpt2", "gemma"], "gpt2", 40),  # both tied
        (["qwen3", "gpt2", "gpt2"], "qwen3", 32),  # one listed twice counts twice
        (["gemma", "llama"], "gemma", 40),
    ],
)
def test_embedding_and_head_are_averaged_token_by_token(here, families, donor, width):
    got = read_tensors(merge(document("hetero_moe", families, f"./{donor}")))
    torch.testing.assert_close(got["embed_tokens.weight"], averaged(families, donor, 0, width))
    if set(families) <= set(TIED):
        assert "lm_head.weight" not in got
    else:
        torch.testing.assert_close(got["lm_head.weight"], averaged(families, donor, 1, width))


def test_the_donors_embedding_is_filled_with_zeros(here):
    got = read_tensors(
        merge(
            document("hetero_moe", ["llama", "gemma"], "./llama", parameters={"embedding": "donor"})
        )
    )
    embedding, head, _ = matrices("llama")
    for name, matrix in {"embed_tokens.weight": embedding, "lm_head.weight": head}.items():
        assert torch.equal(got[name][:, :32], matrix) and not got[name][:, 32:].any()
    tied = merge(
        document("hetero_moe", ["gemma", "llama"], "./gemma", parameters={"embedding": "donor"}),
        "tied",
    )
    got = read_tensors(tied)
    assert (
        torch.equal(got["embed_tokens.weight"], matrices("gemma")[0])
        and "lm_head.weight" not in got
    )


def test_half_precision_is_averaged_in_float32(here):
    for family in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.bfloat16)
        model.save_pretrained(f"half-{family}")
        AutoTokenizer.from_pretrained(family).save_pretrained(f"half-{family}")
    models = ["half-llama", *["half-gpt2"] * 6]
    got = read_tensors(merge(document("hetero_moe", models, "./half-llama")))
    expected = averaged(models, "half-llama", 0, 32).to(torch.bfloat16)
    torch.testing.assert_close(got["embed_tokens.weight"], expected)


def stood_in(family, donor):
    """Embedding and head of a source in the donor's order; for what it lacks, the pieces of its own
    tokenizer.
    """
    embedding, head, rows = matrices(family)
    tokenizer, of_donor = (
        AutoTokenizer.from_pretrained(family),
        AutoTokenizer.from_pretrained(donor),
    )
    words = {row: word for word, row in of_donor.get_vocab().items()}
    expected = []
    for row in range(len(matrices(donor)[0])):
        if row in words and words[row] in rows:
            pieces = [rows[words[row]]]
        elif row in words:
            pieces = tokenizer(of_donor.decode([row]), add_special_tokens=False)["input_ids"]
        else:
            pieces = range(len(embedding))
        expected.append([matrix[list(pieces)].mean(dim=0) for matrix in (embedding, head)])
    return [torch.stack(matrices) for matrices in zip(*expected, strict=True)]


@pytest.mark.parametrize("donor", ["llama", "gpt2"])
def test_a_separate_embedding_has_a_row_for_every_token_of_the_donor(here, donor):
    families = ["llama", "gpt2", "gemma"]
    parameters = {"embedding": "separate", "spelled_tokens": "mean"}
    got = read_tensors(merge(document("hetero_moe", families, f"./{donor}", parameters=parameters)))
    for index, family in enumerate(families):
        embedding, head = matrices(family)[:2] if family == donor else stood_in(family, donor)
        torch.testing.assert_close(got[f"experts.{index}.embed_tokens.weight"], embedding)
        if family in TIED:
            assert f"experts.{index}.lm_head.weight" not in got
        else:
            torch.testing.assert_close(got[f"experts.{index}.lm_head.weight"], head)


def test_a_word_of_two_is_the_mean_of_its_pieces(here):
    """The loop above, once by hand: `w1-w2` is three pieces to GPT-2, the hyphen unknown to it."""
    got = read_tensors(
        merge(
            document(
                "hetero_moe", ["llama", "gpt2"], "./llama", parameters={"embedding": "separate"}
            )
        )
    )
    embedding, _, rows = matrices("gpt2")
    pieces = [rows["w1"], rows["<unk>"], rows["w2"]]
    row = AutoTokenizer.from_pretrained("llama").get_vocab()["w1-w2"]
    torch.testing.assert_close(
        got["experts.1.embed_tokens.weight"][row], embedding[pieces].mean(dim=0)
    )


def test_a_token_of_a_role_is_stood_in_for_by_that_of_the_same_role(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"w{i}" for i in range(20)]
    # All roles in one, as GPT-2 has them: above all it ends the text.
    one = {
        "unk_token": "<|end|>",
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
    }
    save_source("one", words=["<|end|>", *words], special=one)
    apart = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    save_source("apart", words=["<unk>", *words, "</s>", "<s>", "<pad>"], special=apart)
    # Its padding was added to the tokenizer alone, so the embedding has no row for it.
    added = {"unk_token": "[UNK]", "bos_token": "[S]", "eos_token": "[E]", "pad_token": "[PAD]"}
    save_source(
        "added", words=[*words, "[E]", "[S]", "[UNK]", "[PAD]"], special=added, vocab_size=23
    )

    def embeddings(donor):
        config = document(
            "hetero_moe",
            ["one", "apart", "added"],
            f"./{donor}",
            parameters={"embedding": "separate"},
        )
        tensors = read_tensors(merge(config, f"out-{donor}"))
        rows = AutoTokenizer.from_pretrained(donor).get_vocab()
        by_expert = []
        for i in range(3):
            embedding = tensors[f"experts.{i}.embed_tokens.weight"]
            by_expert.append({word: embedding[row] for word, row in rows.items()})
        return by_expert

    own = {name: (matrices(name)[0], matrices(name)[2]) for name in ("one", "apart", "added")}

    def row_of(name, word):
        return own[name][0][own[name][1][word]]

    of_one, of_apart, of_added = embeddings("one")
    assert torch.equal(of_one["<|end|>"], row_of("one", "<|end|>"))
    assert torch.equal(of_apart["<|end|>"], row_of("apart", "</s>"))
    assert torch.equal(of_added["<|end|>"], row_of("added", "[E]"))
    of_one, of_apart, of_added = embeddings("apart")
    for word, stand_in in {"<unk>": "[UNK]", "<s>": "[S]", "</s>": "[E]"}.items():
        assert torch.equal(of_apart[word], row_of("apart", word))
        assert torch.equal(of_added[word], row_of("added", stand_in))
        assert torch.equal(of_one[word], row_of("one", "<|end|>"))
    torch.testing.assert_close(of_added["<pad>"], own["added"][0].mean(dim=0))


def nothing_left(directory):
    return not any(path.name.startswith((".", "out")) for path in directory.iterdir())


@pytest.mark.parametrize(
    ("family", "embedding"), [("llama", "average"), ("gpt2", "separate"), ("olmo", "donor")]
)
def test_a_source_without_a_tokenizer(here, family, embedding):
    """For many a family transformers makes up an empty tokenizer instead."""
    make_model(here / "bare", 1, family=family)
    message = r"\./bare has no tokenizer \(it is needed, since tokens are matched"
    for base in ("./llama", "./bare"):
        with pytest.raises(click.ClickException, match=message):
            merge(
                document("hetero_moe", ["llama", "bare"], base, parameters={"embedding": embedding})
            )
    assert nothing_left(here)


def test_a_tokenizer_that_cannot_be_read(here):
    make_model(here / "broken", 1)
    (here / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(click.ClickException, match=r"cannot read the tokenizer of \./broken"):
        merge(document("hetero_moe", ["llama", "broken"], "./llama"))
    assert nothing_left(here)


@pytest.mark.parametrize("embedding", ["average", "donor", "separate"])
def test_tokenizers_that_share_no_token(here, embedding):
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    save_source("strange", words=["[UNK]", "[EOS]", *(f"v{i}" for i in range(30))], special=special)
    with pytest.raises(click.ClickException, match=r"\./strange shares no token with \./llama"):
        merge(
            document(
                "hetero_moe", ["llama", "strange"], "./llama", parameters={"embedding": embedding}
            )
        )
    assert nothing_left(here)


def test_a_donor_whose_tokenizer_has_more_tokens_than_its_embedding(here):
    save_source("short", words=vocabulary(40), vocab_size=30)
    with pytest.raises(
        click.ClickException, match=r"tokenizer of \./short has a token 30, .* only 30 rows"
    ):
        merge(document("hetero_moe", ["short", "llama"], "./short"))
    assert nothing_left(here)
    merge(
        document("hetero_moe", ["llama", "short"], "./llama", parameters={"embedding": "separate"})
    )


# Tokenizers of the kinds that people have, and what each writes for a word after a space.
MARKS = {"byte_level": "Ġ", "sentencepiece": "▁", "unigram": "▁", "wordpiece": ""}


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """A directory with a Llama per kind of tokenizer, of two widths; in two the head is tied."""
    root = tmp_path_factory.mktemp("subwords")
    for seed, kind in enumerate(MARKS):
        tokenizer = tokenizer_of_kind(kind, size=420 if kind != "unigram" else 180)
        width = 24 + 8 * (seed % 2)
        make_model(
            root / kind,
            seed,
            vocab_size=len(tokenizer),
            hidden_size=width,
            tie_word_embeddings=seed < 2,
            initializer_range=0.3,
        )
        tokenizer.save_pretrained(root / kind)
    return root


@pytest.fixture
def of_kinds(subwords, tmp_path, monkeypatch):
    for source in subwords.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged_pair(donor, kind, name="out", **parameters):
    """The mixture of two kinds with the first one's tokenizer, loaded."""
    config = document("hetero_moe", [donor, kind], f"./{donor}")
    config["parameters"] = {
        "embedding": "separate",
        "routing": "perplexity",
        "experts_per_sequence": 1,
        **parameters,
    }
    model, info = AutoModelForCausalLM.from_pretrained(
        merge(config, name), output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("is_special", [(True, False), (False, True), (False, False)])
def test_a_chat_marker_is_matched_whether_it_is_called_special_or_not(is_special):
    donor, model = tokenizer_of_kind("byte_level"), tokenizer_of_kind("sentencepiece")
    for tokenizer, of_this in zip((donor, model), is_special, strict=True):
        tokenizer.add_tokens(["<|im_start|>"], special_tokens=of_this)
    rows = rows_of(Tokens(donor), Tokens(model), len(donor), len(model))
    marker = donor.convert_tokens_to_ids("<|im_start|>")
    assert rows.own[marker] == model.convert_tokens_to_ids("<|im_start|>")


def test_the_text_of_a_special_token_among_the_words_of_a_donor():
    """A Unigram source makes its own end of text of it, which is not what it says."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*characters, "</", "</s", "</s>"])}
    raw = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("</", "s"), ("</s", ">")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    donor, model = PreTrainedTokenizerFast(tokenizer_object=raw), tokenizer_of_kind("unigram")
    rows = rows_of(Tokens(donor), Tokens(model), len(donor), len(model))
    assert vocabulary["</s>"] in rows.missing
    assert list(rows.stand_ins[vocabulary["</s>"]]) == [model.unk_token_id]


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("donor", MARKS)
def test_words_are_matched_whatever_marks_them(subwords, donor, kind):
    """Every word after a space that both have as one token, and their rests of words."""
    of_donor, own = (AutoTokenizer.from_pretrained(subwords / name) for name in (donor, kind))
    rows = rows_of(Tokens(of_donor), Tokens(own), len(of_donor), len(own))
    donor_vocabulary, vocabulary = of_donor.get_vocab(), own.get_vocab()
    words = {word for line in corpus() for word in line.split() if word.isalpha()}
    both = [
        word
        for word in sorted(words)
        if MARKS[donor] + word in donor_vocabulary and MARKS[kind] + word in vocabulary
    ]
    assert len(both) >= 10
    for word in both:
        token = donor_vocabulary[MARKS[donor] + word]
        assert rows.own[token] == vocabulary[MARKS[kind] + word], word
    rest_of = {donor: "", kind: "", "wordpiece": "##"}
    for rest in ("ka", "li", "a"):
        token = donor_vocabulary.get(rest_of[donor] + rest)
        if token is not None and rest_of[kind] + rest in vocabulary:
            assert rows.own[token] == vocabulary[rest_of[kind] + rest], rest
    for text in ("<s>", "</s>", "<unk>"):
        assert rows.own[donor_vocabulary[text]] == vocabulary[text]


@torch.no_grad()
def probabilities(donor, kind, text, **parameters):
    """What a source gives the next token after each word of a text, and what it gives as the
    second expert of a mixture, whose tokenizer is the donor's; with the source's rows.
    """
    of_donor, own = (AutoTokenizer.from_pretrained(name) for name in (donor, kind))
    model = merged_pair(donor, kind, **parameters)
    theirs = own(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ours = of_donor(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    rows = rows_of(Tokens(of_donor), Tokens(own), len(of_donor), len(own))
    assert torch.equal(rows.own[ours], theirs), "the text is to be one of words that both have"
    source = AutoModelForCausalLM.from_pretrained(kind)(theirs).logits.softmax(dim=-1)
    alone = torch.tensor([[0.0, 1.0]])
    return source[0], model(ours, coefficients=alone).logits.softmax(dim=-1)[0], rows


PAIRS = [("sentencepiece", "byte_level"), ("byte_level", "unigram"), ("byte_level", "wordpiece")]


def text_of_both(donor, kind):
    """Words after a space, of which each is one token to both."""
    of_donor, own = (AutoTokenizer.from_pretrained(name).get_vocab() for name in (donor, kind))
    words = {word for line in corpus() for word in line.split() if word.isalpha()}
    both = [word for word in words if MARKS[donor] + word in of_donor and MARKS[kind] + word in own]
    return " " + " ".join(sorted(both)[:12])


@pytest.mark.parametrize(("donor", "kind"), PAIRS)
def test_spelled_tokens_share_the_probability_of_their_first_piece(of_kinds, donor, kind):
    """Token by token: an own token has the source's probability, which those of one row share, and
    a spelled one that of its first piece, times its part among all that begin with that piece, all
    by Zipf's law.
    """
    source, mixture, rows = probabilities(donor, kind, text_of_both(donor, kind))
    first = {token: row for token, row in enumerate(rows.own.tolist()) if row >= 0}
    own = set(first)
    first |= {token: bag[0] for token, bag in rows.stand_ins.items()}
    expected = torch.zeros_like(mixture)
    made = {token: row for token, row in first.items() if token not in rows.never_made}
    for token, row in made.items():
        alike = [other for other, its_row in made.items() if its_row == row]
        if token in own:
            alike = [other for other in alike if other in own]
        part = 1 / (token + 300) / sum(1 / (other + 300) for other in alike)
        expected[:, token] = source[:, row] * part
    assert len(rows.spelled) > 20
    expected /= expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mixture, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
def test_a_model_with_the_donors_tokenizer_keeps_its_rows(kind):
    tokenizer = tokenizer_of_kind(kind)
    rows = rows_of(Tokens(tokenizer), Tokens(tokenizer), len(tokenizer), len(tokenizer))
    assert rows.own.tolist() == list(range(len(tokenizer)))
    assert not rows.shares().any() and not rows.availability(with_stand_ins=False).any()


def test_tokens_of_one_row_have_its_probability_once():
    """WordPiece's tokens with a space before them and without, and SentencePiece's bytes."""
    for donor, kind in [("byte_level", "wordpiece"), ("sentencepiece", "byte_level")]:
        of_donor, model = tokenizer_of_kind(donor), tokenizer_of_kind(kind)
        rows = rows_of(Tokens(of_donor), Tokens(model), len(of_donor), len(model))
        used = rows.own[rows.own >= 0].unique()
        assert len(used) < (rows.own >= 0).sum()
        mean = rows.availability(with_stand_ins=True)
        for logarithms in (rows.shares(), mean, rows.availability(with_stand_ins=False)):
            for row in used.tolist():
                parts = logarithms[rows.own == row].exp()
                assert parts.sum().item() == pytest.approx(1, abs=1e-6)
        assert all(mean[token] < -10 for token in rows.never_made)


def parts_of_rows(rows, has):
    """By Zipf's law the part of each of these tokens of its row, which others may have, too."""
    tokens = has.nonzero()[:, 0].tolist()
    parts = []
    for token in tokens:
        alike = [other for other in tokens if rows.own[other] == rows.own[token]]
        parts.append(1 / (token + 300) / sum(1 / (other + 300) for other in alike))
    return torch.tensor(parts)


@pytest.mark.parametrize(("donor", "kind"), PAIRS)
def test_unavailable_tokens_leave_their_probability_to_the_experts_own(of_kinds, donor, kind):
    text = text_of_both(donor, kind)
    source, mixture, rows = probabilities(donor, kind, text, spelled_tokens="unavailable")
    has = rows.own >= 0
    has[list(rows.never_made)] = False
    assert mixture[:, ~has].sum(dim=-1).max() < 1e-5
    own = source[:, rows.own[has]] * parts_of_rows(rows, has)
    expected = own / own.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mixture[:, has], expected, atol=1e-6, rtol=1e-4)


def test_a_head_with_a_bias_keeps_it(of_kinds):
    tokenizer = AutoTokenizer.from_pretrained("wordpiece")
    make_model(of_kinds / "phi", 5, family="phi", vocab_size=len(tokenizer), initializer_range=0.3)
    source = AutoModelForCausalLM.from_pretrained("phi")
    with torch.no_grad():
        source.lm_head.bias += torch.linspace(-1, 1, len(tokenizer))
    source.save_pretrained("phi")
    tokenizer.save_pretrained("phi")
    MARKS["phi"] = ""
    try:
        text = text_of_both("byte_level", "phi")
        of_source, mixture, rows = probabilities(
            "byte_level", "phi", text, spelled_tokens="unavailable"
        )
    finally:
        del MARKS["phi"]
    has = rows.own >= 0
    own = of_source[:, rows.own[has]] * parts_of_rows(rows, has)
    expected = own / own.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mixture[:, has], expected, atol=1e-6, rtol=1e-4)


def test_the_plan_and_the_card_count_tokens_with_examples(of_kinds):
    config = document("hetero_moe", ["byte_level", "wordpiece"], "./byte_level")
    config["parameters"] = {"embedding": "separate"}
    printed = str(mergekit_moe_ext.plan(config))
    of_donor, own = (AutoTokenizer.from_pretrained(name) for name in ("byte_level", "wordpiece"))
    rows = rows_of(Tokens(of_donor), Tokens(own), len(of_donor), len(own))
    number = int((rows.own >= 0).sum())
    of_its_tokens = len(set(rows.own.tolist()) - {-1})  # a word with a space and without is one
    counted = f"{number} its own ({of_its_tokens} of its tokens), {len(rows.spelled)} spelled"
    assert number + len(rows.spelled) + len(rows.missing) == len(of_donor)
    card = (merge(config) / "README.md").read_text()
    for text in (printed, card):
        assert counted in text and f"{len(rows.missing)} missing" in text and '" as "' in text


def test_spelled_tokens_is_for_heads_of_the_experts_own(here):
    config = document("hetero_moe", ["llama", "gpt2"], "./llama")
    config["parameters"] = {"spelled_tokens": "mean"}
    with pytest.raises(click.ClickException, match="spelled_tokens is for embedding: separate"):
        merge(config)
    assert nothing_left(here)


def test_a_sum_of_logits_in_which_an_expert_rules_tokens_out_is_warned_about(of_kinds, caplog):
    config = document("hetero_moe", ["byte_level", "wordpiece"], "./byte_level")
    for combine, is_told in (("logits", True), ("probabilities", False)):
        config["parameters"] = {
            "embedding": "separate",
            "spelled_tokens": "unavailable",
            "combine": combine,
        }
        caplog.clear()
        mergekit_moe_ext.plan(config)
        assert ("with combine: logits neither can" in caplog.text) == is_told


@pytest.mark.parametrize("spelled_tokens", ["share", "mean", "unavailable"])
def test_only_tokens_that_are_ruled_out_are_counted(of_kinds, caplog, spelled_tokens):
    """Not those that are written as the unknown token: against the logits of the one expert."""
    config = document("hetero_moe", ["byte_level", "wordpiece"], "./byte_level")
    config["parameters"] = {"embedding": "separate", "spelled_tokens": spelled_tokens}
    out = merge(config)
    told = re.search(r"wordpiece cannot give (\d+) of the donor's tokens", caplog.text)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5]]), coefficients=torch.tensor([[0.0, 1.0]])).logits
    probabilities = logits[0, -1].softmax(-1)
    rows = rows_of(
        *(Tokens(AutoTokenizer.from_pretrained(name)) for name in ("byte_level", "wordpiece")),
        len(probabilities),
        AutoModelForCausalLM.from_pretrained("wordpiece").config.vocab_size,
    )
    ruled_out = set((probabilities < 1e-9).nonzero()[:, 0].tolist()) - rows.never_made
    counted = int(told[1]) if told else 0
    assert counted == len(ruled_out)
    assert (counted > 0) == (spelled_tokens == "unavailable")
