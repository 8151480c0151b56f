"""Heads of classifiers: what PEFT saves whole beside a LoRA, against PEFT's own adapters."""

import copy
import json

import peft
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import peft_routing
from peft_routing import RoutedLoraConfig, UserError
from peft_routing.cli import main
from tests.peft_routing.adapters import make_base, save_lora, skip_without_native_adapters
from tests.tokenizers import save_tokenizer

IDS = torch.randint(5, 96, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
# Each task's model, what is trained there, and what PEFT saves whole.
TASKS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, "SEQ_CLS", "classifier"),
    "llama": (tf.LlamaForSequenceClassification, tf.LlamaConfig, "SEQ_CLS", "score"),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, "SEQ_CLS", "classifier"),
    "tokens": (tf.BertForTokenClassification, tf.BertConfig, "TOKEN_CLS", "classifier"),
    "llama tokens": (tf.LlamaForTokenClassification, tf.LlamaConfig, "TOKEN_CLS", "score"),
    "answers": (tf.BertForQuestionAnswering, tf.BertConfig, "QUESTION_ANS", "qa_outputs"),
    "llama answers": (tf.LlamaForQuestionAnswering, tf.LlamaConfig, "QUESTION_ANS", "qa_outputs"),
}


def make(task="bert", labels=3):
    model, config, task_type, _ = TASKS[task]
    torch.manual_seed(0)
    labels = 2 if task_type == "QUESTION_ANS" else labels
    made = model(config(**SIZES, num_labels=labels, max_position_embeddings=64))
    return made.eval()


def targets(task):
    return ["q_proj", "v_proj"] if "llama" in task else ["query", "value"]


