"""Outputs written where one version of transformers is installed, read where another is: the same
words and logits.

    python -m tests.exchange write DIR    # with one set of versions
    python -m tests.exchange read DIR     # with another; exits with 1 where an output computes
    something else

Custom architectures are read by transformers alone, from the files beside their weights.
`make exchange` keeps these modules apart, in a cache of each version's own (HF_MODULES_CACHE), and
turns torch's autoload off for reading, or transformers would take the classes of this package.
"""

import os
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, __version__

PROMPTS = torch.randint(2, 96, (3, 8), generator=torch.Generator().manual_seed(0))
CUSTOM = ("seq_moe", "wemoe")
STRATEGIES = {"greedy": {}, "beams": {"num_beams": 3}}


def write(directory: Path) -> None:
    from peft_routing import RoutedLoraConfig
    from tests.conftest import document, make_model, merge
    from tests.peft_routing.adapters import make_base, save_experts

    directory.mkdir(parents=True)
    os.chdir(directory)
    for seed, name in enumerate(("base", "math", "code")):
        make_model(Path(name), seed)
    names = ("math", "code")
    routing = {"routing": "perplexity", "experts_per_sequence": 1}
    merge(document("seq_moe", names, parameters={**routing, "embedding": "separate"}), "seq_moe")
    merge(document("wemoe", names, parameters={"lambda": 0.3}), "wemoe")
    wemoe = AutoModelForCausalLM.from_pretrained("wemoe")
    torch.manual_seed(0)
    with torch.no_grad():  # as if the routers had been trained, so that prompts choose differently
        for parameter in wemoe.routers.parameters():
            parameter.normal_()
    wemoe.save_pretrained("wemoe")
    experts = save_experts(Path("loras"))
    base = make_base()
    base.save_pretrained("routed-base")
    config = RoutedLoraConfig(experts=experts, router="arrow", top_k=1, granularity="sequence")
    get_peft_model(base, config).save_pretrained("routed")
    for name in (*CUSTOM, "routed"):
        save_file(_results(_load(name)), f"{name}.results")
    print(f"written with transformers {__version__}")


def read(directory: Path) -> None:
    os.chdir(directory)
    wrong = []
    for name in (*CUSTOM, "routed"):
        model = _load(name)
        if name in CUSTOM:
            assert type(model).__module__.startswith("transformers_modules."), type(model)
        results = _results(model)
        expected = load_file(f"{name}.results")
        for key, tensor in expected.items():
            if not torch.allclose(results[key].float(), tensor.float(), atol=1e-5):
                wrong.append(f"{name}: {key}")
    if wrong:
        sys.exit(
            f"transformers {__version__} computes something else than what was written: "
            f"{', '.join(wrong)}"
        )
    print(f"read with transformers {__version__}: the same words and logits")


def _load(name: str) -> torch.nn.Module:
    if name == "routed":
        import peft_routing  # noqa: F401  (where torch's autoload is off)

        base = AutoModelForCausalLM.from_pretrained("routed-base")
        return PeftModel.from_pretrained(base, "routed").eval()
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()


@torch.no_grad()
def _results(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    results = {"logits": model(input_ids=PROMPTS).logits.contiguous()}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for name, more in STRATEGIES.items():
        mask = torch.ones_like(PROMPTS)
        words = model.generate(input_ids=PROMPTS, attention_mask=mask, **options, **more)
        results[name] = words.contiguous()
    return results


if __name__ == "__main__":
    if sys.argv[1] == "read":
        for module in ("mergekit_moe_ext", "mergekit"):
            sys.modules[module] = None  # type: ignore[assignment]
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
