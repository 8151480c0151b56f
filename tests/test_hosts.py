"""One merge per method and one step of every training, on whatever hosts are installed.

Every training and some of the merges are the installed commands; the others run in this process,
which is faster.
"""

import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import document, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, make_moe, words, write
from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

pytestmark = pytest.mark.hosts

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(0))
COPIES = ("base", "first", "second")
TIES = {"density": 0.5, "normalize": False, "lambda": 1.0}
# All of them make the base again of copies of the base: experts are equal, and task vectors are
# zero.
METHODS = {
    "moe": {"shared": "linear", "experts_per_token": 2},
    "moe_linear": {"experts_per_token": 2},
    "moe_ties": TIES,
    "moe_dare": {"density": 0.5},
    "seq_moe": {"embedding": "separate", "routing": "perplexity", "experts_per_sequence": 1},
    "hetero_moe": {"embedding": "separate", "routing": "perplexity", "experts_per_sequence": 1},
    "wemoe": {"lambda": 0.3},
    "ewemoe": {"lambda": 0.3, "sparsity": 0.5},
    "fast_ties": {**TIES, "weight": 1.0},
    "dare": {"density": 0.5, "weight": 1.0},
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A directory with a tiny Llama under three names, a fine-tune of it, and texts."""
    root = tmp_path_factory.mktemp("copies")
    make_model(root / "base", 0)
    save_tokenizer(root / "base", 96)
    for name in COPIES[1:]:
        shutil.copytree(root / "base", root / name)
    make_model(root / "other", 1)
    save_tokenizer(root / "other", 96)
    for seed, name in enumerate(("news", "law"), start=1):
        ids = torch.randint(90, (12, 40), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = []
        for row in ids:
            texts.append({"text": " ".join(f"w{word}" for word in row)})
        write(root / f"{name}.jsonl", texts)
    return root


def succeed(*command, cwd):
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "stays off" not in done.stderr, done.stderr
    return done


def load(path):
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits_of(path):
    with torch.no_grad():
        return load(path)(IDS).logits


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_a_model_merge_into_the_model(copies, tmp_path, monkeypatch, method):
    monkeypatch.chdir(copies)
    models = COPIES if method == "hetero_moe" else COPIES[1:]  # whose base is one of them
    merge(
        document(method, models, parameters=METHODS[method], dtype="float32"), str(tmp_path / "out")
    )
    torch.testing.assert_close(
        logits_of(tmp_path / "out"), logits_of(copies / "base"), atol=1e-5, rtol=1e-5
    )
    again = tmp_path / "again"
    load(tmp_path / "out").save_pretrained(again)
    assert torch.equal(logits_of(again), logits_of(tmp_path / "out"))


def test_mixtures_become_one_whose_experts_are_theirs(tmp_path):
    for seed in (1, 2):
        make_moe(tmp_path / f"moe-{seed}", "mixtral", seed, **FAMILIES["mixtral"])
        write(tmp_path / f"{seed}.jsonl", words(seed, 8))
    models = [
        {"model": f"./moe-{seed}", "parameters": {"calibration": f"{seed}.jsonl"}}
        for seed in (1, 2)
    ]
    config = document("caem", models, None, parameters={"num_experts": 4}, dtype="float32")
    (tmp_path / "caem.yml").write_text(yaml.safe_dump(config))
    succeed("mergekit-yaml", "caem.yml", "out", cwd=tmp_path)
    assert logits_of(tmp_path / "out").isfinite().all()
    sources = [read_tensors(tmp_path / f"moe-{seed}") for seed in (1, 2)]
    experts = set()
    for source in sources:
        for name, tensor in source.items():
            if ".experts." in name:
                experts.add(tuple(tensor.flatten()[:9].tolist()))
    merged = [t for name, t in read_tensors(tmp_path / "out").items() if ".experts." in name]
    assert merged and all(tuple(t.flatten()[:9].tolist()) in experts for t in merged)


def changed(before, after):
    old, new = read_tensors(before), read_tensors(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_a_step_of_training_gates(copies, tmp_path):
    config = document(
        "moe_linear", ["base", "other"], parameters={"gate_mode": "random"}, dtype="float32"
    )
    (copies / "gates.yml").write_text(yaml.safe_dump(config))
    succeed("mergekit-yaml", "gates.yml", tmp_path / "moe", cwd=copies)
    options = ["--max-steps", "1", "--held-out", "2", "--max-length", "24", "--quiet"]
    data = ["--data", copies / "news.jsonl", "--data", copies / "law.jsonl"]
    succeed("mergekit-moe-ext", "train", "moe", "--train", "gates", *data, *options, cwd=tmp_path)
    names = changed(tmp_path / "moe", tmp_path / "moe-trained")
    assert names and all(".gate." in name for name in names)
    assert logits_of(tmp_path / "moe-trained").isfinite().all()


def test_a_step_of_adapting_routers(copies, tmp_path):
    config = document("wemoe", ["other", "first"], parameters={"lambda": 0.3}, dtype="float32")
    (copies / "adapt.yml").write_text(yaml.safe_dump(config))
    succeed("mergekit-yaml", "adapt.yml", tmp_path / "wemoe", cwd=copies)
    options = ["--steps", "1", "--held-out", "2", "--max-length", "40", "--quiet"]
    data = ["--data", f"other={copies}/news.jsonl", "--data", f"first={copies}/law.jsonl"]
    succeed("mergekit-moe-ext", "adapt", "wemoe", *data, *options, cwd=tmp_path)
    names = changed(tmp_path / "wemoe", tmp_path / "wemoe-adapted")
    assert names and all(name.startswith("routers.") for name in names)
    assert logits_of(tmp_path / "wemoe-adapted").isfinite().all()


def test_a_step_of_training_an_adapters_router(copies, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 96)
    paths = save_experts(tmp_path / "loras")
    experts = []
    for name, path in paths.items():
        experts += ["--expert", f"{name}={path}"]
    succeed(
        "peft-route",
        "compose",
        "base",
        *experts,
        "--router",
        "linear",
        "-o",
        "routed",
        cwd=tmp_path,
    )
    options = [
        "--max-steps",
        "1",
        "--held-out",
        "2",
        "--max-length",
        "24",
        "--learning-rate",
        "0.01",
        "--quiet",
    ]
    data = ["--data", copies / "news.jsonl", "--data", copies / "law.jsonl"]
    succeed("peft-route", "train", "routed", *data, *options, cwd=tmp_path)
    names = changed(tmp_path / "routed", tmp_path / "routed-trained")
    assert names and all("routed_lora_router" in name for name in names)
    with torch.no_grad():
        before = PeftModel.from_pretrained(make_base(), tmp_path / "routed")(IDS).logits
        after = PeftModel.from_pretrained(make_base(), tmp_path / "routed-trained")(IDS).logits
    assert after.isfinite().all() and not torch.equal(before, after)
