"""A structural method of one's own: `pool` puts the experts of several Mixtrals into one.

Importing this file registers the method. Run as a script, it is `mergekit-yaml` with that method:

    python examples/extending_method.py config.yml out
"""

from typing import Any

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods import registry
from mergekit.scripts.run_yaml import main
from pydantic import Field

from mergekit_moe_ext import UserError
from mergekit_moe_ext.merging.manifest import manifest_of
from mergekit_moe_ext.merging.method import (
    CopiedTensor,
    Job,
    MethodOptions,
    Plan,
    StructuralMethod,
)
from mergekit_moe_ext.merging.sources import (
    check_same_size,
    output_dtype,
    read_configs,
    read_headers,
)

MOE = "model.layers.{layer}.block_sparse_moe"


class PoolOptions(MethodOptions):
    """The options under `parameters:` of the merge, beside the shared method's own."""

    shared: str = Field(
        "linear", description="Tensor method that merges all but experts and gates."
    )
    experts_per_token: int | None = Field(
        None, ge=1, description="Experts that a token is sent to; by default as in the first model."
    )


class JoinedRows(Task[torch.Tensor]):
    """The rows of several tensors below each other, in the order of `loads`."""

    loads: tuple[LoadTensor, ...]
    shape: tuple[int, ...]

    def arguments(self) -> dict[str, Task]:
        return {str(index): load for index, load in enumerate(self.loads)}

    def execute(self, **tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensors[str(index)] for index in range(len(self.loads))])


class Pool(StructuralMethod):
    """The method: its name, its options, and its plan of the output."""

    options_type = PoolOptions

    def __init__(self) -> None:
        super().__init__(
            "pool",
            "Pooled experts",
            None,
            "the experts of several Mixtrals become the experts of one",
        )

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        configs = read_configs(job)
        for model, source in configs.items():
            if source.model_type != "mixtral":
                raise UserError(f"{model} is a {source.model_type}; pool takes Mixtrals")
        check_same_size(job, configs)
        manifests = {model: manifest_of(source) for model, source in configs.items()}
        headers = read_headers(job, configs, manifests)

        config = configs[job.donor]
        numbers = [configs[model].num_local_experts for model in job.experts]
        config.num_local_experts = sum(numbers)
        config.num_experts_per_tok = job.options.experts_per_token or config.num_experts_per_tok
        dtype = output_dtype(job, headers)
        config.dtype = dtype

        # Every tensor of the output is copied, computed or shared. Experts are numbered on from
        # source to source, in the order in which the gate's rows are joined.
        copies: dict[str, CopiedTensor] = {}
        computed: dict[str, Task] = {}
        for layer in range(config.num_hidden_layers):
            moe = MOE.format(layer=layer)
            target = 0
            for model, number in zip(job.experts, numbers, strict=True):
                for index in range(number):
                    for part in ("w1", "w2", "w3"):
                        name = f"{moe}.experts.{index}.{part}.weight"
                        shape = headers[model].shapes[name]
                        copy = CopiedTensor(model, name, shape)
                        copies[f"{moe}.experts.{target}.{part}.weight"] = copy
                    target += 1
            gate = f"{moe}.gate.weight"
            loads = tuple(job.load(model, gate, str(dtype)) for model in job.experts)
            computed[gate] = JoinedRows(loads=loads, shape=(target, config.hidden_size))
        of_donor = manifests[job.donor]
        shared = {
            name: of_donor.shared_tensor(name)
            for name in of_donor.shapes
            if ".block_sparse_moe." not in name
        }
        return Plan(
            config=config,
            num_experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
            shared=shared,
            copies=copies,
            computed=computed,
            dtype=dtype,
        )


registry.register(Pool())

if __name__ == "__main__":
    main()
