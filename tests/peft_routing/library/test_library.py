"""A library of adapters: its list, duplicates, clusters, selection and a name per request."""

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

import peft_routing
from peft_routing import Reading, UserError, adapter_files, library
from peft_routing.cli import main
from peft_routing.fusion import report
from peft_routing.library.centroids import nearest
from tests.peft_routing.adapters import make_base, save_lora
from tests.tokenizers import save_tokenizer

NAMES = ("math", "code", "law", "art")
QUIET = Reading(quiet=True)


def texts_of(task, count=4):
    """Texts of a task's own words."""
    first = 20 * NAMES.index(task)
    texts = []
    for row in range(count):
        places = [(7 * row + 3 * step) % 18 for step in range(5 + row)]
        texts.append(" ".join(f"w{first + place}" for place in places))
    return texts


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base model, four adapters and a copy of one, texts, and a library of all."""
    root = tmp_path_factory.mktemp("prepared")
    make_base().save_pretrained(root / "base")
    save_tokenizer(root / "base", 96)
    for seed, name in enumerate(NAMES, 1):
        save_lora(root / "experts" / name, seed)
        write(root / f"{name}.jsonl", texts_of(name))
    shutil.copytree(root / "experts" / "law", root / "experts" / "law-again")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        data = [f"--data={name}={name}.jsonl" for name in NAMES]
        more = ["--data=law-again=law.jsonl", "--task=law-again=law"]
        result = call("add", "lib", "--base", "base", "--experts-from", "experts", *data, *more)
        assert "5 added, 5 adapters" in result, result
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, prepared):
    """A copy of all, beside which nothing of the original is needed."""
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    monkeypatch.chdir(copy)
    return copy


def call(*arguments):
    result = CliRunner().invoke(main, ["library", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout  # without progress bars


def refusal(*arguments):
    result = CliRunner().invoke(main, ["library", *arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    return result.output


def test_adapters_are_listed_and_referenced_not_copied(here):
    assert call("list", "lib").splitlines()[0] == "art: rank 4, task art"
    shown = json.loads(call("show", "lib", "law-again"))
    assert shown["location"] == str(here / "experts" / "law-again")
    assert shown["path"] == "experts/law-again" and shown["task"] == "law"
    assert shown["ranks"] == [4] and shown["targets"] == ["down_proj", "q_proj", "v_proj"]
    tensors = load_file(here / "experts" / "law" / "adapter_model.safetensors")
    for file in (here / "lib" / "index").iterdir():
        assert not tensors.keys() & load_file(file).keys()
    assert library.Library.open("lib").base == str(here / "base")


def test_one_more_adapter_costs_one_adapter(here, monkeypatch):
    from peft_routing.library import adding

    sketched = []
    monkeypatch.setattr(adding, "sketch", lambda expert: sketched.append(expert.name) or {})
    save_lora(here / "more" / "new", 9)
    call("add", "lib", "--expert", "new=more/new")
    assert sketched == ["new"]
    call("remove", "lib", "new", "math")
    assert list(library.Library.open("lib").entries) == ["art", "code", "law", "law-again"]
    assert (here / "experts" / "math" / "adapter_config.json").exists()
    call("add", "lib", "--expert", "math=experts/math")
    assert sketched == ["new"]  # that of math lies there still


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "lib", "--expert", "math=experts/math"), "has an adapter 'math' already"),
        (("add", "lib", "--expert", "m=nowhere/at/all/"), "there is no such directory"),
        (("add", "lib"), "there is no adapter to add"),
        (("add", "experts", "--expert", "m=experts/math"), "is no library"),
        (("add", "lib", "--expert", "m=experts/math", "--base", "other"), "not for other"),
        (("add", "lib", "--expert", "m=experts/math", "--task", "n=x"), "--task n: no adapter"),
        (("add", "lib", "--expert", "m=experts/math", "--data", "m=no.jsonl"), "does not exist"),
        (("remove", "lib", "math", "mats"), "no adapter 'mats'"),
        (("show", "nolib", "math"), "has no library.json"),
        (("select", "lib", "--task", "math=no.jsonl", "-k", "2"), "does not exist"),
        (("route", "lib", "no.jsonl", "-o", "names.jsonl"), "does not exist"),
        (("route", "lib", "math.jsonl", "-o", "math.jsonl"), "exists and is not overwritten"),
        (("cluster", "lib", "-k", "9"), "have no 9 clusters"),
        (("cluster", "lib", "--retrain", "experts"), "is not empty"),
    ],
)
def test_mistakes_are_named_and_change_nothing(here, arguments, words):
    before = (here / "lib" / "library.json").read_bytes()
    files = sorted(here.rglob("*"))
    assert words in refusal(*arguments)
    assert (here / "lib" / "library.json").read_bytes() == before
    assert sorted(here.rglob("*")) == files


def test_each_cluster_is_retrained_by_a_file_that_trl_reads(here):
    output = call("cluster", "lib", "-k", "4", "--retrain", "again")
    content = yaml.safe_load((here / "again" / "cluster2.yml").read_text())
    assert "2: law, law-again\n" in output
    assert output.splitlines()[-4:] == [
        f"trl sft --config again/cluster{number}.yml" for number in range(4)
    ]
    assert content["model_name_or_path"] == str(here / "base") and content["use_peft"] is True
    assert (content["lora_r"], content["lora_alpha"]) == (4, 8)
    assert content["lora_target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert content["output_dir"] == str(here / "again" / "cluster2")
    (source,) = content["datasets"]  # of both adapters
    rows = load_dataset(**source)
    assert rows["text"] == texts_of("law")


def test_texts_that_trl_cannot_read_are_named_before_any_work(here):
    call("add", "lib", "--expert", "new=experts/law")
    assert "--data new=SOURCE" in refusal("cluster", "lib", "--retrain", "again")
    call("remove", "lib", "new")
    (here / "math.jsonl").unlink()
    assert "math.jsonl does not exist" in refusal("cluster", "lib", "--retrain", "again")
    assert not (here / "again").exists()


def test_what_has_changed_or_gone_is_said(here):
    save_lora(here / "experts" / "code", 99)
    with pytest.raises(UserError, match=r"'code'.*have changed since it was added"):
        library.Library.open("lib").experts()
    assert "art" in library.Library.open("lib").experts(("art",))
    shutil.rmtree(here / "experts" / "code")
    with pytest.raises(UserError, match="put it back where it was"):
        library.Library.open("lib").experts()
    file = here / "lib" / "library.json"
    file.write_text(file.read_text()[:40])
    assert "library.json" in refusal("list", "lib")


def test_an_adapter_on_the_hub_is_noted_with_its_commit(here, monkeypatch):
    snapshot = here / "models--owner--name" / "snapshots" / "0123abc"
    shutil.copytree(here / "experts" / "math", snapshot)
    revisions = []

    def download(repository, name, *, subfolder, revision):
        assert (repository, subfolder) == ("owner/name", None)
        revisions.append(revision)
        return str(snapshot / name)

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    call("add", "lib", "--expert", "far=owner/name")
    shown = json.loads(call("show", "lib", "far"))
    assert (shown["path"], shown["revision"]) == ("owner/name", "0123abc")
    assert set(revisions) == {None}
    assert library.Library.open("lib").experts(("far",)) == {"far": "owner/name@0123abc"}
    assert revisions[-1] == "0123abc"


def test_duplicates_are_found_by_sketch_and_exactly(here):
    for options in ((), ("--exact",)):
        output = call("dedupe", "lib", *options)
        assert output == "law-again is within 0.0000 of law, its norm 1.000 of the other's\n"
    call("remove", "lib", "law-again")
    assert call("dedupe", "lib") == "no two adapters are within 0.02 of each other\n"


def test_a_damaged_sketch_is_named(here):
    file = next((here / "lib" / "index").glob("*.sketch*"))
    file.write_bytes(file.read_bytes()[:100])
    assert file.name in refusal("dedupe", "lib")


def test_clusters_go_into_a_hierarchical_router(here):
    output = call("cluster", "lib", "-k", "4", "-o", "clusters.json", "--plot", "cosines.png")
    assert "law, law-again" in output and "4 clusters, silhouette" in output
    content = json.loads((here / "clusters.json").read_text())
    assert content["clusters"]["law"] == content["clusters"]["law-again"]
    assert sorted(content["order"]) == sorted(content["clusters"])
    assert content["data"][str(content["clusters"]["math"])] == ["math.jsonl"]
    assert (here / "cosines.png").stat().st_size > 1000
    composed = peft_routing.compose(
        "base",
        [],
        "routed",
        library="lib",
        only=["math", "law", "law-again"],
        router="hierarchical",
        clusters_from="clusters.json",
    )
    clusters = composed.clusters
    assert clusters["law"] == clusters["law-again"] != clusters["math"]
    with pytest.raises(UserError, match="has no cluster for the expert 'new'"):
        peft_routing.compose(
            "base", {"new": "experts/math"}, "again", router="hierarchical",
            clusters_from="clusters.json",
        )  # fmt: skip


def test_the_recipe_of_mttl_runs(here):
    assert "3 clusters" in call("cluster", "lib", "--as", "mttl", "-k", "3")


def test_compose_takes_a_library_s_adapters_as_they_lie(here):
    peft_routing.compose("base", [], "by-library", library="lib", only=("math", "law"))
    experts = {"math": "experts/math", "law": "experts/law"}
    peft_routing.compose("base", experts, "by-name")
    of_library = load_file(here / "by-library" / "adapter_model.safetensors")
    of_names = load_file(here / "by-name" / "adapter_model.safetensors")
    assert of_library.keys() == of_names.keys()
    for name, tensor in of_names.items():
        assert torch.equal(tensor, of_library[name])
    with pytest.raises(UserError, match=r"'law'.*an adapter of the library"):
        peft_routing.compose("base", experts, "both", library="lib")
    with pytest.raises(UserError, match="give --library"):
        peft_routing.compose("base", experts, "both", only=["math"])


def naive_losses(root, text):
    """By adapter, and "" for the base model, the mean loss of a text's tokens, by stock PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    losses = {}
    for name in ("", *NAMES, "law-again"):
        model = make_base()
        if name:
            model = PeftModel.from_pretrained(model, str(root / "experts" / name)).eval()
        with torch.no_grad():
            losses[name] = model(input_ids=ids, labels=ids).loss.item()
    return losses


