from __future__ import annotations

from typing import Annotated, Literal

from fusionbench import Checkpoint, ModelPool, Range, TaskPool, method, ops


@method("merging", paper="2111.09832", data="calibration", gradients=True)
def fisher_merging(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    labels: Annotated[
        Literal["sampled", "expected", "given"],
        "whose gradients: labels sampled from the model's predictions, all of them by probability, or the data's",
    ] = "sampled",
    normalize: Annotated[bool, "scale each model's Fisher information to the same root mean square"] = True,
    floor: Annotated[
        float, Range(0, open_low=True), "added to the Fisher information, as a fraction of its root mean square"
    ] = 1e-6,
    seed: Annotated[int, Range(0, 2**64 - 1), "of the sampled labels"] = 0,
    statistics: Annotated[str, "folder to keep the Fisher information in, or to read it from; empty for none"] = "",
) -> Checkpoint:
    """Average the models, each parameter weighted by its Fisher information (Matena & Raffel, 2022).

        Fᵢ = the mean over inputs x of task i of (∂ log pᵢ(y|x) / ∂θᵢ)²
        wᵢ = Fᵢ / (root mean square of Fᵢ) + floor
        θ  = Σᵢ wᵢ ⊙ θᵢ / Σᵢ wᵢ

    The label y is sampled from the model's own prediction pᵢ, or as `labels` says; of an answer in words it is the
    first token. The mean is over the gradients of single examples: it does not depend on a batch size. Without
    `normalize` all are divided by the mean of the models' root mean squares. What has no gradient (buffers, unused
    parameters) is averaged evenly. The Fisher information of all models is held in memory, or read from `statistics`
    where these are kept.
    """
    from fusionbench.calibrate import fisher_diagonal, statistics_of

    def collect(name, model, task):
        names = pool.names_in(model)
        diagonal = fisher_diagonal(model, task, tasks.calibration_batches(name, 32), labels=labels, seed=seed)
        return {names[parameter]: squares for parameter, squares in diagonal.items()}

    facts = {"kind": "fisher", "labels": labels, "seed": seed}
    fishers = list(statistics_of(pool, tasks, collect, facts=facts, folder=statistics).values())
    scales = [root_mean_square(fisher) for fisher in fishers]
    if not normalize:
        scales = [sum(scales) / len(scales)] * len(scales)

    def merge(p):
        if p.name not in fishers[0]:
            return ops.mean(p.models)
        weights = p.models.new_tensor(floor).expand(p.models.shape).clone()
        for weight, fisher, scale in zip(weights, fishers, scales, strict=True):
            weight += fisher[p.name] / scale
        return p.models[0] + (weights * (p.models - p.models[0])).sum(0) / weights.sum(0)

    return pool.map(merge)


def root_mean_square(checkpoint: Checkpoint) -> float:
    """Over all elements of all tensors; 1 where all are zero."""
    squares = sum(float(tensor.double().square().sum()) for tensor in checkpoint.values())
    return (squares / sum(spec.numel for spec in checkpoint.specs.values())) ** 0.5 or 1.0
