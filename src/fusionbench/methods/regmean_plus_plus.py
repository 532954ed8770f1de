from __future__ import annotations

from itertools import islice
from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, TaskPool, method, ops


@method("merging", paper="2508.03121", data="calibration")
def regmean_plus_plus(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    off_diagonal: Annotated[
        float, Range(0, 1, search=(0.5, 1.0)), "what the Gram matrices are multiplied by off their diagonal"
    ] = 0.95,
    damping: Annotated[float, Range(0, open_low=True), "pull towards the average, against features never seen"] = 1e-6,
) -> Checkpoint:
    """Merge linear layers in their order, by least squares on what the merged layers before give (Nguyen et al., 2025).

        Gᵢ = Xᵢᵀ Xᵢ / n,   times α off the diagonal
        W  = (Σᵢ Wᵢ Gᵢ + δ/N Σᵢ Wᵢ) (Σᵢ Gᵢ + δ I)⁻¹

    As `regmean`, but a layer's inputs Xᵢ are those that it has in the merged model, on the data of task i, and answers
    that model i writes. The data are read once for every group of layers with one input; the merged model is held in
    memory.
    """
    import torch

    from fusionbench.calibrate import as_matrix, data_of, from_matrix, gram_matrices, matrices_of
    from fusionbench.task import WritingTask

    tasks.check_covers(pool)
    model = pool.build(pool.map(lambda p: ops.mean(p.models)))
    names, layers = pool.names_in(model), matrices_of(model)
    answers = {name: data_of(pool.build(name), tasks, name) for name in pool if isinstance(tasks[name], WritingTask)}

    def grams_of(task: str, layers, batches: int | None = None):
        data = answers[task] if task in answers else tasks.calibration_batches(task, 32)
        return gram_matrices(model, tasks[task], islice(data, batches), layers)

    groups: dict[int, list[str]] = {}  # in the order of a forward pass
    for name, gram in grams_of(next(iter(pool)), layers, 1).items():
        groups.setdefault(id(gram), []).append(name)
    solved = {}
    for group in groups.values():
        some = {name: layers[name] for name in group}
        grams = torch.stack([grams_of(task, some)[group[0]] for task in pool])
        for name, layer in some.items():
            weights = torch.stack([m[names[name]] for m in pool.values()])
            matrices = as_matrix(layer, weights if weights.dtype == torch.float64 else weights.float())
            merged = ops.least_squares_mean(matrices, grams, off_diagonal=off_diagonal, damping=damping)
            solved[names[name]] = from_matrix(layer, merged)
            with torch.no_grad():
                model.get_parameter(name).copy_(solved[names[name]])
    return pool.map(lambda p: solved[p.name] if p.name in solved else ops.mean(p.models))