def save_expert(path, seed, task="bert", labels=3, **config):
    """A LoRA adapter, and its head, with random weights."""
    given = {"r": 4, "target_modules": targets(task), "task_type": TASKS[task][2], **config}
    model = get_peft_model(make(task, labels), LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ".lora_" in name or ".modules_to_save." in name
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(path)
    return str(path)


def save_experts(root, task="bert", **config):
    return {
        name: save_expert(root / name, seed, task, **config)
        for seed, name in enumerate(("tone", "topic"), 1)
    }


def route(experts, head, task="bert", labels=3, **config):
    given = {"router": "uniform", "task_type": TASKS[task][2], **config}
    return get_peft_model(
        make(task, labels), RoutedLoraConfig(experts=experts, head=head, **given)
    ).eval()


@torch.no_grad()
def logits(model, **more):
    """The logits, or those of start and end beside each other."""
    output = model(input_ids=IDS, attention_mask=MASK, **more)
    return output.logits if "logits" in output else torch.stack(list(output.values()), dim=-1)


def stock(path, task="bert", labels=3):
    """PEFT's own logits of an adapter."""
    return logits(PeftModel.from_pretrained(make(task, labels), path).eval())


def one_hot(experts, name):
    return torch.tensor([1.0 if each == name else 0.0 for each in experts])


def head_of(path, module):
    tensors = load_file(f"{path}/adapter_model.safetensors")
    prefix = f"base_model.model.{module}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def wrapper(model, task="bert"):
    return model.get_base_model().get_submodule(TASKS[task][3])


def reloaded(model, path, task="bert", labels=3, **options):
    model.save_pretrained(path)
    return PeftModel.from_pretrained(make(task, labels), path, **options).eval()


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_with_its_head_gives_the_logits_of_peft(tmp_path, task):
    experts = save_experts(tmp_path, task)
    for name, path in experts.items():
        expected = stock(path, task)
        named = route(experts, name, task)
        assert torch.allclose(
            logits(named, coefficients=one_hot(experts, name)), expected, atol=1e-5
        )
        own = route(experts, "own", task)
        chosen = logits(own, coefficients=one_hot(experts, name), task=name)
        assert torch.allclose(chosen, expected, atol=1e-5)
        for model, more in ((named, {}), (own, {"task": name})):
            again = reloaded(model, tmp_path / f"routed-{name}-{len(more)}", task)
            assert type(again) is type(model)
            assert torch.equal(logits(again, **more), logits(model, **more))
    other = logits(route(experts, "own", task), task="tone")
    assert not torch.allclose(other, logits(route(experts, "own", task), task="topic"), atol=1e-3)


@pytest.mark.parametrize("task", ["bert", "roberta", "llama tokens", "answers"])
def test_mean_is_the_mean_of_the_heads(tmp_path, task):
    experts = save_experts(tmp_path, task)
    model = route(experts, "mean", task)
    heads = [head_of(path, TASKS[task][3]) for path in experts.values()]
    inside = wrapper(model, task).modules_to_save["default"].state_dict()
    assert set(inside) == set(heads[0])
    for name, tensor in inside.items():
        assert torch.allclose(tensor, (heads[0][name] + heads[1][name]) / 2, atol=1e-6)
    assert torch.equal(logits(reloaded(model, tmp_path / "routed", task)), logits(model))


def test_new_is_the_head_of_the_base_model(tmp_path):
    model = route(save_experts(tmp_path), "new")
    assert torch.equal(wrapper(model).modules_to_save["default"].weight, make().classifier.weight)
    assert wrapper(model).modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("task", ["bert", "llama", "tokens", "answers"])
def test_without_a_choice_the_error_lists_all(tmp_path, task):
    with pytest.raises(UserError) as caught:
        route(save_experts(tmp_path, task), None, task)
    for part in (TASKS[task][3], "tone, topic", "'mean'", "'new'", "'own'", "modules_to_save is"):
        assert part in str(caught.value)


@pytest.mark.parametrize("stated", [None, []])
@pytest.mark.parametrize("task", ["bert", "llama", "tokens", "roberta"])
def test_a_head_that_the_configuration_does_not_name(tmp_path, task, stated):
    """As the first versions of PEFT wrote it; the class for the task adds it."""
    path = save_expert(tmp_path / "tone", 1, task)
    expected = stock(path, task)
    file = tmp_path / "tone" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": stated}))
    assert torch.equal(stock(path, task), expected)
    model = route({"tone": path}, "tone", task)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.export_experts(str(tmp_path / "exported"))
    assert torch.allclose(stock(str(tmp_path / "exported" / "tone"), task), expected, atol=1e-5)


def test_a_head_that_was_named_by_hand(tmp_path):
    experts = save_experts(tmp_path, "llama", task_type=None, modules_to_save=["score"])
    expected = logits(PeftModel.from_pretrained(make("llama"), experts["topic"]).eval())
    for head, more in (("topic", {}), ("own", {"task": "topic"})):
        model = route(experts, head, "llama", task_type=None)
        assert type(model) is PeftModel
        given = logits(model, coefficients=one_hot(experts, "topic"), **more)
        assert torch.allclose(given, expected, atol=1e-5)
        again = reloaded(model, tmp_path / f"routed-{head}", "llama")
        assert torch.equal(logits(again, **more), logits(model, **more))


@pytest.mark.parametrize("task", ["bert", "roberta", "llama", "tokens", "llama tokens"])
def test_heads_of_different_sizes(tmp_path, task):
    experts = {
        "tone": save_expert(tmp_path / "tone", 1, task, labels=3),
        "topic": save_expert(tmp_path / "topic", 2, task, labels=5),
    }
    with pytest.raises(UserError, match=r"'topic'.*is \(5.*, and \(3.*num_labels=5.*'own'"):
        route(experts, "mean", task)
    with pytest.raises(UserError, match=r"'topic'.*load the base with num_labels=5"):
        route(experts, "topic", task)
    named = route(experts, "topic", task, labels=5)
    expected = stock(experts["topic"], task, labels=5)
    of_topic = one_hot(experts, "topic")
    assert torch.allclose(logits(named, coefficients=of_topic), expected, atol=1e-5)

    own = route(experts, "own", task)
    given = logits(own, coefficients=of_topic, task="topic")
    assert torch.allclose(given, expected, atol=1e-5)
    assert logits(own, task="tone").shape[-1] == 3
    again = reloaded(own, tmp_path / "routed", task)
    assert torch.equal(logits(again, task="topic"), logits(own, task="topic"))


@pytest.mark.parametrize(
    ("task", "labels"),
    [("bert", 1), ("bert", 5), ("llama", 1), ("llama", 5), ("tokens", 5), ("llama tokens", 5)],
)
def test_the_loss_of_a_head_of_another_size_is_peft_s(tmp_path, task, labels):
    experts = {
        "tone": save_expert(tmp_path / "tone", 1, task, labels=3),
        "topic": save_expert(tmp_path / "topic", 2, task, labels=labels),
    }
    shape = IDS.shape if "tokens" in task else IDS.shape[:1]
    classes = torch.arange(shape.numel()).reshape(shape) % labels
    classes = classes.float() if labels == 1 else classes
    alone = PeftModel.from_pretrained(make(task, labels), experts["topic"]).eval()
    expected = alone(input_ids=IDS, attention_mask=MASK, labels=classes)
    own = route(experts, "own", task)
    more = {"coefficients": one_hot(experts, "topic"), "task": "topic", "labels": classes}
    given = own(input_ids=IDS, attention_mask=MASK, **more)
    assert torch.allclose(given.loss, expected.loss, atol=1e-5)
    loss, scores = own(input_ids=IDS, attention_mask=MASK, return_dict=False, **more)[:2]
    assert torch.equal(loss, given.loss)
    assert torch.equal(scores, given.logits)
    three = classes.long() % 3
    tone = {**more, "coefficients": one_hot(experts, "tone"), "task": "tone", "labels": three}
    alone = PeftModel.from_pretrained(make(task), experts["tone"]).eval()
    expected = alone(input_ids=IDS, attention_mask=MASK, labels=three).loss
    assert torch.allclose(own(input_ids=IDS, attention_mask=MASK, **tone).loss, expected, atol=1e-5)


def test_a_task_that_is_missing_or_unknown(tmp_path):
    experts = save_experts(tmp_path)
    own = route(experts, "own")
    for wrong in ({}, {"task": "law"}):
        with pytest.raises(UserError, match="choose a head, one of tone, topic"):
            logits(own, **wrong)
    named = route(experts, "tone")
    assert torch.equal(logits(named, task="tone"), logits(named))
    with pytest.raises(UserError, match="task='topic' is none of tone"):  # whose head that is
        logits(named, task="topic")
    mean = route(experts, "mean")
    assert torch.equal(logits(mean, task="topic"), logits(mean))  # of all experts
    with pytest.raises(UserError, match="is none of tone, topic"):
        logits(mean, task="law")
    with pytest.raises(UserError, match="the whole model must be called"):
        wrapper(own)(torch.zeros(1, 32))
    single = route({"tone": experts["tone"]}, "own")
    assert torch.equal(logits(single), logits(single, task="tone"))


def test_a_base_model_keeps_a_task_of_its_own(tmp_path):
    class Tasked(tf.BertForSequenceClassification):
        def forward(self, input_ids, task="plain", **more):
            self.told = task
            return super().forward(input_ids=input_ids, **more)

    base = Tasked(make().config).eval()
    config = RoutedLoraConfig(experts=save_experts(tmp_path), router="uniform", head="mean")
    model = get_peft_model(base, config)
    logits(model, task="retrieval")
    assert base.told == "retrieval"


def test_a_failed_pass_leaves_no_task_behind(tmp_path):
    own = route(save_experts(tmp_path), "own")
    expected = logits(own, task="tone")
    with pytest.raises(UserError, match="experts"):
        logits(own, task="topic", coefficients=torch.ones(5))
    with pytest.raises(IndexError):
        own(input_ids=IDS + 1000, task="topic")
    with pytest.raises(UserError, match="choose a head"):
        logits(own)
    assert torch.equal(logits(own, task="tone"), expected)


def test_a_compiled_model_takes_a_task(tmp_path):
    own = route(save_experts(tmp_path), "own")
    compiled = torch.compile(own, fullgraph=True, backend="eager")
    for task in ("tone", "topic"):
        assert torch.allclose(logits(compiled, task=task), logits(own, task=task), atol=1e-6)


@pytest.mark.parametrize("head", ["own", "mean", "new", "tone"])
def test_disabled_the_head_is_the_base_model_s(tmp_path, head):
    model = route(save_experts(tmp_path), head)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))
    more = {"task": "tone"} if head == "own" else {}
    assert not torch.allclose(logits(model, **more), logits(make()), atol=1e-4)


