"""CLIP's vision tower as a classifier, whose classes are embeddings of their names (WEMoE 4.1).

For an image, p = P x is the projection of the tower's pooled state x, and the logit of a class is
exp(s) cos(p, t), where t is the embedding of its name and s CLIP's logit scale. With a head per
task, each has its own P and its own classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .modeling_wemoe import model_class


class TextHead(nn.Module):
    """A map of pooled states (samples, width) to logits (samples, classes)."""

    def __init__(self, width: int, projection_dim: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, projection_dim, bias=False)
        self.classes = nn.Linear(projection_dim, classes, bias=False)  # rows have the norm exp(s)

    def with_classes(self, number: int) -> "TextHead":
        """A new head of the same sizes for another number of classes."""
        return TextHead(self.projection.in_features, self.projection.out_features, number)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classes(functional.normalize(self.projection(pooled), dim=-1))


class CLIPVisionForImageClassification(CLIPVisionModel):
    """CLIP's vision tower with a text head, named after transformers' conventions."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.classifier = TextHead(config.hidden_size, config.projection_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        labels: None = None,  # the loss is computed where the heads are chosen, per task
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        kwargs["return_dict"] = True
        output = super().forward(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        return ImageClassifierOutput(
            logits=self.classifier(output.pooler_output),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


WEMoECLIPVisionForImageClassification = model_class(CLIPVisionForImageClassification)
