"""Merges with `--multi-gpu`, with CPU devices in place of GPUs: mergekit's threads and islands are
the real ones.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mergekit import multigpu_executor
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mergekit_moe_ext.growing.gate_rows import offset_of_row, random_tokens
from mergekit_moe_ext.growing.tasks import ArrangedExperts
from mergekit_moe_ext.merging import writer
from mergekit_moe_ext.tensor.kernels import on_gpu
from mergekit_moe_ext.upcycling.families.rewritings import scaled_embedding_and_head
from mergekit_moe_ext.upcycling.prompts import hidden_states
from mergekit_moe_ext.wemoe.clip_heads import FromHeadFile
from tests.conftest import NAMES, document, make_model, merge, read_tensors
from tests.gpu.test_gpu import MERGES
from tests.mergekit_moe_ext.mixtures.test_usage import make_moe, words, write
from tests.tokenizers import save_tokenizer


class Worker(multigpu_executor.Executor):
    """mergekit's workers make their GPU the default device. Here that is one on which nothing can
    be computed, so that a task which takes the default in place of a device is found.
    """

    def _run(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        with torch.device("meta"):
            yield from super()._run(*arguments, **options)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda _type: torch.cpu)
    monkeypatch.setattr(multigpu_executor, "Executor", Worker)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())


def check_alike(config: dict[str, Any]) -> None:
    expected = read_tensors(merge(config, "one", random_seed=1))
    got = read_tensors(merge(config, "two", random_seed=1, multi_gpu=True))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


@pytest.mark.parametrize("method", MERGES)
def test_several_gpus_write_the_same_tensors(here, two_devices, method):
    sources = NAMES if method == "hetero_moe" else NAMES[1:]
    for name in NAMES if method == "hetero_moe" else ():
        (here / name).unlink()
        make_model(here / name, NAMES.index(name))
        save_tokenizer(here / name, 96)
    check_alike(document(method, models=sources, **MERGES[method]))


def test_no_result_is_lost_on_a_busy_machine(here, two_devices, monkeypatch):
    """Results are collected by a thread of its own, which may be slower than all GPUs."""
    stock_bar = multigpu_executor.tqdm.tqdm

    class SlowBar(stock_bar):
        def update(self, n=1):
            time.sleep(0.02)
            return super().update(n)

    monkeypatch.setattr(multigpu_executor.tqdm, "tqdm", SlowBar)
    check_alike(document("moe_ties", models=NAMES[1:], **MERGES["moe_ties"]))


def test_an_interrupted_merge_ends(here, two_devices, monkeypatch):
    """mergekit's thread that collects results would go on for ever."""

    def interrupt(_futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(multigpu_executor.concurrent.futures, "as_completed", interrupt)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        merge(document("moe_ties", models=NAMES[1:], **MERGES["moe_ties"]), multi_gpu=True)
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:  # which would keep the process
            thread.join(60)
            assert not thread.is_alive(), thread
    assert not (here / "out").exists()


def test_caem_on_several_gpus(here, two_devices):
    models = []
    for seed, name in enumerate(("first", "second")):
        make_moe(here / name, "mixtral", seed)
        write(here / f"{name}.jsonl", words(seed, 12))
        models.append({"model": f"./{name}", "parameters": {"calibration": f"{name}.jsonl"}})
    check_alike(document("caem", models=models, base=None, parameters={"num_experts": 4}))


def test_states_of_prompts_do_not_depend_on_the_default_device(sources):
    model = AutoModelForCausalLM.from_pretrained(sources / "base").eval()
    ffns = ("model.layers.0.mlp", "model.layers.1.mlp")
    for average in (True, False):
        expected = hidden_states(model, ffns, ((5, 6, 7), (8, 9)), average=average)
        with torch.device("meta"):
            got = hidden_states(model, ffns, ((5, 6, 7), (8, 9)), average=average)
        assert torch.equal(got, expected)


def test_new_rows_do_not_depend_on_the_default_device():
    states = [(1.0, torch.randn(6)), (-1.0, torch.randn(6))]
    expected = random_tokens(90, 5, 3), offset_of_row(states, 0.5)
    with torch.device("meta"):
        tokens = random_tokens(90, 5, 3)
        offset = offset_of_row(states, 0.5)
    assert tokens == expected[0] and torch.equal(offset, expected[1])


def test_tensors_of_tasks_do_not_depend_on_the_default_device(tmp_path):
    old = torch.randn(3, 4)
    new = torch.randn(1, 4)
    task = SimpleNamespace(
        name="experts", old=SimpleNamespace(execute=lambda: old), axis=0, order=(3, 0), shape=(2, 4)
    )
    save_file({"text_embeds": torch.eye(4)}, tmp_path / "head.safetensors")
    head = FromHeadFile(
        path=str(tmp_path / "head.safetensors"), part="classes", shape=(4, 4), dtype="float32"
    )
    config = SimpleNamespace(hidden_size=16)
    writer._dtype_code.cache_clear()
    with torch.device("meta"):
        arranged = ArrangedExperts.execute(task, new=new)
        classes = head.execute()
        scaled, _ = scaled_embedding_and_head(old, config)
        code = writer._dtype_code(torch.bfloat16)
    assert torch.equal(arranged, torch.cat([new, old[:1]]))
    assert torch.allclose(classes, 100 * torch.eye(4))
    assert torch.equal(scaled, 4 * old) and code == "BF16"


def test_kernels_are_tried_on_tensors_of_the_cpu():
    expected = on_gpu._trial_tensors(torch.device("cpu"), torch.bfloat16)
    with torch.device("meta"):
        tried = on_gpu._trial_tensors(torch.device("cpu"), torch.bfloat16)
    for got, wanted in zip(tried, expected, strict=True):
        assert torch.equal(got, wanted)
