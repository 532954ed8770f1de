"""What mixing would reach if its routers knew the task of every input: how much of its gap is the routers' fault.

    python benchmarks/oracle_routing.py [FAMILY]

Prints test scores of SMILE and WEMoE with the router of an oracle: every token goes to the expert of its own task, and
every block has the weights of its own model. WEMoE's other parameters stay task arithmetic's, SMILE's the base's.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import nn

import fusionbench as fb
from fusionbench.methods.we_moe import BLOCKS, linear_layers_of
from fusionbench.mixing import SmileLinear
from fusionbench.runner import evaluate


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", default="clip-mini")
    family = parser.parse_args().family
    pool, tasks = fb.load_modelpool(family).load(), fb.load_taskpool(family)
    low, high = (tasks.headline(evaluate(run(pool), pool, tasks))["average"] for run in ENDS)
    print(f"{'router of an oracle':<24}{'average':>9}{'g':>6}")
    for label, by_task in (("we_moe", we_moe(pool)), ("smile_upscaling", smile(pool))):
        scores = []
        for name, model in by_task:
            its = tasks.only([name])
            scores.append(its.headline(evaluate(model, pool, its))["average"])
        average = sum(scores) / len(scores)
        print(f"{label:<24}{100 * average:>9.1f}{(average - low) / (high - low):>6.2f}", flush=True)


ENDS = (fb.methods.pretrained, fb.methods.individual)
Models = Iterator[tuple[str, nn.Module]]


def smile(pool: fb.ModelPool) -> Models:
    model = fb.methods.smile_upscaling(pool)
    layers = [layer for layer in model.modules() if isinstance(layer, SmileLinear)]
    gates = [layer.gate.clone() for layer in layers]
    for i, name in enumerate(pool):
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate.zero_()
            layer.gate[i] = 1e3 * gate[i]
        yield name, model


def we_moe(pool: fb.ModelPool) -> Models:
    for name in pool:
        model, own = pool.build(fb.methods.task_arithmetic(pool)), pool.build(name)
        for block, layers in linear_layers_of(model, BLOCKS).items():
            for inner in layers:
                path = f"{block}.{inner}"
                model.get_submodule(path).load_state_dict(own.get_submodule(path).state_dict())
        yield name, model


if __name__ == "__main__":
    main()
