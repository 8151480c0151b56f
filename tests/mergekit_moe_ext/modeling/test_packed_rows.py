"""Rows of several documents: against the documents one by one, each as a batch of its own."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.mergekit_moe_ext.sequences import fine_tunes, mixture, padded, words

LENGTHS = (9, 6, 11, 7)


@pytest.fixture(scope="module")
def sources():
    return fine_tunes(3)


def model_of(sources, routing, is_shared=False, **config):
    base = sources[0]
    around = (base.get_input_embeddings(), base.get_output_embeddings()) if is_shared else ()
    return mixture(sources, *around, routing=routing, routing_tokens=4, **config)


def documents():
    return [words(1, length, seed=length)[0] for length in LENGTHS]


def packed(**options):
    collate = DataCollatorWithFlattening(**options)
    return collate([{"input_ids": document.tolist()} for document in documents()])


def one_by_one(model, **options):
    return [
        model(input_ids=document[None], labels=document[None], use_cache=False, **options)
        for document in documents()
    ]


def mean_loss(outputs):
    """The mean over the labels that count: those behind a prefix of four tokens."""
    numbers = [length - 4 for length in LENGTHS]
    losses = [output.loss * number for output, number in zip(outputs, numbers, strict=True)]
    return sum(losses) / sum(numbers)


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned"])
def test_documents_of_a_row_choose_and_predict_as_they_do_alone(sources, routing, is_shared):
    model = model_of(sources, routing, is_shared)
    with torch.no_grad():
        output = model(**packed(return_flash_attn_kwargs=True), output_hidden_states=True)
        expected = one_by_one(model, output_hidden_states=True)
    choices = torch.cat([each.coefficients for each in expected])
    assert len(choices.unique(dim=0)) > 1
    torch.testing.assert_close(output.coefficients, choices, atol=1e-6, rtol=0)
    logits = torch.cat([each.logits for each in expected], dim=1)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-4)
    for number, state in enumerate(output.hidden_states):
        states = torch.cat([each.hidden_states[number] for each in expected], dim=1)
        torch.testing.assert_close(state, states, atol=1e-5, rtol=1e-4)
    assert abs(output.loss - mean_loss(expected)) < 1e-6


def test_gradients_are_those_of_the_documents(sources):
    model = model_of(sources, "learned", is_shared=True).train()
    number = sum(length - 1 for length in LENGTHS)
    model(**packed(), num_items_in_batch=torch.tensor(number)).loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad()
    # A mean over other labels: those of the prefix count in the number that training divides by.
    share = sum(length - 4 for length in LENGTHS) / number
    (share * mean_loss(one_by_one(model))).backward()
    assert gradients["router.weight"].any()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_rows_may_hold_different_numbers_of_documents(sources):
    """The second row is one document; asked for are the logits of some positions alone."""
    model = model_of(sources, "perplexity")
    ids = words(2, 12)
    positions = torch.stack([torch.arange(12) % 7, torch.arange(12)])
    with torch.no_grad():
        parts = [model(part).logits for part in (ids[:1, :7], ids[:1, 7:], ids[1:])]
        last = model(ids, position_ids=positions, logits_to_keep=3)
        chosen = model(ids, position_ids=positions, logits_to_keep=torch.tensor([2, 8]))
    expected = torch.cat([torch.cat(parts[:2], dim=1), parts[2]])
    assert last.coefficients.shape == (3, 3)
    torch.testing.assert_close(last.logits, expected[:, -3:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(chosen.logits, expected[:, [2, 8]], atol=1e-5, rtol=1e-4)


def test_labels_that_are_shifted_already_and_coefficients(sources):
    model = model_of(sources, "perplexity")
    batch = packed()
    labels = batch.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
        assert torch.equal(model(**batch, labels=labels, shift_labels=shifted).loss, expected)
        coefficients = torch.eye(3)[[0, 2, 1, 0]]
        output = model(**batch, coefficients=coefficients, return_dict=False)
        logits = model(documents()[1][None], coefficients=coefficients[1:2]).logits
    torch.testing.assert_close(output[0][:, 9:15], logits, atol=1e-5, rtol=1e-4)


def test_documents_that_cannot_be_told_apart_are_refused(sources):
    model = model_of(sources, "perplexity")
    batch = packed(return_flash_attn_kwargs=True)
    ids, positions = batch["input_ids"], batch["position_ids"]
    with pytest.raises(ValueError, match=r"cu_seq_lens_q=.*position_ids"):
        model(ids, cu_seq_lens_q=batch["cu_seq_lens_q"])
    for more in ({"attention_mask": torch.ones_like(ids)}, {"use_cache": True}):
        with pytest.raises(ValueError, match="position_ids start again"):
            model(ids, position_ids=positions, **more)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, position_ids=positions, output_attentions=True)


def test_positions_of_padding_pack_nothing(sources):
    """As `generate` gives them, with a mask: those of padding are all alike."""
    model = model_of(sources, "perplexity")
    ids, mask = padded(words(2), [3, 0], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(ids, mask, positions)
        assert torch.equal(output.logits, model(ids, mask).logits)
