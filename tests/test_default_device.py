"""Models compute where they are, whatever a program has made the default device.

Here that is one on which nothing can be computed: a tensor that is made there by mistake is found.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_moe_ext.modeling.modeling_sequence_moe import _Comparison
from mergekit_moe_ext.modeling.sequence_cache import SequenceMoECache
from tests.conftest import NAMES, document, make_model, merge
from tests.gpu.test_gpu import IDS, MERGES, ROUTERS, make_routed
from tests.peft_routing.adapters import save_experts
from tests.tokenizers import save_tokenizer


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(tmp_path_factory.mktemp("experts"))


@torch.no_grad()
def check_logits(model: Any) -> None:
    expected = model(input_ids=IDS).logits
    with torch.device("meta"):
        logits = model(input_ids=IDS).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_routed_adapter(
    experts: dict[str, str], router: str, mixing: str, granularity: str
) -> None:
    check_logits(make_routed(experts, router, mixing=mixing, granularity=granularity).eval())


def test_what_a_sequence_moe_keeps_and_compares() -> None:
    selected: list[torch.Tensor] = []
    cache = SimpleNamespace(coefficients=torch.rand(2, 3), batch_select_indices=selected.append)
    compared = SimpleNamespace(
        number=2,
        others={1: None},
        norms={(1, "weight"): torch.tensor(4.0)},
        of_gradient=[torch.tensor(9.0)],
        products={1: [torch.tensor(3.0)]},
    )
    with torch.device("meta"):
        SequenceMoECache.batch_repeat_interleave(cache, 2)
        cosines = _Comparison.cosines(compared)
    assert selected[0].tolist() == [0, 0, 1, 1]
    assert cosines.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("method", ["seq_moe", "hetero_moe", "wemoe", "ewemoe"])
def test_a_model_of_an_architecture_of_ours(here: Path, method: str) -> None:
    for name in NAMES:
        (here / name).unlink()
        make_model(here / name, NAMES.index(name))
        save_tokenizer(here / name, 96)
    sources = NAMES if method == "hetero_moe" else NAMES[1:]
    out = merge(document(method, models=sources, **MERGES[method]), "out")
    check_logits(AutoModelForCausalLM.from_pretrained(out).eval())
