"""Linear CKA: against float64 kernels written out, its invariances, and a loop over texts."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.analysis import (
    LayerSimilarity,
    LinearCKA,
    cka,
    layer_similarity,
    plot_layers,
    plot_pairs,
)
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, SWITCH, make_moe, words, write

READING = Reading(max_length=24, quiet=True)


def features(seed, samples=40, number=7):
    return torch.randn(samples, number, generator=torch.Generator().manual_seed(seed)) + 3


def centred_kernel(values):
    """The kernel of (samples, samples) that Kornblith et al. write, in float64."""
    kernel = values.double() @ values.double().T
    centring = torch.eye(len(kernel)).double() - 1 / len(kernel)
    return centring @ kernel @ centring


def by_kernels(first, second):
    first, second = centred_kernel(first), centred_kernel(second)
    hsic = (first * second).sum()
    return float(hsic / ((first * first).sum() * (second * second).sum()).sqrt())


def unbiased_hsic(first, second):
    """Song et al. (2012), equation 5, with its kernels of (samples, samples)."""
    number = len(first)
    kernels = [values.double() @ values.double().T for values in (first, second)]
    for kernel in kernels:
        kernel.fill_diagonal_(0)
    one, other = kernels
    ones = torch.ones(number, dtype=torch.float64)
    of_all = (ones @ one @ ones) * (ones @ other @ ones) / ((number - 1) * (number - 2))
    of_rows = 2 / (number - 2) * (ones @ one @ other @ ones)
    return ((one @ other).trace() + of_all - of_rows) / (number * (number - 3))


def in_batches(first, second, size, **options):
    comparison = LinearCKA(**options)
    for start in range(0, len(first), size):
        comparison.update(first[start : start + size], second[start : start + size])
    return comparison.value()


def test_batches_of_features_give_the_cka_of_whole_kernels():
    first, second = features(1), features(2, number=11) + features(1)[:, :1]
    expected = by_kernels(first, second)
    assert 0.05 < expected < 0.95
    for size in (1, 7, 40):
        assert in_batches(first, second, size) == pytest.approx(expected, abs=1e-12)


def test_the_unbiased_estimate_is_the_mean_over_batches():
    first, second = features(1), features(2, number=11) + features(1)[:, :1]
    sums = {"first": 0.0, "second": 0.0, "both": 0.0}
    for start in range(0, 40, 10):
        one, other = first[start : start + 10], second[start : start + 10]
        sums["first"] += unbiased_hsic(one, one)
        sums["second"] += unbiased_hsic(other, other)
        sums["both"] += unbiased_hsic(one, other)
    expected = float(sums["both"] / (sums["first"] * sums["second"]).sqrt())
    assert in_batches(first, second, 10, unbiased=True) == pytest.approx(expected, abs=1e-10)


def test_features_that_have_nothing_in_common_are_unlike_only_without_bias():
    """Of 20 samples and 200 features CKA is near 1, whatever they are; the unbiased one, of many
    such batches, is near 0.
    """
    first, second = features(1, 400, 200), features(2, 400, 200)
    assert in_batches(first[:20], second[:20], 20) > 0.8
    assert abs(in_batches(first, second, 20, unbiased=True)) < 0.1


@pytest.mark.parametrize("unbiased", [False, True])
def test_rotation_scale_and_shift_do_not_matter_and_a_stretch_does(unbiased):
    first, second = features(1).double(), (features(2) + features(1)).double()
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    expected = in_batches(first, second, 20, unbiased=unbiased)
    moved = 3.5 * first @ rotation
    assert in_batches(moved, second, 20, unbiased=unbiased) == pytest.approx(expected, abs=1e-9)
    shifted = moved + torch.arange(7)
    assert in_batches(shifted, second, 20, unbiased=unbiased) == pytest.approx(expected, abs=1e-9)
    assert in_batches(first, first, 20, unbiased=unbiased) == pytest.approx(1)
    stretched = first * torch.tensor([50.0, 1, 1, 1, 1, 1, 1])
    assert abs(in_batches(stretched, second, 20, unbiased=unbiased) - expected) > 0.01


def test_samples_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="of the same samples"):
        LinearCKA().update(features(1), features(2, samples=39))
    with pytest.raises(UserError, match="4 tokens or more"):
        LinearCKA(unbiased=True).update(features(1, 3), features(2, 3))


@pytest.mark.parametrize("unbiased", [False, True])
def test_features_that_are_all_alike_have_no_similarity(unbiased):
    alike = torch.full((12, 5), 0.1)  # whose sums are rounded
    assert math.isnan(in_batches(alike, features(1, samples=12), 6, unbiased=unbiased))


def test_layers_of_decoders_against_a_loop_over_texts(tmp_path, monkeypatch):
    """Hidden states of one unpadded text at a time; those before the last layer's norm are outputs
    of layers.
    """
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        make_moe(tmp_path / name, "mixtral", seed=seed, **FAMILIES["mixtral"])
    rows = words(3, 9)
    write(tmp_path / "news.jsonl", rows)
    similarity = cka("one", "two", ["news.jsonl"], reading=READING, batch_size=4, all_pairs=True)
    (stack,) = similarity.stacks
    states = {}
    for name in ("one", "two"):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(name),
            AutoTokenizer.from_pretrained(name),
        )
        texts = []
        for row in rows:
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"][:, :24]
            if ids.numel():
                texts.append(model(ids, output_hidden_states=True).hidden_states[1].detach()[0])
        states[name] = torch.cat(texts)
    expected = by_kernels(states["one"], states["two"])
    assert stack == "decoder"
    assert similarity.stacks["decoder"][0][0] == pytest.approx(expected, abs=1e-5)
    assert cka("one", "one", ["news.jsonl"], reading=READING).same_layers("decoder") == (
        pytest.approx([1] * len(similarity.stacks["decoder"]))
    )


def test_encoder_and_decoder_are_compared_and_drawn_apart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "one", "switch_transformers", **SWITCH)
    make_moe(tmp_path / "two", "switch_transformers", seed=1, **SWITCH)
    write(tmp_path / "news.jsonl", words(3, 6, ("input", "target")))
    similarity = cka("one", "two", ["news.jsonl"], reading=READING, unbiased=True)
    assert list(similarity.stacks) == ["encoder", "decoder"]
    assert isinstance(similarity, LayerSimilarity)
    layers = len(similarity.stacks["encoder"])
    assert len(similarity.same_layers("encoder")) == layers
    assert not any(map(math.isnan, similarity.same_layers("decoder")))
    assert math.isnan(similarity.stacks["encoder"][0][layers - 1]) == (layers > 1)
    plot_layers({"one and two": similarity}, tmp_path / "lines.png")
    plot_pairs(similarity, tmp_path / "pairs.png")
    assert (tmp_path / "lines.png").stat().st_size and (tmp_path / "pairs.png").stat().st_size


def test_a_last_batch_too_small_for_the_unbiased_estimate_is_found_before_work(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        make_moe(tmp_path / name, "switch_transformers", **SWITCH)
    rows = [{"input": "w1 w2 w3 w4", "target": "w5 w6 w7"}] * 3
    write(tmp_path / "news.jsonl", rows)
    monkeypatch.setattr(layer_similarity, "load_model", None)
    with pytest.raises(UserError, match=r"rows from 2 on are a batch of \d tokens"):
        cka("one", "two", ["news.jsonl"], reading=READING, batch_size=2, unbiased=True)


def test_models_of_two_kinds_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "one", "switch_transformers", **SWITCH)
    make_moe(tmp_path / "two", "mixtral", **FAMILIES["mixtral"])
    with pytest.raises(UserError, match="is an encoder-decoder, and the other is none"):
        cka("one", "two", ["news.jsonl"], reading=READING)
