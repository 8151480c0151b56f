"""Everything that computes, on a GPU against a CPU: `make gpu`, or `pytest tests/gpu`.

Without a GPU these tests are skipped. `pytest tests/gpu --device cpu` runs them all the same, so
that they work when they first meet one.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from _mergekit_moe_ext_common import placement
from mergekit_moe_ext import Reading, Recipe, train
from mergekit_moe_ext.tensor.kernels.drop import random_mask
from peft_routing import RoutedLoraConfig, given_coefficients
from peft_routing.choosers import perplexity
from tests.conftest import (
    NAMES,
    document,
    every_other_layer,
    make_model,
    merge,
    read_tensors,
    run,
)
from tests.mergekit_moe_ext.mixtures.test_usage import make_moe, words, write
from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

IDS = torch.randint(2, 96, (3, 24), generator=torch.Generator().manual_seed(0))
GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ROUTERS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "fixed": {"weights": [0.5, 0.3, 0.2]},
    "global": {},
    "layer": {},
    "arrow": {"top_k": 2},
    "linear": {"init": "arrow", "top_k": 2},
    "mlp": {},
    "hierarchical": {"init": "arrow", "clusters": {"math": 0, "code": 0, "law": 1}},
}
# The methods, with parameters that make every part of them work.
MERGES: dict[str, dict[str, Any]] = {
    "moe_linear": {},
    "moe_ties": {"parameters": {"density": 0.5, "lambda": 0.3, "weight": 1.0}},
    "moe_dare": {"parameters": {"density": 0.5, "lambda": 0.3, "weight": 1.0}},
    "seq_moe": {"parameters": {"routing": "perplexity"}},
    "hetero_moe": {},
    "wemoe": {},
    "ewemoe": {"parameters": {"density": 0.2}},
    "fast_ties": {"parameters": {"density": 0.5, "lambda": 0.3, "weight": 1.0}},
    "dare": {"parameters": {"density": 0.5, "lambda": 0.3, "weight": 1.0}},
}


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    asked = request.config.getoption("--device")
    if asked is None and not torch.cuda.is_available():
        pytest.skip("there is no GPU; --device cpu runs these tests without one")
    return asked or "cuda"


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products in float32 that are not rounded to TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def logits(model: Any, device: str, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.to(device)(input_ids=IDS.to(device), **keywords).logits.float().cpu()


def generated(model: Any, device: str) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    made = model.to(device).generate(
        input_ids=IDS.to(device), attention_mask=mask.to(device), **GENERATION
    )
    return made.cpu()


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(first, second, atol=tolerance, rtol=tolerance)


# Routed adapters


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(tmp_path_factory.mktemp("experts"))


def make_routed(experts: dict[str, str], router: str, dtype: Any = None, **changes: Any) -> Any:
    torch.manual_seed(1)
    options = {"mixing": "full", **ROUTERS[router], **changes}
    config = RoutedLoraConfig(experts=experts, router=router, **options)
    return get_peft_model(make_base(dtype=dtype or torch.float32), config).eval()


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_routed_adapter(
    experts: dict[str, str], router: str, mixing: str, granularity: str, device: str, tmp_path: Path
) -> None:
    model = make_routed(experts, router, mixing=mixing, granularity=granularity)
    on_cpu = logits(model, "cpu")
    words_on_cpu = generated(model, "cpu")
    close(logits(model, device), on_cpu)
    assert torch.equal(generated(model, device), words_on_cpu)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base().to(device), str(tmp_path)).eval()
    close(logits(again, device), on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["arrow", "linear", "uniform"])
def test_a_routed_adapter_in_half_precision(
    experts: dict[str, str], router: str, dtype: torch.dtype, device: str
) -> None:
    # With a choice, scores that nearly tie would choose otherwise in half precision.
    every = {} if router == "uniform" else {"top_k": 3}
    exact = logits(make_routed(experts, router, **every), "cpu")
    half = logits(make_routed(experts, router, dtype, **every), device)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_coefficients_that_are_given_and_a_chooser(experts: dict[str, str], device: str) -> None:
    model = make_routed(experts, "uniform")
    one = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    with given_coefficients(one):
        on_cpu = logits(model, "cpu")
    with given_coefficients(one.to(device)):
        close(logits(model, device), on_cpu)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    on_cpu = perplexity(model.to("cpu"), **inputs)
    inputs = {name: each.to(device) for name, each in inputs.items()}
    close(perplexity(model.to(device), **inputs).cpu(), on_cpu)


@pytest.mark.parametrize("router", ["arrow", "linear"])
def test_gradients_of_a_router(experts: dict[str, str], router: str, device: str) -> None:
    gradients = {}
    for place in ("cpu", device):
        model = make_routed(experts, router, top_k=2).to(place)
        hidden = IDS.to(place)
        model.get_base_model().enable_input_require_grads()
        model(input_ids=hidden, labels=hidden).loss.backward()
        embedding = model.get_input_embeddings().weight
        parameters = [each for each in model.parameters() if each.requires_grad]
        wanted = parameters or [embedding]
        gradients[place] = [each.grad.cpu() for each in wanted if each.grad is not None]
    for first, second in zip(gradients["cpu"], gradients[device], strict=True):
        close(first, second)


def whole(model: Any, device: str) -> Any:
    """The model, compiled in one piece."""
    torch._dynamo.reset()
    backend = "eager" if device == "cpu" else "inductor"  # which would compile for minutes
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("router", "is_compiled"), [("arrow", False), ("linear", False), ("linear", True)]
)
def test_gradients_in_half_precision(
    experts: dict[str, str],
    router: str,
    is_compiled: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients = []
    for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
        # All experts, since scores that nearly tie would choose otherwise in half precision.
        model = make_routed(experts, router, dtype, top_k=3).to(place)
        embedding = model.get_input_embeddings().weight.requires_grad_()
        routed = [each for each in model.parameters() if each.requires_grad]
        call = whole(model, place) if is_compiled else model
        calls = unweighed(monkeypatch) if place == "cuda" and not is_compiled else None
        call(input_ids=IDS.to(place), labels=IDS.to(place)).loss.backward()
        assert calls is None or calls
        gradients.append([each.grad.float().cpu() for each in (embedding, *routed)])
    for exact, half in zip(*gradients, strict=True):
        # The loss of a random model has small gradients, of which rounding is a fifth on a CPU.
        # `test_kernel` compares the kernel's own.
        assert torch.cosine_similarity(half.flatten(), exact.flatten(), dim=0) > 0.9


def unweighed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each backward pass of the Triton kernel."""
    from peft_routing import kernel

    calls: list[int] = []
    compute = kernel.unweigh

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return compute(*arguments, **options)

    monkeypatch.setattr(kernel, "unweigh", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_routed_adapter(
    experts: dict[str, str], dtype: torch.dtype, device: str
) -> None:
    exact = logits(make_routed(experts, "arrow", top_k=3), "cpu")
    model = make_routed(experts, "arrow", dtype, top_k=3)
    compiled = whole(model.to(device), device)
    with torch.no_grad():
        found = compiled(input_ids=IDS.to(device)).logits.float().cpu()
    if dtype == torch.float32:
        close(found, exact)
    else:
        assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_routed_module_in_a_cuda_graph(experts: dict[str, str], tokens: int, device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    model = make_routed(experts, "arrow", torch.bfloat16, top_k=2).to(device).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, tokens, layer.in_features, generator=generator).to(
        device, torch.bfloat16
    )
    (adapter,) = layer._here()
    experts_here = layer.experts_of("default")
    with torch.no_grad():
        expected = layer(second)  # and the kernels are tried and compiled
        adapter.fused._plans.clear()
        adapter.fused._split = None
        experts_here._cast = None
        held = first.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layer(held)
        # What was made in the graph is not there before it is replayed.
        assert not adapter.fused._plans
        assert adapter.fused._split is None and experts_here._cast is None
        close(layer(second).float(), expected.float(), 1e-6)
        held.copy_(second)
        graph.replay()
    close(found.float(), expected.float(), 1e-6)


# Merges


@pytest.fixture
def dense(here: Path) -> Path:
    for name in NAMES:
        (here / name).unlink()
        make_model(here / name, NAMES.index(name))
        save_tokenizer(here / name, 96)
    return here


@pytest.mark.parametrize("method", MERGES)
def test_a_merge_and_what_it_writes(dense: Path, method: str, device: str) -> None:
    sources = NAMES if method == "hetero_moe" else NAMES[1:]
    config = document(method, models=sources, **MERGES[method])
    of_cpu = merge(config, "of-cpu")
    where = [{"cuda": device != "cpu"}]
    if device != "cpu":
        where.append({"multi_gpu": True})  # which one is enough for
    for number, options in enumerate(where):
        tensors = read_tensors(merge(config, f"of-device-{number}", **options))
        for name, tensor in read_tensors(of_cpu).items():
            close(tensors[name], tensor, 1e-6)
    model = AutoModelForCausalLM.from_pretrained(of_cpu).eval()
    on_cpu = logits(model, "cpu", use_cache=False)
    words_on_cpu = generated(model, "cpu")
    close(logits(model, device, use_cache=False), on_cpu)
    assert torch.equal(generated(model, device), words_on_cpu)
    half = AutoModelForCausalLM.from_pretrained(of_cpu, dtype=torch.bfloat16).to(device).eval()
    assert logits(half, device, use_cache=False).isfinite().all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_a_random_mask_is_the_same_everywhere(density: float, device: str) -> None:
    piece = slice(1_000_000, 3_000_000)
    on_cpu = random_mask(12345, piece, density, torch.device("cpu"))
    assert torch.equal(random_mask(12345, piece, density, torch.device(device)).cpu(), on_cpu)


def test_caem(here: Path, device: str) -> None:
    for seed, name in enumerate(("first", "second")):
        make_moe(here / name, "mixtral", seed)
        write(here / f"{name}.jsonl", words(seed, 12))
    models = []
    for name in ("first", "second"):
        models.append({"model": f"./{name}", "parameters": {"calibration": f"{name}.jsonl"}})
    config = document("caem", models=models, base=None, parameters={"num_experts": 4})
    outputs = {}
    for place in ("cpu", device):
        outputs[place] = read_tensors(merge(config, f"out-{len(outputs)}", cuda=place != "cpu"))
    for name, tensor in outputs["cpu"].items():
        close(outputs[device][name], tensor, 1e-6)


# Commands


def command(line: str, cpu: bool = False) -> None:
    """Run a command of ours; `cpu` hides the GPU from it."""
    environment = {**os.environ}
    if cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    result = run(*line.split(), env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def on_both(line: str, device: str) -> None:
    """Run a command that writes a model on a CPU and on the device, and compare what it writes."""
    command(f"{line} -o of-cpu", cpu=True)
    command(f"{line} -o of-device", cpu=device == "cpu")
    tensors = read_tensors(Path("of-device"))
    for name, tensor in read_tensors(Path("of-cpu")).items():
        close(tensors[name], tensor, 1e-3)


def write_rows() -> None:
    write(Path("rows.jsonl"), [{"text": row["text"] * 4} for row in words(0, 24)])


TRAINING = "--max-steps 3 --held-out 4 --learning-rate 0.0001 --quiet"


def test_training_and_counting(here: Path, device: str) -> None:
    make_moe(here / "mixture", "mixtral")
    write_rows()
    training = f"mergekit-moe-ext train mixture --data rows.jsonl {TRAINING}"
    on_both(f"{training} --train gates", device)
    command(f"{training} --train gates --bf16 --gradient-checkpointing -o half")
    command(f"{training} --train all -o all")
    command(f"mergekit-moe-ext usage mixture --data rows.jsonl --device {device}")


def test_training_a_model_that_is_spread(
    here: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_moe(here / "mixture", "mixtral")
    write_rows()
    training = f"mergekit-moe-ext train mixture --data rows.jsonl --train gates {TRAINING}"
    command(f"{training} -o of-cpu", cpu=True)
    command(f"{training} --device-map auto -o of-auto", cpu=device == "cpu")
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    monkeypatch.setattr(placement, "_device_map", lambda model, _: every_other_layer(model, place))
    if device == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train(
        "mixture",
        ["rows.jsonl"],
        "gates",
        output="of-both",
        recipe=Recipe(max_steps=3, held_out=4, learning_rate=0.0001),
        reading=Reading(quiet=True),
        device_map="auto",
    )
    of_cpu = read_tensors(Path("of-cpu"))
    for output in ("of-auto", "of-both"):
        for name, tensor in read_tensors(Path(output)).items():
            close(tensor, of_cpu[name], 1e-3)


def test_adapting_and_unloading(dense: Path, device: str) -> None:
    merge(document("wemoe", models=NAMES[1:]), "ensemble")
    merge(document("wemoe", models=NAMES[1:], parameters={"router_layers": 0}), "constant")
    write_rows()
    adapting = "mergekit-moe-ext adapt ensemble --data text=rows.jsonl --steps 3 --quiet"
    on_both(f"{adapting} --learning-rate 0.0001", device)
    command("mergekit-moe-ext unload constant -o stock")


def test_adapters_by_command(here: Path, experts: dict[str, str], device: str) -> None:
    (here / "base").unlink()
    make_base().save_pretrained(here / "base")
    save_tokenizer(here / "base", 96)
    write_rows()
    named = [f"--expert {name}={path}" for name, path in experts.items()]
    command(f"peft-route compose base {' '.join(named)} -o routed --router linear --top-k 2")
    training = f"peft-route train routed --data rows.jsonl {TRAINING}"
    on_both(training, device)
    command(f"{training} --bf16 --gradient-checkpointing -o half")
    command("peft-route inspect of-device --data rows.jsonl")
