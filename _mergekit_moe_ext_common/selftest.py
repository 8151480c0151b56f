"""A self-test of tiny models: generation with a key-value cache against plain passes without one.

Whatever keeps a choice with the cache would generate other tokens, and not fail, on a host that
treats caches in a way that we do not know. `mergekit-moe-ext doctor` runs this where a user's own
versions are installed.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

PROMPT = 6  # tokens: make models whose plain passes choose by the first so many
VOCABULARY = 32
TOLERANCE = 1e-3  # of logits between -10 and 10, in float32 on any device


def difference(model: Any) -> float:
    """The largest difference of logits between cached generation and one plain pass over all
    tokens, where both choose by the prompt.
    """
    prompts = torch.randint(2, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    made = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        plain = model(input_ids=made.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
    return float((torch.stack(made.logits, dim=1) - plain).abs().max())


def main(models: Mapping[str, Callable[[], Any]]) -> None:
    """Tries the model that each function makes, prints a line for each, and exits with 1 if any
    is wrong.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    is_right = True
    for name, make in models.items():
        try:
            largest = difference(make())
            passed = largest <= TOLERANCE
            remark = f"largest difference {largest:.0e}"
        except Exception as error:
            passed = False
            remark = f"{type(error).__name__}: {error}"
        verdict = "ok  " if passed else "FAIL"
        print(f"{verdict}  {name} generates with a cache as without one ({remark})")
        is_right = is_right and passed
    sys.exit(0 if is_right else 1)
