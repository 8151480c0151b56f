"""`caem`: every copied expert and router row against its source, and everything else against a
float64 average.
"""

import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mergekit_moe_ext import plan
from mergekit_moe_ext.caem.allocation import allocate, normalised_entropy
from mergekit_moe_ext.mixtures.experts import moe_layers
from tests.conftest import document, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.mixtures.test_usage import (
    FAMILIES,
    SWITCH,
    make_moe,
    usage_of,
    words,
    write,
)
from tests.tokenizers import save_tokenizer

TASKS = ("news", "squad", "xsum")
ALL = {**FAMILIES, "switch_transformers": SWITCH}
MORE = {
    "deepseek_v2": {
        **FAMILIES["deepseek_v3"],
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "head_dim": 8, "moe_topk": 2},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 8},
}


def load(path, family, **keywords):
    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    return auto.from_pretrained(path, **keywords)


def make_sources(where, family="mixtral", tasks=TASKS, **changes):
    for seed, task in enumerate(tasks):
        make_moe(where / task, family, seed=seed, **{**{**ALL, **MORE}[family], **changes})
        columns = ("input", "target") if family == "switch_transformers" else ("text",)
        write(where / f"{task}.jsonl", words(seed, 6, columns))


def entries(tasks=TASKS, **more):
    return [
        {"model": f"./{task}", "parameters": {"calibration": f"{task}.jsonl", **more}}
        for task in tasks
    ]


def caem(tasks=TASKS, models=None, base=None, **parameters):
    return document(
        "caem", models or entries(tasks), base=base, parameters={"max_length": 24, **parameters}
    )


def count(where, task):
    command = [
        "mergekit-moe-ext",
        "usage",
        task,
        "--data",
        f"{task}.jsonl",
        "-o",
        f"{task}.usage.json",
    ]
    done = run(*command, "--quiet", "--max-length", "24", cwd=where)
    assert done.returncode == 0, done.stderr


def expected_choice(usages, layer, number, sizes):
    """Per source the indices that are taken, by another sort than the package's."""
    counts = [usage.tasks[task].layers[layer].counts for task, usage in usages.items()]
    shares = allocate([normalised_entropy(c) for c in counts], number, sizes)
    return [
        sorted(sorted(range(len(c)), key=lambda i: (-c[i], i))[:n])
        for c, n in zip(counts, shares, strict=True)
    ]


def experts_of(model, router):
    """Every tensor of each expert of the block of a router, as the loaded model holds it."""
    module = model.get_submodule(f"{router.rsplit('.', 1)[0]}.experts")
    if hasattr(module, "expert_0"):
        return [list(module[f"expert_{i}"].parameters()) for i in range(len(module))]
    tensors = [t for _name, t in sorted(module.named_parameters())]
    return [list(of_expert) for of_expert in zip(*tensors, strict=True)]


