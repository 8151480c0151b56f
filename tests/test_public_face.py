"""The packages as Python sees them: what an import loads, what is public, and the examples in the
docstrings.
"""

import ast
import doctest
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mergekit_moe_ext
import peft_routing
from tests.conftest import document, make_model, merge
from tests.mergekit_moe_ext.mixtures.test_usage import make_moe, words, write
from tests.peft_routing.adapters import make_base, save_lora
from tests.tokenizers import save_tokenizer

HOSTS = ("torch", "transformers", "peft", "mergekit", "datasets", "accelerate")
PRINT_HOSTS = f"\nimport sys; print([host for host in {HOSTS!r} if host in sys.modules])"
HELP = """
from click.testing import CliRunner
from {package}.cli import main
for name in ("", *main.commands):
    if name not in {hosts!r}:
        result = CliRunner().invoke(main, [*name.split(), "--help"])
        assert result.exit_code == 0 and "Usage" in result.output, result.output
"""
# Importing the package first, last, and with torch's autoload on and off, PEFT and transformers
# know what we made.
KNOWN = {
    "peft_routing": "from peft import PEFT_TYPE_TO_CONFIG_MAPPING as table; assert 'ROUTED_LORA' "
    "in table",
    "mergekit_moe_ext": (
        "from transformers import CONFIG_MAPPING, AutoModelForCausalLM\n"
        "config = CONFIG_MAPPING['sequence_moe']\n"
        "assert CONFIG_MAPPING['wemoe_llama'] in AutoModelForCausalLM._model_mapping\n"
        "assert AutoModelForCausalLM._model_mapping[config].__name__ == 'SequenceMoEForCausalLM'"
    ),
}
# What a program imports before it asks: with the autoload and, where less can differ, without it.
FIRST = [
    ("peft_routing", "1", ""),
    ("peft_routing", "1", "import torch"),
    ("peft_routing", "1", "import peft"),
    ("peft_routing", "1", "import peft_routing.model"),
    ("peft_routing", "0", ""),
    ("peft_routing", "0", "import peft"),
    ("mergekit_moe_ext", "1", ""),
    ("mergekit_moe_ext", "1", "import torch"),
    ("mergekit_moe_ext", "1", "import transformers.models.auto.modeling_auto"),
    ("mergekit_moe_ext", "1", "from transformers import AutoConfig"),
    ("mergekit_moe_ext", "1", "import mergekit_moe_ext.modeling.modeling_wemoe"),
    ("mergekit_moe_ext", "1", "import mergekit.merge"),
    ("mergekit_moe_ext", "0", ""),
    ("mergekit_moe_ext", "0", "from transformers import AutoConfig"),
]


def python(code, autoload="1"):
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("package", ["mergekit_moe_ext", "peft_routing"])
def test_importing_a_package_and_its_commands_loads_no_host(package):
    result = python(f"import {package}, {package}.cli; dir({package}){PRINT_HOSTS}")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("package", "of_hosts"),
    [
        ("mergekit_moe_ext", ("yaml", "plan", "add-expert", "remove-expert")),
        ("peft_routing", ("compose",)),
    ],
)
def test_help_loads_no_host_where_no_option_comes_from_one(package, of_hosts):
    result = python(HELP.format(package=package, hosts=of_hosts) + PRINT_HOSTS)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_loading_adapters_needs_neither_a_trainer_nor_mergekit():
    heavy = ("transformers.trainer", "datasets", "mergekit", "mergekit_moe_ext")
    code = (
        "import sys\nfrom peft_routing import RoutedLoraConfig, RoutedLoraModel, "
        "given_coefficients\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = python(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(("package", "autoload", "first"), FIRST)
def test_hosts_know_us_in_every_order_of_imports(package, autoload, first):
    result = python(f"{first}\nimport {package}\n{KNOWN[package]}", autoload)
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr


def test_hosts_are_left_alone_where_nothing_of_ours_is_asked_for():
    code = (
        "import torch, peft, sys\nfrom transformers import CONFIG_MAPPING, AutoModelForCausalLM\n"
        "assert 'LORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING and 'ours' not in CONFIG_MAPPING\n"
        "assert not {'mergekit_moe_ext', 'peft_routing'} & sys.modules.keys()"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["mergekit_moe_ext", "mergekit_moe_ext.analysis", "peft_routing"])
def test_every_public_name_is_there(name):
    package = importlib.import_module(name)
    for each in package.__all__:
        assert each in dir(package) and getattr(package, each) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["mergekit_moe_ext", "mergekit_moe_ext.analysis", "peft_routing"])
