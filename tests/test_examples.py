"""What the README, the docs and `examples/` show runs as it stands there."""

import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mergekit_moe_ext import Reading
from mergekit_moe_ext.analysis import THRESHOLDS, parameter_variation, task_vector_similarity
from mergekit_moe_ext.cli import main
from peft_routing.cli import main as route
from tests.conftest import NAMES, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.mixtures.test_usage import make_moe, words, write
from tests.mergekit_moe_ext.wemoe.test_clip_heads import CLASSES, make_clips
from tests.peft_routing.adapters import make_base, save_lora
from tests.test_autoload import ROOT
from tests.tokenizers import save_tokenizer

SCRIPTS = (
    "demo",
    "wemoe_parameters",
    "wemoe_routing",
    "loss_landscape",
    "mergeme_homogeneous",
    "mergeme_small",
    "mergeme_hetero",
    "mergeme_tokenizers",
    "grown_mixture",
    "upcycled_gates",
    "caem_tasks",
    "tradeoffs_routers",
    "tradeoffs_report",
    "task_vector_similarity",
    "task_vector_variation",
    "wemoe_texts",
    "clip_heads",
)


def configurations():
    """The merges in YAML that the examples and the README show. `test_documentation.py` runs those
    of the docs.
    """
    texts = [path.read_text() for path in (ROOT / "examples").glob("*.yml")]
    texts += re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [text for text in texts if "merge_method:" in text]  # and not a file of tasks


@pytest.fixture
def everything(here, sources, monkeypatch):
    """All that a configuration names: dense models with tokenizers, mixtures of experts, texts, and
    parts of CLIP."""
    for name in ("base", "math", "code"):
        (here / name).unlink()
        shutil.copytree(sources / name, here / name)
        save_tokenizer(here / name, 96)
    for seed, task in enumerate(("news", "squad", "xsum")):
        make_moe(here / f"moe-{task}", "mixtral", seed=seed, num_local_experts=8)
        write(here / f"{task}.jsonl", words(seed, 20))
    for seed, task in enumerate(("math", "code", "law")):
        write(here / f"{task}.jsonl", words(seed, 40))
    make_clips(here / "clip")
    (here / "clip" / "heads").rename(here / "heads")
    return here


def test_every_configuration_runs(everything):
    assert len(configurations()) >= 2
    for number, text in enumerate(configurations()):
        (everything / "config.yml").write_text(text)
        result = CliRunner().invoke(main, ["yaml", "config.yml", f"out-{number}"])
        assert result.exit_code == 0, (text, result.output)


