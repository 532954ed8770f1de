"""A step of layer-wise AdaMerging here and in the reference implementation, on the same models and pictures.

Prints CPU seconds a step, the ratio, and the memory that each takes at most beyond what a forward and backward pass of
one model takes. Weights are random, of a CLIP vision tower of the size asked for. The reference runs in an environment
of its own, which has `fusion-bench==0.2.33` installed; without it, only ours is measured.

    python benchmarks/adaptation_step.py [--reference PYTHON] [--width 384] [--models 8] [--batch 4] [--steps 3]
        [--memory 100MB]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

WHICH = ("one model", "ours", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", metavar="PYTHON", help="interpreter of an environment with fusion-bench")
    parser.add_argument("--width", type=int, default=384, help="of the tower: 768 is ViT-B/32's")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="pictures of each task")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", default="64GB", help="for the task vectors that ours holds; others it reads anew")
    parser.add_argument("--measure", choices=WHICH, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for which in WHICH if arguments.reference else WHICH[:2]:
        python = arguments.reference if which == "reference" else sys.executable
        words = [str(python), __file__, "--measure", which]
        for name in ("width", "models", "batch", "steps", "memory"):
            words += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[which] = json.loads(done.stdout.splitlines()[-1])
    one = found["one model"]
    print(f"{'':<12}{'CPU s a step':>14}{'of one model':>14}{'peak MB more':>14}{'entropy':>10}")
    for which, row in found.items():
        ratio, more = row["seconds"] / one["seconds"], row["peak"] - one["peak"]
        print(f"{which:<12}{row['seconds']:>14.2f}{ratio:>14.2f}{more:>14.0f}{row['entropy']:>10.4f}")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """CPU seconds a step and the peak memory of the process, in MB; and the last entropy, which is to be the same."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = tower(arguments.width)
    head = 0.1 * torch.randn(10, arguments.width)
    count, size = arguments.models, arguments.batch
    pictures = [torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    makers = {"one model": one_model, "ours": partial(ours, arguments.memory), "reference": reference}
    step = makers[arguments.measure](base, head, pictures)
    entropy = step()  # warm
    start = time.process_time()
    for _ in range(arguments.steps):
        entropy = step()
    seconds = (time.process_time() - start) / arguments.steps
    return {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "entropy": entropy,
    }


def tower(width: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    return CLIPVisionModel(config).eval()


def tuned(base: nn.Module, number: int) -> nn.Module:
    model = tower(base.config.hidden_size)
    generator = torch.Generator().manual_seed(number + 1)
    own = {n: t + 0.001 * torch.randn(t.shape, generator=generator) for n, t in base.state_dict().items()}
    model.load_state_dict(own)
    return model


def entropy_of(model, head, pictures) -> torch.Tensor:
    log_p = (model(pictures)[1] @ head.T).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def one_model(base, head, pictures):
    """A forward and a backward pass for each task's batch, to all parameters."""

    def step() -> float:
        total = 0.0
        for batch in pictures:
            loss = entropy_of(base, head, batch) / len(pictures)
            loss.backward()
            total += loss.item()
        base.zero_grad()
        return total

    return step


class Pictures:
    """A task of one batch."""

    def __init__(self, head, batch) -> None:
        self.head, self.batch = head, batch

    def batches(self, split, size, *, seed=None):
        yield self.batch, torch.zeros(len(self.batch))

    def predict(self, model, inputs):
        return model(inputs)[1] @ self.head.T


def ours(memory, base, head, pictures):
    from safetensors.torch import save_file

    import fusionbench as fb
    from fusionbench import ops
    from fusionbench.adapt import MergeAdaptation
    from fusionbench.architectures._template import Template

    folder = Path(tempfile.mkdtemp())  # as models are: in files
    for i in range(len(pictures)):
        save_file(tuned(base, i).state_dict(), folder / f"{i}.safetensors")
    save_file(base.state_dict(), folder / "base.safetensors")
    models = {str(i): folder / f"{i}.safetensors" for i in range(len(pictures))}
    pool = fb.ModelPool(models, base=folder / "base.safetensors", architecture=Template(base), memory=memory)
    tasks = fb.TaskPool({str(i): Pictures(head, batch) for i, batch in enumerate(pictures)})
    rows = {name: i for i, name in enumerate(pool.reference.specs)}
    table = torch.full((len(rows), len(models)), 0.3, requires_grad=True)
    adaptation = MergeAdaptation(
        pool,
        tasks,
        lambda v: v.base + ops.combine(table[rows[v.name]], v.task_vectors),
        vectors=lambda p: p.task_vectors,
        split="test",
        batch_size=len(pictures[0]),
        seed=0,
    )
    entropies = adaptation.entropies(0)
    optimizer = torch.optim.Adam([table], 1e-3)

    def step() -> float:
        optimizer.zero_grad()
        found = next(entropies)()
        optimizer.step()
        return found

    return step


def reference(base, head, pictures):
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

    models = [tuned(base, i) for i in range(len(pictures))]
    table = torch.full((len(models), len(list(base.parameters()))), 0.3)
    module = LayerWiseMergedModel(table, base, models, clamp_weights=False, tie_weights=True, strict=False)
    optimizer = torch.optim.Adam([module.merge_weight], 1e-3)
    module.merge_weights()

    def step() -> float:
        # As its loop does: all tasks on one graph of the merge, which is made anew after the update.
        total = 0.0
        for batch in pictures:
            loss = entropy_loss(module(batch)[1] @ head.T) / len(pictures)
            loss.backward(retain_graph=True)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        module.merge_weights()
        return total

    return step


if __name__ == "__main__":
    main()
