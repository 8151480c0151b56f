"""`merge_method: seq_moe`, from YAML to a model that any process can load."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mergekit_moe_ext.modeling import SequenceMoEForCausalLM
from tests.conftest import NAMES, document, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.merging.test_bad_input import refused
from tests.mergekit_moe_ext.sequences import logits_of, only, padded, words
from tests.tokenizers import save_tokenizer

SEPARATE = {"embedding": "separate"}
NO_AUTOLOAD = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "olmo2": {},
    "phi3": {},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi": {},
}
# Of the two names for a tied matrix, the head's comes first in such checkpoints.
TIED = {
    "qwen3_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "tie_word_embeddings": True,
    },
    "granitemoe": {"num_local_experts": 3, "tie_word_embeddings": True},
}
TUPLES = {
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
    },
}
# In a process of its own, without this package: keeps logits and generated words, and saves each
# model again.
OUTSIDE = """
import json, sys
for name in ('mergekit_moe_ext', '_mergekit_moe_ext_autoload', 'mergekit'): sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
ids, source, target = torch.tensor(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]
for name in sys.argv[4:]:
    path = f"{source}/{name}"
    model, info = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(ids).logits
    words = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.save_pretrained(f"{target}/{name}")
    torch.save({"logits": logits, "words": words}, f"{target}/{name}.pt")
"""


def seq_moe(models=NAMES, base="./base", **parameters):
    return document("seq_moe", models, base, parameters=parameters)


def load(path, **options):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert isinstance(model, SequenceMoEForCausalLM)
    assert not any(info.values()), info
    return model.eval()


def dense_at(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def tied_up_size(path):
    return sum(tensor.numel() for tensor in read_tensors(path).values())


@pytest.mark.parametrize("family", [*FAMILIES, *TIED])
def test_each_expert_is_its_source(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        of_family = {**FAMILIES, **TIED}[family]
        config = {"num_hidden_layers": 2, "initializer_range": 0.3, **of_family}
        make_model(tmp_path / name, seed, family=family, **config)
    model = load(merge(seq_moe(("base", "math"), **SEPARATE)))
    assert model.config.experts_per_sequence == 2
    for side in ("left", "right"):
        ids, mask = padded(words(3), (0, 4, 1), side)
        for index, name in enumerate(("base", "math")):
            got = model(ids, attention_mask=mask, coefficients=only(index, 2)).logits
            expected = logits_of(dense_at(name), ids, mask)
            torch.testing.assert_close(
                got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_each_expert_is_its_source_in_half_precision(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        make_model(tmp_path / name, seed, family=family, dtype=torch.bfloat16, **FAMILIES[family])
    model = load(merge(seq_moe(("base", "math"), **SEPARATE)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = words(3)
    for index, name in enumerate(("base", "math")):
        assert torch.equal(
            model(ids, coefficients=only(index, 2)).logits, logits_of(dense_at(name), ids)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_merged_with_itself_stays_itself(tmp_path, monkeypatch, family):
    """With everything shared that can be: what a family does between embedding, layers and head is
    still done.
    """
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "one", 1, family=family, initializer_range=0.3, **FAMILIES[family])
    model = load(merge(seq_moe(("one", "one"), base=None, attention="merged")))
    expected = logits_of(dense_at("one"), words(2))
    for coefficients in (only(1, 2), torch.tensor([[0.5, 0.5]])):
        got = model(words(2), coefficients=coefficients).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained("again")
    torch.testing.assert_close(load("again")(words(2)).logits, expected, atol=1e-5, rtol=1e-5)


def test_generates_what_a_source_generates(here):
    model, source = load(merge(seq_moe(**SEPARATE))), dense_at("code")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = source.generate(words(2), **options)
    assert torch.equal(model.generate(words(2), coefficients=only(2, 4), **options), expected)


@pytest.mark.parametrize("shared", ["ties", "linear", "fast_ties"])
@pytest.mark.parametrize("attention", ["merged", "separate"])
def test_what_is_shared_is_what_mergekit_makes_of_it(here, shared, attention):
    parameters = {"weight": 0.5, **({} if shared == "linear" else {"density": 0.6})}
    stock = read_tensors(merge(document(shared, NAMES, parameters=parameters), "stock"))
    merged = read_tensors(merge(seq_moe(attention=attention, shared=shared, **parameters)))
    sources = {index: read_tensors(here / name) for index, name in enumerate(NAMES)}
    seen = set()
    for name, tensor in merged.items():
        if not name.startswith("experts."):
            in_source = {"embed_tokens.weight": "model.embed_tokens.weight"}.get(name, name)
            expected = stock[in_source]
        else:
            _, index, _, in_source = name.split(".", 3)
            in_layer = ".layers." in in_source
            own = ".mlp." in in_source if attention == "merged" else in_layer
            expected = sources[int(index)][in_source] if own else stock[in_source]
            if not own:
                assert index == "0"
        seen.add(in_source)
        torch.testing.assert_close(tensor, expected, atol=0, rtol=0, msg=name)
    assert seen == sources[0].keys()


def test_merged_attention_makes_each_expert_a_dense_model_of_merged_parts(here):
    """The merge of the sources by mergekit itself, with one source's FFNs put in."""
    merge(document("ties", NAMES, parameters={"weight": 0.5, "density": 0.6}), "stock")
    model = load(merge(seq_moe(attention="merged", shared="ties", weight=0.5, density=0.6)))
    ids = words(2)
    for index, name in enumerate(NAMES):
        expected = dense_at("stock")
        own = {key: value for key, value in dense_at(name).state_dict().items() if ".mlp." in key}
        expected.load_state_dict({**expected.state_dict(), **own})
        got = model(ids, coefficients=only(index, 4)).logits
        torch.testing.assert_close(got, logits_of(expected, ids), atol=1e-5, rtol=1e-5)


