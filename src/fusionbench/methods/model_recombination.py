from __future__ import annotations

from typing import Annotated, Literal

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.layers import layer_name


@method("mixing", paper="2305.10730")
def model_recombination(
    pool: ModelPool,
    *,
    by: Annotated[Literal["layer", "tensor"], "what stays together: the tensors of a layer, or nothing"] = "layer",
    seed: Annotated[int, Range(0, 2**64 - 1), "of the permutations"] = 0,
) -> ModelPool:
    """Deal the layers of all models out anew: as many models, each layer of each of them in one (Hu et al., 2023).

        layer l of new model i = layer l of model πₗ(i)

    For every layer πₗ is a random permutation of the models; nothing is lost and nothing doubled. A layer is what
    shares a name up to its first number (`encoder.layers.3`); what has no number in its name goes with its module.
    """
    import torch

    names = list(pool)
    groups: dict[str, list[str]] = {}
    for tensor in pool.reference.specs:
        groups.setdefault(layer_name(tensor) if by == "layer" else tensor, []).append(tensor)
    generator = torch.Generator().manual_seed(seed)
    source: dict[str, list[int]] = {}  # of a tensor, the model from which each gets it
    for group in groups.values():
        source.update(dict.fromkeys(group, torch.randperm(len(names), generator=generator).tolist()))
    dealt = {}
    for i, name in enumerate(names):
        parts = {tensor: (pool[names[order[i]]], tensor) for tensor, order in source.items()}
        recombined = Checkpoint.assemble(parts, like=pool[name], inputs=dict(pool))
        dealt[name] = recombined.made_by("model_recombination", {"by": by, "seed": seed}, model=i)
    return pool.of(dealt, pool.base)