def test_several_adapters_are_switched_with_their_heads(tmp_path):
    experts = save_experts(tmp_path)
    model = route(experts, "own")
    own = logits(model, task="topic")
    mean = route(experts, "mean")
    expected = logits(mean)
    mean.save_pretrained(tmp_path / "mean")
    model.load_adapter(tmp_path / "mean", "other")
    model.add_adapter("third", RoutedLoraConfig(experts=experts, router="uniform", head="tone"))
    assert torch.equal(logits(model, task="topic"), own)
    model.set_adapter("other")
    assert torch.allclose(logits(model), expected, atol=1e-6)
    model.set_adapter("third")
    third = logits(model)
    assert torch.allclose(third, logits(route(experts, "tone")), atol=1e-6)
    model.save_pretrained(tmp_path / "all")
    for name, adapter, more in (("", own, {"task": "topic"}), ("other", expected, {})):
        again = PeftModel.from_pretrained(make(), tmp_path / "all" / name).eval()
        assert torch.allclose(logits(again, **more), adapter, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model, task="topic"), own)
    model.delete_adapter("default")
    assert "default" not in wrapper(model).modules_to_save
    model.set_adapter("third")
    assert torch.equal(logits(model), third)


@pytest.mark.parametrize("task", ["bert", "roberta"])  # whose head has one layer, and several
def test_merged_and_unloaded(tmp_path, task):
    experts = save_experts(tmp_path, task)
    for head in ("tone", "mean", "new"):
        model = route(experts, head, task)
        expected = logits(model)
        merged = model.merge_and_unload()
        assert type(merged.classifier) is type(make(task).classifier)
        assert torch.allclose(logits(merged), expected, atol=1e-5)
        merged.save_pretrained(tmp_path / f"merged-{head}")
        again = type(merged).from_pretrained(tmp_path / f"merged-{head}").eval()
        assert torch.equal(logits(again), logits(merged))
        unloaded = route(experts, head, task).unload()
        for name, tensor in unloaded.classifier.state_dict().items():
            assert torch.equal(tensor, merged.classifier.state_dict()[name])
    own = route(experts, "own", task)
    expected = logits(own, task="tone")
    with pytest.raises(UserError, match="a head per expert"):
        own.merge_and_unload()
    assert torch.equal(logits(own, task="tone"), expected)
    own.merge_adapter()  # stays an adapter, with its heads
    assert torch.allclose(logits(own, task="tone"), expected, atol=1e-5)
    own.unmerge_adapter()
    assert torch.allclose(logits(own.unload()), logits(make(task)), atol=1e-6)


