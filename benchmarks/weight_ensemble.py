"""A linear layer of eight experts whose weights are merged for every input: how to compute it, in CPU milliseconds.

python benchmarks/weight_ensemble.py
"""

import time
from collections.abc import Callable

import torch

from fusionbench import mixing

# inputs, tokens, in, out: ViT-B/32's MLP, clip-mini's, t5-mini's
SHAPES = [(16, 50, 768, 3072), (64, 65, 128, 512), (32, 20, 128, 256)]
EXPERTS, REPEATS = 8, 5


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{'inputs x tokens x in x out':<28}{'in the cache':>14}{'all at once':>14}{'outputs':>14}{'one for all':>14}"
    )
    for shape in SHAPES:
        print(
            f"{' x '.join(map(str, shape)):<28}" + "".join(f"{number:>14.1f}" for number in times(*shape)), flush=True
        )


def times(batch: int, tokens: int, inputs: int, outputs: int) -> list[float]:
    """Weights merged a few inputs at a time, or all at once; the experts' outputs; one merge for all inputs."""
    torch.manual_seed(0)
    layer = mixing.EnsembleLinear(inputs, outputs, bias=False, experts=EXPERTS)
    layer.fill(torch.randn(outputs, inputs), torch.randn(EXPERTS, outputs, inputs), None, None)
    x, coefficients = torch.randn(batch, tokens, inputs), torch.rand(batch, EXPERTS)
    experts = layer.task_vectors.permute(0, 2, 1).reshape(EXPERTS * inputs, outputs)

    def of_outputs() -> torch.Tensor:
        return x @ layer.weight.T + (x[:, :, None] * coefficients[:, None, :, None]).flatten(2) @ experts

    small, layer.coefficients = mixing.MERGED_AT_ONCE, coefficients
    torch.testing.assert_close(of_outputs(), layer(x), rtol=1e-3, atol=1e-2)
    found = [milliseconds(lambda: layer(x))]
    mixing.MERGED_AT_ONCE = 2**40
    found.append(milliseconds(lambda: layer(x)))
    mixing.MERGED_AT_ONCE = small
    found.append(milliseconds(of_outputs))
    layer.coefficients = coefficients[:1]
    return [*found, milliseconds(lambda: layer(x))]


def milliseconds(function: Callable[[], object]) -> float:
    """CPU time of the fastest of some calls."""
    fastest = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        fastest = min(fastest, time.process_time() - start)
    return 1000 * fastest


if __name__ == "__main__":
    main()
