from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, TaskPool, method, ops
from fusionbench.methods.adamerging import BatchSize, Patience, Split, Steps
from fusionbench.registry import SCALING


@method("merging", paper="2312.06173", data="test inputs", gradients=True, base=True)
def concrete_task_arithmetic(
    pool: ModelPool,
    tasks: TaskPool,
    *,
    scaling_factor: Annotated[float, SCALING, "what the masked sum of the task vectors is multiplied by"] = 0.3,
    temperature: Annotated[float, Range(0, open_low=True), "of the relaxed Bernoulli variables"] = 0.5,
    steps: Steps = 2000,
    learning_rate: Annotated[float, Range(0, open_low=True), "Adam's, for the logits of the mask"] = 1e-3,
    patience: Patience = 0,
    batch_size: BatchSize = 16,
    split: Split = "test",
    seed: Annotated[int, Range(0), "of the masks that are tried, and of the order of the inputs"] = 0,
) -> Checkpoint:
    """Add the task vectors under a mask that all share, learned by the entropy of predictions (Tang et al., 2023).

        θ = θ₀ + λ m ⊙ Σᵢ τᵢ,   m = σ(z) / mean of σ(z)
        z = argmin of the mean of H(f(x)) over inputs x of all tasks, with
            σ((z + log u/(1 - u)) / T), u ~ Uniform(0, 1), in place of σ(z)

    The logits z begin at zero, and Adam makes steps, each with another sample u: of relaxed Bernoulli variables. The
    mean is over each tensor. In the end the probabilities σ(z) make the mask. Buffers are averaged, and need no mask.
    Beside the task vectors, whose memory `memory` bounds, logits, gradients and Adam's two moments are held: four times
    the model, in float32.
    """
    import torch

    from fusionbench.adapt import MergeAdaptation, descend

    logits = {name: torch.zeros(pool.reference.specs[name].shape, requires_grad=True) for name in pool.floating}
    sample = ""

    def merge(v):
        mask = ops.relaxed_mask(logits[v.name], temperature, sample and f"{sample}/{v.name}")
        return v.base + scaling_factor * mask.to(v.base) * v.task_vectors.squeeze(0)

    adaptation = MergeAdaptation(
        pool,
        tasks,
        merge,
        vectors=lambda p: p.task_vectors.sum(0, keepdim=True),  # under one mask, one vector does
        split=split,
        batch_size=batch_size,
        seed=seed,
    )
    optimizer = torch.optim.Adam([logits[name] for name in adaptation.learned], learning_rate)

    def update(step, entropy) -> float:
        nonlocal sample
        sample = f"{seed}/{step}"
        optimizer.zero_grad()
        found = entropy()
        optimizer.step()
        return found

    numbers = [scaling_factor, temperature, steps, learning_rate, patience, batch_size, seed]
    descend(
        adaptation,
        update,
        [optimizer],
        steps=steps,
        patience=patience,
        facts={"method": ["concrete TA", split, *numbers]},
    )
    sample = ""
    return adaptation.checkpoint()
