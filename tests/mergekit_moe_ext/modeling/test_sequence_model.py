"""A sequence MoE's forward pass, against its sources run one by one in a plain loop."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache

from mergekit_moe_ext.modeling import SequenceMoEConfig
from tests.mergekit_moe_ext.sequences import (
    EOS,
    VOCAB,
    Calls,
    dense,
    fine_tunes,
    logits_of,
    mixture,
    only,
    padded,
    words,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def sources():
    return [dense(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model(sources):
    return mixture(sources, routing_tokens=5)


def hidden_of(source, embedded):
    with torch.no_grad():
        return source.base_model(inputs_embeds=embedded).last_hidden_state


def hand_coefficients(rows, number):
    coefficients = torch.rand(rows, number, generator=torch.Generator().manual_seed(3))
    coefficients[0, 1] = coefficients[1, 0] = coefficients[2, :2] = 0
    return coefficients


@pytest.mark.parametrize("side", ["left", "right"])
def test_separate_heads_mix_logits(model, sources, side):
    ids, mask = padded(words(), (0, 3, 5, 1), side)
    coefficients = hand_coefficients(4, 3)
    expected = sum(
        coefficients[:, i, None, None] * logits_of(source, ids, mask)
        for i, source in enumerate(sources)
    )
    logits = model(ids, attention_mask=mask, coefficients=coefficients).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


def test_a_shared_head_reads_mixed_hidden_states(sources):
    embed, head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB, bias=True)
    model = mixture(sources, embed, head, head_bias=True)
    ids, coefficients = words(), hand_coefficients(4, 3)
    hidden = [hidden_of(source, embed(ids)) for source in sources]
    expected = head(sum(coefficients[:, i, None, None] * part for i, part in enumerate(hidden)))
    torch.testing.assert_close(model(ids, coefficients=coefficients).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("residual", [False, True])
def test_experts_of_different_widths_and_families_behind_projectors(kind, residual):
    """The paper's 3.2, layer by layer: Proj-in, the decoder, Proj-out, weighted sum, head."""
    sources = [dense(0, hidden_size=48), dense(1, "gpt2", n_embd=32, n_layer=1, n_head=2)]
    embed, head = nn.Embedding(VOCAB, 48), nn.Linear(48, VOCAB, bias=False)
    model = mixture(
        sources, embed, head, projector=kind, projector_residual=residual and kind == "mlp"
    )
    ids, coefficients = words(), torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])

    def project(projector, x, width):
        weights = [part.weight for part in projector.layers if isinstance(part, nn.Linear)]
        y = x @ weights[0].T
        if kind == "mlp":
            y = nn.functional.gelu(y) @ weights[1].T
            if residual:
                resized = x.new_zeros(*x.shape[:-1], width)
                resized[..., : min(width, x.shape[-1])] = x[..., :width]
                y = y + resized
        return y

    with torch.no_grad():
        mixed = 0
        for index, (source, width) in enumerate(zip(sources, (48, 32), strict=True)):
            expert = model.experts[index]
            hidden = hidden_of(source, project(expert.proj_in, embed(ids), width))
            mixed = mixed + coefficients[:, index, None, None] * project(
                expert.proj_out, hidden, 48
            )
        torch.testing.assert_close(
            model(ids, coefficients=coefficients).logits, head(mixed), **CLOSE
        )


def test_a_shared_embedding_is_scaled_as_each_source_scales_its_own():
    """Gemma multiplies embeddings by the root of its width, Llama does not; Gemma's head is its
    embedding.
    """
    sources = [dense(0), dense(1, "gemma", head_dim=8)]
    gemma = sources[1]
    model = mixture(sources, gemma.get_input_embeddings(), gemma.get_output_embeddings())
    ids = words()
    got = model(ids, coefficients=only(1, 2)).logits
    torch.testing.assert_close(got, logits_of(gemma, ids), **CLOSE)
    llama = hidden_of(sources[0], nn.functional.embedding(ids, gemma.get_input_embeddings().weight))
    got = model(ids, coefficients=only(0, 2)).logits
    torch.testing.assert_close(got, gemma.lm_head(llama), **CLOSE)


def test_a_cap_on_logits_bounds_the_mixture():
    sources = [dense(seed, "gemma2", head_dim=8, final_logit_softcapping=3.0) for seed in range(2)]
    model, ids = mixture(sources), words()
    with torch.no_grad():
        free = []
        for source in sources:
            source.config.final_logit_softcapping = None
            free.append(logits_of(source, ids))
    expected = 3 * torch.tanh((0.25 * free[0] + 0.75 * free[1]) / 3)
    torch.testing.assert_close(
        model(ids, coefficients=torch.tensor([[0.25, 0.75]])).logits, expected, **CLOSE
    )


