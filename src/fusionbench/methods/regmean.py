from __future__ import annotations

from functools import partial
from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, TaskPool, method, ops


@method("merging", paper="2212.09849", data="calibration")
def regmean(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    off_diagonal: Annotated[
        float, Range(0, 1, search=(0.5, 1.0)), "what the Gram matrices are multiplied by off their diagonal"
    ] = 0.95,
    damping: Annotated[float, Range(0, open_low=True), "pull towards the average, against features never seen"] = 1e-6,
    statistics: Annotated[str, "folder to keep the Gram matrices in, or to read them from; empty for none"] = "",
) -> Checkpoint:
    """Merge each linear layer by least squares on the inputs it sees, and average the rest (Jin et al., 2023).

        Gᵢ = Xᵢᵀ Xᵢ / n,   times α off the diagonal
        W  = (Σᵢ Wᵢ Gᵢ + δ/N Σᵢ Wᵢ) (Σᵢ Gᵢ + δ I)⁻¹

    W is a layer's matrix, `(out, in)`, and Xᵢ has the n inputs of that layer in model i as its rows, on the data of
    task i; δ is `damping` times the mean of the diagonal of Σᵢ Gᵢ. Labels are not used. Linear layers are those of
    transformers (GPT-2's too) and convolutions of one group, as matrices; not those whose weight is another's, too.
    A model that writes also reads its own answers. Where the matrices Gᵢ of all layers do not fit the pool's memory,
    they are computed for some layers at a time, and the data read once for each group; not where they are kept.
    """
    import torch

    from fusionbench.calibrate import (
        InGroups,
        as_matrix,
        data_of,
        from_matrix,
        gram_matrices,
        matrices_of,
        of_all,
        statistics_of,
    )

    module = pool.build(pool.reference)
    names = pool.names_in(module)
    layers = {names[name]: layer for name, layer in matrices_of(module).items()}
    widths = {name: as_matrix(layer, layer.get_parameter("weight")).shape[1] for name, layer in layers.items()}
    sizes = {name: 4 * widths[name] ** 2 for name in pool.reference.specs if name in widths}  # as they are asked for

    def collect(name, model, task, some=layers):
        wanted = {weight: layer for weight, layer in matrices_of(model).items() if names[weight] in some}
        grams = gram_matrices(model, task, data_of(model, tasks, name), wanted)
        return {names[weight]: gram for weight, gram in grams.items()}

    if statistics or len(pool) * sum(sizes.values()) <= pool.room():
        kept = statistics_of(pool, tasks, collect, facts={"kind": "gram"}, folder=statistics).values()
        grams = partial(of_all, list(kept))
    else:
        grams = InGroups(pool, tasks, sizes, collect).of

    def merge(p):
        inputs = grams(p.name)
        if inputs is None:
            return ops.mean(p.models)
        layer = layers[p.name]
        matrices = as_matrix(layer, p.models)
        merged = ops.least_squares_mean(matrices, torch.stack(inputs), off_diagonal=off_diagonal, damping=damping)
        return from_matrix(layer, merged)

    return pool.map(merge)
