"""Generating: with a cache as without, and one choice per sequence, which comes from its prompt
alone.
"""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from peft_routing import RoutedLoraConfig
from tests.peft_routing.adapters import ROUTERS, make_routed, save_experts, save_lora

PROMPT = torch.tensor([[5, 17, 40, 9, 66, 31], [12, 80, 33, 7, 21, 90]])


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def routed(experts, router="arrow", **changes):
    return make_routed(experts, router, **changes)


def generate(model, ids=PROMPT, **options):
    return model.generate(
        input_ids=ids,
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        return_dict_in_generate=True,
        **options,
    )


def scores(output):
    """(batch, steps, vocabulary)"""
    return torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("router", ROUTERS)
def test_per_token_a_cache_changes_nothing(experts, router):
    model = routed(experts, router)
    cached, uncached = (
        generate(model, output_logits=True, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.allclose(scores(cached), scores(uncached), atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_per_sequence_the_prompt_decides_once(experts, router):
    model = routed(experts, router, granularity="sequence")
    output = generate(model, output_logits=True)
    frozen = routed(experts, router, granularity="sequence", routing_tokens=PROMPT.shape[1])
    expected = frozen(input_ids=output.sequences).logits[:, PROMPT.shape[1] - 1 : -1]
    assert torch.allclose(scores(output), expected, atol=1e-5)
    shorter = routed(experts, router, granularity="sequence", routing_tokens=2)(
        input_ids=output.sequences
    ).logits
    assert not torch.allclose(scores(output), shorter[:, PROMPT.shape[1] - 1 : -1], atol=1e-3)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_left_padding_changes_nothing(experts, granularity):
    model = routed(experts, granularity=granularity)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), PROMPT], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(PROMPT)], dim=1)
    plain, beside_padding = (
        generate(model, output_logits=True),
        generate(model, padded, attention_mask=mask, output_logits=True),
    )
    assert torch.allclose(scores(plain), scores(beside_padding), atol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_beam_search_scores_what_it_returns(experts, granularity):
    model = routed(experts, granularity=granularity)
    output = generate(model, num_beams=3, length_penalty=0.0, output_scores=True, pad_token_id=0)
    reference = routed(experts, granularity=granularity, routing_tokens=PROMPT.shape[1])
    logits = (
        reference(input_ids=output.sequences).logits[:, PROMPT.shape[1] - 1 : -1].log_softmax(-1)
    )
    chosen = logits.gather(-1, output.sequences[:, PROMPT.shape[1] :, None]).sum(dim=(1, 2))
    assert torch.allclose(output.sequences_scores, chosen, atol=1e-4)


def test_sampled_sequences_of_one_prompt_share_its_choice(experts):
    model = routed(experts, granularity="sequence")
    torch.manual_seed(0)
    output = model.generate(
        input_ids=PROMPT,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        min_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
    )
    frozen = routed(experts, granularity="sequence", routing_tokens=PROMPT.shape[1])
    expected = frozen(input_ids=output.sequences).logits[:, PROMPT.shape[1] - 1 : -1]
    assert torch.allclose(scores(output), expected, atol=1e-5)


def test_other_passes_in_between_do_not_disturb_a_cache(experts):
    model = routed(experts, granularity="sequence")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    following = torch.tensor([[3], [4]])
    with torch.no_grad():
        alone = DynamicCache(config=model.config)
        model(input_ids=PROMPT, past_key_values=alone)
        expected = model(input_ids=following, past_key_values=alone).logits
        model(input_ids=PROMPT, past_key_values=caches[0])
        model(input_ids=PROMPT.flip(1), past_key_values=caches[1])
        branched = copy.deepcopy(caches[0])
        model(input_ids=PROMPT.flip(0))
        with model.disable_adapter():
            model(input_ids=PROMPT)
        for cache in (caches[0], branched):
            assert torch.equal(model(input_ids=following, past_key_values=cache).logits, expected)


def test_a_cache_that_this_adapter_did_not_fill_is_refused(experts):
    model = routed(experts, granularity="sequence")
    with model.disable_adapter():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="start with an empty one"):
        model(input_ids=PROMPT[:, :1], past_key_values=cache)


def test_generating_without_a_cache_is_refused_per_sequence(experts):
    with pytest.raises(ValueError, match="use_cache=True"):
        generate(routed(experts, granularity="sequence"), use_cache=False)


def test_a_part_of_the_model_is_refused_per_sequence(experts):
    model = routed(experts, granularity="sequence")
    with pytest.raises(RuntimeError, match="the whole model"):
        model.get_base_model().model(input_ids=PROMPT)


def test_nothing_after_the_prefix_is_seen_before_it(experts):
    model = routed(experts, granularity="sequence", routing_tokens=3)
    changed = PROMPT.clone()
    changed[:, -1] = 2
    one, other = (model(input_ids=ids).logits[:, :-1] for ids in (PROMPT, changed))
    assert torch.equal(one, other)


def test_labels_inside_the_prefix_are_left_out_of_the_loss(experts):
    model = routed(experts, granularity="sequence", routing_tokens=3)
    output = model(input_ids=PROMPT, labels=PROMPT)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, 2:-1].flatten(0, 1), PROMPT[:, 3:].flatten()
    )
    assert torch.allclose(output.loss, expected)


def test_padding_has_no_part_in_the_choice(experts):
    model = routed(experts, granularity="sequence", routing_tokens=4)
    padded = torch.cat([PROMPT, torch.full((2, 5), 77)], dim=1)
    mask = (torch.arange(padded.shape[1]) < PROMPT.shape[1]).long().expand(2, -1)
    short = model(input_ids=PROMPT[:, :3]).logits
    long = model(
        input_ids=padded[:, :8], attention_mask=mask[:, :8] * (torch.arange(8) < 3)
    ).logits[:, :3]
    assert torch.allclose(short, long, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}],
    ids=lambda o: next(iter(o)),
)
def test_a_first_pass_that_is_not_the_prompt_is_refused_per_sequence(experts, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .* must be the prompt"):
        generate(routed(experts, granularity="sequence"), PROMPT[:1], **options)
    expected = generate(routed(experts), PROMPT[:1]).sequences
    assert torch.equal(generate(routed(experts), PROMPT[:1], **options).sequences, expected)


def test_a_model_without_a_cache_is_refused_per_sequence(tmp_path):
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4
    )
    base = AutoModelForCausalLM.from_config(config)
    path = save_lora(tmp_path / "one", 1, copy.deepcopy(base), target_modules=["c_attn"])
    model = get_peft_model(base, RoutedLoraConfig(experts=[path, path], granularity="sequence"))
    with pytest.raises(ValueError, match="which this model has not"):
        model.eval().generate(input_ids=PROMPT, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("router", ["arrow", "linear", "mlp"])
def test_choices_per_token_compile_without_a_break(experts, router):
    model = routed(experts, router)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(
        compiled(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits, atol=1e-6
    )
