from __future__ import annotations

from typing import Annotated, Literal

from fusionbench import Checkpoint, InputError, ModelPool, Range, method, ops

Prompts = dict[str, list[str]] | None


@method("mixing", ordered=True, example="path/to/first path/to/second others=average")
def moe_merging(
    pool: ModelPool,
    *,
    experts_per_token: Annotated[int, Range(1), "of which a token gets the sum"] = 2,
    others: Annotated[
        Literal["base", "average"], "what stands for all but the MLPs: the base's parameters, or the models' mean"
    ] = "base",
    prompts: Annotated[
        Prompts,
        "texts for each model that it is to be chosen for, from which the routers are made; null for random ones",
    ] = None,
    router_std: Annotated[float, Range(0), "standard deviation of random routers, which are to be trained"] = 0.02,
    seed: Annotated[int, Range(0), "of random routers"] = 0,
) -> Checkpoint:
    """Make a sparse language model whose experts are the MLPs of fine-tuned ones.

        MLP(x) = Σᵢ gᵢ(x) MLPᵢ(x)
        g(x)   = softmax of the k largest of R x, 0 for the others

    R is the router, `(experts, hidden size)`, and x the state of a token. Llama and Mistral become Mixtral, Qwen2 and
    Qwen3 their own sparse classes. A router made from prompts is, for each expert, the direction of what enters the MLP
    of that layer on its prompts, less the mean over all experts. With random routers nothing is read before the result
    is saved.
    """
    from fusionbench.routers import random_routers, routers_of_prompts
    from fusionbench.sparse import mixture

    if others == "base" and pool.base is None:
        raise InputError(
            "moe_merging needs the base model for all but the MLPs, and has none: say others=average, or use "
            "fusionbench run with a pool that has a base."
        )
    base = pool.require_base() if others == "base" else pool.map(lambda p: ops.mean(p.models), elementwise=True)
    if prompts is None:
        routers = random_routers(seed, router_std)
    else:
        for name in (*prompts, *pool):
            pool[name]  # an unknown name is an error
            if not prompts.get(name):
                raise InputError(f"moe_merging.prompts has no texts for the model '{name}': give some for each model.")
        routers = routers_of_prompts(base, [prompts[name] for name in pool])
    return mixture(base, list(pool.values()), routers, per_token=experts_per_token, inputs=pool.inputs)
