"""What lies beside the weights: nobody's code unasked, nobody's paths and files, honest cards."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.merging.foreign_code import HEADING, settle_code
from mergekit_moe_ext.mixtures.training import train
from mergekit_moe_ext.recipes import Adaptation, Recipe
from mergekit_moe_ext.wemoe.adaptation import adapt
from mergekit_moe_ext.wemoe.unloading import unload
from tests.conftest import document, make_model, merge
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, READING, make_moe, words, write
from tests.tokenizers import save_tokenizer

RECIPE = Recipe(max_steps=1, held_out=4, learning_rate=0.01)
TRUSTING = Reading(max_length=24, quiet=True, trust_remote_code=True)
TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\n"
    "from .helper import GREETING\n"
    "class Mine(PreTrainedTokenizerFast):\n"
    "    greeting = GREETING\n"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with ./base, ./math and ./code, whose files name code of all kinds."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        make_model(tmp_path / name, seed)
        save_tokenizer(tmp_path / name, 96)
        name_code(tmp_path / name)
    write(tmp_path / "news.jsonl", words(1, 24))
    return tmp_path


def edit(path, **keys):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | keys))


def name_code(model, kind="llama"):
    """Configurations that name Python: of the model, of another repository, at any depth."""
    other = {"AutoConfig": f"configuration_{kind}x.X", "AutoModelForCausalLM": "o/r--modeling_x.X"}
    pipelines = {"greet": {"impl": "greet.Pipeline", "pt": ["AutoModel"]}}
    edit(model / "config.json", auto_map=other, custom_pipelines=pipelines)
    edit(model / "config.json", part={"auto_map": other, "size": 3})
    edit(model / "generation_config.json", auto_map={"AutoModel": "modeling_x.X"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "o/r--tok.Other"]})
    edit(model / "preprocessor_config.json", auto_map={"AutoImageProcessor": "image_x.X"})
    edit(model / "processor_config.json", auto_map={"AutoProcessor": "processing_x.X"})
    edit(model / "processor_config.json", image_processor={"auto_map": {"A": "image_x.X"}, "n": 1})
    for name in ("modeling_x", f"configuration_{kind}x", "image_x", "processing_x", "greet"):
        (model / f"{name}.py").write_text("raise SystemExit('code of somebody else ran')\n")


def references(directory):
    """Every class that a configuration names, and the Python beside it."""
    named = set()
    for path in directory.glob("*.json"):
        for name in re.findall(r'"((?:[\w./-]+--)?\w+\.[A-Z]\w*)"', path.read_text()):
            named.add(name)
    return named, {path.name for path in directory.glob("*.py")}


def snippet(directory):
    card = (directory / "README.md").read_text()
    return re.search(r"## Load it\n\n```python\n(.*?)```", card, re.DOTALL)[1]


def test_a_merge_into_a_stock_architecture_names_no_code(here):
    out = merge(document(models=["math", "code"]))
    assert references(out) == (set(), set())
    assert json.loads((out / "processor_config.json").read_text()) == {"image_processor": {"n": 1}}
    card = (out / "README.md").read_text()
    assert "trust_remote_code" not in card and HEADING not in card


@pytest.mark.parametrize("method", ["seq_moe", "wemoe"])
def test_a_merge_into_an_architecture_of_ours_names_our_code_alone(here, method):
    parameters = {"routing": "perplexity"} if method == "seq_moe" else {}
    out = merge(document(method, ["math", "code"], parameters=parameters))
    named, files = references(out)
    assert all(f"{name.partition('.')[0]}.py" in files for name in named) and len(named) == 2
    assert not {name for name in files if name.endswith("x.py")}
    assert "trust_remote_code=True" in snippet(out)
    assert HEADING not in (out / "README.md").read_text()


def test_no_other_command_passes_on_code_or_private_files(here):
    private = {".env": "secret", "train.csv": "rows", ".out.partial-lock": ""}
    make_moe(here / "moe", "mixtral", **FAMILIES["mixtral"])
    constant = {"router_layers": 0}
    merge(document("wemoe", ["math", "code"]), "ensemble")
    merge(document("wemoe", ["math", "code"], parameters=constant), "constant")
    for name in ("moe", "ensemble", "constant"):
        own = json.loads((here / name / "config.json").read_text()).get("auto_map", {})
        name_code(here / name)
        edit(here / name / "config.json", auto_map={**own, "AutoModelX": "modeling_x.X"})
        for file, content in private.items():
            (here / name / file).write_text(content)
    train("moe", "moe-out", "gates", ["news=news.jsonl"], READING, RECIPE)
    quick = Adaptation(steps=1, per_device_train_batch_size=2, learning_rate=0.01)
    long = [{"text": " ".join(f"w{i}" for i in range(start, start + 40))} for start in range(8)]
    write(here / "long.jsonl", long)
    adapt("ensemble", "ensemble-out", ["long.jsonl"], Reading(quiet=True), quick)
    unload("constant", "constant-out")
    for name in ("moe", "ensemble", "constant"):
        out = here / f"{name}-out"
        named, files = references(out)
        assert not {each for each in named if each.partition(".")[0].endswith("x")}, name
        assert not {each for each in files if each.endswith(("x.py", "greet.py"))}, name
        assert bool(files) == (name == "ensemble")
        assert not [file for file in private if (out / file).exists()]
        assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"]
        tokenizer = "tokenizer.json"
        assert (out / tokenizer).read_bytes() == (here / name / tokenizer).read_bytes()


def with_code_of_its_own(model):
    (model / "tok.py").write_text(TOKENIZER)
    (model / "helper.py").write_text("GREETING = 'hello'\n")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tok.Mine"]})


def plain(tmp_path, name, seed):
    make_model(tmp_path / name, seed)
    save_tokenizer(tmp_path / name, 96)


def test_trusted_code_comes_along_and_the_card_says_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base_x", "math", "code")):
        plain(tmp_path, name, seed)
    with_code_of_its_own(tmp_path / "base_x")
    config = document(models=["math", "code"], base="./base_x")
    merge(config, "distrusted")
    assert references(tmp_path / "distrusted") == (set(), set())
    out = merge(config, "trusted", trust_remote_code=True)
    assert references(out) == ({"tok.Mine"}, {"tok.py", "helper.py"})
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True).greeting == "hello"
    card = (out / "README.md").read_text()
    assert "- helper.py, tok.py, of base\\_x\n" in card and "trust_remote_code" not in card

    write(tmp_path / "news.jsonl", words(1, 12))
    data = ["news=news.jsonl"]
    train("trusted", "trained", "gates", data, TRUSTING, RECIPE)
    assert references(tmp_path / "trained") == ({"tok.Mine"}, {"tok.py", "helper.py"})
    again = AutoTokenizer.from_pretrained("trained", trust_remote_code=True)
    assert type(again).__name__ == "Mine"
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "- helper.py, tok.py, of trusted\n" in card and card.count(HEADING) == 1
    train("trusted", "plain", "gates", data, READING, RECIPE)
    assert references(tmp_path / "plain") == (set(), set())
    assert HEADING not in (tmp_path / "plain" / "README.md").read_text()


def test_code_of_another_repository_is_named_where_it_is_trusted(tmp_path, caplog):
    out, source = tmp_path / "out", tmp_path / "source"
    for directory in (out, source):
        directory.mkdir()
    references = {"AutoConfig": "o/r--there.X", "AutoModel": "missing.X", "A": "../../evil.X"}
    edit(out / "config.json", auto_map={**references, "B": "o/r--modeling_ours.Ours"})
    (out / "README.md").write_text("# Card\n")
    settle_code(out, ["modeling_ours.py"], source, "/home/me/source", is_trusted=True)
    kept = json.loads((out / "config.json").read_text())["auto_map"]
    assert kept == {"AutoConfig": "o/r--there.X", "B": "modeling_ours.Ours"}
    assert "- there.py, of o/r\n" in (out / "README.md").read_text()
    assert "that /home/me/source names is left out of the output: ../../evil.X, missing.X" in (
        caplog.text
    )


@pytest.mark.parametrize("content", ['{"a": ', "[" * 3, "\x00"])
def test_settings_that_are_no_json_are_refused_before_any_work(here, content):
    (here / "base" / "processor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read processor_config.json of \./base"):
        merge(document(models=["math", "code"]))
    assert not (here / "out").exists()


def test_a_tokenizer_behind_a_link_is_read_and_saved(here, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "base" / name).rename(away / name)
        (here / "base" / name).symlink_to(away / name)
    edit(away / "tokenizer_config.json", auto_map={})
    out = merge(document(models=["math", "code"]))
    expected = AutoTokenizer.from_pretrained("math")("w1 w2 w3")["input_ids"]
    assert AutoTokenizer.from_pretrained(out)("w1 w2 w3")["input_ids"] == expected
    assert not any(path.is_symlink() for path in out.iterdir())


NAME = 'a`b"|*x* <i>'


def test_a_card_has_names_escaped_and_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "some where"
    for seed, name in enumerate(("base", NAME, "code")):
        make_model(folder / name, seed)
        save_tokenizer(folder / name, 96)
    models = [{"model": str(folder / NAME)}, {"model": "some where/code"}]
    config = document("seq_moe", models, base=str(folder / "base"))
    config["parameters"] = {"routing": "perplexity"}
    out = merge(config, f"out {NAME}")
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "some where" not in card
    kept = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert kept["base_model"] == str(folder / "base")
    assert f"0. {ESCAPED}\n" in card and f"# out {ESCAPED}\n" in card
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == [] and data["tags"] == ["mergekit", "merge", "moe"]
    scope = {}
    exec(snippet(out), scope)  # it is ours, and has a name in it that would break out of it
    assert type(scope["model"]).__name__ == "SequenceMoEForCausalLM"


ESCAPED = 'a\\`b"\\|\\*x\\* \\<i\\>'


def test_a_trained_card_names_no_local_model(here):
    make_moe(here / "moe", "mixtral", **FAMILIES["mixtral"])
    (here / "moe" / "README.md").write_text("---\nbase_model: /home/me/moe\n---\n# Card\n")
    source = f"a.b={here / 'news.jsonl'}"
    train(str(here / "moe"), "out", "gates", [source], READING, RECIPE)
    card = (here / "out" / "README.md").read_text()
    assert str(here) not in card and "/home/me" not in card
    assert "a.b=news.jsonl" in card
    assert (here / "out" / "tokenizer.json").exists()
