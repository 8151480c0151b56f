"""Who is chosen where: the coefficients that a routed adapter gives, per task and module."""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from _mergekit_moe_ext_common.data import (
    RealTokens,
    collate,
    decoder_inputs,
    load,
    parse_sources,
    real_tokens,
    tokenise,
)
from _mergekit_moe_ext_common.figures import heat_map, pyplot
from _mergekit_moe_ext_common.loading import (
    load_tokenizer,
    padding_token,
    silence,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import new_file
from _mergekit_moe_ext_common.token_page import ShownTexts, write_page
from peft_routing.layer import Experts
from peft_routing.loading import base_of, check_routed, load_adapter_config, load_routed

# Keys and values of a decoder's cross-attention, as T5, BART and most others call them.
_READS_THE_ENCODER = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|crossattention).*\.(k|v|k_proj|v_proj|key|value)$"
)


@dataclass(frozen=True)
class Inspection:
    """Mean coefficients over tokens, by task and module: a number per expert."""

    adapter: str
    router: str
    experts: list[str]
    tasks: dict[str, dict[str, list[float]]]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. `UserError` where it cannot be written."""
        with new_file(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def inspect_adapter(
    adapter: str,
    data: Sequence[str],
    reading: Reading,
    *,
    base: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    html: Path | None = None,
) -> Inspection:
    """The mean coefficients of a routed adapter on the texts of each source. Where there is a path
    `html`, a page with the texts is written there.

    `UserError` for what cannot be read.
    """
    silence(reading)
    config = load_adapter_config(adapter)
    base, base_config = base_of(base, config, reading)
    headers = check_routed(adapter, config, base, base_config, reading)
    tokenizer = load_tokenizer(base, reading)
    texts = {}
    for source in parse_sources(data):
        texts[source.name] = tokenise(
            load(source, max_samples),
            source,
            tokenizer,
            columns=reading.columns,
            max_length=reading.max_length,
            vocabulary=vocabulary_of(base_config),
            encoder_decoder=base_config.is_encoder_decoder,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_routed(adapter, config, base, base_config, reading, headers=headers)
    model = model.to(device).eval()
    pad_token_id = padding_token(tokenizer, vocabulary_of(base_config))
    any_head = {"task": config.names[0]} if config.head == "own" else {}
    tasks = {}
    shown = ShownTexts(tokenizer)
    for name, rows in texts.items():
        collate_rows = functools.partial(collate, pad_token_id=pad_token_id)
        batches = DataLoader(rows, batch_size, collate_fn=collate_rows)
        with _recorded(model) as means:
            for batch in tqdm(batches, desc=name, disable=reading.quiet):
                inputs = {key: value.to(device) for key, value in batch.items()}
                is_shown = html is not None and shown.has_room(name)
                _run(model, inputs, any_head, means, name, shown if is_shown else None)
        tasks[name] = means.result()
    inspected = Inspection(str(adapter), config.router, config.names, tasks)
    if html:
        title = f"{Path(adapter).name}: {config.router}"
        write_page(html, title, config.names, shown, tasks, "Mean coefficient of each module")
    return inspected


def _run(
    model: Any,
    inputs: dict[str, Tensor],
    any_head: Mapping[str, str],
    means: "_Means",
    task: str,
    shown: ShownTexts | None,
) -> None:
    """Runs a batch, whose coefficients go to `means` and, token by token, to `shown`."""
    means.of_tokens = None if shown is None else {"inputs": {}, "targets": {}}
    means.real = real_tokens(inputs)
    ids = {"inputs": inputs["input_ids"], "targets": inputs.get("labels")}
    if "labels" in inputs:
        labels = inputs.pop("labels")
        inputs["decoder_input_ids"] = decoder_inputs(model.get_base_model(), labels)
        means.has_targets = True
    with torch.no_grad():
        model(**inputs, **any_head, use_cache=False)
    if shown is None or means.of_tokens is None:
        return
    for kind, layers in means.of_tokens.items():
        tokens = ids[kind]
        if layers and tokens is not None:
            stack = kind if means.has_targets else ""
            shown.add(task, stack, tokens, getattr(means.real, kind), layers)


class _Means:
    """Mean coefficients over the tokens that are not padding, module by module."""

    real: RealTokens  # of the batch that runs next
    # Of that batch, the coefficients (batch, length, experts) of each module for inputs and for
    # targets; None where nobody looks at tokens.
    of_tokens: dict[str, dict[str, Tensor]] | None
    has_targets = False  # whether the model reads targets beside its inputs

    def __init__(self) -> None:
        self.of_tokens = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, module: str, x: Tensor, coefficients: Tensor) -> None:
        """Adds a module's coefficients for its input x (…, in)."""
        coefficients = coefficients.expand(*x.shape[:-1], coefficients.shape[-1])
        reads_targets = "decoder" in module and not _READS_THE_ENCODER.search(module)
        real = self.real.targets if reads_targets else self.real.inputs
        # Where a module's input has lost the batch dimension, nobody knows which row is padding.
        if real.shape == x.shape[:-1]:
            if self.of_tokens is not None:
                of_targets = reads_targets and self.has_targets
                self.of_tokens["targets" if of_targets else "inputs"][module] = coefficients
            coefficients = coefficients[real]
        coefficients = coefficients.flatten(0, -2).double()
        self._sums[module] = self._sums.get(module, 0) + coefficients.sum(dim=0).cpu()
        self._counts[module] = self._counts.get(module, 0) + len(coefficients)

    def result(self) -> dict[str, list[float]]:
        """The mean coefficient of each expert, by module."""
        return {
            module: (total / self._counts[module]).tolist() for module, total in self._sums.items()
        }


