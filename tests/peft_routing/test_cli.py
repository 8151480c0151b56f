"""`peft-route` as a stranger would use it: compose, train, inspect, and mistakes."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_routing import RoutedLoraConfig
from peft_routing.cli import main
from peft_routing.routers import all_routers
from tests.conftest import run
from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

IDS = torch.tensor([[5, 17, 40, 9, 66, 31]])
OPTIONS = {
    "fixed": ["--weight", "math=0.5", "--weight", "code=0.25", "--weight", "law=1"],
    "hierarchical": [
        "--cluster",
        "math=a",
        "--cluster",
        "code=a",
        "--cluster",
        "law=b",
        "--init",
        "arrow",
    ],
    "arrow": ["--top-k", "2", "--router-temperature", "0.5"],
    "linear": ["--init", "arrow", "--mixing", "full"],
    "mlp": ["--mlp-layers", "0", "--init-lambda", "0.2"],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared")
    make_base().save_pretrained(path / "base")
    save_tokenizer(path / "base", 96)
    save_experts(path)
    for name, words in (("news", "w1 w2 w3 w4 w5 w6"), ("law", "w40 w41 w42 w43")):
        (path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{words} w{i}"}) + "\n" for i in range(6))
        )
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, prepared):
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def route(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def compose(*arguments, output="routed"):
    experts = [word for name in ("math", "code", "law") for word in ("--expert", f"{name}={name}")]
    return route("compose", "base", *experts, "-o", output, *arguments)


@pytest.mark.parametrize("router", sorted({"uniform", "global", "layer", *OPTIONS}))
def test_composing_without_the_base_models_weights_equals_composing_with_them(here, router):
    assert router in all_routers()
    result = compose("--router", router, *OPTIONS.get(router, []))
    assert result.exit_code == 0, result.output
    config = RoutedLoraConfig.from_pretrained("routed")
    settings = {
        name: getattr(config, name)
        for name in (
            "top_k",
            "router_temperature",
            "init",
            "score",
            "weights",
            "clusters",
            "mixing",
            "mlp_layers",
            "init_lambda",
        )
    }
    experts = {name: name for name in ("math", "code", "law")}
    expected = get_peft_model(
        make_base(), RoutedLoraConfig(experts=experts, router=router, **settings)
    ).eval()
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "routed"
    ).eval()
    assert loaded.peft_config["default"].names == ["math", "code", "law"]
    assert loaded.peft_config["default"].base_model_name_or_path == "base"
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.mark.parametrize("router", sorted(OPTIONS))
def test_an_option_by_its_name_is_that_of_its_own_flag(here, router):
    flags = OPTIONS[router]
    by_name = {
        "fixed": ['weights={"math": 0.5, "code": 0.25, "law": 1.0}'],
        "hierarchical": ['clusters={"math": "a", "code": "a", "law": "b"}', "init=arrow"],
        "arrow": ["top_k=2", "router_temperature=0.5"],
        "linear": ["init=arrow"],
        "mlp": ["mlp_layers=0", "init_lambda=0.2"],
    }
    options = [f"--router-option={text}" for text in by_name[router]]
    if "--mixing" in flags:
        options += ["--mixing", "full"]
    assert compose("--router", router, *flags, output="one").exit_code == 0
    result = compose("--router", router, *options, output="other")
    assert result.exit_code == 0, result.output
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("one", name).read_bytes() == Path("other", name).read_bytes()


def test_experts_without_names_are_called_by_their_directories(here):
    result = route("compose", "base", "--expert", "math", "--expert", "./law/", "-o", "routed")
    assert "2 experts (math, law)" in result.output


def test_a_directory_may_have_an_equals_sign_in_its_name(here):
    (here / "lr=1").mkdir()
    (here / "lr=1" / "tax").symlink_to(here / "law")
    result = route("compose", "base", "--expert", "math", "--expert", "lr=1/tax", "-o", "routed")
    assert "2 experts (math, tax)" in result.output


def test_inspect_tells_coefficients_per_task_and_module(here):
    compose("--router", "arrow", "--top-k", 2)
    result = route(
        "inspect", "routed", "--data", "news.jsonl", "--data", "law.jsonl", "-o", "means.json",
        "--plot", "map.png", "--batch-size", 4, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("means.json").read_text())
    assert found["experts"] == ["math", "code", "law"]
    assert set(found["tasks"]) == {"news", "law"} and len(found["tasks"]["law"]) == 9
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "routed").eval()
    name = "model.layers.1.mlp.down_proj"
    seen = []
    layer = model.get_base_model().get_submodule(name)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for i in range(6):  # w40 is token 42, and so on
        model(input_ids=torch.tensor([[42, 43, 44, 45, 2 + i]]))
    scores = (torch.cat(seen) @ layer.routed_lora_router["default"].weight.T).abs()
    kept = scores.softmax(-1) * (scores >= scores.topk(2).values[:, 1:])
    expected = (kept / kept.sum(-1, keepdim=True)).mean(dim=0)
    assert torch.tensor(found["tasks"]["law"][name]).float() == pytest.approx(
        expected.detach(), abs=1e-5
    )
    rows = [line.split() for line in result.output.splitlines()]
    means = torch.tensor(list(found["tasks"]["law"].values())).mean(dim=0)
    assert ["law", *(f"{mean:.3f}" for mean in means)] in rows
    assert (
        "exists and is not overwritten"
        in route("inspect", "routed", "--data", "law.jsonl", "-o", "means.json").output
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--router", "arrow", "--top-k", "4"], "there are 3 experts"),
        (["--router", "uniform", "--top-k", "2"], "top_k is not an option of router='uniform'"),
        (["--router", "fixed"], "needs weights="),
        (["--router", "fixed", "--weight", "math=x"], "x is not a number"),
        (["--router", "hierarchical", "--cluster", "math"], "write NAME=VALUE"),
        (["--router", "mlp", "--router-option", "mlp_layers=two"], "is not of the type int | None"),
        (["--router", "mlp", "--router-option", "mlp_layer=1"], "did you mean 'mlp_layers'?"),
        (["--router", "mlp", "--router-option", "mlp_layers"], "write NAME=VALUE"),
        (["--top-k", "1", "--router-option", "top_k=2"], "give it once"),
        (["--expert", "law"], "name all experts, or none"),
        (["--expert", "=math"], "--expert =math: write the expert's name and its adapter"),
        (["--expert", "tax="], "--expert tax=: write the expert's name and its adapter"),
        (["--expert", "law=math"], "two experts are named 'law', law and math: give each a name"),
        (["--weight", "law=1", "--weight", "law=2"], "'law' is named twice, with 1 and 2"),
        (["--router", "distance"], "run its file, which ends with a call of peft_routing.cli.main"),
        (["--expert", "tax=nowhere"], "nowhere"),
        (["--expert", f"{'x' * 300}=nowhere"], "nowhere"),
        (["--expert", "tax=./base"], "has no adapter_config.json"),
    ],
)
def test_mistakes_leave_nothing_behind(here, arguments, complaint):
    before = sorted(Path().iterdir())
    result = compose(*arguments)
    assert result.exit_code == 1
    assert complaint in result.output
    assert "Traceback" not in result.output
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("base", ["./base/", "base"])
def test_a_base_that_is_not_found_from_here_is_the_adapters(here, monkeypatch, base):
    experts = ["--expert", "math=math", "--expert", "code=code"]
    assert route("compose", base, *experts, "-o", "routed").exit_code == 0
    routed, data = Path("routed").absolute(), Path("law.jsonl").absolute()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for command in (["export", routed, "-o", "lora"], ["inspect", routed, "--data", data]):
        result = route(*command)
        assert result.exit_code == 1
        assert (
            f"the adapter names {base} as its base model, which is not found from here: give --base"
            in result.output
        )
        assert route(*command, "--base", here / "base").exit_code == 0


def test_a_random_start_is_that_of_its_seed(here):
    for output, seed in (("one", 1), ("same", 1), ("other", 2)):
        assert compose("--router", "mlp", "--seed", seed, output=output).exit_code == 0
    one, same, other = (
        Path(name, "adapter_model.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other


def test_names_may_have_spaces_and_signs(here):
    names = {"math v1.0": "math", "code+x": "code"}
    options = [f"--expert={name}={path}" for name, path in names.items()]
    assert route("compose", "base", *options, "-o", "named").exit_code == 0
    inspected = route("inspect", "named", "--data", "math v1.0=news.jsonl", "-o", "named.json")
    assert inspected.exit_code == 0, inspected.output
    assert "math v1.0" in json.loads(Path("named.json").read_text())["tasks"]
    exported = route("export", "named", "-o", "experts")
    assert exported.output.endswith("experts: math-v1.0, code-x\n")
    folders = sorted(path.name for path in Path("experts").iterdir())
    assert folders == ["code-x", "math-v1.0"]


@pytest.mark.parametrize("rate", ["nan", "inf", "0"])
def test_a_learning_rate_is_a_number_above_0(here, rate):
    assert compose("--router", "linear").exit_code == 0
    result = route("train", "routed", "--data", "news.jsonl", "--learning-rate", rate)
    assert result.exit_code == 2 and rate in result.output and "Traceback" not in result.output


def test_an_output_that_exists_is_left_alone(here):
    compose()
    weights = Path("routed/adapter_model.safetensors").read_bytes()
    again = compose("--router", "uniform")
    assert again.exit_code == 1 and "is not empty" in again.output
    assert Path("routed/adapter_model.safetensors").read_bytes() == weights


def test_the_installed_command(here):
    assert compose("--router", "linear").exit_code == 0
    options = [
        "--data",
        "news.jsonl",
        "--num-train-epochs",
        "1",
        "--held-out",
        "2",
        "--learning-rate",
        "0.01",
    ]
    trained = run("peft-route", "train", "routed", *options)
    assert trained.returncode == 0, trained.stderr
    assert "news" in trained.stdout and Path("routed-trained/adapter_model.safetensors").exists()
    assert "FutureWarning" not in trained.stderr  # nobody who runs a command can do what they ask
    for command in ("compose", "train", "inspect"):
        assert "Usage" in route(command, "--help").output
