"""FFNs that are mixed layer by layer in one stack: against a stock decoder with a loop in the place
of each FFN, a sequence at a time.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.mergekit_moe_ext.sequences import Calls, dense, mixture, only, padded, words

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAYERS = {"llama": "model.layers", "gemma2": "model.layers", "gpt2": "transformer.h"}
COEFFICIENTS = torch.tensor(
    [[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2], [0.0, 0.6, 0.4]],
)


class Loop(nn.Module):
    """The sum of some FFNs' outputs, written out."""

    def __init__(self, ffns, weights):
        super().__init__()
        self.ffns, self.weights = nn.ModuleList(ffns), weights

    def forward(self, x):
        return sum(w * ffn(x) for w, ffn in zip(self.weights, self.ffns, strict=True))


def sources_that_share_all_but_ffns(family="llama"):
    config = {"head_dim": 8} if family == "gemma2" else {}
    sources = [dense(seed, family, **config) for seed in range(3)]
    for source in sources[1:]:
        own = {name: p for name, p in source.state_dict().items() if ".mlp." in name}
        source.load_state_dict({**sources[0].state_dict(), **own})
    return sources


def mixed(sources, family="llama", **config):
    layers = LAYERS[family].replace(".", r"\.")
    return mixture(
        sources,
        sources[0].get_input_embeddings(),
        sources[0].get_output_embeddings(),
        shared_parameters=[rf"^(?!{layers}\.\d+\.mlp\.)"],
        mixed_ffns=[f"{LAYERS[family]}.{layer}.mlp" for layer in range(2)],
        **config,
    )


def with_loops(sources, weights, family="llama"):
    """A stock decoder in which every FFN is a loop over all sources' FFNs."""
    model = copy.deepcopy(sources[0])
    for layer, block in enumerate(model.get_submodule(LAYERS[family])):
        ffns = [source.get_submodule(f"{LAYERS[family]}.{layer}.mlp") for source in sources]
        block.mlp = Loop(ffns, weights.tolist())
    return model


@pytest.fixture(scope="module")
def sources():
    return sources_that_share_all_but_ffns()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_every_layer_adds_up_the_chosen_ffns(family):
    sources = sources_that_share_all_but_ffns(family)
    model, ids = mixed(sources, family), words(4)
    got = model(ids, coefficients=COEFFICIENTS).logits
    for row, weights in enumerate(COEFFICIENTS):
        expected = with_loops(sources, weights, family)(ids[row : row + 1]).logits
        torch.testing.assert_close(got[row : row + 1], expected, **CLOSE)


def test_it_generates_as_the_loop_does(sources):
    model, ids = mixed(sources), words(4)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}):
        got = model.generate(ids, coefficients=COEFFICIENTS, **options, **GREEDY)
        for row, weights in enumerate(COEFFICIENTS):
            loop = with_loops(sources, weights)
            expected = loop.generate(ids[row : row + 1], **{**GREEDY, **options})
            assert torch.equal(got[row : row + 1], expected)


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned", "uniform"])
@torch.no_grad()
def test_experts_are_chosen_as_without_mixing(sources, routing):
    ids, mask = padded(words(4), (0, 3, 5, 1), "left")
    model = mixed(sources, routing=routing)
    apart = mixed(sources, routing=routing)
    apart.mixed_ffns = None
    if routing == "learned":
        apart.router.weight.copy_(nn.init.normal_(model.router.weight))
    got = model(ids, attention_mask=mask)
    torch.testing.assert_close(got.coefficients, apart(ids, attention_mask=mask).coefficients)
    made = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    coefficients = made.past_key_values.coefficients
    again = model.generate(ids, attention_mask=mask, coefficients=coefficients, **GREEDY)
    assert torch.equal(made.sequences, again)


@torch.no_grad()
def test_one_stack_runs_whatever_the_number_of_experts(sources):
    model = mixed(sources)
    calls = Calls(model)
    model(words(4), coefficients=COEFFICIENTS)
    assert calls.take() == [[(4, 12)], [], []]


def test_states_of_the_one_stack_are_on_the_way_to_the_logits(sources):
    """Hidden states, attentions and their gradients, whatever experts are chosen."""
    model, ids = mixed(sources), words(4)
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    output = model(ids, coefficients=COEFFICIENTS, **asked)
    loop = with_loops(sources, COEFFICIENTS[2])
    loop.set_attn_implementation("eager")
    expected = loop(ids[2:3], **asked)
    for name in ("hidden_states", "attentions"):
        got = getattr(output, name)
        assert len(got) == len(getattr(expected, name))
        for ours, theirs in zip(got, getattr(expected, name), strict=True):
            torch.testing.assert_close(ours[2:3], theirs, **CLOSE)
        got[0].retain_grad()
        getattr(expected, name)[0].retain_grad()
    output.logits[2].sum().backward()
    expected.logits.sum().backward()
    for name in ("hidden_states", "attentions"):
        gradient = getattr(output, name)[0].grad
        assert gradient[2].any()
        torch.testing.assert_close(gradient[2:3], getattr(expected, name)[0].grad, **CLOSE)


def test_gradients_are_those_of_the_loop(sources):
    ids = words(1)
    weights = COEFFICIENTS[2]
    loop = with_loops(sources, weights)
    loop.zero_grad()
    loop(ids, labels=ids).loss.backward()
    block = loop.model.layers[1]
    expected = [ffn.down_proj.weight.grad for ffn in block.mlp.ffns]
    expected.append(block.self_attn.q_proj.weight.grad)
    for checkpointing in (None, False, True):
        model = mixed(sources).train()
        if checkpointing is not None:
            reentrant = {"use_reentrant": checkpointing}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
            model.enable_input_require_grads()
        model(ids, labels=ids, coefficients=weights[None]).loss.backward()
        layers = [expert.trunk.model.layers[1] for expert in model.experts]
        got = [layer.mlp.down_proj.weight.grad for layer in layers]
        got.append(layers[0].self_attn.q_proj.weight.grad)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


@torch.no_grad()
def test_it_is_saved_loaded_and_copied(sources, tmp_path):
    model, ids = mixed(sources), words(4)
    expected = model(ids, coefficients=COEFFICIENTS).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()  # of which a copy keeps nothing
    for each in (loaded, copied):
        assert torch.equal(each(ids, coefficients=COEFFICIENTS).logits, expected)


@torch.no_grad()
def test_it_runs_where_other_experts_are_on_disk(sources, tmp_path):
    model, ids = mixed(sources), words(4)
    model.save_pretrained(tmp_path / "out")
    own = {f"experts.{index}": "disk" for index in (1, 2)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        device_map={**own, "experts.0": "cpu", "embed_tokens": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    got = loaded(ids, coefficients=COEFFICIENTS).logits
    torch.testing.assert_close(got, model(ids, coefficients=COEFFICIENTS).logits, **CLOSE)


def test_what_does_not_go_together_is_refused(sources):
    for config in ({"combine": "probabilities"}, {"embedding": "separate"}):
        with pytest.raises(ValueError, match="mixed_ffns= need"):
            mixed(sources, **config)
    model = mixed(sources)
    hidden = torch.randn(3, 2, 32)
    with (
        model.mixed_ffns.running([], rows=4),
        pytest.raises(ValueError, match="3 rows of a batch of 4"),
    ):
        model.experts[0].trunk.model.layers[0].mlp(hidden)
    assert model(words(2), coefficients=only(1, 3)).logits.isfinite().all()