@pytest.mark.parametrize("family", [*ALL, *MORE])
def test_every_family(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, family)
    usages = {task: usage_of(task, [f"{task}={task}.jsonl"]) for task in TASKS}
    out = merge(caem())
    merged, info = load(out, family, output_loading_info=True)
    assert not any(info.values()), info
    sources = [load(task, family) for task in TASKS]
    layers = moe_layers(merged.config)
    size = len(experts_of(sources[0], layers[0].router))
    taken = {}
    for layer in layers:
        chosen = expected_choice(usages, layer.router, size, [size] * 3)
        taken[layer.router] = [len(indices) for indices in chosen]
        slots = []
        for source, indices in zip(sources, chosen, strict=True):
            slots += [(source, index) for index in indices]
        mine = experts_of(merged, layer.router)
        assert len(mine) == len(slots) == size
        for expert, (source, index) in zip(mine, slots, strict=True):
            theirs = experts_of(source, layer.router)[index]
            assert len(expert) == len(theirs) > 0
            assert all(torch.equal(a, b) for a, b in zip(expert, theirs, strict=True))
        states = torch.randn(2, 5, 32)
        logits_at = 2 if family == "switch_transformers" else 0
        with torch.no_grad():
            got = merged.get_submodule(layer.router)(states)[logits_at].reshape(10, size)
            for slot, (source, index) in enumerate(slots):
                theirs = source.get_submodule(layer.router)(states)[logits_at].reshape(10, size)
                assert torch.allclose(got[:, slot], theirs[:, index], atol=1e-6)
        for name, buffer in merged.get_submodule(layer.router).named_buffers():
            if buffer.numel() == size:
                expected = [
                    s.get_submodule(layer.router).get_buffer(name).flatten()[i] for s, i in slots
                ]
                assert torch.equal(buffer.flatten(), torch.stack(expected))
    tensors = [read_tensors(tmp_path / task) for task in TASKS]
    got = read_tensors(out)
    for layer in layers:
        chosen = expected_choice(usages, layer.router, size, [size] * 3)
        for name, axis in layer.rows.items():
            parts = [
                t[name].index_select(axis, torch.tensor(c))
                for t, c in zip(tensors, chosen, strict=True)
            ]
            assert torch.equal(got[name], torch.cat(parts, dim=axis)), name
    for name in got:
        if (
            ".experts" in name
            or ".router." in name
            or ".gate." in name
            or "moe_statics" in name
            or "_linear" in name
        ):
            continue
        stack = name.split(".")[0] if name.startswith(("encoder", "decoder")) else ""
        numbers = [n for router, n in taken.items() if router.startswith(stack)]
        totals = [sum(column) for column in zip(*numbers, strict=True)]
        average = sum(n * t[name].double() for n, t in zip(totals, tensors, strict=True)) / sum(
            totals
        )
        assert torch.allclose(got[name].double(), average, atol=1e-6), name


