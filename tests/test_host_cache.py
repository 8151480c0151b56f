"""Key-value caches by all their names, and generation by all strategies against plain passes
without a cache.

This is what a new version of transformers breaks first: whatever keeps a choice per sequence is
here.
"""

import dataclasses
import io
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationMixin

import _mergekit_moe_ext_common.host_cache as common_seam
import mergekit_moe_ext.modeling.host_cache as modeling_seam
from mergekit_moe_ext.modeling.host_cache import NAMES, OUTPUT_NAME, cache_in
from mergekit_moe_ext.modeling.modeling_sequence_moe import SequenceMoECache
from tests.mergekit_moe_ext.ensembles import build
from tests.mergekit_moe_ext.sequences import fine_tunes, mixture, padded, words
from tests.peft_routing.adapters import ROUTERS, make_routed, save_experts

pytestmark = pytest.mark.hosts

STEPS = 5
PADDING = (0, 4, 2)
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def _sequence_moe(routing, experts):
    model = mixture(fine_tunes(3), routing=routing)
    if routing == "learned":
        torch.nn.init.normal_(model.router.weight)
    return model


def _ensemble(family, mode, experts):
    return build(family, mode=mode)


def _routed(router, experts):
    return make_routed(experts, router, granularity="sequence")


MODELS = {
    **{
        f"seq_moe-{r}": partial(_sequence_moe, r)
        for r in ("perplexity", "task_vector", "learned", "uniform")
    },
    **{f"wemoe-{f}-frozen": partial(_ensemble, f, "frozen") for f in ("llama", "gpt2", "opt")},
    "wemoe-llama-running": partial(_ensemble, "llama", "running"),
    **{f"routed-{router}": partial(_routed, router) for router in ROUTERS},
}
CHOOSING = [name for name in MODELS if name not in ("seq_moe-uniform", "wemoe-llama-running")]


def choose_by(model, tokens):
    """From now on plain passes choose by the first so many tokens."""
    if hasattr(model, "ensembling"):
        model.ensembling = dataclasses.replace(model.ensembling, routing_tokens=tokens)
    for owner in (model.config, *model.modules()):
        if hasattr(owner, "routing_tokens"):
            owner.routing_tokens = tokens


def plain_logits(model, sequence, prompt_length):
    """One pass without a cache over prompt and answer, chosen for by the prompt: the answer's
    logits.
    """
    choose_by(model, prompt_length)
    with torch.no_grad():
        return model(input_ids=sequence[None], use_cache=False).logits[0, prompt_length - 1 : -1]


def prompts(model):
    vocabulary = model.config.get_text_config().vocab_size
    return padded(words(3, 10) % (vocabulary - 2) + 2, PADDING, "left")


