from __future__ import annotations

from typing import Annotated

from fusionbench import Checkpoint, ModelPool, Range, method
from fusionbench.fuse import require_models


@method("mixing", paper="2212.05055", example="path/to/model")
def moe_upscaling(
    pool: ModelPool,
    *,
    experts: Annotated[int, Range(1), "copies of each MLP"] = 4,
    experts_per_token: Annotated[int, Range(1), "of which a token gets the sum"] = 2,
    router_std: Annotated[float, Range(0), "standard deviation of the routers, which are to be trained"] = 0.02,
    seed: Annotated[int, Range(0), "of the routers"] = 0,
) -> Checkpoint:
    """Make a language model sparse, every expert a copy of its MLP, to be trained further (Komatsuzaki et al., 2023).

        MLP(x) = Σᵢ gᵢ(x) MLPᵢ(x),   all MLPᵢ the dense one
        g(x)   = softmax of the k largest of R x, 0 for the others

    R is the router, `(experts, hidden size)`, and x the state of a token. Llama and Mistral become Mixtral, Qwen2 and
    Qwen3 their own sparse classes. The result predicts what the dense model does. The model is the pool's base or,
    without one, its only one. Nothing is read before the result is saved.
    """
    from fusionbench.routers import random_routers
    from fusionbench.sparse import mixture

    if pool.base is None:
        require_models(pool, 1, "moe_upscaling takes, without a base,", "leave the others out")
    model = pool.reference
    routers = random_routers(seed, router_std)
    return mixture(model, [model] * experts, routers, per_token=experts_per_token, inputs={"base": model})
