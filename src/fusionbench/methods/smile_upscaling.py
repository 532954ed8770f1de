from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from fusionbench import InputError, ModelPool, Range, method, ops

if TYPE_CHECKING:
    from torch import nn


@method("mixing", paper="2408.10174", base=True)
def smile_upscaling(
    pool: ModelPool,
    *,
    gate_rank: Annotated[int, Range(1), "directions in which a router measures a token, for each model"] = 16,
    rank: Annotated[int, Range(-1), "of an expert; -1 for all, which is exact"] = 32,
    top_k: Annotated[int, Range(1), "experts that a token gets"] = 1,
    others: Annotated[
        Literal["base", "average"], "what stands for the parameters of no linear layer: the base's, or the models' mean"
    ] = "base",
) -> nn.Module:
    """Give each linear layer a low-rank expert for each model, and a router that needs no training (Tang et al., 2024).

        y = W₀ x + Σᵢ pᵢ (Uᵢ Sᵢ Vᵢᵀ x + bᵢ),   Uᵢ Sᵢ Vᵢᵀ ≈ Wᵢ - W₀
        p = softmax of the k largest of ‖Dᵢᵀ x‖, 0 for the others

    An expert is the singular value decomposition, of `rank`, of what a model changed in the layer; a token x goes to
    the experts (k is `top_k`) in whose first singular directions, the `gate_rank` columns Dᵢ of Vᵢ, it is strongest.
    Layers that no model changed stay as they are, and so does an output layer that is tied to the embedding, or that
    of a causal language model, as in the paper.
    """
    from fusionbench.calibrate import matrices_of
    from fusionbench.mixed import fill, mix

    base = pool.require_base()
    if top_k > len(pool):
        raise InputError(f"smile_upscaling.top_k is {top_k}, but the pool has {len(pool)} models.")
    if not rank:
        raise InputError("smile_upscaling.rank is 0, at which there are no experts: give 1 or more, or -1 for all.")
    pool.check_finite(base=True)
    model = pool.build(base if others == "base" else pool.map(lambda p: ops.mean(p.models)))
    names = pool.names_in(model)
    layers = {
        name.removesuffix("weight").rstrip("."): layer
        for name, layer in upscaled(model, matrices_of(model)).items()
        # Not all are changed, as where adapters change some layers only.
        if any(pool.param(names[n]).task_vectors.any() for n in (name, _bias(name)) if n in names)
    }
    if not layers:
        raise InputError("smile_upscaling: the models differ from their base in no linear layer.")
    numbers = {"experts": len(pool), "gate_rank": gate_rank, "rank": rank, "top_k": top_k}
    mixed = mix(model, {"kind": "smile", "layers": list(layers), **numbers})
    for path, layer in layers.items():
        fill(mixed, path, layer, pool, names, path)
    return mixed.eval()


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def upscaled(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Of a model's linear layers, by the names of their weights, those that get experts if they were changed."""
    from fusionbench.calibrate import is_matrix
    from fusionbench.mixed import is_causal_lm

    output = model.get_output_embeddings() if is_causal_lm(model) else None  # type: ignore[operator]
    return {name: layer for name, layer in layers.items() if is_matrix(layer) and layer is not output}
