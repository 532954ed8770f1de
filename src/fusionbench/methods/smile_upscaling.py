from __future__ import annotations

from typing import Annotated, Literal

from fusionbench import InputError, ModelPool, Range, method, ops


@method("mixing", paper="2408.10174")
def smile_upscaling(
    pool: ModelPool,
    *,
    gate_rank: Annotated[int, Range(1), "directions in which a router measures a token, for each model"] = 16,
    rank: Annotated[int, Range(-1), "of an expert; -1 for all, which is exact"] = 32,
    top_k: Annotated[int, Range(1), "experts that a token gets"] = 1,
    others: Annotated[
        Literal["base", "average"], "what stands for the parameters of no linear layer: the base's, or the models' mean"
    ] = "base",
):
    """Give each linear layer a low-rank expert for each model, and a router that needs no training (Tang et al., 2024).

    An expert is the singular value decomposition of what a model changed in the layer; a token goes to the experts
    whose first singular directions it is strongest in. Layers that no model changed stay as they are, and so does an
    output layer that is tied to the embedding.
    """
    import torch

    from fusionbench.calibrate import as_matrix, matrices_of
    from fusionbench.mixing import SmileLinear

    base = pool.require_base()
    if top_k > len(pool):
        raise InputError(f"smile_upscaling.top_k is {top_k}, but the pool has {len(pool)} models.")
    if not rank:
        raise InputError("smile_upscaling.rank is 0, at which there are no experts: give 1 or more, or -1 for all.")
    pool.check_finite()
    model = pool.build(base if others == "base" else pool.map(lambda p: ops.mean(p.models)))
    names = pool.names_in(model)
    for name, layer in matrices_of(pool, model).items():
        if isinstance(layer, torch.nn.Conv2d):
            continue
        path = name.removesuffix(".weight") if "." in name else ""
        bias = f"{path}.bias".lstrip(".")
        weight = pool.param(names[name])
        if not weight.task_vectors.any():
            continue  # as where adapters change some layers only
        matrix = as_matrix(layer, weight.base)
        upscaled = SmileLinear(
            matrix.shape[1],
            matrix.shape[0],
            experts=len(pool),
            gate_rank=gate_rank,
            rank=rank if rank > 0 else min(matrix.shape),
            top_k=top_k,
            bias=bias in names,
        ).fill(matrix, as_matrix(layer, weight.models), pool.param(names[bias]).models if bias in names else None)
        if not path:
            return upscaled.eval()
        model.set_submodule(path, upscaled)
    return model.eval()
