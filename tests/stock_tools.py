"""What tools do that have never heard of this package.

`test_stock_tools.py` gives this text to `python -c`. Its arguments are what is imported first;
"native" where transformers can load adapters by itself; "briefly" for two of the ways alone. Each
way to load something is gone in a child process of its own, for which nothing of ours has been
imported. The working directory holds the models, and `expected.pt` their logits.
"""

import os
import sys
import traceback
import warnings

# Before anything else of a host.
exec(sys.argv[1])

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

IDS = torch.arange(5, 25)[None]
expected = torch.load("expected.pt", weights_only=True)


def check(model, name, ours):
    """The model is made of a class of ours, and gives the logits that it gave when it was saved."""
    assert type(model).__module__.startswith(ours), type(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected[name])


def causal(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def adapter_by_peft():
    model = peft.PeftModel.from_pretrained(causal("base"), "routed")
    check(model, "routed", "peft.")
    assert type(model) is peft.PeftModelForCausalLM


def adapter_by_the_auto_class_of_peft():
    check(peft.AutoPeftModelForCausalLM.from_pretrained("routed"), "routed", "peft.")


def configuration_of_an_adapter():
    assert type(peft.PeftConfig.from_pretrained("routed")).__name__ == "RoutedLoraConfig"
    assert type(peft.get_peft_config({"peft_type": "ROUTED_LORA", "experts": ["a", "b"]})).__name__


def adapter_by_transformers():
    if "native" not in sys.argv:
        return
    model = causal("base")
    model.load_adapter("routed")
    check(model, "routed", "transformers.")
    check(causal("routed"), "routed", "transformers.")


def models():
    for name in ("sequence", "ensemble"):
        check(causal(name), name, "mergekit_moe_ext.")


def models_whose_code_is_trusted():
    for name in ("sequence", "ensemble"):
        check(causal(name, trust_remote_code=True), name, "mergekit_moe_ext.")
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


def configuration_and_tokenizer():
    for name, kind in (("sequence", "SequenceMoEConfig"), ("ensemble", "WEMoELlamaConfig")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        assert tokenizer("w3 w4")["input_ids"] == [5, 6]
        config = transformers.AutoConfig.from_pretrained(name)
        assert type(config).__name__ == kind
        fresh = transformers.AutoModelForCausalLM.from_config(config)
        assert type(fresh).__module__.startswith("mergekit_moe_ext.")


def pipelines():
    for name in ("sequence", "ensemble"):
        generate = transformers.pipeline("text-generation", model=name)
        check(generate.model, name, "mergekit_moe_ext.")
        assert generate("w3 w4", max_new_tokens=3, do_sample=False)[0]["generated_text"]


BRIEFLY = [adapter_by_peft, models]
WAYS = [
    adapter_by_peft,
    adapter_by_the_auto_class_of_peft,
    configuration_of_an_adapter,
    adapter_by_transformers,
    models,
    models_whose_code_is_trusted,
    configuration_and_tokenizer,
    pipelines,
]


def is_right(way):
    """Whether a way works in a child process, whose traceback is printed otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 has one for threads
        child = os.fork()
    if child == 0:
        status = 0
        try:
            way()
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return status == 0


loaded = {"mergekit_moe_ext", "peft_routing"} & sys.modules.keys()
assert "mergekit" in sys.modules or not loaded, loaded
chosen = BRIEFLY if "briefly" in sys.argv else WAYS
wrong = [way.__name__ for way in chosen if not is_right(way)]
sys.exit(f"wrong: {wrong}" if wrong else 0)