def test_the_output_loads_where_this_package_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    merge(caem())
    script = (
        "import sys, torch\n"
        "for name in ('mergekit_moe_ext', '_mergekit_moe_ext_autoload', 'mergekit'): "
        "sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model, info = AutoModelForCausalLM.from_pretrained('out', output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "torch.save(model.eval()(torch.arange(20)[None]).logits.detach(), 'logits.pt')\n"
    )
    done = run(
        "python",
        "-c",
        script,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        here = load("out", "mixtral").eval()(torch.arange(20)[None]).logits
    assert torch.allclose(torch.load("logits.pt"), here, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers", "deepseek_v3"])
@pytest.mark.parametrize("router_scale", [False, True])
def test_one_source_is_that_source_bit_for_bit(tmp_path, monkeypatch, family, router_scale):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, family, TASKS[:1])
    got, source = (
        read_tensors(merge(caem(TASKS[:1], router_scale=router_scale))),
        read_tensors(tmp_path / "news"),
    )
    assert got.keys() == source.keys()
    assert all(
        torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype
        for name, tensor in source.items()
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    of_source = json.loads((tmp_path / "news/config.json").read_text())
    old_keys = {"rope_theta", "rope_scaling", "num_mtp_layers"}  # for readers with transformers 4
    assert {key: value for key, value in config.items() if key not in old_keys} == of_source


def test_a_model_and_its_renamed_copy_share_the_experts(tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "olmoe", TASKS[:1], num_experts=7)
    shutil.copytree("news", "copy")
    models = [
        {"model": f"./{name}", "parameters": {"calibration": "news.jsonl"}}
        for name in ("news", "copy")
    ]
    got, source = read_tensors(merge(caem(models=models))), read_tensors(tmp_path / "news")
    for layer in range(3):
        rows = got[f"model.layers.{layer}.mlp.gate.weight"]
        owners = [
            source[f"model.layers.{layer}.mlp.gate.weight"].eq(row).all(dim=1).nonzero().item()
            for row in rows
        ]
        first = next(i for i in range(1, 8) if i == 7 or owners[i] < owners[i - 1])
        assert first in (3, 4)
    assert torch.allclose(got["model.norm.weight"], source["model.norm.weight"])


def test_sources_of_different_sizes_and_more_experts_than_any_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (task, size) in enumerate({"news": 3, "squad": 5}.items()):
        make_moe(tmp_path / task, "qwen3_moe", seed=seed, num_experts=size)
        write(tmp_path / f"{task}.jsonl", words(seed, 6))
    with pytest.raises(click.ClickException, match=r"num_experts is needed.*news: 3, ./squad: 5"):
        merge(caem(("news", "squad")))
    merged = load(merge(caem(("news", "squad"), num_experts=8)), "qwen3_moe")
    news, squad = load("news", "qwen3_moe"), load("squad", "qwen3_moe")
    for mine, first, second in zip(
        merged.model.layers, news.model.layers, squad.model.layers, strict=True
    ):
        assert torch.equal(
            mine.mlp.gate.weight, torch.cat([first.mlp.gate.weight, second.mlp.gate.weight])
        )
    with pytest.raises(click.ClickException, match="the sources have 8 together"):
        merge(caem(("news", "squad"), num_experts=9), "more")


def test_fixed_allocation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "granitemoe", num_local_experts=8)
    models = [
        {"model": f"./{task}", "parameters": {"calibration": f"{task}.jsonl", "experts": number}}
        for task, number in zip(TASKS, (2, 3, 3), strict=True)
    ]
    out = merge(caem(models=models, allocation="fixed"))
    got, news = read_tensors(out), read_tensors(tmp_path / "news")
    name = "model.layers.0.block_sparse_moe.router.layer.weight"
    assert got[name].shape[0] == 8
    assert all(any(torch.equal(row, other) for other in news[name]) for row in got[name][:2])
    assert not any(torch.equal(got[name][2], other) for other in news[name])
    sums = (
        sum(
            n * read_tensors(tmp_path / t)["model.norm.weight"]
            for n, t in zip((2, 3, 3), TASKS, strict=True)
        )
        / 8
    )
    assert torch.allclose(got["model.norm.weight"], sums)
    card = (out / "README.md").read_text()
    assert (
        "| model.layers.0.block_sparse_moe.router |" in card
        and "| all | 0.2500 | 0.3750 | 0.3750 |" in card
    )
    with pytest.raises(click.ClickException, match="add up to 8"):
        merge(caem(models=models, allocation="fixed", num_experts=7), "other")


def test_shared_by_ties_takes_the_weights_and_the_ancestor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    make_moe(tmp_path / "base", "mixtral", seed=9, **FAMILIES["mixtral"])
    out = merge(caem(base="./base", shared="task_arithmetic", **{"lambda": 0.5}))
    base, got = read_tensors(tmp_path / "base"), read_tensors(out)
    row = next(
        line for line in (out / "README.md").read_text().splitlines() if line.startswith("| all |")
    )
    weights = [float(cell) for cell in row.split("|")[2:5]]
    name = "model.layers.1.self_attn.q_proj.weight"
    vectors = [read_tensors(tmp_path / task)[name] - base[name] for task in TASKS]
    assert torch.allclose(
        got[name],
        base[name] + 0.5 * sum(w * v for w, v in zip(weights, vectors, strict=True)),
        atol=1e-4,
    )
    with pytest.raises(click.ClickException, match="the ancestor of all sources"):
        merge(caem(base="./news", shared="task_arithmetic"), "other")
    with pytest.raises(click.ClickException, match="base_model"):
        merge(caem(shared="ties"), "other")


def test_router_scale_brings_the_routers_to_one_norm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "gpt_oss", TASKS[:2])
    loud = load("squad", "gpt_oss")
    with torch.no_grad():
        for layer in loud.model.layers:
            layer.mlp.router.weight *= 8
            layer.mlp.router.bias *= 8
    loud.save_pretrained("squad")
    plain = load(merge(caem(TASKS[:2]), "plain"), "gpt_oss")
    scaled = load(merge(caem(TASKS[:2], router_scale=True), "scaled"), "gpt_oss")
    news, squad = load("news", "gpt_oss"), load("squad", "gpt_oss")
    for index in range(3):
        before, after = (model.model.layers[index].mlp.router for model in (plain, scaled))
        norms = [
            model.model.layers[index].mlp.router.weight.norm(dim=1).mean()
            for model in (news, squad)
        ]
        number = sum(
            bool((news.model.layers[index].mlp.router.weight == row).all(dim=1).any())
            for row in before.weight
        )
        for rows, norm in ((slice(0, number), norms[0]), (slice(number, None), norms[1])):
            factor = (sum(norms) / 2 / norm).item()
            assert torch.allclose(after.weight[rows], before.weight[rows] * factor, rtol=1e-5)
            assert torch.allclose(after.bias[rows], before.bias[rows] * factor, rtol=1e-5)
        assert torch.equal(
            plain.model.layers[index].mlp.experts.down_proj,
            scaled.model.layers[index].mlp.experts.down_proj,
        )