CAPPED = [(0, "llama", {}), (1, "gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0})]


def test_logits_that_are_capped_differently_are_capped_before_they_are_mixed():
    sources = [dense(seed, family, **config) for seed, family, config in CAPPED]
    model, ids = mixture(sources, experts_per_sequence=1), words(3)
    coefficients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    got = model(ids, coefficients=coefficients).logits
    first, second = (logits_of(source, ids) for source in sources)
    torch.testing.assert_close(got[0], first[0], **CLOSE)
    torch.testing.assert_close(got[1], second[1], **CLOSE)
    torch.testing.assert_close(got[2], 0.25 * first[2] + 0.75 * second[2], **CLOSE)
    alone = model(ids[2:], coefficients=coefficients[2:]).logits
    torch.testing.assert_close(got[2:], alone, **CLOSE)
    assert model(ids[:, :1]).coefficients.tolist() == [[0.5, 0.5]] * 3  # nothing to choose by


@pytest.mark.parametrize("embedding", ["separate", "shared"])
def test_probabilities_are_mixed_where_that_is_asked_for(embedding):
    sources = [dense(seed, family, **config) for seed, family, config in CAPPED]
    ends = []
    if embedding == "shared":
        ends = [sources[0].get_input_embeddings(), sources[0].get_output_embeddings()]
    model = mixture(sources, *ends, combine="probabilities")
    ids = words(3)
    each = [model(ids, coefficients=only(expert, 2)).logits for expert in range(2)]
    if embedding == "separate":
        for logits, source in zip(each, sources, strict=True):
            torch.testing.assert_close(logits.exp(), logits_of(source, ids).softmax(-1), **CLOSE)
    coefficients = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.9, 0.1]])
    got = model(ids, coefficients=coefficients).logits
    for row, (first, second) in enumerate(coefficients.tolist()):
        expected = first * each[0][row].exp() + second * each[1][row].exp()
        torch.testing.assert_close(got[row].exp(), expected, **CLOSE)
    with pytest.raises(ValueError, match="cannot be negative"):
        model(ids, coefficients=torch.tensor([[1.5, -0.5]]))


def test_a_loss_of_mixed_probabilities_trains_router_and_experts(sources):
    model = mixture(sources[:2], routing="learned", combine="probabilities", routing_tokens=2)
    model.train()
    ids = words()
    output = model(ids, labels=ids)
    output.loss.backward()
    by_hand = output.logits[:, 1:-1].exp().gather(-1, ids[:, 2:, None]).log()
    torch.testing.assert_close(output.loss, -by_hand.mean(), **CLOSE)
    for parameter in (model.router.weight, *model.experts.parameters()):
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned", "uniform"])
def test_a_batch_is_its_sequences_one_by_one(sources, routing):
    model = mixture(sources, routing=routing, routing_tokens=5)
    lengths = (12, 9, 4, 1)
    rows = [words(1, length, seed) for seed, length in enumerate(lengths)]
    for side in ("left", "right"):
        ids, mask = padded(
            torch.zeros(4, 12, dtype=torch.long), [12 - length for length in lengths], side
        )
        ids[mask.bool()] = torch.cat(rows, dim=1)[0]
        out = model(ids, attention_mask=mask)
        for index, row in enumerate(rows):
            alone = model(row)
            torch.testing.assert_close(out.coefficients[index], alone.coefficients[0], **CLOSE)
            torch.testing.assert_close(
                out.logits[index][mask[index].bool()], alone.logits[0], **CLOSE
            )


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned"])
def test_from_the_end_of_the_prefix_on_nothing_depends_on_later_tokens(sources, routing):
    model = mixture(sources, routing=routing, routing_tokens=5)
    ids = words(3, 12)
    changed = ids.clone()
    changed[:, 8:] = words(3, 4, seed=9)
    before, after = model(ids), model(changed)
    assert torch.equal(before.coefficients, after.coefficients)
    torch.testing.assert_close(before.logits[:, 4:8], after.logits[:, 4:8], **CLOSE)
    assert not torch.allclose(before.logits[:, 8:], after.logits[:, 8:])


def test_the_whole_sequence_chooses_where_that_is_asked_for(sources):
    ids = words(3, 12)
    whole = mixture(sources, routing_tokens=5, routing_prefix="sequence")
    longer = mixture(sources, routing_tokens=12)
    assert torch.equal(whole(ids).coefficients, longer(ids).coefficients)
    assert not torch.equal(
        whole(ids).coefficients, mixture(sources, routing_tokens=5)(ids).coefficients
    )
    labelled = whole(ids, labels=ids)
    expected = nn.functional.cross_entropy(
        labelled.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)
    )
    torch.testing.assert_close(labelled.loss, expected)


