"""Expert usage: the counts against a loop over unpadded texts, one at a time, that chooses by
itself.
"""

import bz2
import gzip
import json
import lzma
import math
import random
import shutil

import click
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from _mergekit_moe_ext_common.data import collate, fingerprint, load, parse_sources, tokenise
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.mixtures.plots import plot_usage
from mergekit_moe_ext.mixtures.routers import recorded
from mergekit_moe_ext.mixtures.usage import (
    count_usage,
    read_texts,
    read_usage,
    routing_probability,
    table,
)
from tests.conftest import (
    NAMES,
    ON_CPU,
    SPECIAL_TOKENS,
    TINY,
    TWO_PROCESSES,
    document,
    make_model,
    merge,
    run,
)
from tests.tokenizers import save_tokenizer

READING = Reading(max_length=24, quiet=True)
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 5},
    "qwen3_moe": {"num_experts": 5, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_key_value_heads": 4},
    "flex_olmo": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
SWITCH = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "expert_capacity": 3,
    "decoder_start_token_id": 0,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
}


def words(seed, rows, columns=("text",)):
    """Rows of random words, up to 29 in each column."""
    generator = random.Random(seed)

    def text():
        length = generator.randrange(1, 30)
        return " ".join(f"w{generator.randrange(90)}" for _ in range(length))

    made_up = []
    for _ in range(rows):
        made_up.append({name: text() for name in columns})
    return made_up


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_moe(path, family, seed=0, **config):
    """A random mixture of experts; other seeds are fine-tunes of it."""
    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    torch.manual_seed(0)
    sizes = {} if family == "switch_transformers" else {**TINY, **EXPERTS}
    model = auto.from_config(
        AutoConfig.for_model(family, **{**sizes, "vocab_size": 96, **SPECIAL_TOKENS, **config})
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # routers that are zero would choose by the order of ties
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith(
                "e_score_correction_bias"
            ):  # makes DeepSeek choose other experts than its logits say
                buffer += torch.linspace(0.5, -0.5, buffer.numel()).view_as(buffer)
    model.save_pretrained(path)
    save_tokenizer(path, 96)
    return model.eval()


def usage_of(model, data, reading=READING, **options):
    return count_usage(model, read_texts(model, data, reading), reading, **options)


def counts(usage, task):
    return {name: layer.counts for name, layer in usage.tasks[task].layers.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_experts_that_ran(tmp_path, monkeypatch, family):
    """What reaches the experts module, one unpadded text at a time."""
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", family, **FAMILIES[family])
    write(tmp_path / "news.jsonl", words(1, 9))
    usage = usage_of("moe", ["news.jsonl"], READING, batch_size=4)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained("moe"),
        AutoTokenizer.from_pretrained("moe"),
    )
    experts = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    expected = {name: [0] * 5 for name in experts}
    tokens = 0

    def counting(name):
        def hook(_module, args, kwargs):
            chosen = next(
                a
                for a in (*args, *kwargs.values())
                if torch.is_tensor(a) and not a.is_floating_point()
            )
            for expert in chosen.flatten().tolist():
                expected[name][expert] += 1

        return hook

    for name, module in experts.items():
        module.register_forward_pre_hook(counting(name), with_kwargs=True)
    for row in words(1, 9):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"][:, :24]
        tokens += ids.numel()
        with torch.no_grad():
            model(ids)
    got = counts(usage, "news")
    assert len(got) == len(expected) == (2 if family == "deepseek_v3" else 3)
    for (router, numbers), (block, wanted) in zip(got.items(), expected.items(), strict=True):
        assert router.rsplit(".", 1)[0] == block.rsplit(".", 1)[0]
        assert numbers == wanted[: len(numbers)] and sum(numbers) == 2 * tokens
    assert all(layer.tokens == tokens for layer in usage.tasks["news"].layers.values())
    assert usage.experts_per_token == 2


def long_texts(rows, length):
    """Rows of `length` words whose frequencies differ, so that routers have favourites."""
    generator = random.Random(7)

    def text(number):
        return " ".join(f"w{min(92, int(generator.expovariate(0.1)))}" for _ in range(number))

    return [{"input": text(length), "target": text(length // 3)} for _ in range(rows)]


def by_logits(path, rows, length, capacity):
    """Per router its tokens, what it chose and what had no room, by a loop over the logits of one
    unpadded text at a time.
    """
    model = AutoModelForSeq2SeqLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chosen, dropped, weights = {}, {}, {}

    def counting(name):
        def hook(_classifier, _inputs, logits):
            room = [capacity] * 4
            for scores in logits[0].tolist():
                expert = scores.index(max(scores))
                weight = math.exp(scores[expert]) / sum(map(math.exp, scores))
                chosen.setdefault(name, [0] * 4)[expert] += 1
                weights.setdefault(name, [0.0] * 4)[expert] += weight
                dropped.setdefault(name, [0] * 4)[expert] += room[expert] <= 0
                room[expert] -= 1

        return hook

    for name, module in model.named_modules():
        if name.endswith(".router.classifier"):
            module.register_forward_hook(counting(name.removesuffix(".classifier")))
    for row in rows:
        ids = [
            tokenizer(row[column], return_tensors="pt")["input_ids"][:, :length]
            for column in ("input", "target")
        ]
        with torch.no_grad():
            model(input_ids=ids[0], labels=ids[1])
    return chosen, dropped, weights


@pytest.mark.parametrize("capacity", [8, 64, 1 << 30])
@pytest.mark.parametrize("length", [60, 250, 1000])
def test_switch_counts_what_routers_chose_and_what_was_dropped(
    tmp_path, monkeypatch, length, capacity
):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "switch_transformers", **{**SWITCH, "expert_capacity": capacity})
    rows = [*long_texts(2, length), *long_texts(1, 20)]  # the last one is padded
    write(tmp_path / "news.jsonl", rows)
    chosen, dropped, weights = by_logits("moe", rows, length, capacity)
    assert [name.split(".")[0] for name in chosen] == ["encoder", "encoder", "decoder"]
    reading = Reading(max_length=length, quiet=True)
    usage = usage_of("moe", ["news=news.jsonl"], reading, batch_size=3)
    assert usage.count == "chosen" and counts(usage, "news") == chosen
    layers = usage.tasks["news"].layers
    assert {name: layer.dropped for name, layer in layers.items()} == dropped
    for name, layer in layers.items():
        assert layer.tokens == sum(layer.counts)
        assert layer.weights == pytest.approx(weights[name], rel=1e-4)
    all_dropped = sum(map(sum, dropped.values()))
    assert (all_dropped == 0) == (capacity > length)
    share = all_dropped / sum(map(sum, chosen.values()))
    assert f"counted: chosen; dropped by the expert capacity: news {share:.1%}" in table(usage)
    dispatched = usage_of("moe", ["news=news.jsonl"], reading, count="dispatched")
    assert dispatched.count == "dispatched"
    assert f"counted: dispatched; dropped by the expert capacity: news {share:.1%}" in table(
        dispatched
    )
    for name, layer in dispatched.tasks["news"].layers.items():
        fitted = [a - b for a, b in zip(chosen[name], dropped[name], strict=True)]
        assert layer.counts == fitted and layer.dropped == dropped[name]


def test_ties_of_a_bfloat16_router_are_broken_as_it_breaks_them(tmp_path, monkeypatch):
    """A router's probabilities are rounded before the largest is taken, and its first mask, without
    a capacity, says which that was.
    """
    monkeypatch.chdir(tmp_path)
    choices = {}
    for capacity in (2, 1 << 30):
        config = AutoConfig.for_model(
            "switch_transformers", **{**SWITCH, "vocab_size": 96, "expert_capacity": capacity}
        )
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).to(torch.bfloat16).eval()
        router = model.encoder.block[0].layer[1].mlp.router
        states = 1e-2 * torch.randn(1, 400, 32, dtype=torch.bfloat16)
        with torch.no_grad(), recorded(model) as recording:
            mask, _weights, logits = router(states)
        choices[capacity] = next(iter(recording.values())).experts.flatten()
    assert torch.equal(choices[2], choices[1 << 30])
    assert torch.equal(choices[2], mask.argmax(-1).flatten())
    assert not torch.equal(choices[2], logits.argmax(-1).flatten())  # there were ties


def test_routing_probability_is_the_mean_weight(tmp_path, monkeypatch):
    """Softmax after top-k of the gate's own product, by hand, over layers and tokens."""
    monkeypatch.chdir(tmp_path)
    model = make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"])
    write(tmp_path / "news.jsonl", words(3, 5))
    task = usage_of("moe", ["news.jsonl"], READING).tasks["news"]
    tokenizer = AutoTokenizer.from_pretrained("moe")
    weights = []

    def hook(gate, inputs, _output):
        for state in inputs[0].reshape(-1, 32):
            scores = gate.weight @ state
            chosen = scores.topk(2)
            weights.append(torch.zeros(4).index_put((chosen.indices,), chosen.values.softmax(0)))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(hook)
    for row in words(3, 5):
        model(tokenizer(row["text"], return_tensors="pt")["input_ids"][:, :24])
    assert routing_probability(task) == pytest.approx(
        torch.stack(weights).mean(0).tolist(), abs=1e-5
    )
    assert sum(routing_probability(task)) == pytest.approx(1)


@pytest.mark.parametrize("prefix", ["prefix", "sequence"])
def test_texts_of_a_sequence_moe_are_weighed_by_perplexity(here, prefix):
    """Against transformers' own loss of the sources on every text's first tokens, one unpadded text
    at a time.
    """
    config = {"routing_tokens": 6, "routing_prefix": prefix, "embedding": "separate"}
    for name in NAMES:
        shutil.copytree(here / name, here / f"a-{name}")
        save_tokenizer(here / f"a-{name}", 96)
    merge(
        document("seq_moe", [f"a-{name}" for name in NAMES], "./a-base", parameters=config), "moe"
    )
    write(here / "news.jsonl", words(3, 7))
    tokenizer = AutoTokenizer.from_pretrained("moe")
    models = [AutoModelForCausalLM.from_pretrained(name) for name in NAMES]
    wanted = []
    for row in words(3, 7):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"][
            :, : 6 if prefix == "prefix" else 24
        ]
        if ids.shape[1] == 1:  # nothing is predicted
            wanted.append(torch.full((4,), 0.25))
            continue
        scores = torch.stack([1 / model(ids, labels=ids).loss.exp() for model in models])
        chosen = scores.topk(2)
        wanted.append(torch.zeros(4).index_put((chosen.indices,), chosen.values.softmax(0)))
    usage = usage_of("moe", ["news.jsonl"], batch_size=3)
    (layer,) = usage.tasks["news"].layers.values()
    assert layer.tokens == 7 and layer.counts == [
        sum(row[i] > 0 for row in wanted).item() for i in range(4)
    ]
    assert routing_probability(usage.tasks["news"]) == pytest.approx(
        torch.stack(wanted).mean(0).tolist(), abs=1e-5
    )
    assert usage.architecture == "SequenceMoEForCausalLM" and usage.experts_per_token == 2
    usage.write(here / "usage.json")
    assert read_usage(here / "usage.json") == usage
    plot_usage(usage, here / "usage.png")
    assert (here / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_a_file_and_a_figure_and_two_processes_count_the_same(tmp_path):
    make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"])
    write(tmp_path / "news.jsonl", words(4, 11))
    write(tmp_path / "one.jsonl", words(5, 1))  # one process has nothing to do
    arguments = [
        "usage",
        "moe",
        "--data",
        "news.jsonl",
        "--data",
        "short=one.jsonl",
        "--batch-size",
        "2",
    ]
    one = run(
        "mergekit-moe-ext", *arguments, "-o", "one.usage.json", "--plot", "usage.png", cwd=tmp_path
    )
    assert one.returncode == 0, one.stderr
    probabilities, entropies = one.stdout.split("\n\n")
    assert [line.split()[0] for line in probabilities.splitlines()] == ["expert", "news", "short"]
    assert entropies.split()[:4] == ["normalised", "entropy", "news", "short"]
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
    two = run(
        *TWO_PROCESSES,
        "-m",
        "mergekit_moe_ext",
        *arguments,
        "-o",
        "two.usage.json",
        cwd=tmp_path,
        env=ON_CPU,
    )
    assert two.returncode == 0, two.stderr
    assert " 6/6 " in one.stderr and " 3/3 " in two.stderr  # batches of the first process
    assert two.stdout.strip() == one.stdout.strip()
    first, second = (read_usage(tmp_path / f"{name}.usage.json") for name in ("one", "two"))
    for task in ("news", "short"):
        assert counts(first, task) == counts(second, task)
        assert first.tasks[task].fingerprint == second.tasks[task].fingerprint
    for option, path, complaint in (
        ("-o", "one.usage.json", "not overwritten"),
        ("-o", "nowhere/x.usage.json", "there is no directory"),
        ("--plot", "x.figure", "figures are written as"),
    ):
        command = ["usage", "moe", "--data", "news.jsonl", option, str(tmp_path / path)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code != 0 and complaint in result.output


def test_the_fingerprint_knows_a_copy_and_tells_a_fine_tune(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"])
    model.to(torch.bfloat16).float().save_pretrained("other")
    save_tokenizer(tmp_path / "other", 96)
    model.save_pretrained("copy")
    (tmp_path / "copy").rename(tmp_path / "renamed")
    save_tokenizer(tmp_path / "renamed", 96)
    write(tmp_path / "news.jsonl", words(1, 2))
    moe, other, renamed = (
        usage_of(m, ["news.jsonl"], READING).checkpoint for m in ("moe", "other", "renamed")
    )
    assert other == renamed != moe


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is no usage file"),
        ('{"format": "mergekit-moe-ext usage 2"}', "is no usage file"),
        (None, "cannot read the usage file"),
    ],
)
def test_files_that_are_no_usage(tmp_path, content, complaint):
    path = tmp_path / "x.usage.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(click.ClickException, match=complaint):
        read_usage(path)


def test_a_file_that_counted_backwards(tmp_path):
    layer = {"tokens": 4, "counts": [-4, 4], "weights": [2.0, 2.0]}
    task = {"data": "x", "fingerprint": "", "samples": 1, "layers": {"gate": layer}}
    usage = {"model": "m", "checkpoint": "", "architecture": "A", "experts_per_token": 1}
    path = tmp_path / "x.usage.json"
    path.write_text(json.dumps({**usage, "tasks": {"news": task}}))
    with pytest.raises(click.ClickException, match=r"counts: 0: .*greater than or equal to 0"):
        read_usage(path)


def test_a_file_that_counted_nothing(tmp_path):
    layer = {"tokens": 0, "counts": [0, 0], "weights": [0.0, 0.0]}
    task = {"data": "x", "fingerprint": "", "samples": 0, "layers": {"gate": layer}}
    usage = {
        "model": "m",
        "checkpoint": "",
        "architecture": "A",
        "experts_per_token": 1,
        "tasks": {"news": task},
    }
    path = tmp_path / "x.usage.json"
    path.write_text(json.dumps(usage))
    with pytest.raises(click.ClickException, match="counted nothing for the task 'news'"):
        read_usage(path)


def test_a_weight_ensembling_model_chooses_no_experts(here):
    save_tokenizer(merge(document("wemoe", ("math",))), 96)
    write(here / "news.jsonl", words(1, 2))
    with pytest.raises(
        click.ClickException, match="no router that chooses experts: `mergekit-moe-ext adapt`"
    ):
        usage_of("out", ["news.jsonl"])


def test_a_dense_model_has_no_router(here):
    make_model(here / "dense", 0)
    save_tokenizer(here / "dense", 96)
    write(here / "news.jsonl", words(1, 2))
    with pytest.raises(click.ClickException, match="no router"):
        usage_of("./dense", ["news.jsonl"], READING)


# What `--data` reads.


@pytest.mark.parametrize(("ending", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_a_compressed_file_reads_as_it_is(tmp_path, suffix, ending, module):
    data, path = Dataset.from_list(words(1, 6)), tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        data.to_json(path)
    elif suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in data))
    else:
        data.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
    packed = tmp_path / f"{path.name}.{ending}"
    packed.write_bytes(module.compress(path.read_bytes()))
    (source,) = parse_sources([str(packed)])
    assert source.name == "data"
    assert load(source)["text"][:] == data["text"][:]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".txt", "", "-saved"])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    save_tokenizer(tmp_path / "tokenizer", 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    data, path = Dataset.from_list(words(1, 6)), tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        data.to_json(path)
    elif suffix == ".parquet":
        data.to_parquet(path)
    elif suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in data))
    elif suffix == "-saved":
        data.save_to_disk(path)
    elif suffix == "":
        path.mkdir()
        data.to_json(path / "train.jsonl")
    else:
        data.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
    (source,) = parse_sources([f"news={path}"])
    tokens = tokenise(load(source), source, tokenizer, max_length=24)
    assert tokens["input_ids"] == [tokenizer(row["text"])["input_ids"][:24] for row in words(1, 6)]
    assert len(load(source, 4)) == 4
    (part,) = parse_sources([f"data={path}:train[:2]+train[-1:]"])
    if suffix == "-saved":
        with pytest.raises(click.ClickException, match="read by whole splits; there are train"):
            load(part)
    else:
        assert len(load(part)) == 3 and part.name == "data"
    again = Dataset.from_dict({"input_ids": list(tokens["input_ids"])})
    assert fingerprint(tokens) == fingerprint(again) != fingerprint(tokens.select(range(5)))
    joined = Dataset.from_dict(
        {"input_ids": [[token for row in tokens["input_ids"] for token in row]]}
    )
    assert fingerprint(joined) != fingerprint(tokens)