def test_usage_files_do_as_calibration_does_and_those_of_other_models_are_refused(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    for task in TASKS:
        count(tmp_path, task)
    counted = merge(caem(), "counted")
    models = [
        {"model": f"./{task}", "parameters": {"usage": f"{task}.usage.json"}} for task in TASKS
    ]
    read = merge(caem(models=models), "read")
    first, second = read_tensors(counted), read_tensors(read)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    models[0]["parameters"]["usage"] = "squad.usage.json"
    with pytest.raises(click.ClickException, match="usage of another model"):
        merge(caem(models=models), "other")
    data = json.loads((tmp_path / "news.usage.json").read_text())
    data["tasks"]["news"]["layers"].popitem()
    (tmp_path / "cut.usage.json").write_text(json.dumps(data))
    models[0]["parameters"]["usage"] = "cut.usage.json"
    with pytest.raises(click.ClickException, match="names other routers"):
        merge(caem(models=models), "other")


def test_columns_of_a_model_s_own(tmp_path, monkeypatch):
    """The same texts under other names are the same merge, and a model's name goes before that of
    the merge.
    """
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "switch_transformers", TASKS[:2])
    usual = plan(caem(TASKS[:2])).notes
    rows = [json.loads(line) for line in (tmp_path / "squad.jsonl").read_text().splitlines()]
    renamed = [{"question": row["input"], "answer": row["target"]} for row in rows]
    write(tmp_path / "squad.jsonl", renamed)
    with pytest.raises(click.ClickException, match=r"squad.jsonl .* no column 'input'") as raised:
        plan(caem(TASKS[:2]))
    assert "`input_column`" in str(raised.value) and "--" not in str(raised.value)
    models = entries(TASKS[:2])
    models[1]["parameters"] |= {"input_column": "question", "target_column": "answer"}
    assert plan(caem(models=models)).notes == usual
    models[0]["parameters"] |= {"input_column": "input", "target_column": "target"}
    for key in ("input_column", "target_column"):
        del models[1]["parameters"][key]
    merged = caem(models=models, input_column="question", target_column="answer")
    assert plan(merged).notes == usual