def test_a_text_is_served_by_what_finds_it_least_surprising(here):
    texts = [texts_of(name, 1)[0] for name in NAMES]
    write(here / "requests.jsonl", texts)
    options = ("--serve-map", "serve.json", "--batch-size", "3", "--quiet")
    output = call("route", "lib", "requests.jsonl", "-o", "names.jsonl", *options)
    lines = [json.loads(line) for line in (here / "names.jsonl").read_text().splitlines()]
    for number, (text, line) in enumerate(zip(texts, lines, strict=True)):
        losses = naive_losses(here, text)
        assert line["losses"] == pytest.approx(losses, abs=1e-4)
        assert line["row"] == number
        assert losses[line["name"] or ""] == pytest.approx(min(losses.values()), abs=1e-4)
        assert sum(line["weights"].values()) == pytest.approx(1)
    assert "of 4 texts" in output
    served = json.loads((here / "serve.json").read_text())
    named = {line["name"] for line in lines} - {None}
    assert {each["name"] for each in served["vllm"]["lora_modules"]} == named
    for each in served["vllm"]["lora_modules"]:
        assert each["path"] == str(here / "experts" / each["name"])
        assert served["lorax"][each["name"]]["adapter_source"] == "local"
    assert served["vllm"]["max_lora_rank"] == 4