def test_the_readme_s_commands_run(everything):
    """Those that train and count, on the mixture that its first configuration makes."""
    readme = (ROOT / "README.md").read_text()
    (everything / "config.yml").write_text(
        re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)[0]
    )
    assert CliRunner().invoke(main, ["yaml", "config.yml", "out"]).exit_code == 0
    commands = re.findall(r"^mergekit-moe-ext ((?:train|usage) .*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(main, [*command.split(), "--quiet"])
        assert result.exit_code == 0, (command, result.output)
    assert (everything / "out-trained" / "model.safetensors").exists() and (
        everything / "usage.png"
    ).exists()


def test_the_first_mixture_is_made_trained_and_generates(everything, capsys):
    """The short example; the walk on the site does the same in the shell."""
    exec((ROOT / "examples" / "first_mixture.py").read_text(), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
    assert (everything / "mixture-trained" / "model.safetensors").exists()


def test_the_first_routed_adapter_is_made_and_generates(here, capsys):
    """Likewise, for adapters."""
    make_base().save_pretrained(here / "a-base")
    save_tokenizer(here / "a-base", 96)
    (here / "base").unlink()
    (here / "a-base").rename(here / "base")
    for seed, task in enumerate(("math", "code")):
        save_lora(here / f"{task}-lora", seed)
        write(here / f"{task}.jsonl", words(seed, 40))
    exec((ROOT / "examples" / "first_routed_adapter.py").read_text(), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
    assert (here / "routed" / "adapter_model.safetensors").exists()


def test_the_first_models_overwrite_nothing(tmp_path, monkeypatch, examples):
    import first_models

    monkeypatch.chdir(tmp_path)
    (tmp_path / "math").mkdir()
    refused = CliRunner().invoke(first_models.main)
    assert refused.exit_code == 1 and "math exists and is not overwritten" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["math"]


def test_the_readme_s_routed_adapters_run(here):
    make_base().save_pretrained(here / "a-base")
    save_tokenizer(here / "a-base", 96)
    (here / "base").unlink()
    (here / "a-base").rename(here / "base")
    for seed, task in enumerate(("math", "code")):
        save_lora(here / f"{task}-lora", seed)
        write(here / f"{task}.jsonl", words(seed, 40))
    readme = (ROOT / "README.md").read_text()
    blocks = [
        text
        for text in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
        if "peft_routing" in text
    ]
    assert len(blocks) == 2
    whole: dict = {}
    exec(blocks[0].rpartition("\n\nbase =")[0], whole)
    composed = whole["model"].eval()
    exec(blocks[0], whole)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(whole["model"](input_ids=ids).logits, composed(input_ids=ids).logits)
    own: dict = {}
    exec(blocks[1], own)
    model = get_peft_model(make_base(), own["config"]).eval()
    model.save_pretrained("routed")
    loaded = PeftModel.from_pretrained(make_base(), "routed").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    commands = re.findall(r"^peft-route (.*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        quiet = [] if command.startswith("compose") else ["--quiet"]
        more = ["--held-out", "4", "--num-train-epochs", "1"] if command.startswith("train") else []
        result = CliRunner().invoke(route, [*command.split(), *quiet, *more])
        assert result.exit_code == 0, (command, result.output)
    assert (here / "learned-trained" / "adapter_model.safetensors").exists() and (
        here / "who.png"
    ).exists()


START = """
import runpy, sys
paths, sys.argv[1:] = sys.argv[1:], ["--help"]
for sys.argv[0] in paths:
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        print("exit", exit.code)
"""


def test_scripts_start():
    """All in one process, since importing takes most of the time."""
    done = run(
        "python", "-c", START, *(str(ROOT / "examples" / f"{script}.py") for script in SCRIPTS)
    )
    helps = done.stdout.split("exit 0\n")
    assert done.returncode == 0 and len(helps) == len(SCRIPTS) + 1, done.stderr
    assert all("--output" in text for text in helps[:-1])


def test_a_head_of_clip_is_that_of_the_function(everything, examples):
    import clip_heads

    (everything / "cars.txt").write_text("\n".join(CLASSES["cars"]))
    arguments = ["--model", "clip/whole", "--classes", "cars.txt", "-o", "cars.safetensors"]
    result = CliRunner().invoke(clip_heads.main, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert (everything / "cars.safetensors").read_bytes() == (
        everything / "heads" / "cars.safetensors"
    ).read_bytes()


@pytest.fixture
def mergeme(examples):
    import mergeme_homogeneous

    return mergeme_homogeneous


def test_the_orderings_of_the_paper_are_judged_by_the_means(mergeme):
    torch.manual_seed(0)
    dense = {"base": dict.fromkeys(mergeme.DOMAINS, 3.0)}
    for name in mergeme.DOMAINS:
        dense[f"{name} expert"] = {
            other: 2.0 if other == name else 3.5 for other in mergeme.DOMAINS
        }
    levels = {
        "Random routing": 3.0,
        "Router fine-tuning": 2.9,
        "BTX merging": 2.5,
        "Ties merging": 2.6,
        "Dare merging": 2.4,
        "MoE upcycling": 2.45,
    }
    rows = {name: [dict.fromkeys(mergeme.DOMAINS, level)] * 3 for name, level in levels.items()}
    rows["Dare merging"] = [*rows["Dare merging"][:2], dict.fromkeys(mergeme.DOMAINS, 2.55)]
    lines = mergeme.orderings(dense, rows)
    assert sum(" expert is " in line for line in lines[:6]) == 6
    verdicts = dict(line.split(" on average: ") for line in lines[6:])
    assert verdicts["Ties merging is better than BTX merging"].startswith("does not hold (-0.100")
    assert verdicts["BTX merging is better than Random routing"].startswith("holds (+0.500")
    assert verdicts["Dare merging is better than BTX merging"].startswith("unclear (+0.050")


def test_the_figures_of_the_experiment_are_drawn(mergeme, tmp_path):
    def made_up():
        losses = {name: torch.rand(4).tolist() for name in mergeme.DOMAINS}
        return mergeme.Run(
            [0, 4, 8, 12],
            losses,
            {name: torch.rand(4).softmax(0).tolist() for name in mergeme.DOMAINS},
        )

    runs = {row: [made_up(), made_up()] for row in ("Router fine-tuning", *mergeme.SHARED)}
    mergeme.draw_curves(runs, tmp_path / "10.png")
    mergeme.draw_routing(runs, tmp_path / "5.png")
    assert all(
        Path(tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("10.png", "5.png")
    )
    assert mergeme.means([[1.0, 2.0], [3.0, 6.0]]) == [statistics.mean([1, 3]), 4.0]


def test_the_experiment_s_configurations_are_the_paper_s(mergeme):
    """Appendix A: 80 percent kept, lambda a third."""
    for row in ("Ties merging", "Dare merging"):
        parameters = mergeme.SHARED[row]["parameters"]
        assert parameters["density"] == 0.8 and parameters["lambda"] == pytest.approx(1 / 3)


@pytest.fixture
def sequence(mergeme, monkeypatch):
    """The experiment with whole experts, on small blocks, its merges in this process."""
    import demo
    import mergeme_sequence

    def merge_here(method, models, base, output, seed=0):
        listed = [{"model": str(model)} for model in models]
        config = {**method, "base_model": str(base), "models": listed, "dtype": "float32"}
        merge(config, str(output), random_seed=seed)

    monkeypatch.setattr(demo, "BLOCK", 40)
    monkeypatch.setattr(mergeme_sequence, "READING", Reading(max_length=40, quiet=True))
    monkeypatch.setattr(mergeme_sequence, "run_mergekit", merge_here)
    return mergeme_sequence


@pytest.fixture
def tiny_experts(here):
    """A base and three fine-tunes with a tokenizer, by the experiment's names."""
    models = {}
    for name, domain in zip(NAMES, ("base", "bible", "music", "code"), strict=True):
        models[domain] = shutil.copytree(here / name, here / f"a-{domain}")
        save_tokenizer(models[domain], 96)
    return models


def sequences_of(domains):
    torch.manual_seed(0)
    return {name: torch.randint(2, 96, (1, 40)) for name in domains}


def test_the_experiment_without_training_runs(sequence, tiny_experts, tmp_path, monkeypatch):
    monkeypatch.setattr(sequence, "ROUNDS", 1)
    monkeypatch.setattr(sequence, "FURTHER", 2)
    held_out = sequences_of(sequence.DOMAINS)
    every_merge = [*sequence.PLAIN, *sequence.SEQUENCE]
    results = sequence.Results()
    sequence.without_training(
        results, tiny_experts, held_out, held_out, range(2), every_merge, timed=True
    )
    losses = {row: of_seeds[0] for row, of_seeds in results.losses.items()}
    for name, path in tiny_experts.items():
        model = AutoModelForCausalLM.from_pretrained(path)
        for domain, ids in held_out.items():
            with torch.no_grad():
                scores = model(ids).logits[0].log_softmax(-1)
            by_hand = -statistics.mean(scores[t - 1, ids[0, t]].item() for t in range(32, 40))
            assert losses[name if name == "base" else f"{name} expert"][domain] == pytest.approx(
                by_hand, abs=1e-5
            )
    assert losses["Oracle: own expert"]["music"] == losses["music expert"]["music"]
    assert len(results.losses["Random routing"]) == len(results.losses["Dare dense"]) == 2
    for domain in sequence.DOMAINS:  # an expert alone is its source
        dense = [
            losses[row][domain] for row in ("base", "bible expert", "music expert", "code expert")
        ]
        chosen = results.routing["all separate, perplexity, K=1"][0][domain]
        assert sorted(chosen) == [0, 0, 0, 1]
        assert losses["all separate, perplexity, K=1"][domain] == pytest.approx(
            dense[chosen.index(1)], abs=1e-5
        )
    for (routing,) in results.routing.values():
        assert all(sum(of_domain) == pytest.approx(1) for of_domain in routing.values())
    text = results.text(list(tiny_experts))
    assert "separate attention, task vector, K=2" in text
    assert [f"{kind}, K={k}" for kind in sequence.SEQUENCE for k in (1, 2, 3)] == [*results.times]
    assert "Milliseconds of a token" in text
    sequence.draw(results.mean_routing(), list(tiny_experts), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_k_of_the_largest_coefficients(sequence):
    scores = torch.tensor([[0.1, 0.7, 0.3, 0.2]])
    assert torch.allclose(
        sequence.largest(scores.softmax(-1), 2)[0, 1:3], torch.tensor([0.7, 0.3]).softmax(-1)
    )
    assert sequence.largest(scores.softmax(-1), 1).tolist() == [[0, 1, 0, 0]]


def test_the_heterogeneous_experiment_runs(sequence, tiny_experts, here):
    from real_data import Domain

    make_model(
        here / "gpt",
        5,
        family="gpt2",
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        vocab_size=60,
    )
    save_tokenizer(here / "gpt", 60)  # knows two thirds of the words
    models = {**tiny_experts, "music": here / "gpt"}
    documents = [row["text"] for row in words(1, 100)]
    texts = {name: Domain(documents, documents) for name in sequence.DOMAINS}
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    held_out = sequences_of(sequence.DOMAINS)
    results = sequence.heterogeneous(models, tokenizer, texts, held_out, held_out, seeds=1, steps=2)
    for row in (*sequence.HETERO, *sequence.CONTROLS):
        assert results.losses[f"{row}, before"] != results.losses[f"{row}, after"]
    assert "music expert" not in results.losses and "music expert (GPT-2)" in results.losses
    assert set(results.routing) >= {f"{row}, after" for row in sequence.HETERO}
    results.text(list(models))


def test_a_cut_tokenizer_splits_as_before(sequence, tmp_path):
    documents = [
        "X:1\nK: G\nGABc d2 ef|",
        "in the beginning was the word",
        "for line in lines:\n    print(line)",
    ]
    whole = ByteLevelBPETokenizer()
    whole.train_from_iterator(
        documents * 4, vocab_size=330, min_frequency=1, special_tokens=["<end>"]
    )
    PreTrainedTokenizerFast(tokenizer_object=whole._tokenizer, eos_token="<end>").save_pretrained(
        tmp_path
    )
    cut = sequence.cut_tokenizer(tmp_path, documents[:1])
    assert len(cut) < whole.get_vocab_size() and cut.eos_token == "<end>"
    for text in (documents[0], "ABc d2"):
        assert cut.tokenize(text) == whole.encode(text).tokens
    assert cut.decode(cut(documents[1])["input_ids"]) == documents[1]  # in smaller pieces


def test_small_models_are_others_for_every_seed(sequence, tiny_experts, here, monkeypatch):
    from real_data import Domain

    documents = [row["text"] for row in words(1, 200)]
    texts = dict.fromkeys(sequence.DOMAINS, Domain(documents, documents))
    seeds = []

    def make_models(_texts, scale, seed):
        assert scale is sequence.SCALES["quick"]
        seeds.append(seed)
        swapped = {"base": tiny_experts["base"], "bible": tiny_experts["music"]}
        return dict(tiny_experts) if seed == 0 else {**tiny_experts, **swapped}

    monkeypatch.setattr(sequence, "domains", lambda: texts)
    monkeypatch.setattr(sequence, "make_models", make_models)
    command = ["--base", "quick", "--seeds", "2", "--held-out", "1", "-o", "out.json", "--only"]
    result = CliRunner().invoke(sequence.main, [*command, "Random routing"])
    assert result.exit_code == 0, result.output
    losses = json.loads((here / "out.json").read_text())["losses"]
    assert seeds == [0, 1] and all(len(of_seeds) == 2 for of_seeds in losses.values())
    bible, other = losses["bible expert"]
    assert other == losses["music expert"][0] and other != bible
    assert [each["bible"] for each in losses["Oracle: own expert"]] == [
        bible["bible"],
        other["bible"],
    ]


@pytest.fixture
def hetero(sequence, tiny_experts, here, monkeypatch):
    """The experiment with experts of two makers, with tiny models on made-up texts."""
    import mergeme_hetero
    from real_data import Domain

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 60}
    make_model(here / "gpt", 5, family="gpt2", **sizes)
    save_tokenizer(here / "gpt", 60)  # knows two thirds of the words
    documents = [row["text"] for row in words(1, 400)]
    held_out = [row["text"] for row in words(2, 50)]
    texts = dict.fromkeys(mergeme_hetero.DOMAINS, Domain(documents, held_out))
    base_and_experts = {name: tiny_experts[name] for name in ("base", "bible", "code")}
    monkeypatch.setattr(mergeme_hetero, "READING", Reading(max_length=40, quiet=True))
    monkeypatch.setattr(mergeme_hetero, "BLOCK", 40)
    monkeypatch.setattr(mergeme_hetero, "LEARNING_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(mergeme_hetero, "domains", lambda: texts)
    monkeypatch.setattr(mergeme_hetero, "make_models", lambda *_: dict(base_and_experts))
    monkeypatch.setattr(mergeme_hetero, "make_music_expert", lambda *_: here / "gpt")
    return mergeme_hetero


def test_the_experiment_with_another_tokenizer_runs_and_goes_on(hetero, tiny_experts, monkeypatch):
    command = ["-o", "hetero.jsonl", "--scale", "quick", "--seeds", "1"]
    rates_seen = []
    recipe_of = hetero.Recipe
    monkeypatch.setattr(hetero, "Recipe", lambda **of: rates_seen.append(of) or recipe_of(**of))
    result = CliRunner().invoke(hetero.main, command)
    assert result.exit_code == 0, result.output
    first = Path("hetero.jsonl").read_text()
    lines = [json.loads(line) for line in first.splitlines()[1:]]
    losses = {line["row"]: line["losses"] for line in lines if "row" in line}
    for row in (*hetero.HETERO, *hetero.CONTROLS):
        assert losses[f"{row}, before"] != losses[f"{row}, after"]
    # Every rate is tried, and the best on validation is that of the row.
    rows = [*hetero.HETERO, *hetero.CONTROLS]
    tried = [line for line in lines if "rates" in line]
    assert [line["of"] for line in tried] == [row for row in rows for _ in hetero.rates_of(row)]
    for row, last in zip(rows, rates_seen[-len(rows) :], strict=True):
        of_row = {line["rates"]: line["validation"] for line in tried if line["of"] == row}
        assert len(set(of_row.values())) == len(of_row)
        best = hetero.Rates(last["learning_rate"], last["projector_learning_rate"])
        assert min(of_row, key=of_row.get) == str(best)
        assert (best.projector is None) == ("projectors" not in row)
    # One seed decides nothing.
    assert "own embeddings beats 3 experts, no music on music: unclear (" in result.output
    assert "1 seeds)" in result.output and ": holds" not in result.output

    # By hand: nats of the tokens after the prefix, for each of their characters.
    tokenizer = AutoTokenizer.from_pretrained(tiny_experts["base"])
    ids = hetero.blocks(tokenizer, hetero.domains()["code"].held_out, 1)
    scores = AutoModelForCausalLM.from_pretrained(tiny_experts["code"])(ids).logits.log_softmax(-1)
    nats = -scores[:, 31:-1].gather(-1, ids[:, 32:, None]).sum().item()
    characters = len("".join(tokenizer.batch_decode(ids[:, 32:])))
    assert losses["code expert"]["code"] == pytest.approx(nats / characters, abs=1e-5)
    # The music expert reads the same words through its own tokenizer.
    assert losses["music expert"].keys() == {"music"}

    # A run that was killed in the middle of a line goes on, and measures what was lost alone.
    Path("hetero.jsonl").write_text(first[:-10])
    monkeypatch.setattr(hetero, "losses_of", lambda *_: dict.fromkeys(hetero.DOMAINS, 1.0))
    result = CliRunner().invoke(hetero.main, command)
    assert result.exit_code == 0, result.output
    *others, last = Path("hetero.jsonl").read_text().splitlines()
    assert others == first.splitlines()[:-1] and json.loads(last)["losses"]["music"] == 1.0
    monkeypatch.setattr(hetero, "ROUTER_LEARNING_RATE", 3e-3)
    result = CliRunner().invoke(hetero.main, command)
    assert result.exit_code == 1 and "name another file" in result.output


@pytest.fixture
def made_up_texts(mergeme):
    from real_data import Domain

    documents = [row["text"] for row in words(1, 400)]
    held_out = [row["text"] for row in words(2, 20)]
    return {name: Domain(documents, held_out) for name in mergeme.DOMAINS}


@pytest.fixture
def nine_steps(mergeme, sequence, tiny_experts, made_up_texts, monkeypatch):
    """The experiment with few steps, with tiny models on made-up texts, its merges in this
    process.
    """
    monkeypatch.setattr(mergeme, "run_mergekit", sequence.run_mergekit)
    monkeypatch.setattr(mergeme, "READING", Reading(max_length=40, quiet=True))
    monkeypatch.setattr(mergeme, "smollm2", lambda: tiny_experts["base"])
    monkeypatch.setattr(mergeme, "domains", lambda: made_up_texts)
    monkeypatch.setattr(mergeme, "make_experts", lambda *_: dict(tiny_experts))
    return mergeme


def test_the_experiment_with_few_steps_goes_on_after_an_interruption(nine_steps, monkeypatch):
    command = ["--output", "out", "--steps", "2", "--seeds", "2"]
    run = nine_steps.run
    begun = []

    def run_until_interrupted(*arguments):
        begun.append(arguments)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(nine_steps, "run", run_until_interrupted)
    result = CliRunner().invoke(nine_steps.main, command)
    assert result.exit_code == 1
    partly = json.loads(Path("out/results.json").read_text())
    assert [len(of_seeds) for of_seeds in partly["runs"].values()] == [1, 1, 1, 0, 0]

    begun.clear()
    monkeypatch.setattr(nine_steps, "run", lambda *arguments: begun.append(0) or run(*arguments))
    result = CliRunner().invoke(nine_steps.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    whole = json.loads(Path("out/results.json").read_text())
    assert len(begun) == 7
    for row, (_, trained) in nine_steps.ROWS.items():
        assert whole["runs"][row][: len(partly["runs"][row])] == partly["runs"][row]
        first, second = whole["runs"][row]
        assert first["steps"] == second["steps"] == [0, 1, 2]
        if trained == "all":
            assert all(values[0] != values[-1] for values in first["losses"].values())
    assert "Random routing" in result.output and Path("out/figure10.png").is_file()

    result = CliRunner().invoke(nine_steps.main, ["--output", "out", "--steps", "3"])
    assert result.exit_code == 1 and "name another directory" in result.output


@pytest.fixture
def small(nine_steps, tiny_experts, made_up_texts, monkeypatch):
    """The experiment with more steps, likewise."""
    import mergeme_small

    monkeypatch.setattr(mergeme_small, "BLOCK", 40)
    monkeypatch.setattr(mergeme_small, "RATES", dict.fromkeys(mergeme_small.ROWS, (1e-3, 1e-2)))
    monkeypatch.setattr(mergeme_small, "domains", lambda: made_up_texts)
    monkeypatch.setattr(mergeme_small, "make_small_base", lambda *_: tiny_experts["base"])
    monkeypatch.setattr(mergeme_small, "make_experts", lambda *_: dict(tiny_experts))
    return mergeme_small


def test_the_experiment_with_more_steps_runs_and_goes_on(small, tiny_experts, monkeypatch):
    command = ["--output", "out", "--scale", "quick"]
    result = CliRunner().invoke(small.main, [*command, "--seeds", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads(Path("out/results.json").read_text())
    assert content["runs"].keys() == set(small.ROWS)
    for row, (_, trained) in small.ROWS.items():
        (of_seed,) = content["runs"][row]
        steps = 8 if row == "MoE upcycling" else 2  # 3 domains, 2 steps of an expert, and 2 more
        assert of_seed["steps"] == [0, steps]
        of_rates = content["validation"][row]
        assert [float(rate) for rate in of_rates] == [1e-3, 1e-2]
        if trained == "all":
            assert of_rates["0.01"] != of_rates["0.001"]
            assert all(after != before for before, after in of_seed["losses"].values())
            assert f"{row:18}  0.001: {of_rates['0.001']:.3f}" in result.output

    # What has been measured is kept, and the rest is measured.
    del content["runs"]["Dare merging"][0]
    Path("out/results.json").write_text(json.dumps(content))
    measured = []

    def run(merged, part, data, measured_on, recipe):
        measured.append((part, recipe))
        routing = {name: [1.0, 0.0, 0.0, 0.0] for name in small.DOMAINS}
        return small.Run([0, 2], {name: [2.0, 1.0] for name in small.DOMAINS}, routing)

    monkeypatch.setattr(small, "run", run)
    result = CliRunner().invoke(small.main, [*command, "--seeds", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ((part, recipe),) = measured
    of_rates = content["validation"]["Dare merging"]
    assert recipe.learning_rate == float(min(of_rates, key=of_rates.get))
    assert part == "all" and recipe.max_steps == 2
    again = json.loads(Path("out/results.json").read_text())
    assert again["runs"].pop("Dare merging")[0]["losses"]["code"] == [2.0, 1.0]
    del content["runs"]["Dare merging"]
    assert again["runs"] == content["runs"] and again["dense"] == content["dense"]
    result = CliRunner().invoke(small.main, ["--output", "out"])
    assert result.exit_code == 1 and "name another directory" in result.output


def test_no_text_is_in_two_shares(small, tiny_experts, tmp_path):
    documents = small.domains()["music"].train
    parts = small.divided(small.domains())
    assert list(parts) == list(small.SHARES)
    of_music = [parts[share]["music"].train for share in parts]
    assert [document for part in of_music for document in part] == documents
    characters = sum(map(len, documents))
    for share, part in zip(small.SHARES.values(), of_music, strict=True):
        assert sum(map(len, part)) / characters == pytest.approx(share, abs=0.01)

    # Sparse upcycling reads what the experts and a mixture have read.
    scale = small.SCALES["quick"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_experts["base"])
    data = small.write_data(tmp_path, tokenizer, small.domains(), scale)
    rows = {part: Path(files[0].partition("=")[2]).read_text() for part, files in data.items()}
    assert rows["upcycling"].endswith(rows["mixture"])
    of_experts = small.blocks(tokenizer, parts["experts"]["bible"].train, 4)
    first = [json.loads(row)["text"] for row in rows["upcycling"].splitlines()[:4]]
    assert first == tokenizer.batch_decode(of_experts)
    assert len(rows["upcycling"].splitlines()) * 3 >= scale.upcycling_steps * scale.batch


@pytest.fixture
def on_texts(sequence, tiny_experts, monkeypatch):
    """WEMoE's experiment on texts, with tiny models on made-up ones."""
    import wemoe_texts
    from real_data import Domain

    documents = [row["text"] for row in words(1, 100)]
    texts = {name: Domain(documents, documents[50:]) for name in sequence.DOMAINS}
    monkeypatch.setattr(wemoe_texts, "BLOCK", 40)
    monkeypatch.setattr(wemoe_texts, "smollm2", lambda: tiny_experts["base"])
    monkeypatch.setattr(wemoe_texts, "domains", lambda: texts)
    monkeypatch.setattr(wemoe_texts, "make_experts", lambda *_: tiny_experts)
    monkeypatch.setattr(wemoe_texts, "run_mergekit", sequence.run_mergekit)
    return wemoe_texts


def test_wemoe_s_experiment_on_texts_runs_and_goes_on(on_texts, tiny_experts, monkeypatch):
    recipes = []

    def make_experts(base, texts, recipe):
        recipes.append(recipe)
        return tiny_experts

    monkeypatch.setattr(on_texts, "make_experts", make_experts)
    rows = ["task arithmetic", "WEMoE, 2 layers", "WEMoE, 2 layers, supervised"]
    command = [
        "-o",
        "texts.json",
        "--steps",
        "1",
        "--expert-steps",
        "3",
        "--held-out",
        "2",
        *(f"--only={row}" for row in rows),
    ]
    result = CliRunner().invoke(on_texts.main, [*command, "--seeds", "1"])
    assert result.exit_code == 0, result.output
    first = json.loads(Path("texts.json").read_text())["losses"]
    assert set(first) == {"base", "bible expert", "music expert", "code expert", *rows}
    texts = AutoTokenizer.from_pretrained(tiny_experts["base"])
    ids = on_texts.blocks(texts, on_texts.domains()["music"].held_out, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_experts["code"])
    labels = ids.masked_fill(torch.arange(40) < 32, -100)
    with torch.no_grad():
        by_hand = model(ids, labels=labels).loss.item()
    assert first["code expert"]["0"]["music"] == pytest.approx(by_hand, abs=1e-5)
    assert [recipe.steps for recipe in recipes] == [3]

    monkeypatch.setattr(on_texts, "losses_of", lambda *_: dict.fromkeys(on_texts.DOMAINS, 1.0))
    result = CliRunner().invoke(on_texts.main, [*command, "--seeds", "2"])
    assert result.exit_code == 0, result.output
    second = json.loads(Path("texts.json").read_text())["losses"]
    assert {row: of_seeds["0"] for row, of_seeds in second.items()} == {
        row: s["0"] for row, s in first.items()
    }
    assert {row for row, of_seeds in second.items() if "1" in of_seeds} == set(
        rows[1:]
    )  # arithmetic has no seeds
    assert (
        result.stdout.rstrip().splitlines()[-1].startswith(rows[2])
        and "code expert" in result.stdout
    )
    other = CliRunner().invoke(on_texts.main, [*command, "--steps", "2"])
    assert other.exit_code == 1 and "name another file" in other.output


@pytest.fixture
def grown(sequence, tiny_experts, here, monkeypatch):
    """The experiment with a fourth domain, with a tiny model on made-up texts."""
    import grown_mixture
    from real_data import Domain

    documents = [row["text"] for row in words(1, 100)]
    texts = dict.fromkeys(grown_mixture.NAMES, Domain(documents, documents[50:]))
    monkeypatch.setenv("MERGEKIT_MOE_EXT_CACHE", str(here / "cache"))
    monkeypatch.setattr(grown_mixture, "BLOCK", 40)
    monkeypatch.setattr(grown_mixture, "smollm2", lambda: tiny_experts["base"])
    monkeypatch.setattr(grown_mixture, "domains", lambda names: texts)
    monkeypatch.setattr(grown_mixture, "run_mergekit", sequence.run_mergekit)
    return grown_mixture


def test_the_experiment_with_a_fourth_domain_runs_and_goes_on(grown, tiny_experts, monkeypatch):
    result = CliRunner().invoke(grown.main, ["--output", "out", "--quick"])
    assert result.exit_code == 0, result.output
    losses = json.loads(Path("out/losses.json").read_text())["losses"]
    assert len(losses) == 8

    # By hand: the fine-tune's loss, and what a growing and a training may change.
    (lora,) = Path("cache").glob("grown-*/news")
    tokenizer = AutoTokenizer.from_pretrained(tiny_experts["base"])
    ids = grown.blocks(tokenizer, grown.domains([])["news"].held_out, 1, 40)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_experts["base"]), lora
    ).eval()
    scores = tuned(ids).logits[0, :-1].log_softmax(-1)
    by_hand = -scores.gather(-1, ids[0, 1:, None]).mean().item()
    assert losses["fine-tuned on news"]["news"] == pytest.approx(by_hand, abs=1e-5)
    before = read_tensors(Path("out/mixture-trained"))
    for start in ("mean", "prompts"):
        after = read_tensors(Path(f"out/grown-{start}-trained"))
        assert all("experts.3." in name for name in after.keys() - before.keys())
        for name, tensor in before.items():
            assert torch.equal(after[name][: len(tensor)], tensor), name

    # The same command measures nothing again.
    monkeypatch.delattr(grown, "losses_of")
    again = CliRunner().invoke(grown.main, ["--output", "out", "--quick"])
    assert again.exit_code == 0 and again.stdout == result.stdout, again.output
    result = CliRunner().invoke(grown.main, ["--output", "out"])
    assert result.exit_code == 1 and "name another directory" in result.output


@pytest.fixture
def gates(mergeme, monkeypatch):
    """The experiment with generic mixtures, on made-up texts."""
    import upcycled_gates
    from real_data import Domain

    texts = {}
    for seed, name in enumerate(upcycled_gates.DOMAINS):
        documents = [row["text"] for row in words(seed, 120)]
        texts[name] = Domain(documents, documents[60:])
    monkeypatch.setattr(upcycled_gates, "TOKENS", 300)
    monkeypatch.setattr(upcycled_gates, "domains", lambda names: texts)
    return upcycled_gates


def test_the_experiment_with_generic_mixtures_runs(gates, here):
    command = ["-o", "gates.json", "--steps", "8", "--gate-steps", "2", "--seeds", "2"]
    result = CliRunner().invoke(gates.main, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("gates.json").read_text())
    before, after = rows["mixture, random gates"], rows["mixture, trained gates"]
    assert len(before) == len(after) == 2
    assert before[0] != after[0] != after[1]
    for losses in rows["mixture, gates of zero"]:  # of nearly untrained models
        assert all(abs(losses[name] - rows["base"][0][name]) < 0.1 for name in losses)
    bible = statistics.mean(losses["bible"] for losses in after)
    last = result.stdout.rstrip().splitlines()[-1].split()
    assert last[:4] == ["mixture,", "trained", "gates", f"{bible:.3f}"]


@pytest.fixture
def similarity(examples):
    import task_vector_similarity

    return task_vector_similarity


def test_the_docs_command_for_task_vectors_runs(similarity, here):
    docs = (ROOT / "docs" / "mergeme.md").read_text()
    (command,) = re.findall(r"python examples/task_vector_similarity.py (.*)", docs)
    result = CliRunner().invoke(similarity.main, [*command.split(), "--quiet"])
    assert result.exit_code == 0, result.output
    models = {name: str(here / name) for name in ("math", "code", "law")}
    pairs = task_vector_similarity(here / "base", models)
    rows = [line.split() for line in result.output.splitlines()[2:]]
    columns = []
    for pair in pairs:
        columns += [pair.attention, pair.ffn]
    assert [row[0] for row in rows] == ["0", "1", "2", "mean"]
    for row, cosines in zip(rows[:3], zip(*columns, strict=True), strict=True):
        assert row[1:] == [f"{cosine:.3f}" for cosine in cosines]
    assert rows[3][1:] == [f"{statistics.mean(column):.3f}" for column in columns]
    written = json.loads((here / "similarity.json").read_text())
    assert written["pairs"][1] == {
        "first": "math",
        "second": "law",
        "attention": list(pairs[1].attention),
        "ffn": list(pairs[1].ffn),
    }
    assert (here / "figure4.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(similarity.main, [*command.split(), "--quiet"])
    assert again.exit_code == 1 and "similarity.json exists and is not overwritten" in again.output


def test_untrained_layers_and_mistakes_in_the_script_for_task_vectors(similarity, here):
    untrained = ["--base", "base", "--model", "a=base", "--model", "b=math", "--quiet"]
    result = CliRunner().invoke(
        similarity.main, [*untrained, "-o", "nan.json", "--plot", "nan.png"]
    )
    assert result.exit_code == 0 and result.output.splitlines()[-1].split() == [
        "mean",
        "nan",
        "nan",
    ], result.output
    assert json.loads((here / "nan.json").read_text())["pairs"][0]["ffn"] == [None] * 3
    for arguments, message in (
        (["--model", "math"], "write NAME=DIR"),
        (["--model", "a=math", "--model", "a=code"], "two models are called 'a'"),
        (["--model", "a=math"], "two fine-tunes or more, not 1"),
        (["--model", "a=math", "--model", "b=nowhere"], "there is no directory nowhere"),
    ):
        result = CliRunner().invoke(similarity.main, ["--base", "base", *arguments])
        assert result.exit_code == 1 and message in result.output, result.output


@pytest.fixture
def task_vector_variation(examples):
    import task_vector_variation

    return task_vector_variation


def test_the_docs_command_for_the_variation_of_parameters_runs(task_vector_variation, here):
    docs = (ROOT / "docs" / "wemoe_analysis.md").read_text()
    (command,) = re.findall(r"python examples/task_vector_variation.py (.*)", docs)
    result = CliRunner().invoke(task_vector_variation.main, [*command.split(), "--quiet"])
    assert result.exit_code == 0, result.output
    variation = parameter_variation(here / "base", {name: here / name for name in ("math", "code")})
    parts = (variation["attention"], variation["mlp"])
    rows = [line.split() for line in result.output.splitlines()]
    for layer in range(3):
        values = []
        for part in parts:
            values.append(statistics.mean(change[layer] for change in part.change.values()))
        for part in parts:
            values.append(statistics.mean(1 - cosine[layer] for cosine in part.cosine.values()))
        assert rows[1 + layer] == [str(layer), *(f"{value:.4g}" for value in values)]
    assert rows[4][:3] == ["mean", *(f"{part.mean_change:.4g}" for part in parts)]
    for row, name in zip(rows[7:9], ("math", "code"), strict=True):
        shares = [f"{part.share_below(name)[THRESHOLDS.index(0.0005)]:.1%}" for part in parts]
        assert row == [
            name,
            *(f"{statistics.mean(part.change[name]):.4g}" for part in parts),
            *shares,
        ]
    assert rows[-1] == ["upscale:", "auto", "takes", "mlp"]
    written = json.loads((here / "variation.json").read_text())["parts"]
    assert written["mlp"]["change"]["code"] == list(variation["mlp"].change["code"])
    assert (here / "variation.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        (["--model", "math"], "write NAME=DIR"),
        (["--model", "a=nowhere"], "there is no directory nowhere"),
        (["--model", "a=math", "-o", "variation.json"], "exists and is not overwritten"),
    ):
        result = CliRunner().invoke(task_vector_variation.main, ["--base", "base", *arguments])
        assert result.exit_code == 1 and message in result.output, result.output


@pytest.fixture
def claims(sequence):
    import claims.__main__
    import claims.records

    return claims


def run_claims(claims, monkeypatch, examples, output, *options):
    """`python -m claims --scale quick`, with examples that a fixture has made tiny."""

    def start(command, place):
        assert place == ROOT and command[0] == sys.executable
        example = examples[Path(command[1]).stem]
        return CliRunner().invoke(example.main, command[2:], catch_exceptions=False).exit_code

    monkeypatch.setattr(claims.records, "start", start)
    only = [f"--only={name}" for name in examples]
    command = ["-o", str(output), "--scale", "quick", *only, *options]
    result = CliRunner().invoke(claims.__main__.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (output / "claims.md").read_text(), claims.records.read_records(output / "claims")


def test_the_quick_scale_runs_and_goes_on(claims, hetero, on_texts, tmp_path, monkeypatch):
    examples = {"mergeme_hetero": hetero, "wemoe_texts": on_texts}
    output = tmp_path / "claims"
    page, records = run_claims(claims, monkeypatch, examples, output)
    assert records.keys() == examples.keys()
    assert "Scale `quick`. It took" in page and "**unclear**" in page
    assert "| **holds** |" not in page  # one seed is not enough
    losses = json.loads((output / "wemoe_texts" / "texts.json").read_text())["losses"]
    kept = records["wemoe_texts"].rows["WEMoE, 2 layers"]["0"]
    assert kept == pytest.approx(losses["WEMoE, 2 layers"]["0"], rel=1e-5)
    # What is written by hand stays with a run that goes on, and not with another one.
    path = output / "claims" / "wemoe_texts.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "A busy machine."}))
    page, records = run_claims(claims, monkeypatch, examples, output, "--no-run")
    assert "A busy machine." in page
    changed = json.loads((output / "wemoe_texts" / "texts.json").read_text())
    changed["losses"]["base"]["0"]["bible"] += 1
    (output / "wemoe_texts" / "texts.json").write_text(json.dumps(changed))
    page, records = run_claims(claims, monkeypatch, examples, output, "--no-run")
    assert "A busy machine." not in page and records["wemoe_texts"].seconds is None