def test_plan_prints_and_draws_the_allocation(tmp_path):
    make_sources(tmp_path)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(caem()))
    done = run(
        "mergekit-moe-ext", "plan", "config.yml", "--plot", "plan.png", "--quiet", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (
        "output    MixtralForCausalLM" in done.stdout
        and "4 experts per layer, 2 of them per token" in done.stdout
    )
    assert done.stdout.count("| model.layers.") == 3 and "| all |" in done.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and not (
        tmp_path / "out"
    ).exists()
    whole = run("mergekit-yaml", "config.yml", "out", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    again = run("mergekit-moe-ext", "plan", "config.yml", "--plot", "plan.png", cwd=tmp_path)
    assert again.returncode != 0 and "not overwritten" in again.stderr


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (caem(models=[{"model": "./news"}]), "`calibration` .data. or `usage`"),
        (caem(models=entries(("news",), usage="x.json")), "not both"),
        (
            caem(models=[{"model": "./news", "parameters": {"usage": "x", "text_column": "y"}}]),
            r"models\[0\].parameters .*`text_column` is for `calibration`",
        ),
        (caem(models=entries(("news",), experts=2)), "is for `allocation: fixed`"),
        (caem(allocation="fixed"), "needs `experts`"),
        (caem(allocation="entropie"), "`allocation` under `parameters:`"),
        (caem(num_experts=2), "3 sources, and each gives at least one"),
        (caem(num_experts=0), "`num_experts` under `parameters:`"),
        (caem(num_expert=4), "did you mean `num_experts`"),
        (caem(weight=2.0), "caem weighs each source"),
        (caem(models=entries(("news", "dense"))), "another family"),
        (caem(models=entries(("dense",))), "no router"),
        (caem(models=entries(("news", "wide"))), "another size"),
        (
            caem(models=[{"model": "./news", "parameters": {"calibration": "nowhere.jsonl"}}]),
            "does not exist",
        ),
        (caem(shared="caem"), "is not a tensor method"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, config, complaint):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    make_moe(tmp_path / "wide", "mixtral", **{**FAMILIES["mixtral"], "intermediate_size": 64})
    make_model(tmp_path / "dense", 0)
    write(tmp_path / "dense.jsonl", words(1, 2))
    write(tmp_path / "wide.jsonl", words(1, 2))
    with pytest.raises(click.ClickException, match=complaint):
        merge(config)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("number", "complaint"),
    [(3, "2 groups"), (2, "must be at least 4"), (6, None)],
)
def test_deepseek_s_groups(tmp_path, monkeypatch, number, complaint):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "deepseek_v3", TASKS[:2])
    config = caem(TASKS[:2], num_experts=number)
    if complaint:
        with pytest.raises(click.ClickException, match=complaint):
            merge(config)
    else:
        assert (
            load(merge(config), "deepseek_v3")
            .eval()(torch.arange(20)[None])
            .logits.isfinite()
            .all()
        )


def test_more_limits_of_routing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "deepseek_v3", TASKS[:2], n_routed_experts=8, num_experts_per_tok=3)
    with pytest.raises(click.ClickException, match="hold only 2 with num_experts 4"):
        merge(caem(TASKS[:2], num_experts=4))
    make_moe(
        tmp_path / "deep", "deepseek_v3", **{**FAMILIES["deepseek_v3"], "first_k_dense_replace": 2}
    )
    write(tmp_path / "deep.jsonl", words(1, 2))
    with pytest.raises(click.ClickException, match="in other layers"):
        merge(caem(("news", "deep"), num_experts=4))
    make_sources(tmp_path, "mixtral", ("squad",))
    with pytest.raises(
        click.ClickException, match="choose 2 experts per token; num_experts is only 1"
    ):
        merge(caem(("squad",), num_experts=1))
    models = entries(("squad",), experts=5)
    with pytest.raises(
        click.ClickException, match=r"`experts: 5` for ./squad is more than the 4 that it has"
    ):
        merge(caem(models=models, allocation="fixed"))
    with pytest.raises(click.ClickException, match="does not truncate"):
        merge(caem(("squad",)), unsafe_truncate_embeddings=True)


def edit_usage(where, task, change):
    path = where / f"{task}.usage.json"
    data = json.loads(path.read_text())
    for router, layer in data["tasks"][task]["layers"].items():
        layer["counts"] = change(router, layer["counts"])
    path.write_text(json.dumps(data))


def usage_entries(tasks):
    return [{"model": f"./{task}", "parameters": {"usage": f"{task}.usage.json"}} for task in tasks]


