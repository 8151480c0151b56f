"""Libraries of mttl become LoRA directories that compute what mttl's `LoRA.forward` computes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from torch import Tensor

from peft_routing import UserError, compose, import_mttl
from peft_routing.cli import main
from tests.peft_routing.adapters import make_base

IDS = torch.tensor([[5, 17, 40, 9, 66, 31]])
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": out
    for layer in range(3)
    for name, out in (("q_proj", 32), ("k_proj", 16), ("o_proj", 32))
}
NAMES = ("adversarial_qa", "race", "wiqa")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights(seed: int, rank: int = 4) -> dict[str, Tensor]:
    """What mttl keeps of an expert: lora_a (in, rank) and lora_b (rank, out)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, out in MODULES.items():
        tensors[f"{module}.lora_a"] = torch.randn(32, rank, generator=generator) * 0.2
        tensors[f"{module}.lora_b"] = torch.randn(rank, out, generator=generator) * 0.2
    return tensors


def info(name: str, **config: Any) -> dict[str, Any]:
    """What mttl says of an expert, as its `MetadataEntry.asdict` does."""
    return {
        "expert_name": name,
        "expert_task_name": name,
        "parent_node": None,
        "expert_config": {
            "modify_modules": ".*",
            "modify_layers": "q_proj|k_proj|o_proj",
            "tie_params": None,
            "lora_rank": 4,
            "lora_alpha": 16.0,
            "lora_dropout": 0.05,
            "class_name": "mttl.models.modifiers.lora.LoRAConfig",
            **config,
        },
        "training_config": {"model": "microsoft/phi-2", "model_family": "gpt"},
        "expert_model": "microsoft/phi-2",
        "expert_deleted": False,
        "class_name": "mttl.models.library.expert_library.MetadataEntry",
    }


def write(directory: Path, name: str, tensors: Mapping[str, Tensor], said: Any) -> None:
    directory.mkdir(exist_ok=True)
    torch.save(dict(tensors), directory / f"{name}.ckpt")
    torch.save(said, directory / f"{name}.meta")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in reversed(list(enumerate(NAMES))):
        write(tmp_path / "library", name, weights(seed), info(name))
    return tmp_path / "library"


def with_mttl(tensors: Mapping[str, Tensor], scaling: float) -> Any:
    """The base with `output + matmul(matmul(input, lora_a), lora_b) * scaling` at each module."""
    model = make_base()
    for module in MODULES:
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]

        def add(_: Any, inputs: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return output + torch.matmul(torch.matmul(inputs[0], a), b) * scaling

        model.get_submodule(module).register_forward_hook(add)
    return model


def test_the_experts_compute_what_they_compute_in_mttl(library: Path) -> None:
    result = CliRunner().invoke(main, ["import-mttl", "library", "-o", "experts"])
    assert result.exit_code == 0, result.output
    assert result.output == "experts: 3 experts, scaling 4\n"
    for seed, name in enumerate(NAMES):
        expected = logits(with_mttl(weights(seed), scaling=16 / 4))
        assert (expected - logits(make_base())).abs().max() > 1e-2
        model = PeftModel.from_pretrained(make_base(), f"experts/{name}").eval()
        torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)

    make_base().save_pretrained("base")
    config = compose(
        "base", {}, "routed", experts_from="experts", router="fixed", weights=[0, 1, 0]
    )
    assert config.names == list(NAMES)
    model = PeftModel.from_pretrained(make_base(), "routed").eval()
    expected = logits(with_mttl(weights(1), scaling=16 / 4))
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    said = json.loads(Path("experts/race/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"]) == (4, 16)
    assert said["base_model_name_or_path"] == "microsoft/phi-2"
    assert said["task_type"] == "CAUSAL_LM"


