"""`hetero_moe`: against its sources themselves, and against MergeME's 3.2 written out in a loop."""

import os
import re
import sys

import click
import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import mergekit_moe_ext
from tests.conftest import (
    SPECIAL_TOKENS,
    TINY,
    document,
    make_model,
    merge,
    read_tensors,
    run,
    same_files,
)
from tests.mergekit_moe_ext.sequence.decoders import only, save_source, vocabulary

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
# One tokenizer …
FAMILIES = {
    "llama": {"vocab_size": 100},
    "qwen3": {"num_hidden_layers": 3},
    "gpt2": {"hidden_size": 24},
    "gemma": {"hidden_size": 40},
    "olmo2": {},
    "phi3": {},
    "phi": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {},
    "gemma2": {},
    "opt": {},
    "granitemoe": {"tie_word_embeddings": True},
}
# … and others
SHUFFLED = {
    "gpt2-shuffled": {"hidden_size": 24, "words": vocabulary(80, shuffled=1)},
    "gemma-shuffled": {"hidden_size": 40, "words": vocabulary(90, shuffled=2, also=("zz",))},
    "olmo2-shuffled": {"words": vocabulary(96, shuffled=3)},
    "phi3-shuffled": {"words": vocabulary(120, shuffled=4), "vocab_size": 128},
    "qwen3-shuffled": {"words": vocabulary(60, shuffled=5)},
}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    for seed, (name, config) in enumerate({**FAMILIES, **SHUFFLED}.items()):
        save_source(root / name, name.removesuffix("-shuffled"), seed, **config)
    return root


@pytest.fixture
def here(decoders, tmp_path, monkeypatch):
    for source in decoders.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def hetero(models, base=None, name="out", options=None, **parameters):
    config = document("hetero_moe", models, f"./{base or models[0]}", parameters=parameters)
    return merge(config, name, **(options or {}))


def ids_of(rows=3, length=20, seed=0):
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids, **more):
    return model(ids, **more).logits


@pytest.mark.parametrize(
    ("families", "parameters"),
    [
        (["llama", "qwen3", "gpt2", "gemma", "olmo2", "phi3"], {"routing": "perplexity"}),
        (["llama", "phi", "cohere", "granite", "opt"], {}),
        (
            ["gemma2", "llama", "gpt2"],
            {"routing": "perplexity", "experts_per_sequence": 1},
        ),  # a cap on logits
    ],
)
def test_with_separate_embeddings_each_expert_is_its_source(here, families, parameters):
    model, ids = load(hetero(families, embedding="separate", **parameters)), ids_of()
    for index, family in enumerate(families):
        got = logits_of(model, ids, coefficients=only(index, len(families)))[..., :96]
        torch.testing.assert_close(got, logits_of(load(family), ids)[..., :96], **CLOSE)


def test_sources_with_other_tokenizers_are_given_the_same_words(here):
    families = ["llama", *SHUFFLED]
    model = load(hetero(families, embedding="separate"))
    of_donor = AutoTokenizer.from_pretrained("llama").get_vocab()
    for index, family in enumerate(families):
        own = AutoTokenizer.from_pretrained(family).get_vocab()
        shared = sorted(of_donor.keys() & own.keys())
        ours, theirs = (torch.tensor([rows[word] for word in shared]) for rows in (of_donor, own))
        chosen = torch.randint(len(shared), (3, 20), generator=torch.Generator().manual_seed(index))
        got = logits_of(model, ours[chosen], coefficients=only(index, len(families)))[..., ours]
        torch.testing.assert_close(
            got, logits_of(load(family), theirs[chosen])[..., theirs], **CLOSE
        )
        assert len(shared) >= 60 and (index == 0 or not torch.equal(ours, theirs))


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize(
    "donor", ["llama", "gpt2", "gemma", "olmo2", "phi3", "cohere", "granite", "opt", "gemma2"]
)
def test_identity_projectors_and_the_donors_embedding_give_the_donor(here, donor, projector):
    """Narrower than the widest or not, in whatever order; each mixed with a wider Gemma and another
    tokenizer.
    """
    capped = {"routing": "perplexity", "experts_per_sequence": 1} if donor == "gemma2" else {}
    families = ["olmo2-shuffled", "gemma-shuffled", donor]
    model = load(
        hetero(
            families,
            donor,
            embedding="donor",
            projector=projector,
            projector_init="identity",
            **capped,
        )
    )
    ids = ids_of()
    got = logits_of(model, ids, coefficients=only(2, 3))
    torch.testing.assert_close(got, logits_of(load(donor), ids), **CLOSE)