def test_a_usage_file_that_was_counted_in_the_other_way_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "switch_transformers", TASKS[:2])
    for count in ("chosen", "dispatched"):
        (tmp_path / count).mkdir()
        for task in TASKS[:2]:
            usage = usage_of(task, [f"{task}={task}.jsonl"], count=count)
            usage.write(tmp_path / count / f"{task}.usage.json")
    # as earlier versions wrote it
    old = json.loads((tmp_path / "dispatched" / "news.usage.json").read_text())
    assert old.pop("count") == "dispatched"
    for layer in old["tasks"]["news"]["layers"].values():
        layer.pop("dropped")
    (tmp_path / "dispatched" / "news.usage.json").write_text(json.dumps(old))

    def listed(counts):
        return [
            {"model": f"./{task}", "parameters": {"usage": f"{count}/{task}.usage.json"}}
            for task, count in zip(TASKS, counts, strict=False)
        ]

    with pytest.raises(click.ClickException, match=r"news.usage.json .*`count: dispatched`"):
        merge(caem(models=listed(["dispatched", "chosen"])))
    with pytest.raises(click.ClickException, match=r"squad.usage.json .*`count: chosen`"):
        merge(caem(models=listed(["dispatched", "chosen"]), count="dispatched"))
    models = listed(["dispatched", "dispatched"])
    read = read_tensors(merge(caem(models=models, count="dispatched"), "read"))
    counted = read_tensors(merge(caem(TASKS[:2], count="dispatched"), "counted"))
    assert read.keys() == counted.keys()
    assert all(torch.equal(read[name], counted[name]) for name in read)


def test_without_a_capacity_both_ways_of_counting_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:1])
    usage = usage_of("news", ["news=news.jsonl"])
    assert all(layer.dropped is None for layer in usage.tasks["news"].layers.values())
    content = usage.model_dump(exclude={"count"})
    (tmp_path / "news.usage.json").write_text(json.dumps(content))
    planned = plan(caem(models=usage_entries(TASKS[:1])))
    assert "dropped" not in planned.notes


def test_the_plan_says_what_the_capacity_dropped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "switch_transformers", TASKS[:2])
    usage = usage_of("news", ["news=news.jsonl"])
    planned = plan(caem(TASKS[:2]))
    assert "(counted: chosen)" in planned.notes
    rows = [line.split("|") for line in planned.notes.splitlines() if ".router |" in line]
    assert len(rows) == 3
    for row in rows:
        layer = usage.tasks["news"].layers[row[1].strip()]
        share = sum(layer.dropped) / layer.tokens
        assert 0 < share < 1 and row[2].endswith(f", {share:.1%} dropped ")


def test_the_figure_has_encoder_and_decoder_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "switch_transformers", TASKS[:2])
    usages = {task: usage_of(task, [f"{task}={task}.jsonl"]) for task in TASKS[:2]}
    saved = []
    figures = pytest.importorskip("matplotlib.figure")
    save = figures.Figure.savefig

    def savefig(figure, *arguments, **keywords):
        saved.append(figure)
        return save(figure, *arguments, **keywords)

    monkeypatch.setattr(figures.Figure, "savefig", savefig)
    plan(caem(TASKS[:2])).draw(tmp_path / "plan.png")
    panels = {axes.get_title(): axes for axes in saved[0].axes if axes.get_title()}
    assert list(panels) == [f"{task} ({s})" for s in ("encoder", "decoder") for task in TASKS[:2]]
    for stack in ("encoder", "decoder"):
        layers = [name for name in usages["news"].tasks["news"].layers if name.startswith(stack)]
        for index, task in enumerate(TASKS[:2]):
            axes = panels[f"{task} ({stack})"]
            counts = torch.tensor([usages[task].tasks[task].layers[name].counts for name in layers])
            shares = counts / counts.sum(dim=1, keepdim=True)
            assert axes.images[0].get_array().tolist() == pytest.approx(shares.numpy())
            crosses = []
            for row, name in enumerate(layers):
                taken = expected_choice(usages, name, 4, [4, 4])[index]
                crosses += [[expert, row] for expert in taken]
            assert axes.collections[0].get_offsets().tolist() == crosses


