from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, TaskPool, method, ops
from fusionbench.methods.adamerging import BatchSize, By, Patience, Split


@method("merging", paper="2312.06173", data="test inputs", gradients=True, base=True)
def concrete_adamerging(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    by: By = "layer",
    scaling_factor: Annotated[float, Range(), "of all coefficients, to begin with"] = 0.3,
    temperature: Annotated[float, Range(0, open_low=True), "of the relaxed Bernoulli variables"] = 0.5,
    mask_steps: Annotated[int, Range(0), "in which the mask is learned"] = 1000,
    steps: Annotated[int, Range(0), "in which then the coefficients are learned"] = 1000,
    base_learning_rate: Annotated[float, Range(0), "of the step of the coefficients that a mask is tried with"] = 1.0,
    mask_learning_rate: Annotated[float, Range(0, open_low=True), "Adam's, for the logits of the mask"] = 1e-3,
    learning_rate: Annotated[float, Range(0, open_low=True), "Adam's, for the coefficients"] = 1e-3,
    patience: Patience = 0,
    batch_size: BatchSize = 16,
    split: Split = "test",
    seed: Annotated[int, Range(0), "of the masks that are tried, and of the order of the inputs"] = 0,
) -> Checkpoint:
    """Learn a mask under which coefficients can be learned well, and then the coefficients (Tang et al., 2023).

        θ = θ₀ + m ⊙ Σᵢ cᵢ τᵢ,   m = σ(z) / mean of σ(z)
        L(c, z) = the mean of H(f(x)) over inputs x of all tasks
        z goes along  -∂L(c′, z)/∂z,   c′ = c - η ∂L(c, z)/∂c
        c goes along  -∂L(c, z)/∂c,   when z has come to its end

    First two levels: each step samples a mask, as `concrete_task_arithmetic` does, takes one gradient step on the
    coefficients c from where they begin, `scaling_factor`, and with those, c′, improves the mask. Then the
    probabilities are the mask, and AdaMerging goes on under it, from where the coefficients begin. What is held in
    memory is as there.
    """
    import torch

    from fusionbench.adapt import MergeAdaptation, descend

    names = pool.floating
    logits = {name: torch.zeros(pool.reference.specs[name].shape) for name in names}
    row = {name: i if by == "layer" else 0 for i, name in enumerate(names)}
    table = torch.full((max(row.values()) + 1, len(pool)), scaling_factor)
    sample = ""

    def merge(v):
        mask = ops.relaxed_mask(logits[v.name], temperature, sample and f"{sample}/{v.name}")
        return v.base + mask.to(v.base) * ops.combine(table[row[v.name]], v.task_vectors)

    adaptation = MergeAdaptation(
        pool,
        tasks,
        merge,
        vectors=lambda p: p.task_vectors,
        split=split,
        batch_size=batch_size,
        seed=seed,
    )
    masks = [logits[name] for name in adaptation.learned]
    mask_optimizer = torch.optim.Adam(masks, mask_learning_rate)
    optimizer = torch.optim.Adam([table], learning_rate)

    def learn(what: list[torch.Tensor], entropy) -> float:
        """The entropy, and its gradient to these alone."""
        for tensor in (table, *masks):
            tensor.grad = None
            tensor.requires_grad_(any(tensor is chosen for chosen in what))
        return entropy()

    def update_mask(step, entropy) -> float:
        nonlocal sample
        sample = f"{seed}/{step}"
        table.requires_grad_(False).fill_(scaling_factor)
        learn([table], entropy)
        if table.grad is not None:
            table.requires_grad_(False).sub_(base_learning_rate * table.grad)
        found = learn(masks, entropy)
        mask_optimizer.step()
        return found

    def update(step, entropy) -> float:
        found = learn([table], entropy)
        optimizer.step()
        return found

    numbers = [
        scaling_factor,
        temperature,
        base_learning_rate,
        mask_learning_rate,
        learning_rate,
        patience,
        batch_size,
        seed,
    ]
    facts = {"method": ["concrete AdaMerging", by, split, mask_steps, steps, *numbers]}
    descend(
        adaptation, update_mask, [mask_optimizer], steps=mask_steps, patience=patience, facts={**facts, "phase": "mask"}
    )
    sample = ""
    with torch.no_grad():
        table.fill_(scaling_factor)
    descend(adaptation, update, [optimizer], steps=steps, patience=patience, facts={**facts, "phase": "coefficients"})
    return adaptation.checkpoint()
