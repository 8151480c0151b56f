"""Files with the head of a CLIP classifier: embeddings of its classes' names (WEMoE 4.1).

A head file is a safetensors file with three tensors: `text_embeds` (classes, projection_dim), of
any norm; `visual_projection.weight` (projection_dim, hidden_size), which is not read where the
tower has one; and `logit_scale`, a scalar as CLIP stores it, the logarithm of the factor of cosines
(ln 100 where there is none). `classes` in its metadata is a JSON list of the classes' names.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPModel, PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import load_config, load_model, load_tokenizer
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.modeling.modeling_clip_heads import CLIPVisionForImageClassification

PROJECTION = "visual_projection.weight"
TEMPLATES = ("a photo of a {}",)
TOWERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


@dataclass(frozen=True)
class ClipHead:
    """The contents of a head file, without its tensors."""

    path: str
    classes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def projection_dim(self) -> int:
        return self.shapes["text_embeds"][1]


def read_heads(
    paths: Sequence[str | None],
    models: Sequence[ModelReference],
    configs: Mapping[ModelReference, PretrainedConfig],
) -> list[ClipHead]:
    """The heads of the models, in order; an empty list where none is named.

    `UserError` for models that have no place for a head, and for heads that do not fit.
    """
    named = [path for path in paths if path is not None]
    if not named:
        return []
    for path, model in zip(paths, models, strict=True):
        architecture = (configs[model].architectures or ["no class"])[0]
        if architecture not in TOWERS:
            raise UserError(f"`head:` is for {' and '.join(TOWERS)}, and {model} is {architecture}")
        if path is None:
            raise UserError(
                f"{model} has no `head:`, though others have one: name one for each or for none"
            )
    heads = [_read_head(path) for path in named]
    for head, model in zip(heads, models, strict=True):
        _check_width(head, heads[0], model, configs[model])
    return heads


def has_projection(config: PretrainedConfig) -> bool:
    return config.architectures == ["CLIPVisionModelWithProjection"]


def as_tower(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration without the projection."""
    tower = copy.deepcopy(config)
    tower.architectures = ["CLIPVisionModel"]
    return tower


def with_projection(manifest: Manifest, config: Any) -> Manifest:
    """The manifest of a tower's files where these hold a projection, too."""
    shapes = {**manifest.shapes, PROJECTION: (config.projection_dim, config.hidden_size)}
    return replace(manifest, shapes=shapes)


def classifier_config(tower: Any, heads: Sequence[ClipHead]) -> PretrainedConfig:
    """The configuration of the tower with heads."""
    config = copy.deepcopy(tower)
    config.architectures = [CLIPVisionForImageClassification.__name__]
    config.projection_dim = heads[0].projection_dim
    return config


def _read_head(path: str) -> ClipHead:
    path = str(Path(path).expanduser())
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"head: {path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"head: {path} is not a safetensors file: {error}") from error
    if len(shapes.get("text_embeds", ())) != 2:
        raise UserError(f"head: {path} has no `text_embeds` of shape (classes, projection_dim)")
    if math.prod(shapes.get("logit_scale", ())) != 1:
        raise UserError(
            f"head: `logit_scale` of {path} must be a scalar, not {shapes['logit_scale']}"
        )
    try:
        classes = json.loads(metadata.get("classes", "null"))
    except ValueError:
        classes = None
    are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not classes or not are_names:
        raise UserError(f"head: the metadata of {path} has no `classes`, a JSON list of names")
    if len(classes) != shapes["text_embeds"][0]:
        raise UserError(
            f"head: {path} names {len(classes)} classes and embeds {shapes['text_embeds'][0]}"
        )
    for name in classes:
        if classes.count(name) > 1:
            raise UserError(f"head: {path} names the class {name!r} more than once")
    return ClipHead(path, tuple(classes), shapes)


def _check_width(head: ClipHead, first: ClipHead, model: ModelReference, config: Any) -> None:
    expected = (head.projection_dim, config.hidden_size)
    if head.projection_dim != first.projection_dim:
        raise UserError(
            f"head: text_embeds of {head.path} are {head.projection_dim} wide and those of "
            f"{first.path} {first.projection_dim}"
        )
    if has_projection(config):
        if head.projection_dim != config.projection_dim:
            raise UserError(
                f"head: text_embeds of {head.path} are {head.projection_dim} wide, and {model} "
                f"projects to {config.projection_dim}"
            )
    elif PROJECTION not in head.shapes:
        raise UserError(f"head: neither {head.path} nor {model} has a `{PROJECTION}`")
    elif head.shapes[PROJECTION] != expected:
        raise UserError(
            f"head: {PROJECTION} of {head.path} has the shape {head.shapes[PROJECTION]}; {model} "
            f"needs {expected}"
        )


class FromHeadFile(Task[Tensor]):
    """The projection, or the embeddings of the classes, each with a norm of exp(logit_scale)."""

    path: str
    part: Literal["projection", "classes"]
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> Tensor:
        tensors = load_file(self.path)
        if self.part == "projection":
            return tensors[PROJECTION].to(dtype_from_name(self.dtype))
        # With rows of norm exp(s) the classifier is a plain linear map of normalised images.
        usual = torch.tensor(math.log(100), device="cpu")
        scale = tensors.get("logit_scale", usual).float().exp()
        classes = scale * functional.normalize(tensors["text_embeds"].float(), dim=-1)
        return classes.to(dtype_from_name(self.dtype))


@torch.no_grad()
def write_clip_head(
    model_path: str,
    classes: Sequence[str],
    path: str | Path,
    templates: Sequence[str] = TEMPLATES,
    quiet: bool = False,
) -> None:
    """Write the head file for classes of these names, with the text tower of the whole CLIP at
    `model_path`.

    Each class is embedded as the mean over the templates (`{}` is its name) of normalised text
    features, itself normalised, as CLIP classifies without training. `UserError` for a template
    without `{}`, for no name or one twice, and for a model that is not a whole CLIP.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} for the name of the class")
    if not templates or not classes or len(set(classes)) < len(classes):
        raise UserError("a head needs a template and names of classes, each of them once")
    reading = Reading(quiet=quiet)
    config = load_config(model_path, reading)
    if config.model_type != "clip":
        raise UserError(
            f"{model_path} is a model of type {config.model_type}, not a whole CLIP with its text "
            "tower"
        )
    tokenizer = load_tokenizer(model_path, reading)
    model = load_model(model_path, config, reading, architecture=CLIPModel)
    longest = model.config.text_config.max_position_embeddings
    embeds = []
    for name in tqdm(classes, desc="classes", disable=quiet):
        texts = [template.replace("{}", name) for template in templates]
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        output = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        features = functional.normalize(output.pooler_output.float(), dim=-1)
        embeds.append(functional.normalize(features.mean(dim=0), dim=-1))
    tensors = {
        "text_embeds": torch.stack(embeds),
        PROJECTION: model.visual_projection.weight.contiguous(),
        "logit_scale": model.logit_scale,
    }
    # One key only: safetensors would write two in an order that differs from run to run.
    save_file(tensors, path, metadata={"classes": json.dumps(list(classes))})