def test_encoder_and_decoder_have_weights_of_their_own(tmp_path, monkeypatch):
    """In the encoder `news` uses one expert and `squad` all evenly; in the decoder the other way
    round.
    """
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, "switch_transformers", TASKS[:2])
    for task, narrow in (("news", "encoder"), ("squad", "decoder")):
        count(tmp_path, task)
        edit_usage(
            tmp_path,
            task,
            lambda router, _counts, n=narrow: [9, 0, 0, 0] if router.startswith(n) else [5] * 4,
        )
    got = read_tensors(merge(caem(models=usage_entries(TASKS[:2]))))
    news, squad = (read_tensors(tmp_path / task) for task in TASKS[:2])
    for name, of_news in (
        ("encoder.final_layer_norm.weight", 1 / 4),
        ("decoder.final_layer_norm.weight", 3 / 4),
        ("shared.weight", (1 + 1 + 3) / 12),  # two layers in the encoder, one in the decoder
    ):
        assert torch.allclose(
            got[name], of_news * news[name] + (1 - of_news) * squad[name], atol=1e-6
        ), name


def test_usage_of_another_shape_or_of_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:1])
    for change, complaint in (
        (lambda _router, counts: [*counts, 7], "names other routers or experts"),
        (lambda router, counts: [0] * 4 if ".1." in router else counts, "was ever chosen"),
    ):
        (tmp_path / "news.usage.json").unlink(missing_ok=True)
        count(tmp_path, "news")
        edit_usage(tmp_path, "news", change)
        with pytest.raises(click.ClickException, match=complaint):
            merge(caem(models=usage_entries(TASKS[:1])))


def test_fine_tunes_with_the_same_routers_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:2])
    news, squad = load("news", "mixtral"), load("squad", "mixtral")
    for mine, theirs in zip(squad.model.layers, news.model.layers, strict=True):
        mine.mlp.gate.load_state_dict(theirs.mlp.gate.state_dict())
    squad.save_pretrained("squad")
    for task in TASKS[:2]:
        count(tmp_path, task)
    merge(caem(models=usage_entries(TASKS[:2])))
    (tmp_path / "news.usage.json").rename(tmp_path / "squad.usage.json")
    with pytest.raises(click.ClickException, match="usage of another model"):
        merge(caem(models=usage_entries(TASKS[1:2])), "other")


def test_a_model_of_which_single_rows_were_trained_is_another(tmp_path, monkeypatch):
    """As `train --train gates --only-experts 3` trains them."""
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:2])
    for task in TASKS[:2]:
        count(tmp_path, task)
    news = load("news", "mixtral")
    with torch.no_grad():
        news.model.layers[0].mlp.gate.weight[3] += 1
    news.save_pretrained("news")
    with pytest.raises(click.ClickException, match=r"news.usage.json is the usage of another"):
        merge(caem(models=usage_entries(TASKS[:2])))


def test_usage_with_another_number_of_experts_per_token_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:2])
    for task in TASKS[:2]:
        count(tmp_path, task)
        path = tmp_path / task / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    complaint = "counted with 2 experts per token, and ./news chooses 1"
    with pytest.raises(click.ClickException, match=complaint):
        merge(caem(models=usage_entries(TASKS[:2])))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("ernie4_5_moe", {"moe_k": 3}),
        ("hunyuan_v1_moe", {"moe_topk": 1}),
        ("granitemoe", {"embedding_multiplier": 12.0, "logits_scaling": 6.0}),
        ("mixtral", {"rms_norm_eps": 1e-3}),
        ("mixtral", {}),
    ],
)
def test_sources_that_compute_differently_are_warned_about(
    tmp_path, monkeypatch, caplog, family, changes
):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, family, TASKS[:2])
    path = tmp_path / "squad" / "config.json"
    config = json.loads(path.read_text())
    in_training_alone = {"attention_dropout": 0.2, "router_aux_loss_coef": 0.5, "use_cache": False}
    path.write_text(json.dumps({**config, **in_training_alone, **changes}))
    merge(caem(TASKS[:2]))
    warnings = [line for line in caplog.messages if "the output has that of" in line]
    assert len(warnings) == len(changes)
    for key, value in changes.items():
        assert any(f"`{key}` of ./squad is {value};" in line for line in warnings)


