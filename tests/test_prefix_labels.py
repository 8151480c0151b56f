"""What a prefix does to labels, against the loss of transformers on labels that are left out by
hand.
"""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from _mergekit_moe_ext_common import prefix_labels

LABELS = torch.tensor([[5, 6, 7, 8, 9, 3], [-100, 4, 3, 2, 6, -100]])
PREFIX = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
COUNTING = ([[3, 8], [4, 9], [5, 3]], [[4, 6]])  # in each row the positions, and their labels
LOGITS = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))


def by_hand():
    log_probabilities = LOGITS.log_softmax(-1)
    losses = []
    for row, pairs in enumerate(COUNTING):
        for position, label in pairs:
            losses.append(-log_probabilities[row, position - 1, label])
    return torch.stack(losses)


def without_prefix_labels(arguments, prefix, training=True):
    return prefix_labels.without_prefix_labels(arguments, prefix, training=training)


def loss(arguments):
    return ForCausalLMLoss(LOGITS, vocab_size=11, **arguments)


@pytest.mark.parametrize("length", [5, 6])
def test_the_loss_is_over_the_labels_after_the_prefix(length):
    shifted = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], dim=1)[:, :length]
    assert torch.allclose(loss(without_prefix_labels({"labels": LABELS}, PREFIX)), by_hand().mean())
    kept = without_prefix_labels({"labels": LABELS, "shift_labels": shifted}, PREFIX)
    logits = LOGITS[:, :length].contiguous()
    of_shifted = ForCausalLMLoss(logits, vocab_size=11, **kept)
    assert torch.allclose(of_shifted, by_hand().mean())


def test_a_step_is_the_same_in_whatever_batches_it_is_cut():
    """The Trainer counts the labels of a step once, and says the same number to each batch."""
    items = torch.tensor(9)
    whole = without_prefix_labels({"labels": LABELS, "num_items_in_batch": items}, PREFIX)
    parts = []
    for row in range(2):
        part = {"labels": LABELS[row : row + 1], "num_items_in_batch": items}
        kept = without_prefix_labels(part, PREFIX[row : row + 1])
        parts.append(ForCausalLMLoss(LOGITS[row : row + 1], vocab_size=11, **kept))
    assert torch.allclose(sum(parts), loss(whole))
    assert torch.allclose(loss(whole), by_hand().sum() / items)


def test_an_evaluation_is_the_mean_over_what_counts():
    """The Trainer counts the labels of each batch, which is all there is."""
    items = (LABELS[:, 1:] != -100).sum()
    kept = without_prefix_labels({"labels": LABELS, "num_items_in_batch": items}, PREFIX, False)
    assert torch.allclose(loss(kept), by_hand().mean())


def test_where_no_label_is_left_an_error_names_the_option():
    everything = torch.ones_like(PREFIX)
    with pytest.raises(ValueError, match=r"rows here have 6\. Leave out .* smaller routing_tokens"):
        without_prefix_labels({"labels": LABELS}, everything)
    without_prefix_labels({"labels": torch.full_like(LABELS, -100)}, everything)  # none was given