@pytest.mark.parametrize("head", ["own", "mean", "tone"])
def test_experts_are_added_and_removed(tmp_path, head):
    experts = save_experts(tmp_path)
    more = {"task": "topic"} if head == "own" else {}
    model = route(experts, head)
    kept = copy.deepcopy(wrapper(model).modules_to_save["default"])
    third = save_expert(tmp_path / "third", 3, labels=5 if head == "own" else 3)
    model.add_expert("law", third)
    names = [*experts, "law"]
    alone = logits(model, coefficients=one_hot(names, "topic"), **more)
    before = logits(route(experts, head), coefficients=one_hot(experts, "topic"), **more)
    assert torch.allclose(alone, before, atol=1e-6)
    if head == "own":
        given = logits(model, coefficients=one_hot(names, "law"), task="law")
        assert torch.allclose(given, stock(third, labels=5), atol=1e-5)
    else:
        assert torch.equal(wrapper(model).modules_to_save["default"].weight, kept.weight)
    again = reloaded(model, tmp_path / "grown")
    assert torch.equal(logits(again, **more), logits(model, **more))
    model.remove_expert("tone")
    assert model.peft_config["default"].head == ("new" if head == "tone" else head)
    given = logits(model, coefficients=torch.tensor([1.0, 0.0]), **more)
    assert torch.allclose(given, alone, atol=1e-6)
    again = reloaded(model, tmp_path / "shrunk")
    assert torch.equal(logits(again, **more), logits(model, **more))


