"""What a sequence MoE takes in place of tokens, and gives besides logits: against its sources."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_moe_ext.modeling import SequenceMoEConfig, SequenceMoEForCausalLM
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


def test_hidden_states_that_nobody_has_are_refused(sources):
    with pytest.raises(ValueError, match="has several experts"):
        mixture(sources)(words(2), output_hidden_states=True)
    deeper = [dense(0), dense(1, num_hidden_layers=3)]
    both = torch.cat([only(0, 2), only(1, 2)])
    model = mixture(deeper)
    with pytest.raises(ValueError, match="one sequence at a time"):
        model(words(2), coefficients=both, output_hidden_states=True)
    assert len(model(words(1), coefficients=both[1:], output_hidden_states=True).hidden_states) == 4


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


def test_embeddings_are_refused_where_tokens_are_needed(sources):
    embedded = torch.randn(2, 12, 32)
    with pytest.raises(ValueError, match=r"inputs_embeds=: each expert .* its own"):
        mixture(sources)(inputs_embeds=embedded)
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