def test_a_shortlist_is_of_the_adapters_whose_texts_are_alike(here):
    write(here / "requests.jsonl", [texts_of(name, 4)[3] for name in NAMES])
    requests = library.route(
        "lib", "requests.jsonl", "names.jsonl", QUIET,
        only=NAMES, shortlist=1, batch_size=2,
    )  # fmt: skip
    assert [set(request.losses) for request in requests] == [{name, ""} for name in NAMES]
    assert all(request.name in request.losses or request.name is None for request in requests)
    call("remove", "lib", "math")
    call("add", "lib", "--expert", "math=experts/math")
    for file in (here / "lib" / "index").glob("*.centroid*"):
        file.unlink()
    words = refusal("route", "lib", "requests.jsonl", "-o", "more.jsonl", "--shortlist", "2")
    assert "has no centroid" in words


def test_a_text_without_a_token_to_predict_is_the_base_model_s(here):
    write(here / "requests.jsonl", ["w1", texts_of("math", 1)[0]])
    requests = library.route(
        "lib", "requests.jsonl", "names.jsonl", QUIET,
        batch_size=2,
    )  # fmt: skip
    assert requests[0].name is None
    write(here / "requests.jsonl", ["", "w1 w2"])
    assert "1 of 2 rows are empty" in refusal("route", "lib", "requests.jsonl", "-o", "n.jsonl")


def test_the_nearest_centroids_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(5, 7, generator=generator) + 3
    texts = torch.randn(4, 7, generator=generator) + 3
    found = nearest(texts, centroids, 2)
    common = sum(centroids) / 5
    for text, best in zip(texts, found.tolist(), strict=True):
        cosines = []
        for centroid in centroids:
            one, other = text - common, centroid - common
            cosines.append((one @ other / one.norm() / other.norm()).item())
        assert best == sorted(range(5), key=lambda place: -cosines[place])[:2]


def test_the_library_says_what_an_adapter_was_trained_on(here):
    call("remove", "lib", "law")
    options = {"library": "lib", "reading": QUIET, "strategies": ["own_expert"]}
    tasks = {"math": "math.jsonl", "law": "law.jsonl"}
    compared = peft_routing.compare("base", {}, tasks, "report", **options)
    assert compared.row("own_expert").values["by_task"] == {"math": "math", "law": "law-again"}
    assert any(" of 2 experts are not first" in line for line in report.notes(compared))


def test_selection_is_that_of_compare_and_keeps_scores(here):
    tasks = {name: f"{name}.jsonl" for name in NAMES}
    options = [f"--task={name}={source}" for name, source in tasks.items()]
    output = call("select", "lib", *options, "-k", "2", "--quiet", "--batch-size", "3")
    compared = peft_routing.compare(
        "base", [], tasks, "report", library="lib", strategies=["base"], reading=QUIET
    )
    chosen = compared.selected
    lines = output.splitlines()
    for place in (1, 2):
        values = f"validation {chosen.validation[place]:.4f}, test {chosen.test[place]:.4f}"
        assert lines[place] == f"{place}. {chosen.order[place - 1]}: {values}"
    scores = json.loads(call("show", "lib", "code"))["scores"]
    losses = compared.tables.validation.losses
    column = list(compared.experts).index("code")
    assert list(scores.values()) == pytest.approx(losses[:, column].tolist(), abs=1e-5)
    assert not (here / "report.cache").exists()  # the library's cache served both
    assert "mean loss" in call("list", "lib")