def test_an_expert_that_does_not_fit_is_not_added(tmp_path):
    experts = save_experts(tmp_path)
    other = save_expert(tmp_path / "other", 3, labels=5)
    headless = save_expert(tmp_path / "headless", 3, task_type="FEATURE_EXTRACTION")
    model = route(experts, "mean")
    expected = logits(model)
    with pytest.raises(UserError, match="num_labels=5"):
        model.add_expert("law", other)
    with pytest.raises(UserError, match="has no head"):
        model.add_expert("law", headless)
    with pytest.raises(UserError, match="'law' has no head"):
        route(experts, "own").add_expert("law", headless)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("head", ["own", "mean", "topic"])
def test_exported_experts_are_what_they_are_here(tmp_path, head):
    experts = save_experts(tmp_path)
    model = route(experts, head)
    model.export_experts(str(tmp_path / "exported"))
    for name, path in experts.items():
        more = {"task": name} if head == "own" else {}
        given = logits(model, coefficients=one_hot(experts, name), **more)
        assert torch.allclose(stock(tmp_path / "exported" / name), given, atol=1e-5)
        if head in ("own", name):
            assert torch.allclose(given, stock(path), atol=1e-5)
    if head == "own":
        with pytest.raises(UserError, match="a head per expert"):
            model.to_lora(str(tmp_path / "one"))
    else:
        model.to_lora(str(tmp_path / "one"))
        assert torch.allclose(stock(tmp_path / "one"), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("head", "task"),
    [("own", "bert"), ("mean", "bert"), ("new", "bert"), ("tone", "bert"), ("own", "tokens")],
)
def test_the_trainer_trains_router_and_head(tmp_path, head, task):
    model = route(save_experts(tmp_path, task), head, task, router="linear")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = IDS % 3 if task == "tokens" else IDS[:, 0] % 3
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(IDS, MASK, labels, strict=True)
    ]
    more = {"task": "topic"} if head == "own" else {}

    def batch(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | more

    arguments = tf.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        save_steps=3,
        disable_tqdm=True,
    )
    tf.Trainer(model, arguments, train_dataset=rows, data_collator=batch).train()
    model.eval()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    trained = {"routed_lora_router"} | ({"modules_to_save"} if head != "own" else set())
    for name in changed:
        assert any(part in name for part in trained), name
    for part in trained:
        assert any(part in name for name in changed), part
    again = PeftModel.from_pretrained(make(task), tmp_path / "run" / "checkpoint-3").eval()
    assert torch.equal(logits(again, **more), logits(model, **more))


def test_what_is_loaded_is_frozen_unless_it_is_to_be_trained(tmp_path):
    model = route(save_experts(tmp_path), "mean")
    for is_trainable in (False, True):
        again = reloaded(model, tmp_path / str(is_trainable), is_trainable=is_trainable)
        assert wrapper(again).modules_to_save["default"].weight.requires_grad == is_trainable
    again = reloaded(model, tmp_path / "lean", low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


def test_loading_twice_leaves_the_configuration_as_it_is(tmp_path):
    model = route(save_experts(tmp_path), "own")
    for index in range(3):
        model = reloaded(model, tmp_path / str(index))
    config = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    assert len(config["modules_to_save"]) == len(set(config["modules_to_save"]))
    assert config["head"] == "own"


def test_peft_s_auto_class_and_transformers_load_it(tmp_path):
    make().save_pretrained(tmp_path / "base")
    base = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    config = RoutedLoraConfig(
        experts=save_experts(tmp_path), router="uniform", head="own", task_type="SEQ_CLS"
    )
    model = get_peft_model(base, config).eval()
    expected = logits(model, task="topic")
    model.save_pretrained(tmp_path / "routed")
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "routed", num_labels=3
    ).eval()
    assert torch.equal(logits(again, task="topic"), expected)
    skip_without_native_adapters()
    native = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "routed").eval()
    assert torch.allclose(logits(native, task="topic"), expected, atol=1e-6)