def test_ffns_are_mixed_in_the_merge_of_the_sources(here):
    """mergekit's own merge, whose FFNs are hooked to give the mean of two sources'."""
    merge(document("ties", NAMES, parameters={"weight": 0.5, "density": 0.6}), "stock")
    options = {"weight": 0.5, "density": 0.6, "attention": "merged", "shared": "ties"}
    model = load(merge(seq_moe(mix="ffn", **options)))
    stock, sources = dense_at("stock"), [dense_at(name) for name in NAMES[:2]]
    for layer, block in enumerate(stock.model.layers):
        ffns = [source.model.layers[layer].mlp for source in sources]
        block.mlp.register_forward_hook(
            lambda _, inputs, __, ffns=ffns: (ffns[0](*inputs) + ffns[1](*inputs)) / 2
        )
    got = model(words(2), coefficients=torch.tensor([[0.5, 0.5, 0.0, 0.0]])).logits
    torch.testing.assert_close(got, logits_of(stock, words(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TUPLES)
def test_ffns_that_give_their_routers_scores_as_well_are_mixed(tmp_path, monkeypatch, family):
    """Of sources that differ in their FFNs alone, each is what its coefficients choose."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "math"):
        config = {"num_hidden_layers": 2, "initializer_range": 0.3, **TUPLES[family]}
        make_model(tmp_path / name, 0, family=family, **config)
    source = dense_at("math")
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if ".mlp." in name or ".feed_forward." in name:
                parameter *= 1.5
    source.save_pretrained("math")
    model = load(merge(seq_moe(("base", "math"), attention="merged", mix="ffn")))
    expected = [logits_of(dense_at(name), words(2)) for name in ("base", "math")]
    assert not torch.allclose(*expected, atol=1e-3)
    for index in (0, 1):
        got = model(words(2), coefficients=only(index, 2)).logits
        torch.testing.assert_close(got, expected[index], atol=1e-5, rtol=1e-5)
    assert model(words(2), coefficients=torch.tensor([[0.5, 0.5]])).logits.isfinite().all()


def test_ffns_of_several_modules_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        make_model(tmp_path / name, seed, family="opt", **FAMILIES["opt"])
    config = seq_moe(("base", "math"), attention="merged", mix="ffn")
    refused(tmp_path, config, "mix: ffn", "OPTForCausalLM", "take mix: output")


@pytest.mark.parametrize(
    ("options", "trunks", "outside"),
    [
        ({"attention": "separate", "embedding": "separate"}, 4, 4),
        ({"attention": "separate"}, 4, 1),
        ({"attention": "merged"}, "ffns", 1),
        ({"attention": "merged", "embedding": "separate"}, "ffns", 4),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_shared_is_stored_once(tmp_path, monkeypatch, options, trunks, outside, tied):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        make_model(tmp_path / name, seed, tie_word_embeddings=tied)
    source = read_tensors(tmp_path / "base")
    sizes = {"layers": 0, "ffns": 0, "norm": 0, "outside": 0}
    for name, tensor in source.items():
        where = "ffns" if ".mlp." in name else "layers" if ".layers." in name else "outside"
        sizes["norm" if name == "model.norm.weight" else where] += tensor.numel()
    expected = 4 * sizes["ffns"] + (4 if trunks == 4 else 1) * sizes["layers"]
    expected += outside * (sizes["norm"] + sizes["outside"])
    out = merge(seq_moe(**options))
    assert tied_up_size(out) == expected
    model = load(out)
    assert sum(p.numel() for p in model.parameters()) == expected
    model.save_pretrained("again", max_shard_size="40KB")
    assert tied_up_size(tmp_path / "again") == expected
    assert torch.equal(load("again")(words(2)).logits, model(words(2)).logits)


def test_loads_in_a_process_without_this_package(here, tmp_path_factory):
    """Moved elsewhere, loaded there, saved from there, and loaded again both there and here."""
    variants = {
        "perplexity": {"embedding": "separate"},
        "task-vector": {
            "attention": "merged",
            "shared": "ties",
            "density": 0.5,
            "routing": "task_vector",
        },
        "learned": {"routing": "learned"},
        "uniform": {"routing": "uniform", "embedding": "separate", "attention": "merged"},
        "ffn": {"attention": "merged", "mix": "ffn"},
        "probabilities": {"embedding": "separate", "combine": "probabilities"},
    }
    ids, elsewhere, expected = words(2), tmp_path_factory.mktemp("elsewhere"), {}
    (elsewhere / "moved").mkdir()
    for name, parameters in variants.items():
        out = merge(seq_moe(**parameters), name)
        model = load(out)
        made = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        expected[name] = {"logits": model(ids).logits, "words": made}
        shutil.move(out, elsewhere / "moved" / name)
    environment = {
        "PATH": "/usr/bin",
        "HF_HOME": str(elsewhere),
        "HF_HUB_OFFLINE": "1",
        **NO_AUTOLOAD,
    }
    for source, target in (("moved", "saved"), ("saved", "saved-again")):
        (elsewhere / target).mkdir()
        command = (
            sys.executable,
            "-P",
            "-c",
            OUTSIDE,
            json.dumps(ids.tolist()),
            source,
            target,
            *variants,
        )
        result = run(*command, cwd=elsewhere, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        for name in variants:
            made = torch.load(elsewhere / target / f"{name}.pt", weights_only=True)
            assert torch.equal(made["words"], expected[name]["words"])
            torch.testing.assert_close(made["logits"], expected[name]["logits"], atol=0, rtol=0)
            path = elsewhere / target / name
            assert {"modeling_sequence_moe.py", "configuration_sequence_moe.py"} <= {
                p.name for p in path.iterdir()
            }
    torch.testing.assert_close(load(path)(ids).logits, expected[name]["logits"], atol=0, rtol=0)


def test_the_configuration_says_what_was_asked_for(here):
    out = merge(
        seq_moe(
            ("math", "base", "math"),
            routing="task_vector",
            task_vector_layers=[0, 2],
            experts_per_sequence=3,
            routing_tokens=7,
            routing_prefix="sequence",
        )
    )
    config = load(out).config
    assert config.expert_names == ["math-0", "base", "math-2"] and config.base_expert == 1
    assert (config.routing, config.task_vector_layers, config.experts_per_sequence) == (
        "task_vector",
        [0, 2],
        3,
    )
    assert (config.routing_tokens, config.routing_prefix) == (7, "sequence")
    assert config.special_token_ids == [0, 1]
    assert (config.pad_token_id, config.eos_token_id, config.max_position_embeddings) == (0, 1, 128)
    card = (out / "README.md").read_text()
    assert "SequenceMoE" in card or "seq_moe" in card


def test_a_source_listed_twice_is_two_experts(here):
    model = load(merge(seq_moe(("math", "math", "base"), embedding="separate")))
    ids, source = words(2), dense_at("math")
    for index in (0, 1):
        got = model(ids, coefficients=only(index, 3)).logits
        torch.testing.assert_close(got, logits_of(source, ids), atol=1e-5, rtol=1e-5)


def test_without_a_base_model(here):
    model = load(merge(seq_moe(("math", "code"), base=None, **SEPARATE)))
    expected = logits_of(dense_at("code"), words(2))
    torch.testing.assert_close(
        model(words(2), coefficients=only(1, 2)).logits, expected, atol=1e-5, rtol=1e-5
    )


def test_a_learned_router_is_drawn_by_the_seed(here):
    first = read_tensors(merge(seq_moe(routing="learned"), "one"))["router.weight"]
    again = read_tensors(merge(seq_moe(routing="learned"), "two"))["router.weight"]
    other = read_tensors(merge(seq_moe(routing="learned"), "three", random_seed=5))["router.weight"]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (4, 32) and 0.01 < first.std() < 0.03


def test_half_precision_out(here):
    out = merge({**seq_moe(attention="merged"), "out_dtype": "bfloat16"})
    assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.bfloat16}
    assert load(out).dtype == torch.bfloat16


def test_a_text_generation_pipeline(here):
    (here / "base").unlink()
    make_model(here / "base", 0)
    save_tokenizer(here / "base", 96)
    out = merge(seq_moe(**SEPARATE))
    made = pipeline("text-generation", model=str(out), tokenizer=AutoTokenizer.from_pretrained(out))
    (text,) = made("w1 w2 w3", max_new_tokens=4, do_sample=False)
    assert text["generated_text"].startswith("w1 w2 w3")
    several = made(["w1 w2", "w3 w4 w5 w6"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert len(several) == 2
    assert load(out).config.special_token_ids == [0, 1]


@pytest.mark.parametrize("attention", ["merged", "separate"])
def test_vocabularies_that_differ_are_joined(tmp_path, monkeypatch, attention):
    monkeypatch.chdir(tmp_path)
    for name, size, extra in (("base", 96, ("apple",)), ("math", 97, ("banana", "cherry"))):
        make_model(tmp_path / name, 1, vocab_size=size)
        save_tokenizer(tmp_path / name, size, extra)
    out = merge({**seq_moe(("base", "math"), attention=attention), "tokenizer_source": "union"})
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 98  # 95 in both, and three
    ids = tokenizer("w1 apple w2 cherry", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 4, 98)
    own, merged = (
        read_tensors(tmp_path / "math")["model.embed_tokens.weight"],
        read_tensors(out)["embed_tokens.weight"],
    )
    in_math = AutoTokenizer.from_pretrained("math").convert_tokens_to_ids("cherry")
    torch.testing.assert_close(merged[ids[0, 3]], own[in_math])


@pytest.mark.parametrize(
    ("models", "base"),
    [
        (("math", "base"), "base"),
        (("base", "math"), "base"),
        (("math", "code"), "base"),
        (("base", "code"), "math"),
        (("math", "base"), None),
    ],
)
@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", ()), ("llama", ("base",)), ("llama", ("base", "math", "code")), ("phi", ())],
)
def test_vocabularies_are_joined_in_any_order(tmp_path, monkeypatch, models, base, family, tied):
    """The base is padded beyond its tokenizer, and a fine-tune has a token of its own."""
    monkeypatch.chdir(tmp_path)
    rows_of, sources = {}, {}
    for seed, (name, size, extra, padding) in enumerate(
        (("base", 96, (), 16), ("math", 97, ("cherry",), 0), ("code", 96, (), 0))
    ):
        make_model(
            tmp_path / name,
            seed,
            family=family,
            vocab_size=size + padding,
            tie_word_embeddings=name in tied,
        )
        save_tokenizer(tmp_path / name, size, extra)
        rows_of[name] = AutoTokenizer.from_pretrained(name).get_vocab()
        sources[name] = read_tensors(tmp_path / name)
    config = seq_moe(models, f"./{base}" if base else None)
    out = merge({**config, "tokenizer": {"source": "union"}})
    merged, vocabulary = read_tensors(out), AutoTokenizer.from_pretrained(out).get_vocab()
    participants = {*models, base or models[0]}
    assert len(vocabulary) == (97 if "math" in participants else 96)
    assert load(out).config.vocab_size == len(vocabulary)
    assert ("lm_head.weight" in merged) == (not participants <= set(tied))
    assert ("lm_head.bias" in merged) == (family == "phi")
    for name in {"embed_tokens.weight", "lm_head.weight", "lm_head.bias"} & merged.keys():
        assert len(merged[name]) == len(vocabulary)
        for token, row in vocabulary.items():
            own_rows = []
            for model in models:
                tensors = sources[model]
                own = tensors["model.embed_tokens.weight"]
                if name.startswith("lm_head"):
                    own = tensors.get(name, own)
                if token in rows_of[model]:
                    own_rows.append(own[rows_of[model][token]])
            # mergekit has nothing for a token of the base alone, whose embedding is not merged.
            expected = torch.zeros_like(merged[name][row])
            if own_rows:
                expected = torch.stack(own_rows).mean(dim=0)
            torch.testing.assert_close(merged[name][row], expected)


def test_loads_as_asked_for(here):
    out = merge(seq_moe(**SEPARATE))
    ids, model = words(2), load(out)
    eager = load(out, attn_implementation="eager")
    assert {expert.trunk.config._attn_implementation for expert in eager.experts} == {"eager"}
    torch.testing.assert_close(eager(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    trusted = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(trusted(ids).logits, model(ids).logits)
    assert load(out, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_plan_says_what_it_would_be(here):
    (here / "config.yml").write_text(
        yaml.safe_dump(seq_moe(attention="merged", shared="ties", density=0.5))
    )
    result = run("mergekit-moe-ext", "plan", "config.yml")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "stays off" not in result.stderr
    assert "4 experts, 2 of them per sequence" in result.stdout and not (here / "out").exists()


def test_the_command(here):
    (here / "config.yml").write_text(
        yaml.safe_dump(seq_moe(attention="merged", shared="ties", density=0.5))
    )
    result = run("mergekit-yaml", "config.yml", "out")
    assert result.returncode == 0, result.stderr[-2000:]
    assert load(here / "out")(words(2)).coefficients.shape == (2, 4)


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (seq_moe(experts_per_sequence=5), ["experts_per_sequence is 5", "at most 4"]),
        (seq_moe(experts_per_sequence=0), ["`experts_per_sequence`", "greater than or equal to 1"]),
        (seq_moe(routing="perplexty"), ["`routing`", "perplexty", "perplexity"]),
        (
            seq_moe(routing="learned", experts_per_sequence=1),
            ["experts_per_sequence: 1", "no gradient"],
        ),
        (seq_moe(routing="uniform", experts_per_sequence=2), ["all 4 experts"]),
        (
            seq_moe(("math", "code"), routing="task_vector"),
            ["task_vector", "list ./base in `models:`"],
        ),
        (seq_moe(base=None, routing="task_vector"), ["task_vector", "`base_model:`"]),
        (seq_moe(router_aux_loss_coef=0.1), ["router_aux_loss_coef", "routing: learned"]),
        (
            seq_moe(task_vector_layer=[1]),
            ["`task_vector_layer`", "did you mean `task_vector_layers`"],
        ),
        (seq_moe(experts_per_token=2), ["`experts_per_token`"]),
        (seq_moe(gate_mode="random"), ["`gate_mode`"]),
        (seq_moe(attention="seperate"), ["`attention`", "seperate", "separate"]),
        (seq_moe(shared="tise"), ["'tise'", "did you mean `ties`"]),
        (seq_moe(density=0.5), ["`density`"]),
        (seq_moe(routing_tokens=0), ["`routing_tokens`"]),
        (seq_moe(mix="ffn"), ["mix: ffn", "needs attention: merged"]),
        (
            seq_moe(mix="ffn", attention="merged", combine="probabilities"),
            ["mix: ffn", "needs combine: logits"],
        ),
        (seq_moe(routing="task_vector", task_vector_layers=[7]), ["task_vector_layers", "7", "3"]),
        (seq_moe(task_vector_layers=[1]), ["task_vector_layers", "routing: task_vector"]),
        ({**seq_moe(**SEPARATE), "tokenizer_source": "union"}, ["tokenizer"]),
    ],
)
def test_a_mistake_is_named(here, config, fragments):
    refused(here, config, *fragments)


def test_embeddings_are_not_truncated(here):
    (here / "math").unlink()
    make_model(here / "math", 1, vocab_size=80)
    refused(here, seq_moe(), "seq_moe does not truncate", unsafe_truncate_embeddings=True)


@pytest.mark.parametrize(
    ("family", "config", "fragments"),
    [
        ("qwen3", {"head_dim": 8}, ["./odd", "Qwen3ForCausalLM", "LlamaForCausalLM", "hetero_moe"]),
        ("llama", {"hidden_size": 64}, ["./odd", "`hidden_size` is 64, not 32"]),
        ("llama", {"num_hidden_layers": 2}, ["./odd", "`num_hidden_layers` is 2, not 3"]),
        ("llama", {"vocab_size": 80}, ["./odd", "`vocab_size` is 80, not 96"]),
        (
            "t5",
            {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4},
            ["./odd", "encoder-decoder"],
        ),
        ("mamba", {}, ["./odd", "MambaForCausalLM", "key-value cache"]),
        ("rwkv", {"attention_hidden_size": 32}, ["./odd", "key-value cache"]),
    ],
)
def test_a_source_that_does_not_fit(here, family, config, fragments):
    make_model(here / "odd", 1, family=family, **config)
    refused(here, seq_moe(("base", "odd")), *fragments)


@pytest.mark.parametrize(
    ("model_type", "config", "architecture", "fragment"),
    [
        (
            "gemma3n_text",
            {"hidden_size_per_layer_input": 8},
            "Gemma3nForCausalLM",
            "token embeddings inside",
        ),
        ("gemma3", {}, "Gemma3ForConditionalGeneration", "not a language model alone"),
        ("llava", {}, "LlavaForConditionalGeneration", "not a language model alone"),
        ("bert", {}, "BertForMaskedLM", "causal"),
        ("jamba", {}, "JambaForCausalLM", "key-value cache"),
    ],
)
def test_an_architecture_that_cannot_be_an_expert(here, model_type, config, architecture, fragment):
    from transformers import AutoConfig

    shutil.copytree(here / "base", here / "odd")
    AutoConfig.for_model(model_type, architectures=[architecture], **config).save_pretrained(
        here / "odd"
    )
    refused(here, seq_moe(("base", "odd")), "./odd", fragment)