@contextmanager
def _recorded(model: Any) -> Iterator[_Means]:
    """The means of all that the model's experts are given while this is open."""
    means = _Means()

    def recorder(module: str, count: int) -> Any:
        def record(_: Any, inputs: tuple[Any, ...]) -> None:
            x, coefficients, *_others = inputs
            means.add(module, x, coefficients[..., :count])

        return record

    handles = []
    for name, experts in model.named_modules():
        if isinstance(experts, Experts):
            module = name.removeprefix("base_model.model.").partition(".routed_lora_")[0]
            count = len(experts.site.ranks) - experts.site.general  # without general experts
            handles.append(experts.register_forward_pre_hook(recorder(module, count)))
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def table(inspection: Inspection) -> str:
    """A table with each expert's mean coefficient over modules and tokens, a row per task."""
    rows = {"coefficient": inspection.experts}
    for task, modules in inspection.tasks.items():
        means = torch.tensor(list(modules.values())).mean(dim=0)
        rows[task] = [f"{mean:.3f}" for mean in means.tolist()]
    width = max(map(len, rows))
    lines = []
    for head, cells in rows.items():
        pairs = zip(cells, inspection.experts, strict=True)
        aligned = [f"{cell:>{max(7, len(expert))}}" for cell, expert in pairs]
        lines.append("  ".join([f"{head:{width}}", *aligned]))
    return "\n".join(lines)


def plot(inspection: Inspection, path: Path) -> None:
    """Draws a heat map per task, with a row per module and a column per expert, into a file."""
    plt = pyplot()
    tasks = inspection.tasks
    modules = list(next(iter(tasks.values())))
    rows = itertools.chain.from_iterable(task.values() for task in tasks.values())
    highest = max(map(max, rows))
    height = min(12.0, 1.6 + 0.1 * len(modules))  # inches
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(2.4 * len(tasks) + 1.2, height), squeeze=False
    )
    for axes, (name, task) in zip(panels[0], tasks.items(), strict=True):
        image = heat_map(axes, [task[module] for module in modules], highest)
        axes.set_title(name, fontsize=9)
        if len(inspection.experts) <= 16:
            axes.set_xticks(range(len(inspection.experts)), inspection.experts, rotation=90)
        axes.set_xlabel("expert")
    panels[0][0].set_ylabel("module")
    figure.suptitle(f"{Path(inspection.adapter).name}: {inspection.router}", fontsize=11)
    figure.tight_layout()
    figure.colorbar(image, ax=panels[0].tolist(), label="mean coefficient", fraction=0.03, pad=0.02)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=150, bbox_inches="tight")
    plt.close(figure)
