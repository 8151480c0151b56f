"""Tables of log-probabilities without a model: experts that are each good at a task."""

import torch

from peft_routing.fusion.tables import Table, joined


def make_table(
    experts: int = 4, tasks: int = 4, texts: int = 3, length: int = 6, seed: int = 0
) -> Table:
    """Random log-probabilities, about 1.5 nats higher for the expert of a text's own task.

    Tasks differ in the number of tokens. Experts are called e0, e1 … and tasks by their experts.
    """
    generator = torch.Generator().manual_seed(seed)
    columns, counts = [], []
    for task in range(tasks):
        of_texts = [length + task + text for text in range(texts)]
        tokens = sum(of_texts)
        values = -3 * torch.rand(experts + 1, tokens, generator=generator) - 1.2
        if task < experts:
            values[task] += 1.1
        columns.append(list(values))
        counts.append(of_texts)
    names = [f"e{index}" for index in range(experts)]
    return joined(names, [f"e{index}" for index in range(tasks)], columns, counts)