def test_classes_of_other_names_have_no_mean(tmp_path):
    experts = save_experts(tmp_path)
    for name, classes in (("tone", ["bad", "good", "mixed"]), ("topic", ["art", "law", "sport"])):
        config = copy.deepcopy(make().config)
        config.id2label = dict(enumerate(classes))
        config.save_pretrained(experts[name])
        if name == "tone":
            route(experts, "mean")  # of the others nothing is known
    with pytest.raises(UserError, match=r"classes of 'tone' are bad, good, mixed.*'own'"):
        route(experts, "mean")


def test_a_word_that_means_nothing(tmp_path):
    experts = save_experts(tmp_path)
    with pytest.raises(UserError, match="head='law' is none of the experts"):
        RoutedLoraConfig(experts=experts, head="law")
    with pytest.raises(UserError, match="names an expert as well"):
        RoutedLoraConfig(experts={"mean": experts["tone"]}, head="mean")


def test_heads_that_are_not_there(tmp_path):
    headless = save_expert(tmp_path / "headless", 3, task_type="FEATURE_EXTRACTION")
    experts = {"tone": save_expert(tmp_path / "tone", 1), "plain": headless}
    for head in ("mean", "own", "plain"):
        with pytest.raises(UserError, match="'plain' has no head"):
            route(experts, head)
    expected = stock(experts["tone"])
    model = route(experts, "tone")
    assert torch.allclose(logits(model, coefficients=one_hot(experts, "tone")), expected, atol=1e-5)
    plain = {"one": str(save_lora(tmp_path / "one", 1))}
    config = RoutedLoraConfig(experts=plain, router="uniform", head="new")
    with pytest.raises(UserError, match="a LlamaForCausalLM has no head"):
        get_peft_model(make_base(), config)
    whole = RoutedLoraConfig(
        experts=save_experts(tmp_path / "llama", "llama"), router="uniform", head="tone"
    )
    causal = tf.LlamaForCausalLM(make("llama").config)
    with pytest.raises(UserError, match=r"score\.weight, for which the base model has no place"):
        get_peft_model(causal, whole)


def test_a_base_model_without_a_head_is_named(tmp_path):
    model = route(save_experts(tmp_path, "llama"), "own", "llama")
    model.save_pretrained(tmp_path / "routed")
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*AutoModelForSequenceClassification"):
        PeftModel.from_pretrained(make_base(), tmp_path / "routed")


@pytest.mark.parametrize("task", ["bert", "tokens", "answers"])
def test_without_heads_the_base_model_s_is_trained_and_saved(tmp_path, task):
    headless = save_experts(tmp_path, task, task_type="FEATURE_EXTRACTION")
    model = route(headless, None, task)
    assert model.peft_config["default"].head == "new"
    head = wrapper(model, task).modules_to_save["default"]
    with torch.no_grad():
        head.weight.add_(1)
    assert head.weight.requires_grad
    assert torch.equal(logits(reloaded(model, tmp_path / "routed", task)), logits(model))


@pytest.mark.parametrize("head", ["own", "mean", "tone"])
def test_other_modules_are_trained_and_saved_beside_a_head(tmp_path, head):
    experts = save_experts(tmp_path)
    model = route(experts, head, modules_to_save=["pooler.dense"])
    pooler = model.get_base_model().bert.pooler.dense
    with torch.no_grad():
        pooler.modules_to_save["default"].weight.normal_()
    assert pooler.modules_to_save["default"].weight.requires_grad
    more = {"task": "tone"} if head == "own" else {}
    expected = logits(model, **more)
    assert not torch.allclose(expected, logits(route(experts, head), **more), atol=1e-4)
    assert torch.equal(logits(reloaded(model, tmp_path / "routed"), **more), expected)


def test_modules_inside_the_model_are_refused(tmp_path):
    path = save_expert(
        tmp_path / "one", 1, "llama", modules_to_save=["embed_tokens"], task_type=None
    )
    for head in (None, "one", "own"):
        with pytest.raises(UserError, match=r"embed_tokens.*is inside the model"):
            route({"one": path}, head, "llama")