def generate(model, ids, mask, **options):
    torch.manual_seed(3)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=STEPS,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_generation_is_what_plain_passes_say(name, strategy, experts):
    model = MODELS[name](experts)
    ids, mask = prompts(model)
    made = generate(model, ids, mask, **STRATEGIES[strategy])
    per_prompt = len(made.sequences) // len(ids)
    for row, sequence in enumerate(made.sequences):
        padding = PADDING[row // per_prompt]
        expected = plain_logits(model, sequence[padding:], ids.shape[1] - padding)
        answer = sequence[ids.shape[1] :]
        if strategy == "beams":
            score = expected.log_softmax(-1).gather(1, answer[:, None]).sum()
            torch.testing.assert_close(made.sequences_scores[row], score, atol=1e-4, rtol=1e-4)
            continue
        logits = torch.stack([step[row] for step in made.logits])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        if strategy == "greedy":
            assert torch.equal(answer, expected.argmax(-1))


@pytest.mark.parametrize("name", CHOOSING)
def test_another_prefix_would_have_been_noticed(name, experts):
    """Without this the test above could not fail."""
    model = MODELS[name](experts)
    ids, _ = prompts(model)
    by_prompt, by_all = plain_logits(model, ids[0], 5), plain_logits(model, ids[0], 9)
    assert not torch.allclose(by_prompt[-1:], by_all[-1:], atol=1e-3)


KINDS = ("seq_moe-perplexity", "wemoe-llama-frozen", "wemoe-llama-running", "routed-arrow")


def empty_cache(model):
    return SequenceMoECache() if hasattr(model, "experts") else DynamicCache(config=model.config)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("argument", ["positional", *NAMES])
def test_a_cache_is_taken_by_every_name(name, argument, experts):
    model = MODELS[name](experts)
    ids, mask = prompts(model)
    ids, mask = ids[:1], mask[:1]
    choose_by(model, 7)

    def step(tokens, until, cache):
        if argument == "positional":
            # PEFT's class for language models has an order of arguments of its own.
            called = model.base_model if isinstance(model, PeftModel) else model
            return called(tokens, mask[:, :until], None, cache)
        return model(tokens, attention_mask=mask[:, :until], **{argument: cache})

    cache = empty_cache(model)
    with torch.no_grad():
        first = step(ids[:, :7], 7, cache)
        then = step(ids[:, 7:], 10, cache)
        whole = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(
        torch.cat([first.logits, then.logits], dim=1), whole, atol=1e-4, rtol=1e-4
    )
    assert cache.get_seq_length() == 10
    assert (
        cache_in(first) is cache
        and getattr(first, OUTPUT_NAME) is cache
        and first.past_key_values is cache
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_by_two_names_or_by_one_that_nobody_knows_is_an_error(name, experts):
    model = MODELS[name](experts)
    ids, _ = prompts(model)
    with pytest.raises(ValueError, match="two names of one cache"):
        model(ids, cache=empty_cache(model), past_key_values=empty_cache(model))
    with pytest.raises(
        ValueError, match=r"memory= is a key-value cache, which this model takes as \w+="
    ):
        model(ids, memory=empty_cache(model))


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def answer_from(model, cache, token):
    """The logits of greedy steps that go on with a cache, and their tokens."""
    logits, tokens = [], [token]
    with torch.no_grad():
        for _ in range(STEPS):
            output = model(tokens[-1], past_key_values=cache)
            logits.append(output.logits)
            tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(logits, dim=1), torch.cat(tokens, dim=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("through", [pickled, saved])
def test_a_cache_that_went_through_a_file_goes_on(name, rows, through, experts):
    model = MODELS[name](experts)
    ids = prompts(model)[0][:rows]
    ids, token = ids[:, :8], ids[:, 8:9]
    cache = empty_cache(model)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        model(ids[:, 7:], past_key_values=cache)  # merged weights are kept from here on
    if hasattr(cache, "carried"):
        cache.carried.merged[0] = torch.zeros(1), None  # of a module that is no more
    for seam in (common_seam, modeling_seam):
        seam.following.cache_clear()  # as in a new process
    loaded = through(cache)
    again = through(loaded)
    reordered = through(cache)
    if hasattr(cache, "carried"):
        assert not again.carried.merged
    logits, tokens = answer_from(model, cache, token)
    # Another model's modules lie elsewhere in memory.
    other = MODELS[name](experts)
    other_logits, other_tokens = answer_from(other, again, token)
    assert torch.equal(other_tokens, tokens)
    torch.testing.assert_close(other_logits, logits, atol=1e-5, rtol=1e-5)
    assert isinstance(again, type(empty_cache(model)))
    if hasattr(reordered, "reorder_cache"):
        order = torch.arange(rows).flip(0)
        reordered.reorder_cache(order)
        reordered_logits, _ = answer_from(other, reordered, token[order])
        torch.testing.assert_close(reordered_logits, logits[order], atol=1e-5, rtol=1e-5)


def _losing(stock, model, outputs, model_kwargs, *args, **kwargs):
    """The cache that a step filled is not handed to the next one."""
    kept = stock(model, outputs, model_kwargs, *args, **kwargs)
    return {key: value for key, value in kept.items() if key not in NAMES}


def _renaming(stock, model, outputs, model_kwargs, *args, **kwargs):
    """The cache is handed on under a name that no model of today knows."""
    kept = stock(model, outputs, model_kwargs, *args, **kwargs)
    return {"memory" if key in NAMES else key: value for key, value in kept.items()}


@pytest.mark.parametrize("name", [*CHOOSING, "wemoe-llama-running"])
@pytest.mark.parametrize(
    ("host", "message"), [(_losing, "did not come back"), (_renaming, "memory= is a key-value")]
)
def test_a_cache_that_never_comes_back_is_an_error(name, host, message, experts, monkeypatch):
    model = MODELS[name](experts)
    ids, mask = prompts(model)
    stock = GenerationMixin._update_model_kwargs_for_generation
    monkeypatch.setattr(
        GenerationMixin,
        "_update_model_kwargs_for_generation",
        lambda *args, **more: host(stock, *args, **more),
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        generate(model, ids, mask)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("seq_moe")])
def test_a_cache_that_the_host_has_under_another_name_is_an_error(name, experts, monkeypatch):
    """As it was when transformers 5.24 came: the base found its cache, and what chooses did not."""
    for seam in (common_seam, modeling_seam):
        for module in (seam, *_users_of(seam)):
            if hasattr(module, "cache_in"):
                monkeypatch.setattr(module, "cache_in", lambda values: None)
    model = MODELS[name](experts)
    ids, mask = prompts(model)
    with pytest.raises(RuntimeError, match="did not come back"):
        generate(model, ids, mask)


def _users_of(seam):
    import mergekit_moe_ext.modeling.wemoe_calls
    import peft_routing.calls

    return {
        common_seam: [peft_routing.calls],
        modeling_seam: [mergekit_moe_ext.modeling.wemoe_calls],
    }[seam]


def test_generations_do_not_disturb_each_other(experts):
    """Two in a row, one inside another's step, and one that fails: each begins its sequences
    once."""
    model, other = (MODELS["wemoe-llama-frozen"](experts) for _ in range(2))
    ids, mask = prompts(model)
    expected = generate(model, ids, mask).sequences
    assert torch.equal(generate(model, ids, mask).sequences, expected)
    handle = model.register_forward_pre_hook(lambda *_: generate(other, ids, mask) and None)
    assert torch.equal(generate(model, ids, mask).sequences, expected)
    handle.remove()
    with pytest.raises(ValueError, match="coefficients="):
        model.generate(ids, coefficients=torch.ones(3, 5))
    with torch.no_grad():
        model(ids), model(ids)
    assert torch.equal(generate(model, ids, mask).sequences, expected)


@pytest.mark.parametrize("name", ["seq_moe-perplexity", "wemoe-llama-frozen", "routed-arrow"])
def test_passes_of_ones_own_inside_a_generation_are_let_be(name, experts):
    """A logits processor that scores without a cache, and classifier-free guidance, which has one
    of its own.
    """
    model = MODELS[name](experts)
    ids, mask = prompts(model)

    def score(_ids, scores):
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        return scores

    expected = generate(model, ids, mask).sequences
    assert torch.equal(generate(model, ids, mask, logits_processor=[score]).sequences, expected)
    guided = generate(model, ids[:1], mask[:1], guidance_scale=1.5)
    assert guided.sequences.shape == (1, ids.shape[1] + STEPS)


@pytest.mark.parametrize("name", ["seq_moe-perplexity", "wemoe-llama-frozen", "routed-arrow"])
def test_a_cache_of_another_kind_is_an_error(name, experts):
    model = MODELS[name](experts)
    ids, _ = prompts(model)
    with pytest.raises(ValueError, match=r"SequenceMoECache|keeps no choice for a sequence"):
        model(ids, **{OUTPUT_NAME: object()})


@pytest.mark.parametrize("name", [Path(common_seam.__file__).name, "prefix_labels.py"])
def test_the_seam_is_the_same_in_both_places(name):
    """Also what a prefix does to labels: what lies beside weights imports nothing from outside."""
    in_common = Path(common_seam.__file__).with_name(name)
    assert in_common.read_bytes() == Path(modeling_seam.__file__).with_name(name).read_bytes()
