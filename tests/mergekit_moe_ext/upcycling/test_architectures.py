"""A sample of all architectures of the installed transformers; all of them with
`ARCHITECTURES=all`, as `make architectures` has it.
"""

import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from tests.conftest import document, merge
from tests.mergekit_moe_ext.upcycling.architectures import (
    architectures,
    inputs_of,
    is_comparable,
    largest_difference,
    rows_of,
    tiny_config,
    tried,
    tried_in_caem,
)

DOCS = Path(__file__).parents[3] / "docs"
EVERY = sorted(architectures())
CHOSEN = EVERY if os.environ.get("ARCHITECTURES") == "all" else random.Random(2).sample(EVERY, 24)
# By kind, those whose stock model does not run on token ids alone at this size.
NOT_RUN = {
    "causal": {
        "bamba": "two layers of it are no attention",
        "gemma4_unified_assistant": "it reads another model's states",
        "minicpm3": "its heads have sizes of their own",
        "xlstm": "its heads have sizes of their own",
        "youtu": "its heads have sizes of their own",
    },
    "encoder-decoder": {"voxtral_realtime": "it needs sound"},
    "vision": {"shieldgemma2": "it needs text as well"},
    "image-text": {
        **dict.fromkeys(
            (
                "blip",
                "blip-2",
                "idefics",
                "instructblip",
                "instructblipvideo",
                "kosmos-2",
                "pix2struct",
            ),
            "it needs an image",
        ),
        **dict.fromkeys(
            ("hunyuan_vl", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
            "the sections of its rotary embeddings are for larger heads",
        ),
        "pi0": "it needs the state of a robot",
        "step3p7": "its windows need a size",
        "udop": "it needs the places of words on a page",
    },
}


@pytest.mark.parametrize(("kind", "model_type", "architecture"), CHOSEN)
def test_it_is_exact_generic_or_refused_with_a_reason(
    kind, model_type, architecture, tmp_path, monkeypatch
):
    result = tried(kind, model_type, architecture)
    check_page("upcycling.md", result)
    if "is a mixture of experts already" in result.detail:
        check_page("caem.md", tried_in_caem(kind, model_type, architecture))
    is_wrapped = result.detail.startswith("itself around")
    if not (result.outcome == "generic" or is_wrapped) or model_type in NOT_RUN[kind]:
        assert result.detail
        return
    config = tiny_config(CONFIG_MAPPING[model_type])
    config.architectures = [architecture]
    if not is_comparable(config):
        return
    if is_wrapped:
        monkeypatch.chdir(tmp_path)
        assert difference_of_a_merge(kind, config) < 1e-5
    else:
        assert largest_difference(kind, config) < 1e-5


def check_page(name, result):
    """The page says the same, if it is of the installed transformers."""
    page = (DOCS / name).read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in page:
        assert (result.kind, result.model_type) in rows_of(page)[result.outcome]


def difference_of_a_merge(kind, config):
    """By how much the logits of a dense model and of a merge of it alone, written and loaded,
    differ, relative to the largest.
    """
    model_class = getattr(transformers, config.architectures[0])
    torch.manual_seed(0)
    dense = model_class(config).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    dense.save_pretrained("base")
    out = merge(document("moe_linear", ["base"] * 3))
    mixture, report = model_class.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    inputs = inputs_of(kind, config)
    with torch.no_grad():
        wanted, got = dense(**inputs).logits, mixture.eval()(**inputs).logits
    return ((wanted - got).abs().max() / wanted.abs().max()).item()
