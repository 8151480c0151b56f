"""Heads of CLIP's vision towers, against CLIPModel's own logits of the same images and texts."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    pipeline,
)

from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.recipes import Adaptation
from mergekit_moe_ext.wemoe.adaptation import adapt
from mergekit_moe_ext.wemoe.clip_heads import write_clip_head
from mergekit_moe_ext.wemoe.unloading import unload
from tests.conftest import document, merge, read_tensors, run
from tests.mergekit_moe_ext.merging.test_bad_input import refused
from tests.mergekit_moe_ext.wemoe.test_adaptation import draw, naive_entropy, pixels_of
from tests.mergekit_moe_ext.wemoe.test_wemoe import OUTSIDE, load
from tests.tokenizers import save_words

CLASSES = {"sun": ["beach", "open sea", "sky"], "cars": ["bmw", "old red audi", "fiat", "opel"]}
WORDS = [
    "<unk>",
    "</s>",
    *["a", "photo", "of", "the", "drawing"],
    *" ".join(CLASSES["sun"] + CLASSES["cars"]).split(),
]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SOURCE = {"router_layers": 0, "init_lambda": 1.0, "lambda": 1.0}  # one source comes out as it is


def make_clips(root, towers=CLIPVisionModel):
    """`whole`, its tower `base`, fine-tunes of that, and a head file for each of these."""
    config = CLIPConfig(
        # with an eos_token_id of 2 the word of the highest number is pooled, which here is of the
        # name
        text_config={
            **SIZES,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 16,
            "eos_token_id": 2,
        },
        vision_config={**SIZES, "image_size": 12, "patch_size": 4, "projection_dim": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    clip = CLIPModel(config)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        clip.logit_scale.fill_(2.3)
    clip.save_pretrained(root / "whole")
    save_words(root / "whole", WORDS, unk_token="<unk>", pad_token="</s>", eos_token="</s>")
    for seed, name in enumerate(("base", "sun", "cars")):
        tower = towers.from_pretrained(root / "whole")
        with torch.no_grad():
            for parameter in tower.parameters() if seed else ():
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(seed)
                )
        tower.save_pretrained(root / name)
    CLIPImageProcessor(size={"height": 12, "width": 12}, do_center_crop=False).save_pretrained(
        root / "base"
    )
    (root / "heads").mkdir()
    for task, names in CLASSES.items():
        write_clip_head(
            str(root / "whole"), names, root / "heads" / f"{task}.safetensors", quiet=True
        )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path)
    return tmp_path


def with_heads(tasks=("sun", "cars"), method="wemoe", base="./base", **parameters):
    keys = {key: parameters.pop(key) for key in ("dtype",) if key in parameters}
    models = [
        {"model": f"./{task}", "parameters": {"head": f"heads/{task}.safetensors"}}
        for task in tasks
    ]
    return document(method, models, base, parameters=parameters, **keys)


@torch.no_grad()
def logits_of_clip(task, tower=None, template="a photo of a {}"):
    """CLIPModel's, with the vision tower and, where there is one, the projection of that
    directory."""
    clip, tokenizer = (
        CLIPModel.from_pretrained("whole").eval(),
        AutoTokenizer.from_pretrained("whole"),
    )
    if tower:
        tensors = {
            name.removeprefix("vision_model."): each
            for name, each in read_tensors(Path(tower)).items()
        }
        clip.visual_projection.weight.copy_(
            tensors.pop("visual_projection.weight", clip.visual_projection.weight)
        )
        clip.vision_model.load_state_dict(tensors)
    texts = tokenizer(
        [template.format(name) for name in CLASSES[task]], padding=True, return_tensors="pt"
    )
    return clip(
        input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=IMAGES
    )["logits_per_image"]


@torch.no_grad()
def logits_of(path, task=None, **options):
    return load(path, AutoModelForImageClassification, **options)(
        pixel_values=IMAGES, task=task
    ).logits


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("towers", [CLIPVisionModel, CLIPVisionModelWithProjection])
@pytest.mark.parametrize("method", ["wemoe", "ewemoe"])
def test_logits_are_those_of_the_whole_clip(tmp_path, monkeypatch, towers, method):
    monkeypatch.chdir(tmp_path)
    make_clips(tmp_path, towers)
    own = {"upscale": "attention+mlp", **({"sparsity": 0.0} if method == "ewemoe" else {})}
    for task in CLASSES:
        path = merge(with_heads((task,), method, **SOURCE, **own), f"out-{task}")
        close(logits_of(path), logits_of_clip(task, tower=task))
        (tmp_path / task / "model.safetensors").write_bytes(
            (tmp_path / "base" / "model.safetensors").read_bytes()
        )
    both = merge(
        with_heads(method=method, router_init_std=0.3), "both"
    )  # all task vectors are zero
    model = load(both, AutoModelForImageClassification)
    for task in CLASSES:
        expected = logits_of_clip(task)
        assert expected.std(dim=1).min() > 0.1  # the classes differ
        close(model(pixel_values=IMAGES, task=task).logits, expected)
        output = model(
            pixel_values=IMAGES,
            task=task,
            labels=torch.tensor([2, 0, 1]),
            output_hidden_states=True,
        )
        close(output.loss, -expected.log_softmax(-1)[[0, 1, 2], [2, 0, 1]].mean())
        assert len(output.hidden_states) == 3
        close(model(pixel_values=IMAGES, task=task, return_dict=False)[0], expected)
    assert model.config.ensembling["heads"] == CLASSES
    with pytest.raises(ValueError, match="choose a head, one of sun, cars"):
        model(pixel_values=IMAGES)


def test_the_auto_class_of_image_classification_loads_it_without_remote_code(here):
    out = merge(with_heads(("sun",), **SOURCE))
    model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert (
        not any(info.values()) and type(model).__name__ == "WEMoECLIPVisionForImageClassification"
    )
    with torch.no_grad():
        close(model.eval()(IMAGES).logits, logits_of_clip("sun", "sun"))
    with pytest.raises(ValueError, match="which AutoModelForImageClassification loads"):
        AutoModel.from_pretrained(out)
    bare = merge(document("wemoe", ("sun",), parameters=SOURCE), "bare")
    with pytest.raises(ValueError, match="this is a WEMoECLIPVisionModel, which AutoModel loads"):
        AutoModelForImageClassification.from_pretrained(bare)
    draw(here / "images", 1, 1)
    found = pipeline("image-classification", str(out), top_k=3)("images/0.png")
    (pixels,) = pixels_of(out, "images")
    expected = dict(zip(CLASSES["sun"], model(pixels).logits[0].softmax(-1).tolist(), strict=True))
    assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-5)


def test_it_loads_where_this_package_is_missing_and_saves_again(here):
    merge(with_heads(method="ewemoe", sparsity=0.5), "clip-moe")
    expected = logits_of("clip-moe", "cars")
    inputs = {"pixel_values": IMAGES, "task": "cars"}
    torch.save({"clip-moe": ("AutoModelForImageClassification", inputs)}, "inputs.pt")
    environment = {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(here / "hf"),
    }
    done = run(sys.executable, "-c", OUTSIDE, "inputs.pt", "clip-moe", cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load("clip-moe.pt"), expected)
    first, again = read_tensors(here / "clip-moe"), read_tensors(here / "clip-moe-again")
    assert first.keys() == again.keys() and all(
        torch.equal(again[key], first[key]) for key in first
    )
    assert torch.equal(logits_of("clip-moe-again", "cars"), expected)


def test_in_bfloat16_logits_are_near(here):
    out = merge(with_heads(("sun",), **SOURCE, dtype="bfloat16"))
    model = load(out, AutoModelForImageClassification, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        close(model(IMAGES.bfloat16()).logits.float(), logits_of_clip("sun", "sun"), atol=0.5)


@torch.no_grad()
def test_embeddings_are_the_normalised_mean_of_normalised_text_features(here):
    templates = ["a photo of a {}", "the drawing of {}", "{}"]
    write_clip_head("whole", CLASSES["cars"], "several.safetensors", templates, quiet=True)
    clip, tokenizer = CLIPModel.from_pretrained("whole"), AutoTokenizer.from_pretrained("whole")
    written = load_file("several.safetensors")
    for name, embed in zip(CLASSES["cars"], written["text_embeds"], strict=True):
        mean = torch.zeros(8)
        for template in templates:
            ids = tokenizer(template.replace("{}", name), return_tensors="pt")["input_ids"]
            features = clip.text_projection(clip.text_model(ids).pooler_output)[0]
            mean += features / features.pow(2).sum().sqrt() / 3
        close(embed, mean / mean.pow(2).sum().sqrt(), atol=1e-5)
    assert torch.equal(written["visual_projection.weight"], clip.visual_projection.weight)
    with safe_open("several.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == CLASSES["cars"]
    for _ in range(5):
        write_clip_head("whole", CLASSES["cars"], "again.safetensors", templates, quiet=True)
        assert Path("again.safetensors").read_bytes() == Path("several.safetensors").read_bytes()
    for classes, given in (
        (["a", "a"], templates),
        ([], templates),
        (["a"], ["a photo"]),
        (["a"], []),
    ):
        with pytest.raises(ValueError, match="template"):
            write_clip_head("whole", classes, "wrong.safetensors", given)
    with pytest.raises(
        ValueError, match="sun is a model of type clip_vision_model, not a whole CLIP"
    ):
        write_clip_head("sun", ["a"], "wrong.safetensors")
    assert not Path("wrong.safetensors").exists()


def rewrite(path, classes=None, **tensors):
    """The head of `sun` with other tensors, None for none."""
    given = {name.replace("__", "."): each for name, each in tensors.items()}
    merged = {**load_file("heads/sun.safetensors"), **given}
    metadata = {
        "classes": classes if isinstance(classes, str) else json.dumps(classes or CLASSES["sun"])
    }
    save_file(
        {name: each for name, each in merged.items() if each is not None}, path, metadata=metadata
    )


def test_embeddings_of_any_norm_and_the_scale_that_clip_starts_from(here):
    embeds = load_file("heads/sun.safetensors")["text_embeds"] * torch.tensor([[0.1], [7.0], [1.0]])
    rewrite("heads/sun.safetensors", text_embeds=embeds, logit_scale=None)
    expected = logits_of_clip("sun", "sun") / math.exp(2.3) * 100
    close(logits_of(merge(with_heads(("sun",), **SOURCE))), expected, atol=1e-3)


def test_it_is_adapted_to_images_and_unloaded_to_the_tower(here, caplog):
    for task, names in CLASSES.items():
        for number, name in enumerate(reversed(names)):  # another order than the head's
            draw(here / "images" / task / name, [len(task), number], 3)
    merge(with_heads(router_layers=0), "out")
    options = Adaptation(steps=4, learning_rate=0.05, per_device_train_batch_size=6)
    data = [f"{task}=images/{task}" for task in CLASSES]
    measured = adapt("out", None, data, Reading(quiet=True), options)
    model = load("out-adapted", AutoModelForImageClassification)
    for task, names in CLASSES.items():
        logits = [
            model(pixels, task=task).logits[0] for pixels in pixels_of("out", f"images/{task}")
        ]
        right = [
            names[each.argmax()] == name
            for each, name in zip(logits, sorted(3 * names), strict=True)
        ]
        assert measured[task]["accuracy"][1] == sum(right) / len(right)
        mean = sum(naive_entropy(each.tolist()) for each in logits) / len(logits)
        assert measured[task]["entropy"][1] == pytest.approx(mean, abs=1e-4)
    assert (
        sum(after - before for before, after in (each["entropy"] for each in measured.values())) < 0
    )
    caplog.set_level("INFO")
    assert unload("out-adapted", "stock") is CLIPVisionModel
    assert (
        "its heads stay in the files" in caplog.text
        and "its heads stay" in (here / "stock/README.md").read_text()
    )
    assert (
        not list((here / "stock").glob("*.py"))
        and (here / "stock/preprocessor_config.json").exists()
    )
    for task in CLASSES:
        close(model(IMAGES, task=task).logits, logits_of_clip(task, "stock"))
    done = CliRunner().invoke(main, ["unload", "out-adapted", "-o", "again", "--task", "sun"])
    assert done.exit_code != 0 and "leave --task out" in done.output


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (
            {"text_embeds": None},
            ["heads/sun.safetensors", "`text_embeds`", "(classes, projection_dim)"],
        ),
        ({"text_embeds": torch.zeros(3)}, ["`text_embeds`", "(classes, projection_dim)"]),
        (
            {"text_embeds": torch.zeros(3, 6)},
            ["visual_projection.weight", "(8, 16)", "./sun needs (6, 16)"],
        ),
        ({"text_embeds": torch.zeros(2, 8)}, ["names 3 classes and embeds 2"]),
        ({"visual_projection__weight": None}, ["has a `visual_projection.weight`", "./sun"]),
        ({"logit_scale": torch.zeros(3)}, ["`logit_scale`", "scalar", "(3,)"]),
        ({"classes": ["sky", "sea", "sky"]}, ["'sky' more than once"]),
        ({"classes": "sky,sea"}, ["no `classes`, a JSON list"]),
        ({"classes": "{}"}, ["no `classes`, a JSON list"]),
    ],
)
def test_a_head_file_that_does_not_fit_is_refused(here, changes, fragments):
    rewrite("heads/sun.safetensors", **changes)
    refused(here, with_heads(), *fragments)


def test_heads_that_do_not_fit_the_models_are_refused(here, tmp_path):
    config = with_heads()
    del config["models"][1]["parameters"]
    refused(here, config, "./cars has no `head:`", "for each or for none")
    refused(
        here,
        {**with_heads(), "parameters": {"head": "heads/sun.safetensors"}},
        "`head` belongs under",
        "a model",
    )
    Path("heads/cars.safetensors").write_text("no tensors")
    refused(here, with_heads(), "heads/cars.safetensors is not a safetensors file")
    rewrite(
        "heads/cars.safetensors",
        text_embeds=torch.zeros(3, 6),
        visual_projection__weight=torch.zeros(6, 16),
    )
    refused(
        here, with_heads(), "heads/cars.safetensors are 6 wide and those of heads/sun.safetensors 8"
    )
    Path("heads/cars.safetensors").unlink()
    refused(here, with_heads(), "heads/cars.safetensors does not exist")
    whole = with_heads(("sun",))
    whole["models"][0]["model"] = "./whole"
    refused(here, whole, "`head:` is for CLIPVisionModel and", "./whole is CLIPModel")
    refused(here, {**with_heads(("sun",)), "base_model": "./whole"}, "they must be one class")


def test_the_script_writes_a_head(here, examples):
    import clip_heads

    Path("cars.txt").write_text("\n".join(CLASSES["cars"]) + "\n\n")
    command = ["--model", "whole", "--classes", "cars.txt", "-o", "cars.safetensors", "--quiet"]
    for given, exit_code, said in (
        ([], 0, ""),
        ([], 1, "exists"),
        (["--template", "x"], 1, "'x' has no {}"),
    ):
        command[5] = "other.safetensors" if given else command[5]
        done = CliRunner().invoke(clip_heads.main, [*command, *given])
        assert done.exit_code == exit_code and said in done.output, done.output
    made, expected = load_file("cars.safetensors"), load_file("heads/cars.safetensors")
    assert made.keys() == expected.keys() and all(
        torch.equal(made[name], expected[name]) for name in made
    )