def test_chats_go_through_the_tokenizer_s_template(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    write(tmp_path / "chat.jsonl", [{"messages": chat}])
    (source,) = parse_sources([str(tmp_path / "chat.jsonl")])
    with pytest.raises(click.ClickException, match="no chat template"):
        tokenise(load(source), source, tokenizer, max_length=24)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w9 {% endfor %}"
    tokens = tokenise(load(source), source, tokenizer, max_length=24)
    assert tokens["input_ids"] == [tokenizer("w1 w2 w9 w3 w9")["input_ids"]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nowhere.jsonl", "does not exist"),
        ("./nowhere", "does not exist"),
        ("data.exe", "is none of"),
        ("empty.jsonl", "cannot read|has no rows"),
        ("blank.jsonl", "has no tokens"),
        ("other.jsonl", "no column 'text'.*there are words"),
        ("owner/name", "cannot read owner/name"),
        ("other.jsonl:test", "cannot read other.jsonl:test"),
        ("numbers.jsonl", r"row 0 of numbers.jsonl"),
        ("null.jsonl", "the first row of null.jsonl is null"),
        ("null.json", "the first row of null.json is null"),
        ("null.jsonl.gz", "the first row of null.jsonl.gz is null"),
        ("cut.jsonl.gz", r"cannot read cut.jsonl.gz .*ended before the end"),
        ("data.parquet.gz", r"is none of .* nor a compressed file of text"),
        ("nowhere.jsonl.gz", "does not exist"),
        ("latin.jsonl", r"cannot read latin.jsonl .*not all of its texts are UTF-8"),
        ("latin.txt", r"cannot read latin.txt .*'utf-8'"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, monkeypatch, text, complaint):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", 96)
    (tmp_path / "data.exe").touch()
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "blank.jsonl", [{"text": ""}])
    write(tmp_path / "other.jsonl", [{"words": "w1"}])
    write(tmp_path / "numbers.jsonl", [{"text": 5}])
    (tmp_path / "null.jsonl").write_text('null\n{"text": "w1"}\n')
    (tmp_path / "null.json").write_text('[\n null, {"text": "w1"}]')
    packed = gzip.compress((tmp_path / "null.jsonl").read_bytes())
    (tmp_path / "null.jsonl.gz").write_bytes(packed)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    (tmp_path / "data.parquet.gz").touch()
    (tmp_path / "latin.jsonl").write_bytes('{"text": "w1"}\n{"text": "é"}\n'.encode("latin-1"))
    (tmp_path / "latin.txt").write_bytes("w1\né\n".encode("latin-1"))
    (source,) = parse_sources([text])
    with pytest.raises(click.ClickException, match=complaint):
        tokenise(load(source), source, AutoTokenizer.from_pretrained("tokenizer"), max_length=24)


@pytest.mark.parametrize("has_targets", [False, True])
def test_rows_have_the_tokens_that_they_have_alone(tmp_path, has_targets):
    """Of more rows than one call of the tokenizer takes, some of them empty or too long."""
    save_tokenizer(tmp_path / "tokenizer", 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rows = []
    alone = []
    for number in range(300):
        # The first 200 are empty, so that nothing can be inferred from them.
        text = " ".join(["w1", "w2", "w3"] * (number % 4)) if number >= 200 else ""
        row = {"input": text, "target": text + " w9", "text": text or None}
        rows.append(row)
        ids = tokenizer(text, truncation=True, max_length=7)["input_ids"]
        if ids and has_targets:
            labels = tokenizer(row["target"], truncation=True, max_length=4)["input_ids"]
            alone.append({"input_ids": ids, "labels": labels})
        elif ids:
            alone.append({"input_ids": ids})
    write(tmp_path / "rows.jsonl", rows)
    (source,) = parse_sources([str(tmp_path / "rows.jsonl")])
    tokens = tokenise(
        load(source),
        source,
        tokenizer,
        max_length=7,
        max_target_length=4 if has_targets else None,
        encoder_decoder=has_targets,
    )
    assert list(tokens) == alone
    assert 70 < len(alone) < 100


def test_a_row_that_cannot_be_read_is_named(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rows = [{"input": f"w{number % 90}", "target": "w1"} for number in range(300)]
    rows[201]["target"] = None
    write(tmp_path / "rows.jsonl", rows)
    (source,) = parse_sources([str(tmp_path / "rows.jsonl")])
    with pytest.raises(click.ClickException, match=r"^row 201 of .*'target' holds 'None'"):
        tokenise(load(source), source, tokenizer, max_length=24, encoder_decoder=True)
    # A chat that is none, or has none of its messages.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w9 {% endfor %}"
    chat = [{"role": "user", "content": "w1"}]
    for number, (broken, complaint) in enumerate(
        (
            (None, "holds null, which is no list of messages"),
            ([None], "has null among its messages"),
        )
    ):
        write(tmp_path / f"chats{number}.jsonl", [{"messages": chat}, {"messages": broken}])
        (source,) = parse_sources([str(tmp_path / f"chats{number}.jsonl")])
        with pytest.raises(click.ClickException, match=rf"^row 1 of .*'messages' {complaint}"):
            tokenise(load(source), source, tokenizer, max_length=24)
    # Two texts in a list would be a pair.
    write(tmp_path / "pairs.jsonl", [{"text": ["w1", "w2"]}])
    (source,) = parse_sources([str(tmp_path / "pairs.jsonl")])
    with pytest.raises(click.ClickException, match=r"^row 0 of .*'text' holds"):
        tokenise(load(source), source, tokenizer, max_length=24)


def test_names_and_splits_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jsonl").touch()
    parsed = parse_sources(
        ["x.jsonl", "law=x.jsonl:train[:5%]", "owner/name/config:test", "a=b.jsonl"]
    )
    assert [(s.name, s.path, s.split) for s in parsed] == [
        ("x", "x.jsonl", "train"),
        ("law", "x.jsonl", "train[:5%]"),
        ("config", "owner/name/config", "test"),
        ("a=b", "a=b.jsonl", "train"),
    ]
    with pytest.raises(click.ClickException, match="two sources are called 'x'"):
        parse_sources(["x.jsonl", "y/x.csv"])
    with pytest.raises(click.ClickException, match="--data '' names no file"):
        parse_sources([""])


def test_collate_pads_on_the_right():
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [1]}, {"input_ids": [0], "labels": [2, 3]}],
        pad_token_id=0,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, -100], [2, 3]]


def test_the_counts_are_seen_even_where_the_file_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"])
    write(tmp_path / "news.jsonl", words(1, 3))
    command = ["usage", "moe", "--data", "news.jsonl", "--quiet", "-o"]
    # Refused before the model is read.
    for place, complaint in (("u" * 300, "File name too long"), ("moe", "is a directory")):
        result = CliRunner().invoke(main, [*command, place])
        assert result.exit_code != 0 and complaint in result.output
        assert "expert 0" not in result.output

    def full(path, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", full)
        result = CliRunner().invoke(main, [*command, "news.usage.json"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "expert 0" in result.output
    assert "cannot write news.usage.json: No space left on device" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "news.jsonl"]