# The paper's 3.2: one architecture after another, by their own classes.
MIXED = ["llama", "gpt2-shuffled", "gemma", "granite", "opt"]


def trunk_of(family, embedded):
    """What a source makes of embeddings, from what follows them to what its head reads."""
    model = load(family)
    if family.startswith("gemma"):
        embedded = embedded * model.config.hidden_size**0.5
    if family.startswith("opt"):  # its projections lie between its embedding and its layers
        return model.model(inputs_embeds=embedded).last_hidden_state
    hidden = model.base_model(inputs_embeds=embedded).last_hidden_state
    return hidden / model.config.logits_scaling if family.startswith("granite") else hidden


def project(tensors, name, x, projector, residual):
    first = tensors[f"{name}.layers.0.weight"]
    if projector == "linear":
        return x @ first.T
    last = tensors[f"{name}.layers.2.weight"]
    y = functional.gelu(x @ first.T) @ last.T
    if residual:
        both = min(x.shape[-1], y.shape[-1])
        y[..., :both] += x[..., :both]
    return y


@torch.no_grad()
def mergeme(out, ids, projector, residual=False):
    """Logits of MergeME 3.2 with K = 2, sequence by sequence."""
    tensors, every = read_tensors(out), []
    embedding = tensors["embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    for sequence in ids:
        embedded = embedding[sequence]
        chances = tensors["router.weight"] @ embedded.mean(dim=0)
        chosen = chances.topk(2).indices
        mixed = 0
        for alpha, index in zip(chances[chosen].softmax(dim=0), chosen.tolist(), strict=True):
            into = project(tensors, f"experts.{index}.proj_in", embedded[None], projector, residual)
            hidden = trunk_of(MIXED[index], into)
            mixed = (
                mixed
                + alpha
                * project(tensors, f"experts.{index}.proj_out", hidden, projector, residual)[0]
            )
        every.append(mixed @ head.T)
    return torch.stack(every)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("init", ["random", "identity"])
@pytest.mark.parametrize("embedding", ["average", "donor"])
def test_the_papers_equations(here, projector, init, embedding):
    out = hetero(
        MIXED,
        embedding=embedding,
        projector=projector,
        projector_init=init,
        routing_prefix="sequence",
    )
    model, ids = load(out), ids_of(6)
    output = model(ids)
    assert (
        len({tuple(row.nonzero()[:, 0].tolist()) for row in output.coefficients}) > 1
    )  # not all choose alike
    torch.testing.assert_close(
        output.logits, mergeme(out, ids, projector, init == "identity"), **CLOSE
    )


def test_the_prefix_chooses_if_not_told_otherwise(here):
    out = hetero(MIXED, routing_tokens=5)
    model, ids, tensors = load(out), ids_of(6), read_tensors(out)
    means = torch.stack([tensors["embed_tokens.weight"][row[:5]].mean(dim=0) for row in ids])
    scores = means @ tensors["router.weight"].T
    values, chosen = scores.topk(2)
    expected = torch.zeros_like(scores).scatter(1, chosen, values.softmax(dim=1))
    torch.testing.assert_close(model(ids).coefficients, expected, **CLOSE)


def projectors(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".proj_" in name}


def test_defaults_are_the_papers(here):
    models = ["llama", "gemma", "gpt2"]
    plain = hetero(models)
    spelled = hetero(
        models,
        name="spelled",
        routing="learned",
        embedding="average",
        projector="mlp",
        projector_init="random",
        experts_per_sequence=2,
    )
    assert all(
        torch.equal(t, read_tensors(spelled)[name]) for name, t in read_tensors(plain).items()
    )
    assert (plain / "config.json").read_bytes() == (spelled / "config.json").read_bytes()


@pytest.mark.parametrize("embedding", ["average", "donor"])
def test_shapes_and_identity_of_projectors(here, embedding):
    widths = {
        "llama": (32, 32),
        "gpt2": (24, 24),
        "gemma": (40, 40),
        "opt": (20, 20),
    }  # OPT's own projections stay
    linear, mlp = (
        projectors(
            read_tensors(hetero([*widths], "llama", kind, None, embedding=embedding, **parameters))
        )
        for kind, parameters in {
            "linear": {"projector": "linear", "projector_init": "identity"},
            "mlp": {"projector": "mlp", "projector_init": "identity"},
        }.items()
    )
    assert len(linear) == 8 and len(mlp) == 16
    for index, (into, out_of) in enumerate(widths.values()):
        for name, (columns, rows) in {"proj_in": (40, into), "proj_out": (out_of, 40)}.items():
            name = f"experts.{index}.{name}.layers"
            assert torch.equal(linear[f"{name}.0.weight"], torch.eye(rows, columns))
            assert (
                mlp[f"{name}.0.weight"].shape == (40, columns) and mlp[f"{name}.0.weight"].std() > 0
            )
            assert torch.equal(mlp[f"{name}.2.weight"], torch.zeros(rows, 40))


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_random_projectors_keep_the_size_of_what_they_project(here, projector):
    """Normal, with a variance of one over the number of inputs; no two alike."""
    got = projectors(read_tensors(hetero(["llama", "gpt2", "gemma"], projector=projector)))
    for tensor in got.values():
        scaled = tensor * tensor.shape[1] ** 0.5
        assert abs(scaled.mean()) < 4 / scaled.numel() ** 0.5
        assert abs(scaled.std() - 1) < 4 / (2 * scaled.numel()) ** 0.5
        assert (
            0.5 < (scaled.abs() < 0.6745).float().mean() * 1.0 + 0.06 < 0.62
        )  # half of a normal distribution
    firsts = [tensor.flatten()[:8] for tensor in got.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


def test_the_same_seed_gives_the_same_files(here):
    models = ["llama", "gpt2-shuffled", "gemma"]
    one = hetero(models, name="one", options={"random_seed": 3})
    for name, options in {
        "again": {},
        "threads": {"num_threads": 2},
        "async": {"async_write": True, "write_threads": 2},
        "lazy": {"lazy_unpickle": True, "low_cpu_memory": True},
    }.items():
        assert same_files(one, hetero(models, name=name, options={"random_seed": 3, **options})), (
            name
        )
    other = read_tensors(hetero(models, name="other", options={"random_seed": 4}))
    for name, tensor in read_tensors(one).items():
        is_drawn = ".proj_" in name or name == "router.weight"
        assert torch.equal(tensor, other[name]) != is_drawn, name


def test_a_source_listed_twice_is_two_experts(here):
    model, ids = load(hetero(["llama", "gpt2", "gpt2"], embedding="separate")), ids_of()
    for index in (1, 2):
        got = logits_of(model, ids, coefficients=only(index, 3))[..., :96]
        torch.testing.assert_close(got, logits_of(load("gpt2"), ids), **CLOSE)
    assert model.config.expert_names == ["llama", "gpt2-1", "gpt2-2"]
    assert model.experts[1].trunk.lm_head is not model.experts[2].trunk.lm_head


def test_half_precision(here):
    for name in ("llama", "gpt2"):
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).save_pretrained(
            f"half-{name}"
        )
        AutoTokenizer.from_pretrained(name).save_pretrained(f"half-{name}")
    out = hetero(["half-llama", "half-gpt2", "gemma"], name="mixed")
    assert {
        tensor.dtype for name, tensor in read_tensors(out).items() if ".trunk." not in name
    } == {torch.float32}
    model = load(hetero(["half-llama", "half-gpt2"], embedding="donor", projector_init="identity"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    got = logits_of(model, ids_of(), coefficients=only(0, 2))
    torch.testing.assert_close(got, logits_of(load("half-llama"), ids_of()))


def test_dtype_of_the_output(here):
    config = document("hetero_moe", ["llama", "gpt2"], "./llama", dtype="bfloat16")
    out = merge(config)
    assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.bfloat16}
    assert load(out).generate(ids_of(), max_new_tokens=2, min_new_tokens=2).shape == (3, 22)


# Afterwards: fine-tuning, saving, generating.
def batch(length=16):
    ids = ids_of(4, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, steps=2):
    arguments = TrainingArguments(
        "trained",
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=batch())
    trainer.train()
    return model


def changed_by(model, action):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    action(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }


def test_fine_tuning_everything_changes_the_experts_that_are_chosen(here):
    model = load(hetero(["llama", "gpt2-shuffled", "gemma"], routing_tokens=4))
    with torch.no_grad():  # so that all choose the first two
        model.router.weight[2] = -100 * model.embed_tokens(ids_of(4, 16)[:, :4]).mean(dim=(0, 1))
        model.router.weight[:2] *= 0.01
    ids = ids_of(4, 16)
    assert not model(ids).coefficients[:, 2].any()
    changed = changed_by(model, train)
    everything = {name for name, _ in model.named_parameters()}
    unchosen = {name for name in everything if name.startswith("experts.2.")}
    assert everything - unchosen - changed == set() and not changed & unchosen


def test_fine_tuning_projectors_and_router_changes_nothing_else(here):
    model = load(hetero(["llama", "gpt2-shuffled"], routing_tokens=4))
    trained = {
        name for name, _ in model.named_parameters() if ".proj_" in name or name == "router.weight"
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    assert changed_by(model, train) == trained and len(trained) == 9


@pytest.mark.parametrize("part", ["projectors", "all"])
def test_the_loss_falls(here, part):
    model = load(hetero(["llama", "gpt2-shuffled", "gemma"], routing_tokens=4)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part == "all" or ".proj_" in name or name == "router.weight")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = ids_of(4, 16)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# In a process in which neither package can be imported.
ELSEWHERE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mergekit_moe_ext", "_mergekit_moe_ext_common", "mergekit"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
try:
    import mergekit_moe_ext
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("it can be imported")
ids, got = torch.load("ids.pt"), {}
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        got[path] = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = generator("w1 w2 w3", max_new_tokens=2)
    assert said[0]["generated_text"].startswith("w1 w2 w3"), said
    model.save_pretrained(path + "-again")
    again = AutoModelForCausalLM.from_pretrained(path + "-again", trust_remote_code=True)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
torch.save(got, "got.pt")
"""


def test_it_is_saved_moved_and_loaded_without_this_package(here):
    ids, models, away = ids_of(), {}, here / "away"
    away.mkdir()
    for embedding in ("average", "separate"):
        out = hetero(
            ["llama", "gpt2-shuffled", "gemma"], name=f"out-{embedding}", embedding=embedding
        )
        model = models[embedding] = load(out)
        with torch.no_grad():  # so that what is saved is not what was merged
            model.router.weight.mul_(-3)
        model.save_pretrained("saved")
        AutoTokenizer.from_pretrained(out).save_pretrained("saved")
        (here / "saved").rename(away / embedding)
    torch.save(ids, away / "ids.pt")
    env = {
        **os.environ,
        "HF_MODULES_CACHE": str(here / "cache"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    env.pop("PYTHONPATH", None)
    result = run(sys.executable, "-c", ELSEWHERE, *models, cwd=away, env=env)
    assert result.returncode == 0, result.stderr
    for embedding, (logits, generated) in torch.load(away / "got.pt").items():
        torch.testing.assert_close(logits, logits_of(models[embedding], ids))
        assert torch.equal(
            generated, models[embedding].generate(ids, max_new_tokens=5, do_sample=False)
        )
        torch.testing.assert_close(logits, logits_of(load(away / f"{embedding}-again"), ids))


@pytest.mark.parametrize(
    ("embedding", "routing"), [("average", "learned"), ("separate", "perplexity")]
)
def test_generating_is_taking_the_likeliest_word_again_and_again(here, embedding, routing):
    model, ids = load(hetero(MIXED, embedding=embedding, routing=routing)), ids_of()
    got = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    coefficients = model(ids, past_key_values=None).coefficients
    expected = ids
    for _ in range(6):
        logits = logits_of(model, expected, coefficients=coefficients, use_cache=False)[:, -1]
        logits[:, SPECIAL_TOKENS["eos_token_id"]] = -torch.inf
        expected = torch.cat([expected, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("embedding", ["average", "separate"])
def test_experts_lie_on_different_devices(here, embedding):
    out, ids = hetero(["llama", "gpt2-shuffled", "gemma"], embedding=embedding), ids_of()
    expected = logits_of(load(out), ids)
    shared = ["embed_tokens", "lm_head", "router"] if embedding == "average" else ["router"]
    device_map = {
        **dict.fromkeys(shared, "cpu"),
        "experts.0": "cpu",
        "experts.1": "disk",
        "experts.2": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(
        out, device_map=device_map, offload_folder="offload"
    )
    torch.testing.assert_close(logits_of(model, ids), expected)
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (3, 23)


# Bad input.
def nothing_left(directory):
    return not any(path.name.startswith((".", "out")) for path in directory.iterdir())


def refused(directory, message, models=("llama", "gpt2"), base="./llama", options=None, **keys):
    with pytest.raises(click.ClickException, match=message):
        merge(document("hetero_moe", models, base, **keys), **(options or {}))
    assert nothing_left(directory)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"routing": "learned", "experts_per_sequence": 1},
            "cannot be trained: .* 1.*take 2 or more",
        ),
        (
            {"experts_per_sequence": 3},
            r"experts_per_sequence is 3, but `models:` lists 2 expert\(s\)",
        ),
        ({"experts_per_sequence": 0}, "`experts_per_sequence`.*is 0.*greater than or equal to 1"),
        ({"routing": "uniform", "experts_per_sequence": 1}, "uniform takes all 2 experts"),
        (
            {"routing": "task_vector"},
            "`routing`.*'task_vector'.*'learned', 'perplexity' or 'uniform'",
        ),
        ({"routing": "learnt"}, "`routing`.*'learnt'.*'learned', 'perplexity' or 'uniform'"),
        ({"embedding": "merged"}, "`embedding`.*'merged'.*'average', 'donor' or 'separate'"),
        ({"projector": "mpl"}, "`projector`.*'mpl'.*'linear' or 'mlp'"),
        ({"projector_init": "zeros"}, "`projector_init`.*'zeros'.*'random' or 'identity'"),
        (
            {"embedding": "separate", "projector": "mlp"},
            "separate has no projectors: leave projector out",
        ),
        (
            {"embedding": "separate", "projector_init": "identity"},
            "no projectors: leave projector_init out",
        ),
        (
            {"routing": "perplexity", "router_aux_loss_coef": 0.1},
            "router_aux_loss_coef is for routing: learned",
        ),
        ({"projectr": "mlp"}, "unknown key `projectr`.*did you mean `projector`"),
        ({"attention": "separate"}, "unknown key `attention`"),
        ({"shared": "ties"}, "unknown key `shared`"),
        ({"weight": 1.0}, "`weight`"),
        ({"normalize": False}, "no use for `normalize`"),
    ],
)
def test_options_that_cannot_be(here, parameters, message):
    refused(here, message, parameters=parameters)


def test_options_of_a_model_that_cannot_be(here):
    for key, message in {
        "weight": "no use for `weight`",
        "projector": "`projector`.*belongs under the merge's",
    }.items():
        refused(here, message, models=["llama", {"model": "./gpt2", "parameters": {key: 0.5}}])


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": "union"},
        {"tokenizer": {"source": "./gpt2"}},
    ],
)
def test_tokenizers_are_not_to_be_merged(here, keys):
    refused(here, "takes the tokenizer of `base_model`: leave `tokenizer` out", **keys)


def test_base_model(here):
    refused(
        here,
        r"base_model: \./gemma, whose tokenizer the output gets, must be among `models:`",
        base="./gemma",
    )
    assert (
        load(merge(document("hetero_moe", ["llama", "gpt2"], None))).config.vocab_size == 100
    )  # the first


STRANGE = {
    "t5": (TINY, "is an encoder-decoder"),
    "mamba": (
        {"hidden_size": 32, "num_hidden_layers": 2},
        "keeps no key-value cache of the usual kind",
    ),
    "mamba2": ({}, "keeps no key-value cache of the usual kind"),
    "falcon_mamba": (
        {"hidden_size": 32, "num_hidden_layers": 2},
        "keeps no key-value cache of the usual kind",
    ),
    "jamba": ({}, "keeps no key-value cache of the usual kind"),
    "recurrent_gemma": ({}, "keeps no key-value cache of the usual kind"),
    "qwen3_next": ({}, "keeps no key-value cache of the usual kind"),
    "gemma3n_text": ({}, "needs token embeddings inside its layers"),
    "gemma4_text": ({}, "needs token embeddings inside its layers"),
    "gemma3n": ({}, "is not a language model alone"),
    "gemma4": ({}, "is not a language model alone"),
    "gemma3": ({}, "is not a language model alone"),
}


@pytest.mark.parametrize("family", STRANGE)
def test_decoders_that_cannot_be_experts(here, family):
    settings, message = STRANGE[family]
    AutoConfig.for_model(family, **settings).save_pretrained(here / "strange")
    AutoTokenizer.from_pretrained("llama").save_pretrained("strange")
    for base in ("./llama", "./strange"):
        refused(
            here,
            rf"\./strange cannot be an expert .*{message}",
            models=["llama", "strange"],
            base=base,
        )


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_experts_that_cap_differently_are_mixed_by_a_learned_router(here, combine):
    models = ["llama", "gemma2"]
    model = load(hetero(models, embedding="separate", routing="learned", combine=combine))
    assert model.config.combine == combine and model.config.experts_per_sequence == 2
    ids = ids_of()
    first, second = (logits_of(model, ids, coefficients=row[None]) for row in torch.eye(2))
    assert second.max() < 3 or combine == "probabilities"
    got = logits_of(model, ids, coefficients=torch.tensor([[0.3, 0.7]]))
    if combine == "probabilities":
        got, first, second = got.exp(), first.exp(), second.exp()
    torch.testing.assert_close(got, 0.3 * first + 0.7 * second, **CLOSE)


def test_experts_that_cap_alike_are_mixed(here):
    save_source(here / "gemma2-b", "gemma2", 77)
    model, ids = load(hetero(["gemma2", "gemma2-b"], embedding="separate")), ids_of()
    uncapped = []
    for name in ("gemma2", "gemma2-b"):
        source = load(name)
        source.config.final_logit_softcapping = None
        uncapped.append(logits_of(source, ids))
    expected = 3 * torch.tanh((0.3 * uncapped[0] + 0.7 * uncapped[1]) / 3)
    torch.testing.assert_close(
        logits_of(model, ids, coefficients=torch.tensor([[0.3, 0.7]])), expected, **CLOSE
    )


@pytest.mark.parametrize("embedding", ["average", "donor"])
def test_a_shared_head_has_no_bias(here, embedding):
    message = r"the head of \./phi has a bias.*take embedding: separate"
    refused(here, message, models=["llama", "phi"], parameters={"embedding": embedding})


def test_damaged_sources(here):
    make_model(here / "hollow", 1)
    AutoTokenizer.from_pretrained("llama").save_pretrained("hollow")
    (here / "hollow" / "model.safetensors").unlink()
    refused(here, r"cannot read the weights of \./hollow", models=["llama", "hollow"])
    save_source(here / "nan", "gpt2", 1)
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"):
        model = load("gpt2")
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = float("nan")
        model.save_pretrained(here / "nan")
        refused(here, rf"{name} of \./nan holds NaN or Inf", models=["llama", "nan"])


# The commands.
CONFIG = """
merge_method: hetero_moe
base_model: ./llama
models:
- model: ./llama
- model: ./gpt2-shuffled
- model: ./gemma-shuffled
- model: ./olmo2-shuffled
parameters: {routing: learned, projector: mlp, projector_init: identity, experts_per_sequence: 2}
"""


def test_the_command_merges(here):
    (here / "config.yml").write_text(CONFIG)
    result = run("mergekit-yaml", "config.yml", "out", "--quiet")
    assert result.returncode == 0, result.stderr
    got, expected = (
        read_tensors(here / "out"),
        read_tensors(merge(yaml.safe_load(CONFIG), "expected")),
    )
    assert got.keys() == expected.keys() and all(
        torch.equal(got[name], expected[name]) for name in expected
    )
    card = (here / "out" / "README.md").read_text()
    for fact in (
        "hetero_moe",
        "arxiv.org/abs/2502.00997",
        "gemma-shuffled: 89 its own, 0 spelled, 11 missing",
        "trust_remote_code=True",
    ):
        assert fact in card, card
    assert (
        AutoTokenizer.from_pretrained("out").get_vocab()
        == AutoTokenizer.from_pretrained("llama").get_vocab()
    )
    assert load("out").generate(ids_of(), max_new_tokens=2, min_new_tokens=2).shape == (3, 22)


@pytest.mark.parametrize(
    ("parameters", "untrained"),
    [
        ({}, "the router and the projectors are random until trained: "),
        ({"projector_init": "identity"}, "the router is random until trained: "),
        ({"routing": "perplexity"}, "the projectors are random until trained: "),
        ({"routing": "perplexity", "embedding": "separate"}, None),
    ],
)
def test_the_plan_says_what_is_random(here, parameters, untrained):
    config = {**yaml.safe_load(CONFIG), "parameters": {"experts_per_sequence": 2, **parameters}}
    planned = mergekit_moe_ext.plan(config)
    if untrained is None:
        assert planned.untrained == "" and "untrained" not in str(planned)
        return
    assert planned.untrained.startswith(f"{untrained}mergekit-moe-ext train out --train ")
    trained = re.findall(r"--train (\w+)", planned.untrained)
    assert trained == [part for part in ("router", "projectors") if part in untrained]


def test_the_plan_command(here):
    (here / "config.yml").write_text(CONFIG)
    result = run("mergekit-moe-ext", "plan", "config.yml")
    assert result.returncode == 0, result.stderr
    for fact in (
        "SequenceMoEForCausalLM",
        "- gpt2-shuffled: 80 its own, 0 spelled, 20 missing",
        "- olmo2-shuffled: 96 its own, 0 spelled, 4 missing",
    ):
        assert fact in result.stdout, result.stdout
    assert nothing_left(here)
