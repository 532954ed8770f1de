from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fusionbench import Checkpoint, ModelPool, Range, TaskPool, method, ops
from fusionbench.registry import Output

# What all adaptations have.
By = Annotated[Literal["layer", "task"], "a coefficient for each tensor and model, or for each model"]
Steps = Annotated[int, Range(0), "of the adaptation"]
Patience = Annotated[int, Range(0), "steps without a lower entropy after which it ends; 0 for never"]
BatchSize = Annotated[int, Range(1), "inputs of each task in a step"]
Split = Annotated[Literal["test", "calibration"], "whose inputs are seen, without their labels"]


@method("merging", paper="2310.02575", data="test inputs", gradients=True, base=True)
def adamerging(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    by: By = "layer",
    scaling_factor: Annotated[float, Range(), "of all coefficients, to begin with"] = 0.3,
    density: Annotated[
        float, Range(0, 1, open_low=True), "fraction kept of each task vector, by TIES; 1 for all (0.2 is AdaMerging++)"
    ] = 1.0,
    steps: Steps = 500,
    learning_rate: Annotated[float, Range(0, open_low=True), "Adam's"] = 1e-3,
    patience: Patience = 0,
    batch_size: BatchSize = 16,
    split: Split = "test",
    coefficients: Annotated[
        str, Output, "file to write the coefficients to, for apply_coefficients; empty for none"
    ] = "",
    seed: Annotated[int, Range(0), "of the order of the inputs"] = 0,
) -> Checkpoint:
    """Learn the coefficients of the task vectors by the entropy of predictions on test inputs (Yang et al., 2024).

        θ  = θ₀ + Σᵢ λᵢ τᵢ
        λᵢ = argmin of the mean of H(f(x)) over inputs x of all tasks

    There is a λᵢ for each tensor and model, or for each model; all begin at `scaling_factor`, and Adam takes `steps`
    steps. With a `density` below 1, τᵢ is what `ties_merging` leaves of it before it sums. Of a text-to-text model the
    entropy is that of the first token it writes.
    """
    import torch

    from fusionbench.adapt import MergeAdaptation, descend, step
    from fusionbench.coefficients import write_coefficients
    from fusionbench.writer import check_file

    if coefficients:
        check_file(Path(coefficients), "coefficients")
    names = pool.floating
    row = {name: i if by == "layer" else 0 for i, name in enumerate(names)}
    table = torch.full((max(row.values()) + 1, len(pool)), scaling_factor, requires_grad=True)
    adaptation = MergeAdaptation(
        pool,
        tasks,
        lambda v: v.base + ops.combine(table[row[v.name]], v.task_vectors),
        vectors=ops.trimmed_and_elected(pool, density),
        split=split,
        batch_size=batch_size,
        seed=seed,
    )
    optimizer = torch.optim.Adam([table], learning_rate)
    numbers = [scaling_factor, density, learning_rate, patience, batch_size, seed]
    facts = {"method": ["adamerging", by, split, steps, *numbers]}
    descend(adaptation, step(optimizer), [optimizer], steps=steps, patience=patience, facts=facts)
    if coefficients:
        rows = {name: table[row[name]].tolist() for name in adaptation.learned}
        write_coefficients(coefficients, list(pool), rows, density)
    return adaptation.checkpoint()
