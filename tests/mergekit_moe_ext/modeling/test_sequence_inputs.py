"""What a sequence MoE takes in place of tokens, and gives besides logits: against its sources."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_moe_ext.modeling import SequenceMoEConfig, SequenceMoEForCausalLM
from mergekit_moe_ext.modeling.token_lookup import tokens_of
from tests.conftest import TINY
from tests.mergekit_moe_ext.sequences import dense, fine_tunes, mixture, only, padded, words

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def sources():
    return fine_tunes(3)


def shared(sources, **config):
    base = sources[0]
    return mixture(sources, base.get_input_embeddings(), base.get_output_embeddings(), **config)


def states_of(source, ids, mask=None):
    with torch.no_grad():
        return source(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_hidden_states_are_those_of_each_sequence_s_expert(family):
    config = {"head_dim": 8} if family == "gemma2" else {}
    sources = [dense(seed, family, **config) for seed in range(3)]
    model, ids = mixture(sources), words(4)
    chosen = [1, 0, 1, 2]
    coefficients = torch.cat([only(expert, 3) for expert in chosen])
    with torch.no_grad():
        got = model(ids, coefficients=coefficients, output_hidden_states=True).hidden_states
    for row, expert in enumerate(chosen):
        expected = states_of(sources[expert], ids[row : row + 1])
        assert len(got) == len(expected) == 3
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-5, rtol=1e-4)


def test_the_configuration_asks_for_hidden_states_too(sources):
    model = mixture(sources, experts_per_sequence=1)
    ids = words(1)
    model.config.output_hidden_states = True
    with torch.no_grad():
        output = model(ids)
    expected = states_of(sources[output.coefficients[0].argmax()], ids)
    torch.testing.assert_close(output.hidden_states[-1], expected[-1], atol=1e-5, rtol=1e-4)
    assert model(ids, output_hidden_states=False).hidden_states is None
    made = model.generate(ids, return_dict_in_generate=True, output_hidden_states=True, **GREEDY)
    assert [step[-1].shape[1] for step in made.hidden_states] == [12, 1, 1, 1]


def test_states_of_several_experts_are_weighed(sources):
    """Hidden states and attentions, against those of the sources alone."""
    model, ids = mixture(sources), words(2)
    coefficients = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    for each in (model, *sources):
        each.set_attn_implementation("eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got = model(ids, coefficients=coefficients, **more)
        of_sources = [source(ids, **more) for source in sources]
    for name, number in (("hidden_states", 3), ("attentions", 2)):
        assert len(got[name]) == number
        for layer, ours in enumerate(got[name]):
            expected = torch.zeros_like(ours)
            for index, output in enumerate(of_sources):
                for row in range(2):
                    expected[row] += coefficients[row, index] * output[name][layer][row]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for each in (model, *sources):
        each.set_attn_implementation("sdpa")


def test_attentions_by_the_configuration_and_while_generating(sources):
    model = mixture(sources, experts_per_sequence=1)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with torch.no_grad():
        attentions = model(words()).attentions
        torch.testing.assert_close(attentions[1].sum(-1), torch.ones(4, 4, 12))
    made = model.generate(words(), return_dict_in_generate=True, output_attentions=True, **GREEDY)
    assert [step[0].shape[-1] for step in made.attentions] == [12, 13, 14, 15]


def test_a_gradient_passes_through_the_states_of_an_expert_alone(sources):
    output = mixture(sources)(words(), coefficients=only(1, 3), output_hidden_states=True)
    output.hidden_states[1].retain_grad()
    output.logits.sum().backward()
    assert output.hidden_states[1].grad.abs().sum() > 0


def test_states_of_different_sizes_are_refused():
    both = torch.cat([only(0, 2), only(1, 2)])
    for more, message in (({"num_hidden_layers": 3}, "numbers of layers"), ({}, "sizes")):
        model = mixture([dense(0), dense(1, hidden_size=64, **more)])
        with pytest.raises(ValueError, match=message):
            model(words(2), coefficients=both, output_hidden_states=True)
        alone = model(words(1), coefficients=both[1:], output_hidden_states=True).hidden_states
        assert alone[-1].shape[-1] == 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_vocabulary_is_resized_in_every_expert(tmp_path, is_shared, tied):
    sources = [dense(seed, tie_word_embeddings=tied) for seed in range(2)]
    make = shared if is_shared else mixture
    model = make(sources, routing="uniform", tie_word_embeddings=is_shared and tied)
    ids = words()
    with torch.no_grad():
        before = model(ids).logits
    size = before.shape[-1]
    embedding = model.resize_token_embeddings(size + 10)
    assert embedding is model.get_input_embeddings() and embedding.num_embeddings == size + 10
    assert (model.get_output_embeddings().weight is embedding.weight) == tied
    ids[:, -1] = size + 9
    with torch.no_grad():
        after = model(ids).logits
    assert after.shape[-1] == size + 10
    torch.testing.assert_close(after[:, :-1, :size], before[:, :-1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, after)
    again.resize_token_embeddings(size)
    with torch.no_grad():
        torch.testing.assert_close(again(ids % size).logits[:, :-1], before[:, :-1])


@pytest.mark.parametrize("is_shared", [False, True])
def test_embeddings_and_heads_can_be_set(sources, is_shared):
    model = (shared if is_shared else mixture)(sources, base_expert=1)
    embedding, head = torch.nn.Embedding(96, 32), torch.nn.Linear(32, 96)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head
    expected = torch.cat([source.lm_head.weight for source in sources[::2]])
    if not is_shared:  # those of the other experts stay
        others = torch.cat([model.experts[index].lm_head.weight for index in (0, 2)])
        assert torch.equal(others, expected)


@pytest.mark.parametrize("routing", ["learned", "uniform"])
def test_embeddings_in_place_of_tokens(sources, routing):
    model = shared(sources, routing=routing)
    if routing == "learned":
        torch.nn.init.normal_(model.router.weight)
    ids, mask = padded(words(3), (0, 4, 2), "left")
    embedded = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
        got = model(inputs_embeds=embedded, attention_mask=mask)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.coefficients, expected.coefficients)
    made = model.generate(ids, attention_mask=mask, **GREEDY)
    for more in ({}, {"use_cache": False}):  # which transformers overrides here
        from_embedded = model.generate(
            inputs_embeds=embedded, attention_mask=mask, **GREEDY, **more
        )
        assert torch.equal(from_embedded, made[:, 12:])
    soft = torch.nn.Parameter(embedded)  # a prompt that is trained
    model(inputs_embeds=soft, attention_mask=mask, coefficients=only(1, 3)).logits.sum().backward()
    assert soft.grad.abs().sum() > 0


@pytest.mark.parametrize("routing", ["learned", "perplexity", "task_vector"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_embeddings_of_tokens_are_looked_up(sources, routing, is_shared):
    """Those of the base expert's embedding, where each has its own; padding may be anything."""
    model = (shared if is_shared else mixture)(sources, routing=routing, base_expert=1)
    ids, mask = padded(words(3), (0, 4, 2), "left")
    embedded = model.get_input_embeddings()(ids).detach()
    embedded[mask == 0] = torch.nan if not is_shared else 0.5
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
        got = model(inputs_embeds=embedded, attention_mask=mask)
    assert torch.equal(got.coefficients, expected.coefficients)
    kept = mask.bool()
    torch.testing.assert_close(got.logits[kept], expected.logits[kept])
    made = model.generate(ids, attention_mask=mask, **GREEDY)
    from_embedded = model.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(from_embedded, made[:, 12:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_found_by_its_embedding_alone(dtype):
    embedding = torch.nn.Embedding(3000, 16).to(dtype)
    tokens = torch.randint(10, 3000, (2, 700))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    vectors = embedding(tokens).detach()
    vectors[1, :5] = 7
    looked_up = tokens_of(vectors, embedding, mask, padding=3)
    assert torch.equal(looked_up, tokens.masked_fill(mask == 0, 3))
    vectors[0, 9] *= 1.01
    assert tokens_of(vectors, embedding, mask, padding=3) is None
    with torch.no_grad():
        embedding.weight[1] = embedding.weight[0]  # whose vector is then that of both
    assert tokens_of(embedding(torch.tensor([[5, 0]])), embedding, None, padding=3) is None


def test_embeddings_are_refused_where_tokens_are_needed(sources):
    embedded = torch.randn(2, 12, 32)
    with pytest.raises(ValueError, match=r"inputs_embeds=: each expert .* one token alone"):
        mixture(sources)(inputs_embeds=embedded)
    model = mixture(sources)
    of_tokens = model.get_input_embeddings()(words(2))
    with pytest.raises(ValueError, match="no gradient reaches them"):
        model(inputs_embeds=of_tokens)
    for routing in ("perplexity", "task_vector"):
        model = shared(sources, routing=routing)
        with pytest.raises(ValueError, match=f"inputs_embeds=: routing '{routing}'"):
            model(inputs_embeds=embedded)
        with pytest.raises(ValueError, match=f"inputs_embeds=: routing '{routing}'"):
            model.generate(inputs_embeds=embedded, **GREEDY)
        assert model(inputs_embeds=embedded, coefficients=only(0, 3)).logits.isfinite().all()
    for inputs in ({}, {"input_ids": words(2), "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="one of input_ids= and inputs_embeds="):
            model(**inputs)


def test_a_mask_that_does_not_tell_padding_is_refused(sources):
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    for wrong in (mask, {"full_attention": mask}):
        with pytest.raises(ValueError, match=r"attention_mask= has to be of shape \(rows"):
            mixture(sources)(words(2), attention_mask=wrong)
    for shape in ((2, 15), (1, 12), (2, 11)):
        with pytest.raises(ValueError, match=rf"is of shape \({shape[0]}, {shape[1]}\)"):
            mixture(sources)(words(2), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned"])
def test_tokens_and_masks_of_other_types(sources, routing):
    """Tokens of 32 bits, as `numpy` and other libraries make them, and masks of any kind."""
    model = mixture(sources, routing=routing)
    ids, mask = padded(words(2), [3, 0], "left")
    with torch.no_grad():
        expected = model(ids, mask).logits[mask.bool()]
        for other in (mask.bool(), mask.float(), mask.int()):
            logits = model(ids.int(), other).logits[mask.bool()]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_configuration_with_a_shared_embedding_made_by_hand(tmp_path, tied):
    expert = AutoConfig.for_model("llama", **TINY, architectures=["LlamaForCausalLM"]).to_dict()
    sizes = {"hidden_size": 32, "vocab_size": 96, "embedding": "shared"}
    config = SequenceMoEConfig([expert, expert], **sizes)
    assert config.tie_word_embeddings is False
    if tied:
        config.tie_word_embeddings = True
    model = SequenceMoEForCausalLM(config).eval()
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(words()).logits, model(words()).logits)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_longer_than_an_expert_s_positions_names_it(family):
    sources = [dense(0), dense(1, family, max_position_embeddings=16)]
    model = mixture(sources, expert_names=["rotary", "short"])
    ids, mask = padded(words(2, 17), (0, 3), "left")
    assert model(ids, coefficients=only(0, 2)).logits.isfinite().all()
    assert model(ids[:, :16], coefficients=only(1, 2)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"'short' has 16 positions, .* 17 tokens"):
        model(ids)
    with pytest.raises(ValueError, match=r"'short' has 16 positions, .* 17 tokens"):
        model.generate(ids[:, :14], coefficients=only(1, 2), **GREEDY)
    # padding takes none
    last = {"attention_mask": mask[1:], "coefficients": only(1, 2)}
    assert model(ids[1:], **last).logits.isfinite().all()
