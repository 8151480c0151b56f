"""`generate` with a sequence MoE: against forward passes without a cache, and against a source
alone.
"""

import pytest
import torch
from measuring import operations

from mergekit_moe_ext.modeling.modeling_sequence_moe import SequenceMoECache
from tests.mergekit_moe_ext.sequences import Calls, dense, fine_tunes, mixture, only, padded, words

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ROUTINGS = ("perplexity", "task_vector", "learned", "uniform")


@pytest.fixture(scope="module")
def sources():
    return fine_tunes(3)


@pytest.fixture(scope="module")
def model(sources):
    return mixture(sources)


def routed(sources, routing, **config):
    model = mixture(sources, routing=routing, **config)
    if routing == "learned":
        torch.nn.init.normal_(model.router.weight)
    return model


def greedy_by_hand(model, ids, coefficients, steps=6, **keywords):
    """One forward pass over everything per token, without a cache."""
    mask = keywords.pop("mask", torch.ones_like(ids))
    for _ in range(steps):
        with torch.no_grad():
            logits = model(
                ids, attention_mask=mask, coefficients=coefficients, use_cache=False
            ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize("routing", ROUTINGS)
def test_cached_generation_equals_uncached(sources, routing):
    """The choice is the prompt's; the same coefficients given, and every step from scratch, lead to
    the same words.
    """
    model = routed(sources, routing)
    ids, mask = padded(words(4), (0, 3, 7, 1), "left")
    made = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    coefficients = made.past_key_values.coefficients
    assert torch.equal(made.sequences, greedy_by_hand(model, ids, coefficients, mask=mask))
    everything = torch.cat([mask, torch.ones(4, 6, dtype=torch.long)], dim=1)
    afterwards = model(made.sequences, attention_mask=everything, coefficients=coefficients).logits
    torch.testing.assert_close(
        torch.stack(made.logits, dim=1), afterwards[:, 11:-1], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        model.generate(ids, attention_mask=mask, coefficients=coefficients, **GREEDY), made[0]
    )
    without = model.generate(
        ids, attention_mask=mask, coefficients=coefficients, use_cache=False, **GREEDY
    )
    assert torch.equal(without, made.sequences)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize(
    "strategy", [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 3}]
)
def test_one_expert_generates_as_its_source_does(family, strategy):
    config = {"head_dim": 8} if family == "gemma2" else {}
    sources = [dense(seed, family, **config) for seed in range(2)]
    model = mixture(sources)
    ids, mask = padded(words(3), (0, 3, 7), "left")
    options = {**GREEDY, **strategy}
    if strategy:
        options |= {"num_return_sequences": 2}
    for index, source in enumerate(sources):
        torch.manual_seed(5)
        expected = source.generate(ids, attention_mask=mask, **options)
        torch.manual_seed(5)
        got = model.generate(
            ids, attention_mask=mask, coefficients=only(index, 2, rows=3), **options
        )
        assert torch.equal(got, expected)
        torch.manual_seed(5)
        assert torch.equal(
            model.generate(ids, attention_mask=mask, coefficients=only(index, 2), **options),
            expected,
        )


