from __future__ import annotations

import numpy as np

from fusionbench import Checkpoint, InputError, ModelPool, Param, method
from fusionbench.fuse import TaskVectors, products


@method("merging", paper="2403.19522", base=True)
def model_stock(pool: ModelPool) -> Checkpoint:
    """Go from the base towards the models' average, the further the smaller their angles are (Jang et al., 2024).

        c = the mean of cos(τᵢ, τⱼ) over all pairs
        t = N c / (1 + (N - 1) c)
        θ = θ₀ + t/N Σᵢ τᵢ

    For every tensor by itself. As in the paper and in mergekit, t is not kept in [0, 1]: below 0 where the models
    disagree. A task vector of zeros is at right angles to all others. Where the task vectors cancel (the ratio has no
    limit there) the base stays.
    """
    pool.require_base()
    count = len(pool)
    if count < 2:
        raise InputError(
            f"model_stock looks at the angles between at least 2 models, and the pool has 1 ({', '.join(pool)}): "
            "add others, or use task_arithmetic."
        )

    pairs = np.triu_indices(count, 1)

    @np.errstate(all="ignore")
    def stock(p: Param) -> TaskVectors:
        gram = products(p)
        norms = np.sqrt(gram.diagonal())
        lengths = np.outer(norms, norms)
        cosines = gram / np.where(lengths == 0, 1, lengths)
        cosine = float(cosines[pairs].mean())
        below = 1 + (count - 1) * cosine
        t = 0.0 if below < 1e-12 else count * cosine / below
        return TaskVectors([t] * count, divisor=count)

    return pool.fuse(stock)