def test_all_have_the_scaling_of_the_first_by_name(library: Path) -> None:
    write(library, "wiqa", weights(2, rank=2), info("wiqa", lora_rank=2, lora_alpha=1.0))
    result = CliRunner().invoke(main, ["import-mttl", "library", "-o", "experts"])
    assert "1 experts, wiqa among them, were trained with another scaling" in result.output
    assert "that of adversarial_qa" in result.output
    model = PeftModel.from_pretrained(make_base(), "experts/wiqa").eval()
    expected = logits(with_mttl(weights(2, rank=2), scaling=16 / 4))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_shared_factors_are_written_out(library: Path) -> None:
    tied = r"q_proj.*\.lora_a|k_proj.*\.lora_a"
    tensors = weights(0)
    for module in MODULES:
        if "k_proj" in module:
            tensors[f"{module}.lora_a"] = tensors[f"{module.replace('k_', 'q_')}.lora_a"]
    expected = logits(with_mttl(tensors, scaling=4))
    kept = {name: t for name, t in tensors.items() if not name.endswith("k_proj.lora_a")}
    write(library, "race", kept, info("race", tie_params=tied))
    import_mttl(["library/race.ckpt"], "experts")
    model = PeftModel.from_pretrained(make_base(), "experts/race").eval()
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    write(library, "race", kept, info("race"))
    with pytest.raises(UserError, match=r"race\.ckpt: .*k_proj has no lora_a"):
        import_mttl(["library/race.ckpt"], "others")


def test_an_older_library_and_deleted_experts(library: Path) -> None:
    old = info("race")
    old["training_config"] |= {"lora_rank": 4, "lora_alpha": 8.0}
    del old["expert_config"], old["expert_model"]
    write(library, "race", weights(1), old)
    write(library, "adversarial_qa", weights(0), info("adversarial_qa") | {"expert_deleted": True})
    assert import_mttl(["library"], "experts") == {"race": 2.0, "wiqa": 4.0}
    assert sorted(path.name for path in Path("experts").iterdir()) == ["race", "wiqa"]
    said = json.loads(Path("experts/wiqa/adapter_config.json").read_text())
    assert said["lora_alpha"] == 8


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def skilled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[None, None] for name, tensor in tensors.items()}


def private(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("self_attn.q_proj", "mixer.Wqkv"): t for name, t in tensors.items()}


WRONG: dict[str, tuple[Any, Any, str]] = {
    "code in the weights": ({"a": Runs()}, info("race"), r"race\.ckpt holds more than tensors"),
    "code in the metadata": (weights(1), {"a": Runs()}, r"race\.meta holds more than tensors"),
    "no scaling": (weights(1), {"expert_name": "race"}, "says no lora_alpha and lora_rank"),
    "rank 0": (weights(1), info("race", lora_rank=0), "says no lora_alpha and lora_rank"),
    "another modifier": (
        weights(1),
        info("race", class_name="mttl.models.modifiers.ia3.IA3Config"),
        "its expert is a mttl.models.modifiers.ia3.IA3Config; only LoRAs are imported",
    ),
    "skilled": (skilled(weights(1)), info("race"), r"\(1, 1, 32, 4\) is no factor of a LoRA"),
    "another name": ({"lora": torch.ones(2, 2)}, info("race"), r"lora \(2, 2\) is no factor"),
    "the private Phi-2": (private(weights(1)), info("race"), "convert_library_to_hf_phi2.py first"),
    "nothing": ({}, info("race"), "holds no LoRA"),
    "not finite": (
        {name: tensor / 0 for name, tensor in weights(1).items()},
        info("race"),
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_library_is_refused_and_nothing_is_written(library: Path, case: str) -> None:
    tensors, said, reason = WRONG[case]
    write(library, "race", tensors, said)
    with pytest.raises(UserError, match=reason):
        import_mttl(["library"], "experts")
    assert not Path("experts").exists() and not Path("ran").exists()


def test_files_that_are_not_there(library: Path) -> None:
    (library / "race.meta").unlink()
    with pytest.raises(UserError, match=r"race\.meta is missing"):
        import_mttl(["library"], "experts")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no \*\.ckpt"):
        import_mttl(["empty"], "experts")
    with pytest.raises(UserError, match=r"nowhere\.ckpt does not exist"):
        import_mttl(["nowhere.ckpt"], "experts")
    with pytest.raises(UserError, match="two files are of one expert"):
        import_mttl(["library", "library/wiqa.ckpt"], "experts")
    Path("experts").mkdir()
    Path("experts/mine").touch()
    with pytest.raises(UserError, match="experts"):
        import_mttl(["library"], "experts")