@pytest.mark.parametrize("tied", TASKS[:2])
def test_a_tied_source_gives_its_embedding_for_the_head(tmp_path, monkeypatch, tied):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:2])
    make_moe(tmp_path / tied, "mixtral", seed=7, **ALL["mixtral"], tie_word_embeddings=True)
    out = merge(caem(TASKS[:2], allocation="entropy", num_experts=4))
    got = read_tensors(out)
    card = (out / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| all |"))
    weights = [float(cell) for cell in row.split("|")[2:4]]
    heads = []
    for task in TASKS[:2]:
        tensors = read_tensors(tmp_path / task)
        heads.append(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
    expected = weights[0] * heads[0] + weights[1] * heads[1]
    torch.testing.assert_close(got["lm_head.weight"], expected, atol=1e-3, rtol=0)
    assert not torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert not load(out, "mixtral").config.tie_word_embeddings


def test_a_source_listed_twice_with_two_calibrations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    models = [
        {"model": "./news", "parameters": {"calibration": f"{task}.jsonl"}} for task in TASKS[:2]
    ]
    models.append({"model": "./xsum", "parameters": {"calibration": "xsum.jsonl"}})
    got = read_tensors(merge(caem(models=models, num_experts=6)))
    news, xsum = read_tensors(tmp_path / "news"), read_tensors(tmp_path / "xsum")
    card = (tmp_path / "out" / "README.md").read_text()
    weight = float(
        next(line for line in card.splitlines() if line.startswith("| all |")).split("|")[2]
    )
    name = "model.norm.weight"
    assert torch.allclose(got[name], weight * news[name] + (1 - weight) * xsum[name], atol=1e-3)
    assert weight > 0.5


def test_families_whose_routers_are_no_rows_are_refused():
    from transformers import AutoConfig

    config = AutoConfig.for_model("zaya", num_hidden_layers=2, hidden_size=32, num_experts=4)
    config.architectures = ["ZayaForCausalLM"]
    with pytest.raises(
        click.ClickException, match=r"one entry per expert|more than a row|do not lie"
    ):
        moe_layers(config)


def test_a_method_without_weights_is_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    merge(caem(shared="karcher"))
    assert "karcher has no `weight`" in caplog.text


def test_the_union_of_vocabularies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path, tasks=TASKS[:1])
    make_moe(tmp_path / "squad", "mixtral", seed=1, **FAMILIES["mixtral"])
    save_tokenizer(tmp_path / "squad", 96, extra=("new",))
    write(tmp_path / "squad.jsonl", words(1, 6))
    out = merge({**caem(TASKS[:2]), "tokenizer": {"source": "union"}})
    assert read_tensors(out)["model.embed_tokens.weight"].shape[0] == 97
    assert load(out, "mixtral").eval()(torch.arange(20)[None]).logits.shape[-1] == 97


def test_a_killed_merge_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    make_sources(tmp_path)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(caem()))
    waits = (
        "import time, sys\n"
        "from mergekit_moe_ext.merging.tasks import ExpertRows\n"
        "stock = ExpertRows.execute\n"
        "def execute(self, **kw):\n"
        "    open('working', 'w').close(); time.sleep(60); return stock(self, **kw)\n"
        "ExpertRows.execute = execute\n"
        "from mergekit_moe_ext.cli import main\n"
        "main(['yaml', 'config.yml', 'out'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", waits], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if (tmp_path / "working").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "working").exists() and not (tmp_path / "out").exists()
    done = run("mergekit-yaml", "config.yml", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob(".out.partial*")) and (tmp_path / "out" / "config.json").exists()


def test_dtypes_and_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    whole = merge({**caem(), "dtype": "float32", "out_dtype": "bfloat16"}, "whole")
    shards = merge(
        {**caem(), "dtype": "float32", "out_dtype": "bfloat16"}, "shards", out_shard_size=20_000
    )
    assert {tensor.dtype for tensor in read_tensors(whole).values()} == {torch.bfloat16}
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert all(
        torch.equal(read_tensors(shards)[name], tensor)
        for name, tensor in read_tensors(whole).items()
    )