@pytest.mark.filterwarnings("ignore:.*tie")
def test_a_tied_head_that_was_saved_whole_is_the_embedding(tmp_path):
    """What PEFT saves of both says what cannot be, not that the copy is not the base model's."""
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    config = LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "one")
    experts = {"one": str(tmp_path / "one")}
    for head in (None, "one", "new"):
        with pytest.raises(UserError, match=r"embed_tokens.*is inside the model; whole modules"):
            get_peft_model(base, RoutedLoraConfig(experts=experts, router="uniform", head=head))


def test_a_language_model_s_head(tmp_path):
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path / "one")
    experts = {"one": str(tmp_path / "one")}
    config = RoutedLoraConfig(experts=experts, router="uniform", head="one")
    routed = get_peft_model(copy.deepcopy(base), config).eval()
    assert torch.allclose(logits(routed), logits(model.eval()), atol=1e-5)
    with pytest.raises(UserError, match="models that do not generate"):
        get_peft_model(base, RoutedLoraConfig(experts=experts, router="uniform", head="own"))


def test_a_head_cannot_be_routed_as_well(tmp_path):
    routed = save_expert(
        tmp_path / "one", 1, "llama", target_modules=["q_proj", "score"], task_type=None
    )
    experts = {"one": routed, "two": save_expert(tmp_path / "two", 2, "llama")}
    with pytest.raises(UserError, match=r"LoRA at score.*cannot be both"):
        route(experts, "two", "llama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_are_peft_s(tmp_path, dtype):
    experts = save_experts(tmp_path, "llama")
    own = PeftModel.from_pretrained(make("llama").to(dtype), experts["topic"]).eval()
    config = RoutedLoraConfig(experts=experts, router="uniform", head="topic", task_type="SEQ_CLS")
    model = get_peft_model(make("llama").to(dtype), config).eval()
    head = wrapper(model, "llama").modules_to_save["default"].weight
    stock_head = wrapper(own, "llama").modules_to_save["default"].weight
    assert head.dtype == stock_head.dtype
    assert torch.equal(head, stock_head)


@pytest.mark.parametrize("task", ["llama", "llama tokens"])
@pytest.mark.parametrize("head", ["topic", "mean", "own"])
def test_the_command_composes_on_a_language_model(tmp_path, task, head):
    """The base model of most adapters has no head, and nowhere their number of labels."""
    torch.manual_seed(0)
    tf.LlamaForCausalLM(make("llama").config).save_pretrained(tmp_path / "base")
    experts = save_experts(tmp_path, task, labels=5)
    given = [f"--expert={name}={path}" for name, path in experts.items()]
    command = ["compose", str(tmp_path / "base"), *given, "--router", "uniform", "--head", head]
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "routed")])
    assert done.exit_code == 0, done.output
    auto = {
        "SEQ_CLS": tf.AutoModelForSequenceClassification,
        "TOKEN_CLS": tf.AutoModelForTokenClassification,
    }[TASKS[task][2]]

    def base():
        return auto.from_pretrained(tmp_path / "base", num_labels=5).eval()

    model = PeftModel.from_pretrained(base(), tmp_path / "routed").eval()
    composed = get_peft_model(
        base(), RoutedLoraConfig(experts=experts, router="uniform", head=head)
    ).eval()
    more = {"task": "topic"} if head == "own" else {}
    assert torch.allclose(logits(model, **more), logits(composed, **more), atol=1e-6)
    if head != "mean":
        alone = PeftModel.from_pretrained(base(), experts["topic"]).eval()
        given = logits(model, coefficients=one_hot(experts, "topic"), **more)
        assert torch.allclose(given, logits(alone), atol=1e-5)
    exported = ["export", str(tmp_path / "routed"), "-o", str(tmp_path / "exported")]
    done = CliRunner().invoke(main, exported)
    assert done.exit_code == 0, done.output
    alone = PeftModel.from_pretrained(base(), tmp_path / "exported" / "topic").eval()
    given = logits(model, coefficients=one_hot(experts, "topic"), **more)
    assert torch.allclose(logits(alone), given, atol=1e-5)