def test_a_sliding_window_slides():
    config = {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    sources = [dense(seed, "gemma2", **config) for seed in range(2)]
    ids = words(2)
    expected = sources[1].generate(ids, **GREEDY)
    assert torch.equal(mixture(sources).generate(ids, coefficients=only(1, 2), **GREEDY), expected)


@pytest.mark.parametrize("routing", ["perplexity", "learned"])
def test_beams_are_those_of_a_search_by_hand(sources, routing):
    model, ids = routed(sources, routing), words(1)
    beams, steps = 3, 4
    made = model.generate(
        ids, num_beams=beams, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": steps}
    )
    coefficients = made.past_key_values.coefficients[:1]
    kept = [(0.0, ids[0].tolist())]
    for _ in range(steps):
        longer = []
        for total, tokens in kept:
            with torch.no_grad():
                logits = model(
                    torch.tensor([tokens]), coefficients=coefficients, use_cache=False
                ).logits
            chances = logits[0, -1].log_softmax(-1)
            longer += [
                (total + chance, [*tokens, token]) for token, chance in enumerate(chances.tolist())
            ]
        kept = sorted(longer, reverse=True)[:beams]
    assert made.sequences[0].tolist() == kept[0][1]


def test_every_beam_and_sample_of_a_prompt_keeps_its_choice(sources):
    model, ids = mixture(sources, experts_per_sequence=1), words(6)
    expected = model(ids).coefficients
    assert len(expected.argmax(dim=1).unique()) > 1
    for options in ({"num_beams": 3}, {"do_sample": True}):
        made = model.generate(
            ids, return_dict_in_generate=True, num_return_sequences=3, **{**GREEDY, **options}
        )
        torch.testing.assert_close(
            made.past_key_values.coefficients, expected.repeat_interleave(3, dim=0)
        )
    beams = model.generate(ids, num_beams=3, **GREEDY)
    for row in range(6):
        assert torch.equal(beams[row], model.generate(ids[row : row + 1], num_beams=3, **GREEDY)[0])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_batch_generates_as_its_prompts_one_by_one(sources, routing):
    model = routed(sources, routing)
    ids, mask = padded(words(4), (0, 3, 7, 1), "left")
    made = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, padding in enumerate((0, 3, 7, 1)):
        alone = model.generate(ids[row : row + 1, padding:], **GREEDY)
        assert torch.equal(made[row, padding:], alone[0])


def test_the_choice_is_that_of_the_whole_prompt(sources):
    model, ids = mixture(sources, routing_tokens=4), words(2)
    made = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = mixture(sources, routing_tokens=12)(ids).coefficients
    torch.testing.assert_close(made.past_key_values.coefficients, longer)
    assert not torch.equal(made.past_key_values.coefficients, model(ids).coefficients)


@pytest.mark.parametrize("routing", ["perplexity", "learned"])
def test_a_conversation_that_goes_on_keeps_its_choice(sources, routing):
    model, ids = routed(sources, routing), words(2)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    coefficients = first.past_key_values.coefficients.clone()
    asked = torch.cat([first.sequences, words(2, 5, seed=4)], dim=1)
    second = model.generate(
        asked, past_key_values=first.past_key_values, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(second.past_key_values.coefficients, coefficients)
    assert torch.equal(second.sequences, greedy_by_hand(model, asked, coefficients))
    assert not torch.equal(model(asked).coefficients, coefficients)


def test_a_forward_pass_in_between_disturbs_no_cache(model):
    ids = words(2)
    out = model(ids, past_key_values=SequenceMoECache())
    more = words(2, 1, seed=8)
    model(words(3, 7, seed=5))
    with torch.no_grad():
        step = model(more, past_key_values=out.past_key_values).logits
        whole = model(torch.cat([ids, more], dim=1), coefficients=out.coefficients).logits
    torch.testing.assert_close(step, whole[:, -1:], atol=1e-4, rtol=1e-4)


def test_several_tokens_at_once_and_a_mask(model):
    """A cached step may bring many tokens, as a question in a conversation does; with left padding
    in the prompt.
    """
    ids, mask = padded(words(3), (0, 4, 2), "left")
    more = words(3, 5, seed=8)
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    with torch.no_grad():
        out = model(ids, attention_mask=mask[:, :12], past_key_values=SequenceMoECache())
        step = model(more, attention_mask=mask, past_key_values=out.past_key_values).logits
        whole = model(
            torch.cat([ids, more], dim=1), attention_mask=mask, coefficients=out.coefficients
        ).logits
    torch.testing.assert_close(step, whole[:, -5:], atol=1e-4, rtol=1e-4)


def test_rows_of_a_cache_can_be_selected_repeated_and_forgotten(sources):
    model, ids = mixture(sources, experts_per_sequence=1), words(4)
    cache = model(ids, past_key_values=SequenceMoECache()).past_key_values
    coefficients = cache.coefficients
    assert (cache.batch_size, cache.get_seq_length()) == (4, 12)
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([3, 3, 1, 1])
    assert torch.equal(cache.coefficients, coefficients[rows])
    more = words(4, 2, seed=8)
    with torch.no_grad():
        step = model(more, past_key_values=cache).logits
        whole = model(torch.cat([ids[rows], more], dim=1), coefficients=coefficients[rows]).logits
    torch.testing.assert_close(step, whole[:, -2:], atol=1e-4, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.coefficients is None


def test_a_cache_can_take_tokens_back(model):
    ids, coefficients = words(3), torch.cat([only(1, 3), only(0, 3), torch.full((1, 3), 1 / 3)])
    cache = SequenceMoECache()
    with torch.no_grad():
        model(ids, past_key_values=cache, coefficients=coefficients)
        cache.crop(-4)
        assert cache.get_seq_length() == 8
        again = model(ids[:, 8:], past_key_values=cache).logits
        whole = model(ids, coefficients=coefficients).logits
    torch.testing.assert_close(again, whole[:, 8:], atol=1e-4, rtol=1e-4)


def step_after(model, ids, **keywords):
    """A function that takes one step after a prompt; the cache grows by a token per run."""
    with torch.no_grad():
        cache = model(ids, use_cache=True, **keywords).past_key_values

    def step():
        return model(ids[:, -1:], past_key_values=cache, use_cache=True)

    return step


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_of_one_expert_is_one_of_its_source(sources, model, rows):
    ids = words(rows)
    ours = operations(step_after(model, ids, coefficients=only(1, 3)))
    assert ours <= operations(step_after(sources[1], ids)) + 3


def test_a_step_of_two_experts_is_one_of_each_on_its_rows(sources, model):
    ids = words(4)
    coefficients = only(1, 3, rows=4)
    coefficients[2:] = only(2, 3)
    ours = operations(step_after(model, ids, coefficients=coefficients))
    of_sources = [operations(step_after(source, ids[:2])) for source in sources[1:]]
    assert ours <= sum(of_sources) + 20


def test_each_token_costs_the_chosen_experts_alone(sources):
    model = mixture(sources, experts_per_sequence=1)
    calls = Calls(model)
    ids = words(1)
    made = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    chosen = made.past_key_values.coefficients[0].tolist()
    assert calls.take() == [[(1, 12), *([(1, 1)] * 5 if weight else [])] for weight in chosen]
    model.generate(ids, coefficients=only(2, 3), **GREEDY)
    assert calls.take() == [[], [], [(1, 12), *[(1, 1)] * 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"assistant_early_exit": 1}, "assistant_early_exit.*no one stack"),
        ({"use_cache": False, "guidance_scale": 2.0}, "guidance_scale.*give coefficients="),
        ({"coefficients": torch.ones(2, 5)}, r"\(2, 3\)"),
    ],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(words(2), **{**GREEDY, **options})


@pytest.mark.parametrize("routing", ROUTINGS)
def test_guesses_of_an_assistant_do_not_choose(sources, routing):
    model = routed(sources, routing)
    ids = words(1).repeat(1, 2)  # so that there is something to look up
    options = {"return_dict_in_generate": True, **GREEDY}
    alone = model.generate(ids, **options)
    assistants = [
        {"assistant_model": sources[1]},
        {"assistant_model": routed(sources[:2], routing)},
        {"prompt_lookup_num_tokens": 3},
    ]
    for assistant in assistants:
        made = model.generate(ids, **assistant, **options)
        assert torch.equal(made.sequences, alone.sequences)
        torch.testing.assert_close(
            made.past_key_values.coefficients, alone.past_key_values.coefficients
        )
    given = model.generate(
        ids, assistant_model=sources[1], coefficients=only(2, 3), **options
    ).sequences
    assert torch.equal(given, model.generate(ids, coefficients=only(2, 3), **GREEDY))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_static_cache_gives_the_same(family, options):
    config = {"head_dim": 8, "sliding_window": 6} if family == "gemma2" else {}
    model = mixture([dense(seed, family, **config) for seed in range(3)], experts_per_sequence=1)
    ids, mask = padded(words(4), (0, 3, 7, 1), "left")
    options = {"attention_mask": mask, **options, **GREEDY}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_without_a_cache_the_prompt_s_choice_stays(sources, routing, options):
    """A prompt that is longer than the prefix of a plain pass; of a base whose generation_config
    says `use_cache: false`, say.
    """
    model = routed(sources, routing, routing_tokens=4)
    ids, mask = padded(words(4), (0, 3, 7, 1), "left")
    expected = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    calls = Calls(model)
    model.generation_config.use_cache = False
    got = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(got, expected)
    assert max(length for calls_of in calls.take() for _, length in calls_of) == 12 + 5
    # a plain pass in between has its own prefix again
    with torch.no_grad():
        before = model(ids, attention_mask=mask).coefficients
    assert torch.equal(before, routed(sources, routing, routing_tokens=4)(ids, mask).coefficients)


def test_uniform_needs_no_cache(sources):
    model, ids = mixture(sources, routing="uniform"), words(2)
    assert torch.equal(
        model.generate(ids, use_cache=False, **GREEDY), model.generate(ids, **GREEDY)
    )
