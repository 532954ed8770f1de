"""How often the routers of a SMILE model choose the expert of the task that an input is of, on calibration data.

    python benchmarks/smile_routing.py [FAMILY] [--gate-rank 64] [--rank -1]

Prints, for each task, the share of tokens, over all layers, that go to each model's expert.
"""

import argparse

import torch

import fusionbench as fb
from fusionbench.mixing import SmileLinear


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="clip-mini")
    parser.add_argument("--gate-rank", type=int, default=64)
    parser.add_argument("--rank", type=int, default=-1)
    arguments = parser.parse_args()
    pool, tasks = fb.load_modelpool(arguments.family), fb.load_taskpool(arguments.family)
    model = fb.methods.smile_upscaling(pool, gate_rank=arguments.gate_rank, rank=arguments.rank)
    shares: dict[str, torch.Tensor] = {}

    def add(layer: SmileLinear, inputs: tuple[torch.Tensor, ...]) -> None:
        shares[task] = shares[task] + layer.route(inputs[0]).argmax(-1).flatten().bincount(minlength=len(pool))

    for layer in model.modules():
        if isinstance(layer, SmileLinear):
            layer.register_forward_pre_hook(add)
    print(f"{'of the task':<16}" + "".join(f"{name:>15}" for name in pool))
    for task in tasks:
        shares[task] = torch.zeros(len(pool))
        inputs, _ = next(tasks.calibration_batches(task, 64))
        tasks[task].predict(model, inputs)
        row = 100 * shares[task] / shares[task].sum()
        print(f"{task:<16}" + "".join(f"{number:>15.1f}" for number in row.tolist()), flush=True)


if __name__ == "__main__":
    main()