@pytest.fixture
def prepared(tmp_path):
    make().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 96)
    (tmp_path / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4 w5 w6 w7"}\n')
    return tmp_path


def test_the_command_trains_no_classifier_and_reads_the_head_of_the_base(prepared):
    experts = save_experts(prepared)
    base = str(prepared / "base")
    peft_routing.compose(base, experts, str(prepared / "routed"), router="linear", head="new")
    model = PeftModel.from_pretrained(make(), prepared / "routed")
    assert torch.equal(wrapper(model).modules_to_save["default"].weight, make().classifier.weight)
    with pytest.raises(UserError, match=r"for classifying.*transformers' Trainer"):
        peft_routing.train(str(prepared / "routed"), [str(prepared / "texts.jsonl")])
    headless = save_experts(prepared / "headless", task_type="FEATURE_EXTRACTION")
    with pytest.raises(UserError, match="say head='new'"):
        peft_routing.compose(base, headless, str(prepared / "no"), task_type="SEQ_CLS")
    assert not (prepared / "no").exists()


@pytest.mark.parametrize("head", ["own", "mean"])
@pytest.mark.parametrize("task", ["bert", "llama"])
def test_texts_are_inspected_without_a_task(prepared, head, task):
    if (
        task == "llama"
    ):  # a language model's head has no place here, and a classifier's is not there
        tf.LlamaForCausalLM(make(task).config).save_pretrained(prepared / "base")
    routed = str(prepared / "routed")
    experts = save_experts(prepared, task)
    peft_routing.compose(str(prepared / "base"), experts, routed, router="arrow", head=head)
    reading = peft_routing.Reading(quiet=True)
    found = peft_routing.inspect(routed, [f"a={prepared}/texts.jsonl"], reading=reading)
    means = torch.tensor(list(found.tasks["a"].values()))
    assert torch.allclose(means.sum(dim=-1), torch.ones(len(means)), atol=1e-5)


def test_adapters_for_features_are_on_the_trunk_of_a_language_model(prepared):
    """As PEFT's are, on what AutoModel makes of the checkpoint."""
    torch.manual_seed(0)
    tf.BertForMaskedLM(make().config).save_pretrained(prepared / "base")

    def trunk():
        return tf.AutoModel.from_pretrained(prepared / "base").eval()

    given = {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"]}
    experts = {}
    for seed, name in enumerate(("tone", "topic"), 1):
        experts[name] = save_lora(prepared / name, seed, trunk(), **given)
    base = str(prepared / "base")
    routed = str(prepared / "routed")
    peft_routing.compose(base, experts, routed, router="arrow")
    model = PeftModel.from_pretrained(trunk(), routed)
    with torch.no_grad():
        features = model(IDS, MASK, coefficients=one_hot(experts, "topic")).last_hidden_state
        alone = PeftModel.from_pretrained(trunk(), experts["topic"])
        assert torch.allclose(features, alone(IDS, MASK).last_hidden_state, atol=1e-5)
    reading = peft_routing.Reading(quiet=True)
    found = peft_routing.inspect(routed, [f"a={prepared}/texts.jsonl"], reading=reading)
    assert found.tasks["a"]
    with pytest.raises(UserError, match=r"for classifying or features.*FEATURE_EXTRACTION"):
        peft_routing.train(routed, [str(prepared / "texts.jsonl")])


def test_other_layers_than_the_configuration_has_are_refused_beside_another_head(prepared):
    config = copy.deepcopy(make("llama").config)
    experts = save_experts(prepared, "llama")
    config.num_hidden_layers = 2
    tf.LlamaForCausalLM(config).save_pretrained(prepared / "base")
    path = prepared / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1}))
    routed = str(prepared / "routed")
    peft_routing.compose(str(prepared / "base"), experts, routed, router="arrow", head="mean")
    with pytest.raises(UserError, match=r"holds model\.layers\.1\..*no place"):
        peft_routing.inspect(routed, [f"a={prepared}/texts.jsonl"])
