"""A sample of all architectures of the installed transformers; all of them with
`ARCHITECTURES=all`, as `make architectures` has it.
"""

import os
import random
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING

from tests.mergekit_moe_ext.upcycling.architectures import (
    architectures,
    is_comparable,
    largest_difference,
    rows_of,
    tiny_config,
    tried,
)

PAGE = Path(__file__).parents[3] / "docs" / "upcycling.md"
EVERY = sorted(architectures())
CHOSEN = EVERY if os.environ.get("ARCHITECTURES") == "all" else random.Random(2).sample(EVERY, 24)
# Those whose stock model does not run on token ids alone at this size.
NOT_RUN = {
    "bamba": "two layers of it are no attention",
    "gemma4_unified_assistant": "it reads another model's states",
    "minicpm3": "its heads have sizes of their own",
    "voxtral_realtime": "it needs sound",
    "xlstm": "its heads have sizes of their own",
    "youtu": "its heads have sizes of their own",
}


@pytest.mark.parametrize(("kind", "model_type", "architecture"), CHOSEN)
def test_it_is_exact_generic_or_refused_with_a_reason(kind, model_type, architecture):
    result = tried(kind, model_type, architecture)
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in page:
        assert (kind, model_type) in rows_of(page)[result.outcome]
    if result.outcome != "generic" or model_type in NOT_RUN:
        assert result.detail
        return
    config = tiny_config(CONFIG_MAPPING[model_type])
    config.architectures = [architecture]
    if is_comparable(config):
        assert largest_difference(kind, config) < 1e-5
