"""Training a sequence MoE: against gradient descent by hand, one way of running against another;
and where it lies.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import ON_CPU, TWO_PROCESSES, read_tensors, run
from tests.mergekit_moe_ext.mixtures.test_usage import words as texts
from tests.mergekit_moe_ext.mixtures.test_usage import write
from tests.mergekit_moe_ext.modeling.train_sequences import ROWS, train, train_by_command
from tests.mergekit_moe_ext.sequences import VOCAB, fine_tunes, mixture, words
from tests.tokenizers import save_tokenizer

PREFIX = 4


def saved(path, routing, *own, **config):
    model = mixture(fine_tunes(3), *own, routing=routing, routing_tokens=PREFIX, **config)
    if routing == "learned":
        nn.init.normal_(model.router.weight)
    model.save_pretrained(path)
    return path


def one_step_by_hand(model, ids, rate):
    """Of all rows at once: the mean loss behind the prefix, each row by itself, with its experts
    combined by hand.
    """
    losses = []
    for row in ids:
        table = model.experts[0].embed_tokens.weight
        scores = model.router.weight @ table[row[:PREFIX]].mean(dim=0)
        best = scores.topk(2).indices
        weights = scores[best].softmax(dim=0)
        logits = 0
        for weight, index in zip(weights, best, strict=True):
            expert = model.experts[index]
            hidden = expert.trunk(inputs_embeds=expert.embed_tokens(row[None])).logits[0]
            logits = logits + weight * expert.lm_head(hidden)
        losses += [
            nn.functional.cross_entropy(logits[t - 1], row[t]) for t in range(PREFIX, len(row))
        ]
    loss = torch.stack(losses).mean()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
    return loss.item()


@pytest.mark.parametrize(
    "arguments", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
)
def test_trainer_descends_the_loss_behind_the_prefix(tmp_path, arguments):
    path = saved(tmp_path / "moe", "learned")
    expected = AutoModelForCausalLM.from_pretrained(path)
    trainer = train(path, str(tmp_path / "out"), 8, **arguments)
    ids = torch.stack([row["input_ids"] for row in ROWS])
    # The Trainer divides by the number of all labels, and those inside the prefix do not count.
    share = (ids.shape[1] - PREFIX) / (ids.shape[1] - 1)
    losses = [share * one_step_by_hand(expected, ids, share * 0.1) for _ in range(2)]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-3)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(
        got["router.weight"], AutoModelForCausalLM.from_pretrained(path).router.weight
    )


def test_trainer_evaluates_and_predicts(tmp_path):
    trainer = train(saved(tmp_path / "moe", "perplexity"), str(tmp_path / "out"), 4)
    model, ids = trainer.model.eval(), torch.stack([row["input_ids"] for row in ROWS[:3]])
    with torch.no_grad():
        out = model(ids)
    losses = nn.functional.cross_entropy(
        out.logits[:, PREFIX - 1 : -1].flatten(0, 1), ids[:, PREFIX:].flatten()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses.item(), rel=1e-4)
    predicted = trainer.predict(ROWS[:3]).predictions
    torch.testing.assert_close(torch.from_numpy(predicted), out.logits, atol=1e-4, rtol=1e-4)


def test_two_processes_train_as_one_does(tmp_path):
    """Each process sees other sequences, which choose other experts; also with parameters that
    experts share.
    """
    base = fine_tunes(1)[0]
    own = base.get_input_embeddings(), base.get_output_embeddings()
    shared = {"shared_parameters": [r"^(?!model\.layers\.\d+\.mlp\.)"]}
    names = [
        saved(tmp_path / "learned", "learned", experts_per_sequence=2, router_aux_loss_coef=0.0),
        saved(tmp_path / "task-vector", "task_vector", *own, experts_per_sequence=1, **shared),
        saved(tmp_path / "by-command", "learned"),
    ]
    save_tokenizer(names[-1], VOCAB)
    write(tmp_path / "texts.jsonl", texts(1, 60))
    two = run(
        *TWO_PROCESSES,
        "-m",
        "tests.mergekit_moe_ext.modeling.train_sequences",
        "4",
        *names,
        env=ON_CPU,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    for name in names:
        train_alone = train_by_command if name == names[-1] else train
        train_alone(str(name), f"{name}-one", 8)
        expected, got = (
            read_tensors(tmp_path / f"{name}-one"),
            read_tensors(tmp_path / f"{name}-two"),
        )
        assert expected.keys() == got.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(got[key], tensor, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("routing", ["perplexity", "task_vector", "learned"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(routing, reentrant):
    model = mixture(fine_tunes(3), routing=routing, routing_tokens=PREFIX).train()
    plain, ids = copy.deepcopy(model), words(2)
    expected = plain(ids, labels=ids)
    expected.loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(
        layer.gradient_checkpointing
        for expert in model.experts
        for layer in expert.trunk.model.layers
    )
    out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.coefficients, expected.coefficients)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], msg=name)


def test_projectors_and_router_alone(tmp_path):
    """With the rest frozen nothing else moves."""
    embed, head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB, bias=False)
    model = mixture(
        fine_tunes(3), embed, head, routing="learned", routing_tokens=PREFIX, projector="mlp"
    )
    nn.init.normal_(model.router.weight)
    for name, p in model.named_parameters():
        p.requires_grad_(".proj_" in name or name.startswith("router."))
    ids = words(6)
    model.train()(ids, labels=ids).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("stored") / "moe", "perplexity")


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        {"experts.0": "cpu", "experts.1": "disk", "experts.2": "disk"},
        {
            "experts.0": "disk",
            "experts.1": "cpu",
            "experts.2.trunk": "disk",
            "experts.2.embed_tokens": "cpu",
            "experts.2.lm_head": "cpu",
        },
    ],
)
def test_a_device_map_places_experts(stored, tmp_path, device_map):
    expected = AutoModelForCausalLM.from_pretrained(stored)
    model = AutoModelForCausalLM.from_pretrained(
        stored, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    ids = words(2)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


@pytest.mark.parametrize("on_disk", ["experts", "embed_tokens", "lm_head"])
def test_a_device_map_places_experts_that_share_parameters(tmp_path, on_disk):
    """The embedding stays where it is, whatever expert reads it."""
    base = fine_tunes(1)[0]
    own = base.get_input_embeddings(), base.get_output_embeddings()
    path = saved(
        tmp_path / "moe", "perplexity", *own, shared_parameters=[r"^(?!model\.layers\.\d+\.mlp\.)"]
    )
    places = {**dict.fromkeys(("experts", "embed_tokens", "lm_head"), "cpu"), on_disk: "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        path, device_map=places, offload_folder=tmp_path / "offload"
    )
    expected, ids = AutoModelForCausalLM.from_pretrained(path), words(2)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_an_automatic_device_map_splits_no_layer(stored, tmp_path):
    size = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(stored).parameters())
    model = AutoModelForCausalLM.from_pretrained(
        stored,
        device_map="auto",
        max_memory={"cpu": int(size * 0.6)},
        offload_folder=tmp_path / "offload",
    )
    places = set(model.hf_device_map.values())
    assert {str(place) for place in places} == {"cpu", "disk"}
    assert not any(".layers.0." in name or ".layers.1." in name for name in model.hf_device_map)
    ids = words(2)
    torch.testing.assert_close(
        model(ids).logits, AutoModelForCausalLM.from_pretrained(stored)(ids).logits
    )