def test_the_prefix_is_counted_without_padding(model):
    ids, mask = padded(words(2), (4, 0), "left")
    first = model(ids, attention_mask=mask).coefficients[0]
    torch.testing.assert_close(first, model(ids[:1, 4:]).coefficients[0])
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1 - 2) % (VOCAB - 2) + 2  # the fifth word
    assert not torch.equal(model(changed, attention_mask=mask).coefficients[0], first)


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_loss_is_taken_inside_the_prefix(model, side):
    ids, mask = padded(words(3), (0, 3, 6), side)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    losses = []
    for row in range(3):
        real = mask[row].bool()
        logits, tokens = out.logits[row][real], ids[row][real]
        losses += [
            nn.functional.cross_entropy(logits[t - 1], tokens[t]) for t in range(5, len(tokens))
        ]
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    inside = labels.clone()
    inside[:, :5][mask[:, :5].bool()] = 7
    if side == "right":
        torch.testing.assert_close(model(ids, attention_mask=mask, labels=inside).loss, out.loss)
    # The Trainer divides by a count of labels taken beforehand, which knows nothing of the prefix.
    counted = (labels[:, 1:] != -100).sum()
    again = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=counted)
    torch.testing.assert_close(again.loss, out.loss)


def test_all_labels_count_where_coefficients_are_given_or_uniform(model, sources):
    ids = words(2)
    for out in (
        model(ids, labels=ids, coefficients=torch.full((2, 3), 1 / 3)),
        mixture(sources, routing="uniform")(ids, labels=ids),
    ):
        expected = nn.functional.cross_entropy(
            out.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)
        )
        torch.testing.assert_close(out.loss, expected)


def test_uniform_is_the_mean_of_all(sources):
    ids = words()
    expected = sum(logits_of(source, ids) for source in sources) / 3
    torch.testing.assert_close(mixture(sources, routing="uniform")(ids).logits, expected, **CLOSE)


def test_only_asked_for_positions_reach_the_head(model):
    ids = words()
    everything = model(ids, coefficients=only(1, 3)).logits
    torch.testing.assert_close(
        model(ids, coefficients=only(1, 3), logits_to_keep=2).logits, everything[:, -2:]
    )
    some = torch.tensor([1, 4])
    torch.testing.assert_close(
        model(ids, coefficients=only(1, 3), logits_to_keep=some).logits, everything[:, some]
    )


def test_half_precision_and_tuples(sources):
    model = mixture(sources).to(torch.bfloat16)
    ids = words()
    for index, source in enumerate(sources):
        expected = logits_of(source.to(torch.bfloat16), ids)
        source.float()  # back again: bfloat16 rounded it, so the other tests' sources are spoilt
        torch.testing.assert_close(model(ids, coefficients=only(index, 3)).logits, expected)
    assert model(ids).logits.dtype == torch.bfloat16
    logits, *_rest = model(ids, return_dict=False)
    torch.testing.assert_close(logits, model(ids).logits)


def test_experts_that_are_not_chosen_are_not_run(sources):
    model = mixture(sources, routing="learned")
    calls = Calls(model)
    out = model(words(6, 9))
    chosen = (out.coefficients > 0).sum(dim=0).tolist()
    assert sum(chosen) == 12
    assert calls.take() == [[(rows, 9)] if rows else [] for rows in chosen]
    model(words(6, 9), coefficients=only(2, 3))
    assert calls.take() == [[], [], [(6, 9)]]


@torch.no_grad()
def test_perplexity_runs_each_expert_once_over_the_prompt(sources):
    model = mixture(sources)
    calls = Calls(model)
    out = model(words(6, 9))  # no longer than the prefix
    assert calls.take() == [[(6, 9)]] * 3
    step = model(words(6, 1), past_key_values=out.past_key_values)
    assert torch.equal(step.coefficients, out.coefficients)
    chosen = (out.coefficients > 0).sum(dim=0).tolist()
    assert calls.take() == [[(rows, 1)] if rows else [] for rows in chosen]
    model.generate(words(6, 40), max_new_tokens=1, eos_token_id=None)
    assert calls.take() == [[(6, 40)]] * 3
    out = model(words(6, 40))  # longer: the winners go on with the rest, from the start
    chosen = (out.coefficients > 0).sum(dim=0).tolist()
    assert calls.take() == [[(6, 32), *([(rows, 40)] if rows else [])] for rows in chosen]


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (torch.ones(3), r"\(4, 3\)"),
        (torch.ones(4, 2), r"\(4, 3\)"),
        (torch.ones(3, 3), r"\(4, 3\)"),
        (torch.ones(0, 3), r"\(4, 3\)"),
        (torch.eye(3)[:2], r"\(4, 3\)"),  # nothing says which two sequences each row is of
        (torch.zeros(4, 3), "not all 0"),
        (torch.full((4, 3), float("nan")), "finite"),
    ],
)
def test_coefficients_of_a_wrong_shape(model, coefficients, message):
    with pytest.raises(ValueError, match=message):
        model(words(), coefficients=coefficients)


