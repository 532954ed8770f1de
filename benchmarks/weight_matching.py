"""Two networks from two seeds, half-way between them: as they are, and after weight matching.

An MLP and a small ResNet are trained on the digits of clip-mini's MNIST (the 1,000 pictures of its test split; the 512
of the other split say the loss). The barrier is the loss half-way between the two, less the mean of theirs. Of the
ResNet also with the statistics of its batch norms taken anew half-way (`batch_norm=calibrate`).

    python benchmarks/weight_matching.py [--width 512] [--channels 48] [--steps 400]
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification

import fusionbench as fb
from fusionbench.alignment import distance
from fusionbench.batch_norm import recalibrated
from fusionbench.locations import find


class Digits:
    """The pictures of MNIST that the zoo has; those a network is trained on are its calibration data."""

    primary = "accuracy"

    def __init__(self) -> None:
        file = np.load(find("zoo:clip-mini/tasks/mnist.npz"))
        self.splits = {}
        for name, stored in (("calibration", "test"), ("test", "calibration")):
            images = torch.from_numpy(file[f"{stored}_images"]).float()[:, None] / 255 - 0.5
            self.splits[name] = images[..., ::2, ::2], torch.from_numpy(file[f"{stored}_labels"]).long()

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.splits[split]
        random = torch.Generator().manual_seed(seed or 0)
        for part in torch.randperm(len(labels), generator=random).split(size):
            yield images[part], labels[part]

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        out = model(inputs)
        return out if isinstance(out, Tensor) else out.logits

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        images, labels = self.splits[split]
        logits = self.predict(model.eval(), images)
        return {
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
            "loss": float(cross_entropy(logits, labels)),
        }

    def describe(self) -> dict[str, str]:
        return {"kind": "digits"}


def mlp(width: int) -> nn.Module:
    hidden = (nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def resnet(width: int) -> nn.Module:
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_channels=1, num_labels=10))


def trained(model: nn.Module, digits: Digits, steps: int, seed: int, rate: float) -> nn.Module:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    random = torch.Generator().manual_seed(seed)
    images, labels = digits.splits["calibration"]
    for _ in range(steps):
        part = torch.randint(len(labels), (128,), generator=random)
        shift = torch.randint(-1, 2, (2,), generator=random).tolist()
        loss = cross_entropy(digits.predict(model, images[part].roll(shift, (2, 3))), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def barriers(pool: fb.ModelPool, tasks: fb.TaskPool, *, recalibrate: bool) -> tuple[float, float]:
    """The loss barrier and the accuracy half-way between the two models."""
    middle = fb.methods.simple_average(pool)
    if recalibrate:
        middle = recalibrated(middle, pool, tasks)
    ends = [tasks.evaluate(pool.build(name))["average"] for name in pool]
    half = tasks.evaluate(pool.build(middle))["average"]
    return half["loss"] - sum(end["loss"] for end in ends) / 2, half["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the MLP")
    parser.add_argument("--channels", type=int, default=48, help="of the ResNet's first stage")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    digits = Digits()
    tasks = fb.TaskPool({"digits": digits}, calibration="calibration")
    print("| network | half-way | distance | accuracy of the two | accuracy half-way | barrier (loss) |")
    print("|---|---|--:|--:|--:|--:|")
    for kind, size, rate in ((mlp, arguments.width, 1e-3), (resnet, arguments.channels, 3e-3)):
        models = {}
        for seed in (1, 2):
            torch.manual_seed(seed)
            models[f"seed {seed}"] = trained(kind(size), digits, arguments.steps, seed, rate)
        pool = fb.ModelPool(models)
        scores = ", ".join(f"{100 * digits.score(model)['accuracy']:.1f}" for model in models.values())
        for said, of in (("as they are", pool), ("aligned", pool.aligned())):
            first, second = of.values()
            for recalibrate in (False, True) if kind is resnet else (False,):
                barrier, accuracy = barriers(of, tasks, recalibrate=recalibrate)
                more = ", statistics calibrated" if recalibrate else ""
                numbers = f"{distance(first, second):.2f} | {scores} | {100 * accuracy:.1f} | {barrier:.3f}"
                print(f"| {kind.__name__} of {size} | {said}{more} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