def test_no_file_has_the_name_of_a_public_function(name):
    # Python would put the file, once it is loaded, where the function was.
    package = importlib.import_module(name)
    for each in package.__all__:
        if not isinstance(getattr(package, each), ModuleType):
            assert importlib.util.find_spec(f"{name}.{each}") is None


@pytest.fixture
def everything(here):
    """What the examples name: dense models, a mixture, ensembles, adapters, texts."""
    for seed, name in enumerate(("base", "math", "code")):
        (here / name).unlink()
        make_model(here / name, seed)
        save_tokenizer(here / name, 96)
    for seed, name in enumerate(("math", "news")):
        # long enough that a prefix of 32 tokens leaves something to predict
        write(
            here / f"{name}.jsonl",
            [{"text": f"{row['text']} w1 w2" * 12} for row in words(seed, 12)],
        )
    make_moe(here / "mixture", "mixtral")
    save_tokenizer(here / "mixture", 96)
    merge(document("wemoe", models=("math", "code")), "ensemble")
    merge(document("wemoe", models=("math", "code"), parameters={"router_layers": 0}), "constant")
    return here


@pytest.fixture
def adapters(here):
    (here / "base").unlink()
    make_base().save_pretrained(here / "base")
    save_tokenizer(here / "base", 96)
    for seed, name in enumerate(("math", "code")):
        save_lora(here / f"{name}-lora", seed)
    write(here / "math.jsonl", words(0, 12))
    return here


def run_examples(package, names):
    """Each function's docstring, in this order: what one writes, the next reads."""
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE),
    )
    known = {each: getattr(package, each) for each in package.__all__}
    for name in names:
        (example,) = finder.find(getattr(package, name), name, module=False, globs=known)
        assert example.examples
        runner.run(example)
    assert runner.failures == 0 and runner.tries > 0


def test_the_examples_for_mixtures_run(everything):
    names = ["plan", "count_usage", "train", "add_expert", "remove_expert", "adapt", "unload"]
    run_examples(mergekit_moe_ext, names)
    for directory in ("mixture-trained", "grown", "smaller", "ensemble-adapted", "stock"):
        assert (everything / directory / "model.safetensors").exists()


def test_the_examples_for_adapters_run(adapters):
    names = ["compose", "train", "inspect", "export", "save", "compare", "ensemble", "distil"]
    run_examples(peft_routing, names)
    for directory in ("routed", "routed-trained", "experts/math", "routed-again"):
        assert (adapters / directory / "adapter_config.json").exists()
    assert (adapters / "report" / "report.json").exists()


def test_a_plan_says_what_the_command_prints(everything):
    from click.testing import CliRunner

    from mergekit_moe_ext.cli import main

    config = document("moe", models=("math", "code"))
    (everything / "config.yml").write_text(json.dumps(config))
    planned = mergekit_moe_ext.plan(config)
    assert planned.architecture == "MixtralForCausalLM" and planned.bytes > 0 and planned.seed == 0
    assert CliRunner().invoke(main, ["plan", "config.yml"]).output == f"{planned}\n"
    with pytest.raises(mergekit_moe_ext.UserError, match="nothing to draw"):
        planned.draw("figure.png")
    with pytest.raises(ValueError, match="linear leaves the architecture as it is"):
        mergekit_moe_ext.plan(document("linear", parameters={"weight": 1.0}))
    with pytest.raises(ValueError, match="did you mean `moe_ties`"):
        mergekit_moe_ext.plan(document("moe_tie"))
    with pytest.raises(ValueError, match="nowhere"):
        mergekit_moe_ext.plan("nowhere.yml")


def test_the_scripts_use_public_names_alone():
    root = Path(__file__).parents[1]
    scripts = [
        path for path in (root / "examples").rglob("*.py") if not path.name.startswith("extending_")
    ]
    assert len(scripts) > 10
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert "sys.path" not in text, path.name
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                if module.startswith(("_mergekit", "mergekit_moe_ext", "peft_routing")):
                    assert module in (
                        "mergekit_moe_ext",
                        "mergekit_moe_ext.analysis",
                        "peft_routing",
                        "peft_routing.library",
                    ), path.name
                    public = importlib.import_module(module).__all__
                    names = (
                        [alias.name for alias in node.names]
                        if isinstance(node, ast.ImportFrom)
                        else []
                    )
                    assert set(names) <= set(public), path.name