def test_what_it_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match="DynamicCache"):
        model(words(), past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"routing": "perplexty"}, "perplexity, task_vector, learned, uniform"),
        ({"experts_per_sequence": 4}, "there are 3 experts"),
        ({"experts_per_sequence": 0}, "there are 3 experts"),
        ({"routing": "uniform", "experts_per_sequence": 2}, "takes all 3 experts"),
        ({"routing_prefix": "half"}, "'prefix' nor 'sequence'"),
        ({"routing_tokens": 0}, "routing_tokens=0"),
        ({"combine": "words"}, "combine='words'"),
        ({"embedding": "merged"}, "'shared' nor 'separate'"),
    ],
)
def test_a_configuration_that_makes_no_sense(model, config, message):
    values = {**model.config.to_dict(), **config}
    with pytest.raises(ValueError, match=message):
        SequenceMoEConfig(**values)


def test_a_learned_router_that_cannot_learn_is_refused_in_training(sources):
    """One expert kept and softmax after: always 1, so the router gets no gradient."""
    model = mixture(sources, routing="learned", experts_per_sequence=1)
    ids = words(2)
    assert model(ids).coefficients.sum() == 2  # to be used it is fine
    with pytest.raises(ValueError, match="no gradient"):
        model.train()(ids, labels=ids)


def test_fine_tunes_of_one_base_may_share_most_of_their_parameters():
    """`attention: merged`, by hand: one set of attentions and norms, each expert its FFNs."""
    sources = fine_tunes(3)
    pattern = r"^(?!model\.layers\.\d+\.mlp\.)"
    base = sources[0]
    for source in sources[1:]:
        own = {name: p for name, p in source.state_dict().items() if ".mlp." in name}
        source.load_state_dict({**base.state_dict(), **own})
    model = mixture(sources, base.model.embed_tokens, base.lm_head, shared_parameters=[pattern])
    assert {id(expert.trunk.model.norm.weight) for expert in model.experts} == {
        id(model.experts[0].trunk.model.norm.weight)
    }
    ids = words()
    for index, source in enumerate(sources):
        got = model(ids, coefficients=only(index, 3)).logits
        torch.testing.assert_close(got, logits_of(source, ids), **CLOSE)
    assert EOS in model.config.special_token_ids


@pytest.fixture
def with_merged_attention():
    sources = fine_tunes(2)
    pattern = r"^model\.layers\.\d+\.(?!mlp\.)"
    return mixture(sources, shared_parameters=[pattern], routing="uniform")


def adapted(model, targets, name="default"):
    """The model with a LoRA that changes what it computes."""
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    return get_peft_model(model, config, adapter_name=name).eval()


def test_an_adapter_on_shared_attention_is_not_merged(with_merged_attention, tmp_path):
    model = with_merged_attention
    weight = model.experts[1].trunk.model.layers[0].self_attn.q_proj.weight.detach().clone()
    plain = model(words()).logits
    wrapped = adapted(model, ["q_proj", "up_proj"])
    unmerged = wrapped(words()).logits
    assert not torch.allclose(unmerged, plain, atol=1e-3)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(ValueError, match=r"self_attn\.q_proj has an adapter .* by all experts"):
            merge()
    torch.testing.assert_close(wrapped(words()).logits, unmerged, **CLOSE)
    # The same holds where it is loaded.
    wrapped.save_pretrained(tmp_path)
    model = wrapped.unload()
    assert torch.equal(model.experts[1].trunk.model.layers[0].self_attn.q_proj.weight, weight)
    torch.testing.assert_close(model(words()).logits, plain, **CLOSE)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(loaded(words()).logits, unmerged, **CLOSE)
    with pytest.raises(ValueError, match="by all experts"):
        loaded.merge_and_unload(safe_merge=True)


def test_an_adapter_on_ffns_beside_shared_attention_is_merged(with_merged_attention):
    wrapped = adapted(with_merged_attention, ["up_proj", "down_proj"])
    unmerged = wrapped(words()).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(words()).logits, unmerged, **CLOSE)
