"""`ensemble` against separate PEFT models whose distributions are mixed step by step."""

import pickle
import weakref

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from peft_routing import UserError, ensemble
from peft_routing.fusion import generation as generation_module
from tests.peft_routing.adapters import NAMES, make_base, make_routed, save_experts

PROMPTS = torch.tensor([[0, 0, 5, 9, 13], [7, 8, 21, 3, 30]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GIVEN = {"math": 0.5, "code": 0.3, "law": 0.2}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def alone(experts):
    """Each expert on a base model of its own, by stock PEFT."""
    return {name: PeftModel.from_pretrained(make_base(), path).eval()
            for name, path in experts.items()}  # fmt: skip


@pytest.fixture
def routed(experts):
    return make_routed(experts, "linear")


@torch.no_grad()
def log_probabilities(alone, ids, mask):
    """(experts, rows, tokens, vocabulary), without a cache and with positions counted from the
    first real token.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    values = []
    for model in alone.values():
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        values.append(output.logits.double())
    return torch.stack(values)


def mixed(alone, ids, mask, coefficients, of="probabilities", beta=0.0):
    """(rows, tokens, vocabulary): the logits of the mixture, a token at a time."""
    logits = log_probabilities(alone, ids, mask)
    if of == "logits":
        return torch.einsum("e,ertv->rtv", coefficients, logits)
    probabilities = logits.softmax(dim=-1)
    rows, tokens = ids.shape
    result = torch.zeros(rows, tokens, logits.shape[-1], dtype=torch.float64)
    for row in range(rows):
        weights = coefficients.clone()
        for token in range(tokens):
            if token and mask[row, token] and mask[row, token - 1]:
                seen = probabilities[:, row, token - 1, ids[row, token]]
                weights = weights * seen**beta
                weights = weights / weights.sum()
            result[row, token] = (weights[:, None] * probabilities[:, row, token]).sum(dim=0).log()
    return result


CASES = [
    (None, {}),
    (GIVEN, {}),
    ({"math": 0.6, "law": 0.4}, {}),
    (GIVEN, {"of": "logits"}),
    (GIVEN, {"beta": 1.0}),
    (None, {"beta": 0.5}),
]


def as_tensor(coefficients):
    if coefficients is None:
        return torch.full((3,), 1 / 3, dtype=torch.float64)
    return torch.tensor([coefficients.get(name, 0.0) for name in NAMES], dtype=torch.float64)


@pytest.mark.parametrize(("coefficients", "options"), CASES)
def test_a_forward_pass_is_the_mixture_of_separate_models(routed, alone, coefficients, options):
    mixture = ensemble(routed, coefficients, **options)
    positions = (MASK.cumsum(dim=1) - 1).clamp(min=0)
    output = mixture(input_ids=PROMPTS, attention_mask=MASK, position_ids=positions)
    expected = mixed(alone, PROMPTS, MASK, as_tensor(coefficients), **options)
    real = MASK.bool()
    found = output.logits.double().log_softmax(dim=-1)[real]
    torch.testing.assert_close(found, expected.log_softmax(dim=-1)[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("coefficients", "options"), CASES)
def test_greedy_words_are_those_of_a_plain_loop(routed, alone, coefficients, options):
    made = ensemble(routed, coefficients, **options).generate(
        input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=6, min_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids, mask = PROMPTS, MASK
    for step in range(6):
        logits = mixed(alone, ids, mask, as_tensor(coefficients), **options)[:, -1]
        found = made.logits[step].double().log_softmax(dim=-1)
        torch.testing.assert_close(found, logits.log_softmax(dim=-1), atol=1e-4, rtol=0)
        following = made.sequences[:, ids.shape[1]]
        ids = torch.cat([ids, following[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)


def test_sampling_is_of_the_mixture(routed, alone):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "min_new_tokens": 5}
    torch.manual_seed(3)
    made = ensemble(routed, GIVEN).generate(
        input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=5, **options
    )
    torch.manual_seed(3)
    ids, mask = PROMPTS, MASK
    end = routed.generation_config.eos_token_id
    for _ in range(5):
        logits = mixed(alone, ids, mask, as_tensor(GIVEN))[:, -1].float()
        if end is not None:
            logits[:, end] = -torch.inf
        following = torch.multinomial((logits / 0.7).softmax(dim=-1), 1)
        ids = torch.cat([ids, following], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize("options", [{}, {"beta": 1.0}])
def test_beams_with_caches_are_those_of_an_explicit_mixture_without(routed, alone, options):
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "early_stopping": True}
    made = ensemble(routed, GIVEN, **options).generate(
        input_ids=PROMPTS, attention_mask=MASK, **settings
    )
    base = make_base()
    plain = base.forward

    def explicit(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        output = plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        output.logits = mixed(alone, input_ids, attention_mask, as_tensor(GIVEN), **options).float()
        return output

    base.forward = explicit
    expected = base.generate(input_ids=PROMPTS, attention_mask=MASK, use_cache=False, **settings)
    assert torch.equal(made, expected)


def test_every_expert_has_a_cache_and_the_model_is_left_as_it_was(routed):
    mixture = ensemble(routed, beta=1.0)
    passes = []
    layer = routed.base_model.model.model.layers[0]
    handle = layer.register_forward_hook(lambda *given: passes.append(given[2][0].shape[-2]))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    cached = mixture.generate(input_ids=PROMPTS, attention_mask=MASK, **settings)
    assert passes == [5, 5, 5, 1, 1, 1, 1, 1, 1]
    handle.remove()
    uncached = mixture.generate(input_ids=PROMPTS, attention_mask=MASK, use_cache=False, **settings)
    assert torch.equal(cached, uncached)
    assert "forward" not in vars(routed.get_base_model())
    with torch.no_grad():
        alike = routed(input_ids=PROMPTS).logits, routed(input_ids=PROMPTS).logits
    assert torch.equal(*alike)


@torch.no_grad()
def test_a_cache_that_went_through_a_file_goes_on(routed):
    mixture = ensemble(routed, GIVEN, beta=1.0)
    cache = DynamicCache(config=routed.config)
    mixture(input_ids=PROMPTS, past_key_values=cache)
    loaded = pickle.loads(pickle.dumps(cache))
    token = torch.tensor([[3], [4]])
    for _ in range(4):
        logits = mixture(input_ids=token, past_key_values=cache).logits
        assert torch.equal(mixture(input_ids=token, past_key_values=loaded).logits, logits)
        token = logits[:, -1:].argmax(-1)
    assert torch.equal(loaded.log_weights, cache.log_weights)


class LargeTensors(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that are in memory at once.

    most: the largest count.
    makers: the operation that each came from.
    """

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.most = 0
        self.makers = []
        self._alive = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {each.untyped_storage().data_ptr() for each in self._tensors()}
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.numel() >= self.least:
                self._alive.append(weakref.ref(each))
                if each.untyped_storage().data_ptr() not in before:
                    self.makers.append(function.name())
        alive = {each.untyped_storage().data_ptr() for each in self._tensors()}
        self.most = max(self.most, len(alive))
        return result

    def _tensors(self):
        tensors = [reference() for reference in self._alive]
        return [each for each in tensors if each is not None]


@pytest.fixture
def long_prompt(monkeypatch):
    """(2, 48) tokens, of which four at a time are normalised."""
    monkeypatch.setattr(generation_module, "_AT_A_TIME", 4 * 96)
    return torch.randint(2, 96, (2, 48), generator=torch.Generator().manual_seed(0))


def test_a_posterior_reads_a_prompt_with_one_expert_s_logits_in_memory(routed, long_prompt):
    mixture = ensemble(routed, beta=1.0)
    settings = {
        "attention_mask": torch.ones_like(long_prompt),
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
    }
    with LargeTensors(long_prompt.numel() * 96) as large:
        made = mixture.generate(input_ids=long_prompt, **settings)
    # Of each expert what the head makes.
    assert len(large.makers) == 3 and len(set(large.makers)) == 1, large.makers
    assert "mm" in large.makers[0] and large.most == 1

    # And in parts where that is asked for.
    with LargeTensors(2 * 25 * 96) as large:
        in_parts = mixture.generate(input_ids=long_prompt, prefill_chunk_size=24, **settings)
    assert torch.equal(in_parts, made)
    assert large.makers == []


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_more_experts_take_no_more_memory_to_read_a_text(routed, long_prompt, beta):
    most = []
    for coefficients in ([1, 1, 0], [1, 1, 1]):
        mixture = ensemble(routed, coefficients, beta=beta)
        with torch.no_grad(), LargeTensors(long_prompt.numel() * 96) as large:
            mixture(input_ids=long_prompt)
        most.append(large.most)
    # An expert's logits, what is added of it, the mixture before and the mixture after.
    assert most == [4, 4]


def test_an_adapter_that_chooses_per_sequence_is_an_ensemble_like_any_other(experts, alone):
    routed = make_routed(experts, "linear", granularity="sequence")
    made = ensemble(routed).generate(
        input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=2, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = mixed(alone, PROMPTS, MASK, as_tensor(None))[:, -1]
    torch.testing.assert_close(made.logits[0].double(), expected, atol=1e-4, rtol=0)


def test_labels_give_the_loss_of_the_mixture(routed, alone):
    output = ensemble(routed, GIVEN)(input_ids=PROMPTS, labels=PROMPTS)
    expected = mixed(alone, PROMPTS, torch.ones_like(PROMPTS), as_tensor(GIVEN))
    chosen = expected[:, :-1].gather(2, PROMPTS[:, 1:, None])
    assert output.loss.item() == pytest.approx(-chosen.mean().item(), abs=1e-5)


def test_an_ensemble_of_one_expert_is_that_expert(routed, alone):
    made = ensemble(routed, [0, 1, 0])
    assert made.experts == ["code"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    found = made.generate(input_ids=PROMPTS, attention_mask=MASK, **settings)
    expected = alone["code"].generate(input_ids=PROMPTS, attention_mask=MASK, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("coefficients", "options", "words"),
    [
        ({"maths": 1.0}, {}, "did you mean 'math'"),
        ([1.0, 1.0], {}, "there are 3 experts"),
        ([1.0, -1.0, 1.0], {}, "numbers from 0 on"),
        ([0.0, 0.0, 0.0], {}, "some above it"),
        ([1.0, float("nan"), 1.0], {}, "numbers from 0 on"),
        (None, {"of": "tokens"}, "neither 'probabilities' nor 'logits'"),
        (None, {"beta": -1.0}, "not a number from 0 on"),
        (None, {"beta": 1.0, "of": "logits"}, "a posterior is of probabilities"),
    ],
)
def test_mistakes_are_named(routed, coefficients, options, words):
    with pytest.raises(UserError, match=words):
        ensemble(routed, coefficients, **options)


def test_what_an_ensemble_has_not_is_refused(routed):
    with pytest.raises(UserError, match="an ensemble has only logits"):
        ensemble(routed)(input_ids=PROMPTS, output_hidden_states=True)
    with pytest.raises(UserError, match="exactly one active routed adapter"):
        ensemble(make_base())
    assert "forward" not in vars(routed.get_base_model())
