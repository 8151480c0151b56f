"""What was measured once: against stock PEFT, one row at a time, and read back."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.fusion.cache import Cache, Measured, Subject, Texts, fill, measure
from peft_routing.fusion.subjects import any_adapter, base_alone, one_expert
from peft_routing.fusion.tables import joined
from tests.conftest import SPECIAL_TOKENS, TINY
from tests.peft_routing.adapters import make_base, save_experts, save_lora

ROWS = {
    "math": [[5, 9, 11, 30], [7, 8], [40, 41, 42, 43, 44, 45], [3]],
    "law": [[60, 61, 62], [70, 71, 72, 73, 74]],
}


def texts_of(task: str, split: str = "test") -> Texts:
    return Texts.of(task, split, Dataset.from_dict({"input_ids": ROWS[task]}), False)


def expected(model, rows):
    """The log-probabilities of all tokens but the first, one row at a time."""
    values = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(dim=-1)
            values += [logits[place, token] for place, token in enumerate(row[1:])]
    return torch.stack(values)


def fill_quietly(cache, subjects, texts, load_base=make_base):
    work = [(subject, texts) for subject in subjects]
    fill(cache, work, load_base, pad_token_id=0, batch_size=3, quiet=True)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"), ("math", "law"))


def test_every_column_is_what_peft_computes_with_that_adapter(experts, tmp_path):
    cache = Cache(tmp_path / "cache", "base")
    # The base model comes last: by then adapters were put on it and taken off.
    subjects = [*[one_expert(name, path) for name, path in experts.items()], base_alone()]
    texts = [texts_of("math"), texts_of("law")]
    fill_quietly(cache, subjects, texts)
    for each in texts:
        for subject, path in zip(subjects, [*experts.values(), None], strict=True):
            model = make_base()
            if path:
                model = PeftModel.from_pretrained(model, path).eval()
            measured = cache.read(subject, each)
            assert measured.log_probabilities.dtype == torch.float32
            torch.testing.assert_close(
                measured.log_probabilities.double(), expected(model, ROWS[each.task]),
                atol=2e-5, rtol=0,
            )  # fmt: skip
            assert measured.tokens_read == sum(map(len, ROWS[each.task])) and measured.seconds > 0


def test_nothing_of_an_adapter_of_the_users_own_stays_for_those_after_it(tmp_path):
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    subjects = []
    for name, config in (("head", {"modules_to_save": ["lm_head"]}), ("bias", {"bias": "all"})):
        model = get_peft_model(make_base("qwen2"), LoraConfig(**lora, **config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        subjects.append(any_adapter(name, str(tmp_path / name), name))
    cache = Cache(tmp_path / "cache", "base")
    fill_quietly(cache, [*subjects, base_alone()], [texts_of("math")], lambda: make_base("qwen2"))
    models = [
        PeftModel.from_pretrained(make_base("qwen2"), str(tmp_path / "head")).eval(),
        PeftModel.from_pretrained(make_base("qwen2"), str(tmp_path / "bias")).eval(),
        make_base("qwen2"),
    ]
    for subject, model in zip([*subjects, base_alone()], models, strict=True):
        found = cache.read(subject, texts_of("math")).log_probabilities.double()
        torch.testing.assert_close(found, expected(model, ROWS["math"]), atol=2e-5, rtol=0)


def test_only_what_is_lacking_is_measured(experts, tmp_path):
    cache = Cache(tmp_path, "base")
    math, law = (one_expert(name, path) for name, path in experts.items())
    fill_quietly(cache, [math], [texts_of("math")])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    seen = []

    def watched(subject):
        def put_on(base):
            seen.append(subject.name)
            return subject.put_on(base)

        return Subject(subject.name, subject.fingerprint, put_on)

    texts = [texts_of("math"), texts_of("law")]
    fill_quietly(cache, [watched(math), watched(law)], texts)
    assert seen == ["expert 'math'", "expert 'law'"] and len(list(tmp_path.iterdir())) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    def never():
        raise AssertionError

    fill_quietly(cache, [math, law], texts, never)


def test_an_interrupted_measuring_leaves_whole_files_alone(experts, tmp_path):
    cache = Cache(tmp_path, "base")
    math = one_expert("math", experts["math"])

    def interrupted(base):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_quietly(cache, [math, Subject("late", "late", interrupted)], [texts_of("law")])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert cache.has(math, texts_of("law"))


def test_another_base_adapter_or_text_is_another_file(experts, tmp_path):
    math = one_expert("math", experts["math"])
    changed = one_expert("math", str(save_lora(tmp_path / "math", 9)))
    files = {
        Cache(tmp_path, base).path(subject, texts_of(task))
        for base in ("one", "other")
        for subject in (math, changed, base_alone())
        for task in ("math", "law")
    }
    assert len(files) == 12
    # What it is called, and which split it is, says nothing of what is computed.
    renamed = one_expert("other name", experts["math"])
    cache = Cache(tmp_path, "one")
    assert cache.path(math, texts_of("law")) == cache.path(renamed, texts_of("law", "train"))


def test_a_damaged_file_and_numbers_that_are_none_are_refused(tmp_path):
    cache, subject, texts = Cache(tmp_path, "base"), base_alone(), texts_of("law")
    cache.write(subject, texts, Measured(torch.zeros(5), 1.0, 8, "here"))
    with pytest.raises(UserError, match="does not hold what its name says; remove it"):
        cache.read(subject, texts)
    path = cache.path(subject, texts)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"is damaged: .* remove it"):
        cache.read(subject, texts)
    path.unlink()

    def broken(base):
        with torch.no_grad():
            base.lm_head.weight[62] = torch.nan
        return base

    with pytest.raises(UserError, match=r"broken, task 'law', test: \d of 6 .* NaN or infinite"):
        fill_quietly(cache, [Subject("broken", "broken", broken)], [texts])
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path):
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*cache: File exists"):
        fill_quietly(Cache(tmp_path / "cache", "base"), [base_alone()], [texts_of("law")])


def test_only_targets_are_measured_where_rows_have_them():
    rows = Dataset.from_dict(
        {"input_ids": [[5, 9, 11, 30], [7, 8, 6]], "labels": [[-100, -100, 11, 30], [-100, 8, 6]]}
    )
    texts = Texts.of("math", "test", rows, False)
    assert texts.counts == [2, 2]
    measured = measure(make_base(), rows, 0, 2)
    whole = expected(make_base(), [[5, 9, 11, 30], [7, 8, 6]])
    torch.testing.assert_close(measured.log_probabilities.double(), whole[1:], atol=2e-5, rtol=0)
    nothing = Dataset.from_dict({"input_ids": [[5]]})
    with pytest.raises(UserError, match="task 'math', test: there is no token to predict"):
        Texts.of("math", "test", nothing, False)


def test_an_encoder_decoder_predicts_every_target():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = AutoConfig.for_model(
        "t5", **sizes, vocab_size=TINY["vocab_size"], **SPECIAL_TOKENS, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    inputs, labels = [[5, 9, 11], [7, 8]], [[30, 31], [40, 41, 42]]
    rows = Dataset.from_dict({"input_ids": inputs, "labels": labels})
    assert Texts.of("math", "test", rows, True).counts == [2, 3]
    losses = []
    with torch.no_grad():
        for row, targets in zip(inputs, labels, strict=True):
            output = model(input_ids=torch.tensor([row]), labels=torch.tensor([targets]))
            losses.append(output.loss.item() * len(targets))
    found = measure(model, rows, 0, 2).log_probabilities
    assert -found.split([2, 3])[0].sum().item() == pytest.approx(losses[0], abs=1e-4)
    assert -found.split([2, 3])[1].sum().item() == pytest.approx(losses[1], abs=1e-4)


def test_a_table_weighs_tasks_alike_and_tells_texts_apart():
    columns = [[torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])], [torch.tensor([-5.0])] * 2]
    table = joined(["math"], ["math", "law"], columns, [[2, 0], [1]])
    assert table.weights.tolist() == [0.25, 0.25, 0.5]
    assert table.texts_of.tolist() == [0, 0, 2] and table.tasks_of.tolist() == [0, 0, 1]
    assert table.losses.tolist() == [[2.0, 2.0], [5.0, 5.0]]
    assert table.task_losses(torch.tensor([-1.0, -2.0, -4.0])).tolist() == [1.5, 4.0]
    assert table.of_experts.dtype == torch.float64 and table.of_experts.shape == (3, 1)


def test_the_file_says_for_people_what_it_holds(tmp_path: Path):
    from safetensors import safe_open

    cache = Cache(tmp_path, "base")
    texts = texts_of("law")
    cache.write(base_alone(), texts, Measured(torch.zeros(6), 0.25, 8, "here"))
    with safe_open(cache.path(base_alone(), texts), framework="pt") as file:
        notes = file.metadata()
    assert notes == {
        "subject": "base model", "task": "law", "split": "test", "seconds": "0.25",
        "tokens_read": "8", "machine": "here",
    }  # fmt: skip
