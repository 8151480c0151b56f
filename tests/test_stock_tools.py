"""Tools that know the hosts and not this package find what it made, with nothing imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

from mergekit_moe_ext.selftest import sequence_mixture, weight_ensembling_model
from tests.conftest import run
from tests.peft_routing.adapters import (
    has_native_adapters,
    make_base,
    make_routed,
    save_experts,
)
from tests.tokenizers import save_tokenizer

SCRIPT = (Path(__file__).parent / "stock_tools.py").read_text(encoding="utf-8")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# In the second and third, torch is imported from the body of a module that we extend.
FIRST = [
    "import torch",
    "from transformers import AutoConfig",
    "from transformers import AutoModelForCausalLM",
    "import peft",
    "import mergekit.merge",
    "import accelerate",
]
# What mergekit and PEFT call themselves.
STRICT = [
    *("-W", "error"),
    *("-W", "ignore:numpy.core is deprecated"),
    *("-W", "ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a base model, a routed adapter, and two models of our architectures."""
    here = tmp_path_factory.mktemp("tools")
    make_base().save_pretrained(here / "base")
    save_tokenizer(here / "base", 96)
    routed = make_routed(save_experts(here / "experts"), "arrow")
    routed.peft_config["default"].base_model_name_or_path = "base"
    routed.save_pretrained(here / "routed")
    save_tokenizer(here / "routed", 96)
    models = {
        "routed": routed,
        "sequence": sequence_mixture(),
        "ensemble": weight_ensembling_model(),
    }
    expected = {}
    for name, model in models.items():
        if name != "routed":
            model.save_pretrained(here / name)
            save_tokenizer(here / name, model.config.vocab_size)
        with torch.no_grad():
            expected[name] = model(input_ids=torch.arange(5, 25)[None]).logits
    torch.save(expected, here / "expected.pt")
    return here


@pytest.mark.hosts
@pytest.mark.parametrize("first", FIRST)
def test_nothing_has_to_be_imported(made, first):
    told = ["native"] if has_native_adapters() else []
    if first != FIRST[0]:
        told.append("briefly")
    done = run(sys.executable, *STRICT, "-c", SCRIPT, first, *told, cwd=made, env=OFFLINE)
    assert done.returncode == 0, done.stderr
