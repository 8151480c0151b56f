"""What chooses the experts of a sequence: each formula against transformers' own loss, autograd, or
the paper.
"""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.mergekit_moe_ext.sequences import (
    EOS,
    PAD,
    VOCAB,
    Calls,
    dense,
    fine_tunes,
    mixture,
    padded,
    words,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def sources():
    return [dense(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def tuned():
    return fine_tunes(3)


def scored_labels(ids, mask):
    return ids.masked_fill((mask == 0) | (ids == PAD) | (ids == EOS), -100)


def own_loss(source, ids, mask):
    """transformers' own, of one sequence without its padding; -100 on padding and special
    tokens."""
    real = mask.bool()
    return source(input_ids=ids[real][None], labels=scored_labels(ids, mask)[real][None]).loss


def chosen(scores, k):
    """Softmax over the k largest, the others 0: written out for one sequence."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
    total = sum(math.exp(scores[i]) for i in order)
    return torch.tensor(
        [math.exp(scores[i]) / total if i in order else 0.0 for i in range(len(scores))]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_perplexity_is_that_of_each_source_alone(sources, side, k):
    ids, mask = padded(words(4, 12), (0, 3, 7, 1), side)
    ids[0, 0] = ids[1, 5] = ids[3, 3] = EOS
    ids[0, 7] = PAD  # a special token, though no padding
    model = mixture(sources, experts_per_sequence=k)
    out = model(ids, attention_mask=mask)
    for row in range(4):
        with torch.no_grad():
            inverse = [
                math.exp(-own_loss(source, ids[row], mask[row]).item()) for source in sources
            ]
        torch.testing.assert_close(out.coefficients[row], chosen(inverse, k), **CLOSE)


def test_perplexity_of_gemma_2_sees_its_cap():
    sources = [
        dense(seed, "gemma2", head_dim=8, final_logit_softcapping=cap)
        for seed, cap in enumerate((2.0, 2.0))
    ]
    ids = words(2)
    out = mixture(sources)(ids)
    with torch.no_grad():
        inverse = [math.exp(-source(ids[:1], labels=ids[:1]).loss.item()) for source in sources]
    torch.testing.assert_close(out.coefficients[0], chosen(inverse, 2), **CLOSE)


def test_perplexity_with_a_shared_embedding_and_head(sources):
    embed, head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB, bias=False)
    nn.init.normal_(head.weight)
    model, ids = mixture(sources, embed, head, experts_per_sequence=3), words(2)
    inverse = []
    for source in sources:
        stands_in = copy.deepcopy(source)
        stands_in.set_input_embeddings(embed)
        stands_in.set_output_embeddings(head)
        with torch.no_grad():
            inverse.append(math.exp(-stands_in(ids[:1], labels=ids[:1]).loss.item()))
    torch.testing.assert_close(model(ids).coefficients[0], chosen(inverse, 3), **CLOSE)


def test_perplexity_is_summed_in_parts_that_change_nothing(sources, monkeypatch):
    from mergekit_moe_ext.modeling import modeling_sequence_moe

    model, ids = mixture(sources), words(3)
    whole = model(ids).coefficients
    monkeypatch.setattr(modeling_sequence_moe, "_SCORED_AT_ONCE", 5)
    torch.testing.assert_close(model(ids).coefficients, whole)


def test_equal_experts_tie(sources):
    """Two of the same: k of them are chosen, each as much as the other."""
    model = mixture([sources[0]] * 4, experts_per_sequence=2)
    coefficients = model(words(3)).coefficients
    assert ((coefficients > 0).sum(dim=1) == 2).all()
    torch.testing.assert_close(coefficients.max(dim=1).values, torch.full((3,), 0.5))


@pytest.mark.parametrize("routing", ["perplexity", "task_vector"])
@pytest.mark.parametrize(
    "prompt",
    [[[5]], [[EOS]], [[EOS, EOS, EOS]], [[PAD, EOS, 7]]],
    ids=["one word", "one special", "all special", "a word after padding and a special token"],
)
def test_nothing_to_score_makes_all_experts_alike(tuned, routing, prompt):
    ids = torch.tensor(prompt)
    out = mixture(tuned, routing=routing)(ids, attention_mask=(ids != PAD).long())
    expected = torch.full((1, 3), 1 / 3)
    if len(prompt[0]) == 3 and prompt[0][-1] == 7:  # a word after a real token is scored
        assert not torch.allclose(out.coefficients, expected)
    else:
        torch.testing.assert_close(out.coefficients, expected)


def test_only_the_prompts_without_a_choice_are_uniform(sources):
    ids, mask = padded(words(2), (11, 0), "left")
    coefficients = mixture(sources)(ids, attention_mask=mask).coefficients
    torch.testing.assert_close(coefficients[0], torch.full((3,), 1 / 3))
    assert (coefficients[1] > 0).sum() == 2


def test_dropout_plays_no_part_in_a_choice():
    sources = [dense(seed, attention_dropout=0.5) for seed in range(3)]
    for routing in ("perplexity", "task_vector"):
        model, ids = mixture(sources, routing=routing), words(2)
        expected = model(ids).coefficients
        torch.testing.assert_close(model.train()(ids).coefficients, expected)
        assert all(module.training for module in model.modules())


def cosines_by_hand(sources, ids, mask, compared, base=0):
    """Appendix C with everything materialised, in float64."""
    network = copy.deepcopy(sources[base]).double()
    own_loss(network, ids, mask).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if compared(name)}
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    similarities = []
    for source in sources:
        state = dict(source.named_parameters())
        theta = {name: p.detach() for name, p in network.named_parameters()}
        tau = torch.cat(
            [(theta[name] - state[name].detach().double()).flatten() for name in gradients]
        )
        similarities.append((flat @ tau / (flat.norm() * tau.norm())).item() if tau.any() else 0.0)
    return similarities


def cosines_of(model, ids, mask=None):
    """From the coefficients of all experts: the differences of their logarithms; the base's is
    0."""
    logarithms = model(ids, attention_mask=mask).coefficients.double().log()
    return logarithms - logarithms[:, [model.config.base_expert]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("base", [0, 2])
def test_task_vector_against_autograd(tuned, side, base):
    tuned = [*tuned[1:], tuned[0]] if base == 2 else tuned
    ids, mask = padded(words(3), (0, 4, 2), side)
    ids[0, 5] = EOS
    model = mixture(tuned, routing="task_vector", experts_per_sequence=3, base_expert=base)
    got = cosines_of(model, ids, mask)
    for row in range(3):
        expected = cosines_by_hand(tuned, ids[row], mask[row], lambda _name: True, base)
        assert expected[base] == 0.0
        torch.testing.assert_close(got[row].tolist(), expected, atol=1e-5, rtol=1e-4)


def test_an_expert_down_the_gradient_is_chosen(tuned):
    """One step of gradient descent on the prompt itself has a cosine of 1 with the paper's task
    vector; one up, -1.
    """
    ids = words(1)
    base = copy.deepcopy(tuned[0])
    base(ids, labels=ids).loss.backward()
    down, up = copy.deepcopy(tuned[0]), copy.deepcopy(tuned[0])
    with torch.no_grad():
        for p, d, u in zip(base.parameters(), down.parameters(), up.parameters(), strict=True):
            d -= 0.1 * p.grad
            u += 0.1 * p.grad
    got = cosines_of(
        mixture([tuned[0], up, down], routing="task_vector", experts_per_sequence=3), ids
    )
    torch.testing.assert_close(got[0].tolist(), [0.0, -1.0, 1.0], atol=1e-4, rtol=0)
    coefficients = mixture([tuned[0], up, down], routing="task_vector", experts_per_sequence=1)(
        ids
    ).coefficients
    assert coefficients.tolist() == [[0.0, 0.0, 1.0]]


def test_task_vector_of_some_layers(tuned):
    ids = words(2)
    model = mixture(tuned, routing="task_vector", experts_per_sequence=3, task_vector_layers=[1])
    got = cosines_of(model, ids)
    for row in range(2):
        expected = cosines_by_hand(
            tuned, ids[row], torch.ones(12), lambda name: ".layers.1." in name
        )
        torch.testing.assert_close(got[row].tolist(), expected, atol=1e-5, rtol=1e-4)


def test_task_vector_leaves_shared_parameters_out(tuned):
    """Attention, norms and embeddings of one: only the FFNs are compared."""
    base = tuned[0]
    tuned = copy.deepcopy(tuned)
    for source in tuned[1:]:
        own = {name: p for name, p in source.state_dict().items() if ".mlp." in name}
        source.load_state_dict({**base.state_dict(), **own})
    pattern = r"^(?!model\.layers\.\d+\.mlp\.)"
    model = mixture(
        tuned,
        base.get_input_embeddings(),
        base.get_output_embeddings(),
        routing="task_vector",
        experts_per_sequence=3,
        shared_parameters=[pattern],
    )
    ids = words(2)
    got = cosines_of(model, ids)
    for row in range(2):
        expected = cosines_by_hand(tuned, ids[row], torch.ones(12), lambda name: ".mlp." in name)
        torch.testing.assert_close(got[row].tolist(), expected, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_task_vector_with_tied_embeddings():
    tuned = fine_tunes(3, tie_word_embeddings=True)
    ids = words(1)
    got = cosines_of(mixture(tuned, routing="task_vector", experts_per_sequence=3), ids)
    expected = cosines_by_hand(tuned, ids[0], torch.ones(12), lambda _name: True)
    torch.testing.assert_close(got[0].tolist(), expected, atol=1e-5, rtol=1e-4)


def test_task_vector_with_frozen_parameters_and_without_gradients(tuned):
    ids = words(2)
    config = {"routing": "task_vector", "experts_per_sequence": 3}
    expected = mixture(tuned, **config)(ids).coefficients
    frozen = mixture(tuned, **config).requires_grad_(False)
    torch.testing.assert_close(frozen(ids).coefficients, expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(frozen(ids.clone()).coefficients, expected)
    assert not frozen(ids).coefficients.requires_grad


def test_an_adapter_is_part_of_a_task_vector_as_if_it_were_merged(tuned):
    """A new adapter of PEFT changes no choice, and merging a trained one does not either."""
    ids = words(3)
    model = mixture(tuned, routing="task_vector", experts_per_sequence=3)
    expected = model(ids).coefficients
    lora = {"target_modules": "all-linear", "r": 2, "modules_to_save": ["embed_tokens"]}
    adapted = get_peft_model(model, LoraConfig(**lora)).eval()
    assert torch.equal(adapted(input_ids=ids).coefficients, expected)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    coefficients = adapted(input_ids=ids).coefficients
    assert not torch.allclose(coefficients, expected, atol=1e-3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).coefficients, coefficients, atol=1e-5, rtol=1e-4)


def test_task_vectors_of_threads_that_share_a_model(tuned):
    model = mixture(tuned, routing="task_vector", experts_per_sequence=3)
    prompts = [words(1, seed=seed) for seed in range(8)]
    expected = [model(prompt).coefficients for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(model, prompts))
    for output, coefficients in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.coefficients, coefficients)


@pytest.mark.parametrize("embedding", ["separate", "shared"])
@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_task_vector_of_a_model_that_was_made_or_moved_in_inference_mode(embedding, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    sources = fine_tunes(3, rope_parameters=rope, max_position_embeddings=8)
    shares = {"embed": sources[0].get_input_embeddings(), "head": sources[0].lm_head}
    config = {"routing": "task_vector", "experts_per_sequence": 3}
    config |= shares if embedding == "shared" else {}
    ids = words(2)
    expected = mixture(sources, **config)(ids).coefficients
    moved = mixture(sources, **config)
    with torch.inference_mode():
        moved.double().float()
        made = mixture(sources, **config)
        for model in (moved, made):
            assert next(model.parameters()).is_inference()
            torch.testing.assert_close(model(ids.clone()).coefficients, expected)
    with torch.no_grad():
        torch.testing.assert_close(made(ids).coefficients, expected)
    with torch.inference_mode():  # which makes the frequencies of `dynamic` grow
        assert made.generate(ids.clone(), max_new_tokens=2, do_sample=False).shape[1] == 14


@pytest.mark.parametrize("embedding", ["separate", "shared"])
@pytest.mark.parametrize("layers", [None, [0]])
def test_task_vector_leaves_gradients_alone(tuned, embedding, layers):
    own = (
        ()
        if embedding == "separate"
        else (tuned[0].get_input_embeddings(), tuned[0].get_output_embeddings())
    )
    model = mixture(tuned, *own, routing="task_vector", task_vector_layers=layers)
    ids = words(2)
    model(ids)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.train()(ids)
    assert all((p.grad == 1).all() for p in model.parameters())


def test_task_vector_in_training_adds_nothing_to_the_gradient(tuned):
    """The same gradients as with the coefficients given, where no loss is taken inside the
    prefix."""
    model = mixture(tuned, routing="task_vector", routing_tokens=4).train()
    ids = words(2)
    out = model(ids, labels=ids)
    out.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    labels = ids.clone()
    labels[:, :4] = -100
    model(ids, labels=labels, coefficients=out.coefficients).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == got.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name])


def learned(sources, *own, **config):
    model = mixture(sources, *own, routing="learned", **config)
    nn.init.normal_(model.router.weight)
    return model


@pytest.mark.parametrize("embedding", ["separate", "shared"])
def test_a_learned_router_reads_the_mean_embedding_of_the_prefix(sources, embedding):
    own = (
        ()
        if embedding == "separate"
        else (nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB, bias=False))
    )
    model = learned(sources, *own, routing_tokens=5, base_expert=1)
    table = own[0] if own else sources[1].get_input_embeddings()
    ids, mask = padded(words(4), (0, 3, 9, 2), "left")
    got = model(ids, attention_mask=mask).coefficients
    for row in range(4):
        prefix = ids[row][mask[row].bool()][:5]
        scores = (table.weight[prefix].mean(dim=0) @ model.router.weight.T).tolist()
        torch.testing.assert_close(got[row], chosen(scores, 2), **CLOSE)


def test_gradients_reach_the_router_and_the_chosen_experts_alone(sources):
    model = learned(sources, routing_tokens=4).train()
    ids = words(1)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert model.router.weight.grad.abs().sum() > 0
    for index, expert in enumerate(model.experts):
        reached = any(p.grad is not None and p.grad.any() for p in expert.trunk.parameters())
        assert reached == (out.coefficients[0, index] > 0)
    difference = 1e-3
    rows = []
    for sign in (1, -1):  # the router's gradient is the slope of the loss
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.router.weight[out.coefficients[0].argmax(), 0] += sign * difference
            rows.append(moved(ids, labels=ids).loss.item())
    slope = model.router.weight.grad[out.coefficients[0].argmax(), 0].item()
    assert (rows[0] - rows[1]) / (2 * difference) == pytest.approx(slope, abs=1e-3, rel=0.05)


def test_the_load_balancing_loss(sources):
    """Switch Transformer's, per sequence: experts times the sum over experts of their share of the
    choices times their mean probability."""
    model = learned(sources, routing_tokens=4, router_aux_loss_coef=0.5)
    ids = words(6)
    assert model(ids).aux_loss is None
    model.train()
    out = model(ids, labels=ids)
    scores = sources[0].get_input_embeddings()(ids[:, :4]).mean(dim=1) @ model.router.weight.T
    expected = 0.0
    for expert in range(3):
        picked = sum(expert in row.topk(2).indices.tolist() for row in scores)
        expected += 3 * picked / 12 * scores.softmax(dim=-1)[:, expert].mean().item()
    assert out.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    labels = ids.clone()
    labels[:, :4] = -100
    plain = model(ids, labels=labels, coefficients=out.coefficients.detach()).loss
    assert out.loss.item() == pytest.approx(plain.item() + 0.5 * expected, rel=1e-5)


def test_balanced_choices_have_the_least_loss():
    """1 where experts and probabilities are level, and up to the number of experts where all choose
    one.
    """
    model = mixture([dense(0), dense(1)], routing="learned").train()
    nn.init.zeros_(model.router.weight)
    assert model(words(2)).aux_loss.item() == pytest.approx(1.0)


def test_a_router_in_float32_on_a_model_in_half_precision(sources):
    model = learned(sources).to(torch.bfloat16)
    model.router.float()
    assert model(words(2)).coefficients.dtype == torch.float32


def test_other_experts_are_not_run_for_a_task_vector(tuned):
    model = mixture(tuned, routing="task_vector", experts_per_sequence=1)
    calls = Calls(model)
    out = model(words(1))
    expected = [[(1, 12)] if weight else [] for weight in out.coefficients[0].tolist()]
    expected[0] = [(1, 12), *expected[0]]  # the base, for its gradient
    assert calls.take() == expected


def test_perplexity_without_training_leaves_the_gradient_of_the_chosen(sources):
    """What ran to be scored is used again only where no gradient is wanted."""
    ids, model = words(2, 9), mixture(sources, experts_per_sequence=2)
    gradients = []
    for coefficients in (None, model(ids).coefficients):
        model.zero_grad()
        model(ids, coefficients=coefficients).logits.square().sum().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


def _spread_router(model):
    """Router weights so large that one token more shows in the coefficients."""
    if model.config.routing == "learned":
        torch.nn.init.normal_(model.router.weight)


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_without_a_mask_does_not_choose(tuned, routing, side):
    model = mixture(tuned, routing=routing, routing_tokens=8)
    _spread_router(model)
    ids, mask = padded(words(4), (0, 3, 7, 9), side)
    expected, got = model(ids, attention_mask=mask), model(ids)
    torch.testing.assert_close(got.coefficients, expected.coefficients)
    torch.testing.assert_close(got.logits[mask.bool()], expected.logits[mask.bool()])


@torch.no_grad()
def test_padding_without_a_mask_stays_padding_in_the_steps_that_follow(tuned):
    model = mixture(tuned)
    ids, mask = padded(words(4), (0, 3, 7, 1), "left")
    cache = model(ids[:, :-2], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 1]))
    one = model(ids[[2, 1], -2:-1], past_key_values=cache).logits
    two = model(ids[[2, 1], -1:], past_key_values=cache).logits
    whole = model(ids, attention_mask=mask, coefficients=model(ids[:, :-2]).coefficients).logits
    torch.testing.assert_close(torch.cat([one, two], dim=1), whole[[2, 1], -2:])


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned"])
@torch.no_grad()
def test_a_padding_token_that_ends_texts_as_well(tuned, routing):
    """It is seen as any other token is; but behind a text it does not choose."""
    model = mixture(tuned, routing=routing, pad_token_id=EOS, routing_tokens=12)
    _spread_router(model)
    ids = words(3)
    for row, number in enumerate((5, 2, 0)):
        ids[row, 12 - number :] = EOS
    got = model(ids)
    for row, length in enumerate((7, 10, 12)):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(got.coefficients[row : row + 1], alone.coefficients)
    seen = model(ids, attention_mask=torch.ones_like(ids), coefficients=got.coefficients)
    assert torch.equal(seen.logits, got.logits)
    begun = torch.cat([torch.full((3, 1), EOS), ids], dim=1)  # as GPT-2's texts begin
    whole = model(begun, attention_mask=torch.ones_like(begun), coefficients=got.coefficients)
    assert torch.equal(model(begun, coefficients=got.coefficients).logits, whole.logits)
