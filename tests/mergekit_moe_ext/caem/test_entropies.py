"""Entropies of expert usage: means and their table, against numbers that are known."""

import math

import pytest

from mergekit_moe_ext.caem.entropies import entropy_table, layer_entropies, mean_entropies
from mergekit_moe_ext.mixtures.usage import LayerUsage, TaskUsage, Usage

# Of four experts: all alike, two of them, one, and none.
COUNTS = {
    "encoder.block.1.router": ([3, 3, 3, 3], 1.0),
    "encoder.block.3.router": ([6, 6, 0, 0], 0.5),
    "decoder.block.1.router": ([0, 0, 9, 0], 0.0),
}


def layer(counts):
    return LayerUsage(tokens=sum(counts), counts=counts, weights=[float(n) for n in counts])


def usage(names):
    layers = {name: layer(COUNTS[name][0]) for name in names}
    task = TaskUsage(data="news.jsonl", fingerprint="0", samples=1, layers=layers)
    tasks = {"news": task, "a-long-name": task}
    return Usage(model="m", checkpoint="0", architecture="Switch", experts_per_token=1, tasks=tasks)


def test_entropies_and_their_means():
    entropies = layer_entropies({name: layer(counts) for name, (counts, _) in COUNTS.items()})
    assert entropies == pytest.approx({name: value for name, (_, value) in COUNTS.items()})
    means = mean_entropies(entropies)
    assert means == pytest.approx({"encoder": 0.75, "decoder": 0.0, "all": 0.5})
    assert math.isnan(layer_entropies({"router": layer([0, 0])})["router"])
    assert mean_entropies({"layers.0.gate": 0.25, "layers.1.gate": 0.75}) == {"all": 0.5}


def test_the_table_has_a_line_per_layer_and_mean_and_a_column_per_task():
    lines = entropy_table(usage(COUNTS)).splitlines()
    assert lines[0].split() == ["normalised", "entropy", "news", "a-long-name"]
    assert [line.split()[-2:] for line in lines[1:4]] == [
        ["1.000", "1.000"],
        ["0.500", "0.500"],
        ["0.000", "0.000"],
    ]
    assert [line.split()[:2] for line in lines[4:]] == [
        ["mean,", "encoder"],
        ["mean,", "decoder"],
        ["mean,", "all"],
    ]
    assert len({len(line) for line in lines}) == 1
