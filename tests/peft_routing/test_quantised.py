"""Quantised base models: routed adapters as on any other, next to PEFT's own LoRA on the same base.

Each kind is tested where its package is installed (docs/routed_quantised.md says which); none needs
a GPU.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _get_in_out_features
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    TorchAoConfig,
)

from peft_routing import RoutedLoraConfig
from tests.conftest import read_tensors
from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

IDS = torch.tensor([[5, 17, 40, 9, 66, 31], [12, 80, 33, 7, 21, 90]])
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def load(path: Path, **quantised: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **quantised).eval()


def int8(plain: Path, path: Path) -> Callable:
    pytest.importorskip("bitsandbytes")
    return lambda: load(plain, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def nf4(plain: Path, path: Path) -> Callable:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_use_double_quant=True,
    )
    return lambda: load(plain, quantization_config=config)


def torchao(plain: Path, path: Path) -> Callable:
    quantization = pytest.importorskip("torchao.quantization")
    return lambda: load(
        plain, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )


def gptq(plain: Path, path: Path) -> Callable:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    save_tokenizer(plain, 96)
    texts = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(100)) for i in range(8)]
    config = GPTQConfig(bits=4, group_size=32, dataset=texts, tokenizer=str(plain))
    load(plain, quantization_config=config).save_pretrained(path)
    trainable = GPTQConfig(
        bits=4, group_size=32, backend="torch"
    )  # by itself it may take a kernel that is not
    return lambda: load(path, quantization_config=trainable)


def awq(plain: Path, path: Path) -> Callable:
    """A checkpoint as AutoAWQ writes it, its weights at random: its quantisers need data and more
    cores.
    """
    pytest.importorskip("gptqmodel")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in read_tensors(plain).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        (columns, rows), module = tensor.shape, name.removesuffix(".weight")
        packed = torch.randint(
            -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64
        )
        tensors[f"{module}.qweight"] = packed.to(torch.int32)
        tensors[f"{module}.qzeros"] = torch.full(
            (rows // 32, columns // 8), 0x77777777, dtype=torch.int32
        )
        tensors[f"{module}.scales"] = torch.full((rows // 32, columns), 0.004, dtype=torch.float16)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    how = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
    }
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    trainable = AwqConfig(bits=4, group_size=32, backend="torch_awq")
    return lambda: load(path, quantization_config=trainable)


@pytest.fixture(
    scope="module", params=[int8, nf4, torchao, gptq, awq], ids=lambda kind: kind.__name__
)
def make_quantised(request, tmp_path_factory):
    """A function that loads the base model, quantised in one way."""
    root = tmp_path_factory.mktemp(request.param.__name__)
    make_base(**SIZES).save_pretrained(root / "plain")
    return request.param(root / "plain", root / "quantised")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"), base=make_base(**SIZES))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_one_expert_is_peft_s_own_lora(make_quantised, experts):
    base = make_quantised()
    target = base.model.layers[0].mlp.down_proj
    assert _get_in_out_features(target) == (128, 64)
    of_base = logits(base)
    ours = get_peft_model(
        base, RoutedLoraConfig(experts={"math": experts["math"]}, router="uniform")
    )
    theirs = PeftModel.from_pretrained(make_quantised(), experts["math"])
    assert torch.equal(logits(ours), logits(ours))
    assert torch.allclose(logits(ours), logits(theirs), rtol=1e-3, atol=1e-4)
    assert (logits(ours) - of_base).abs().max() > 0.1
    with ours.disable_adapter():
        assert torch.equal(logits(ours), of_base)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_gives_the_same_logits(make_quantised, experts, tmp_path, low_cpu_mem_usage):
    model = get_peft_model(
        make_quantised(), RoutedLoraConfig(experts=experts, router="arrow", top_k=2)
    ).eval()
    model.save_pretrained(str(tmp_path))
    assert all("routed_lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(
        make_quantised(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), logits(model))


def test_merging_is_refused_before_anything_is_changed(make_quantised, experts, tmp_path):
    model = get_peft_model(
        make_quantised(), RoutedLoraConfig(experts=experts, router="uniform")
    ).eval()
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="without a plain weight, as quantised ones are"):
            merge()
    assert torch.equal(logits(model), before)
    assert model.to_lora(str(tmp_path / "one")) == 0
    one = PeftModel.from_pretrained(make_quantised(), tmp_path / "one").eval()
    assert torch.allclose(logits(one), before, rtol=1e-3, atol=1e-4)


def test_the_router_is_trained_and_nothing_else(make_quantised, experts):
    config = RoutedLoraConfig(experts=experts, router="linear", init="arrow")
    before, of_base = logits(get_peft_model(make_quantised(), config)), logits(make_quantised())
    model = get_peft_model(
        make_quantised(), config
    ).train()  # one that has not run: see docs/routed_quantised.md
    optimizer = torch.optim.SGD(model.parameters(), lr=10)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (
            "routed_lora_router" in name
        )
    optimizer.step()
    model.eval()
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), of_base)


class Packed(nn.Module):
    """A linear module in the manner of GPTQ's and AWQ's: of no class of torch's, without a
    `weight`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        self.register_buffer(
            "qweight", (linear.weight.detach() / self.scale).round().to(torch.int8)
        )

    def forward(self, x):
        return functional.linear(x, self.qweight.to(x.dtype) * self.scale)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_module_is_linear_by_its_two_sizes(experts, tmp_path):
    packed, plain = make_base(**SIZES), make_base(**SIZES)
    for name, module in plain.named_modules():
        if name.endswith("_proj"):
            packed.set_submodule(name, Packed(module))
            module.weight.data = (
                packed.get_submodule(name).qweight * packed.get_submodule(name).scale
            )
    config = RoutedLoraConfig(experts=experts, router="uniform")
    ours, theirs = get_peft_model(packed, config), get_peft_model(plain, config)
    assert torch.equal(logits(ours), logits(theirs))
    ours.save_pretrained(str(tmp_path))
    assert all("routed_lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="is a Packed without a plain weight"):
        ours.merge_and_unload()
    theirs.merge_and_unload()
