"""Statistics of models on calibration data: Fisher information and Gram matrices. They are checkpoints themselves."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.pool import ModelPool
from fusionbench.progress import track
from fusionbench.task import Task, TaskPool, WritingTask
from fusionbench.tasks._batches import device_of, to_device
from fusionbench.writer import check_writable, save

Labels = Literal["sampled", "expected", "given"]


def statistics_of(
    pool: ModelPool,
    tasks: TaskPool,
    compute: Callable[[str, nn.Module, Task], Mapping[str, Tensor]],
    *,
    facts: Mapping[str, Any],
    folder: str = "",
) -> dict[str, Checkpoint]:
    """A statistic of every model on its own task's calibration data, computed, or read where it was kept.

    Args:
        pool: the models.
        tasks: a task of the same name for each.
        compute: of a model's name, its module and its task.
        facts: what the statistic depends on besides model and data.
        folder: where statistics are kept, a checkpoint for each model; they are not kept where this is empty.

    Raises:
        InputError: where a model has no task, or the folder holds the statistics of other models, data or settings.
    """
    tasks.check_covers(pool)
    missing = [name for name in pool if not folder or not Path(folder, name).exists()]
    for name in missing if folder else ():
        check_writable(Path(folder, name), overwrite=False)
    if missing:
        pool.check_finite()
    found = {}
    for name in track(pool, "collecting statistics", len(pool)):
        recipe = {
            **facts,
            "calibration": tasks.calibration,
            "model": pool.identity(name),
            "data": tasks[name].describe(),
        }
        place = Path(folder, name)
        if folder and place.exists():
            found[name] = _kept(place, recipe)
            continue
        statistic = Checkpoint.of(compute(name, pool.build(name), tasks[name]))
        statistic.recipe = {"statistic": recipe}
        found[name] = Checkpoint.open(save(statistic, place)) if folder else statistic
    return found


class InGroups:
    """Statistics of every model on its own task's data, of some tensors at a time where those of all would not fit.

    A group is computed when one of its tensors is asked for, and takes the place of the one before: the data are read,
    and the models built, once for each.

    Args:
        pool: the models; its `room()` bounds a group.
        tasks: a task of the same name for each.
        sizes: bytes that a tensor's statistic takes for one model, by the tensors' names, in the order of asking.
        compute: as in `statistics_of`, but of a model's name, its module, its task, and the group's names.
    """

    def __init__(
        self,
        pool: ModelPool,
        tasks: TaskPool,
        sizes: Mapping[str, int],
        compute: Callable[[str, nn.Module, Task, list[str]], Mapping[str, Tensor]],
    ) -> None:
        tasks.check_covers(pool)
        pool.check_finite()
        self._pool, self._tasks, self._compute = pool, tasks, compute
        self._groups: list[list[str]] = []
        room = left = pool.room() // len(pool)
        for name, size in sizes.items():
            if not self._groups or size > left:
                self._groups.append([])
                left = room
            self._groups[-1].append(name)
            left -= size
        self._group_of = {name: i for i, group in enumerate(self._groups) for name in group}
        self._lock = threading.Lock()
        self._now = -1
        self._found: list[Mapping[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def of(self, name: str) -> list[Tensor] | None:
        """A tensor's statistics in all models; None where it has none."""
        number = self._group_of.get(name)
        if number is None:
            return None
        with self._lock:
            if number != self._now:
                self._found = []
                group = self._groups[number]
                pairs = track(self._pool, f"collecting statistics, {number + 1} of {len(self)}", len(self._pool))
                self._found = [self._compute(m, self._pool.build(m), self._tasks[m], group) for m in pairs]
                self._now = number
            return of_all(self._found, name)


def of_all(found: Sequence[Mapping[str, Tensor]], name: str) -> list[Tensor] | None:
    """A tensor's statistics in all models; None where one has none."""
    return [each[name] for each in found] if all(name in each for each in found) else None


def _kept(place: Path, recipe: Mapping[str, Any]) -> Checkpoint:
    """The statistics kept in a folder, if they are what `recipe` says."""
    try:
        kept = json.loads((place / "recipe.json").read_text())["statistic"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"'{place}' holds no statistics: name another folder.") from None
    wanted = json.loads(json.dumps(recipe))
    other = next((key for key in wanted if kept.get(key) != wanted[key]), None)
    if other is not None:
        raise InputError(f"The statistics in '{place}' are of another {other}: name another folder, or remove it.")
    return Checkpoint.open(place)


def fisher_diagonal(
    model: nn.Module, task: Task, batches: Iterable[tuple[Any, Tensor]], *, labels: Labels = "sampled", seed: int = 0
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of every parameter: the mean over examples of squared gradients.

    The gradient is that of each example's own log-likelihood, so that the result does not depend on the batch size
    (squares of a batch's summed gradient, which others take, do).

    Args:
        model: in evaluation mode. All of its parameters are made to require a gradient, frozen ones, too.
        task: gives the logits, `(batch, classes)`.
        batches: inputs and labels.
        labels: `sampled` from the model's own predictions, one for each example; `expected`, the exact expectation over
            them, at a backward pass for each class; or `given`, those of the data (the empirical Fisher).
        seed: of the sampling.

    Returns:
        Tensors under the parameters' names and of their shapes, zero for what the output does not depend on.
    """
    parameters = dict(model.requires_grad_(True).named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    generator, count, device = torch.Generator().manual_seed(seed), 0, device_of(model)

    def add(log_likelihood: Tensor, weight: float, again: bool) -> None:
        gradients = torch.autograd.grad(
            log_likelihood, list(parameters.values()), retain_graph=again, allow_unused=True
        )
        for squares, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                squares.addcmul_(gradient, gradient, value=weight)

    for inputs, truth in batches:
        for i in range(len(truth)):
            example = {n: t[i : i + 1] for n, t in inputs.items()} if isinstance(inputs, Mapping) else inputs[i : i + 1]
            logits = task.predict(model, to_device(example, device))
            if logits.dim() != 2:
                raise InputError("The Fisher information needs tasks that classify: these predict something else.")
            log_p = logits.float().log_softmax(-1)[0]
            count += 1
            if labels == "expected":
                p = log_p.detach().exp()
                for c in range(len(p)):
                    add(log_p[c], float(p[c]), c + 1 < len(p))
            elif labels == "given":
                add(log_p[truth[i].reshape(-1)[0]], 1.0, False)  # of an answer in tokens the first
            else:
                noise = -torch.empty(len(log_p)).exponential_(generator=generator).log()  # Gumbel's
                add(log_p[int((log_p.detach().cpu() + noise).argmax())], 1.0, False)
    if not count:
        raise InputError("There are no calibration examples to take the Fisher information from.")
    return {name: squares.cpu() / count for name, squares in total.items()}


@contextmanager
def attention_of(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """In this block, what takes from states `(batch, tokens, ...)` within the model those of what it attends to.

    It returns them as `(rows, ...)`, without what only fills a batch up; and other tensors as they are.
    """
    masks: dict[torch.Size, Tensor] = {}  # of what is read, and of what is written

    def see(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module is model:
            masks.clear()
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            masks[mask.shape] = mask

    def attended(x: Tensor) -> Tensor:
        return x[masks[x.shape[:2]].bool()] if x.dim() == 3 and x.shape[:2] in masks else x

    with ExitStack() as stack:
        for module in (model, *model.children()):  # encoder and decoder have their own
            stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield attended


def data_of(model: nn.Module, tasks: TaskPool, name: str) -> Iterable[tuple[Any, Tensor]]:
    """What a model is given on a task's calibration data: where it writes, with the answers that it writes itself."""
    task, batches = tasks[name], tasks.calibration_batches(name, 32)
    if not isinstance(task, WritingTask):
        return batches
    return [(task.answered(model, to_device(inputs, device_of(model))), labels) for inputs, labels in batches]


class _Enough(Exception):
    """Raised in a forward pass after the last layer of interest."""


@torch.no_grad()
def gram_matrices(
    model: nn.Module, task: Task, batches: Iterable[tuple[Any, Tensor]], layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """`X^T X / n` of the inputs of linear layers: `(in, in)`, float32, under the names of their weights.

    Rows of `X` are tokens or, of a convolution, patches with `in = channels * height * width`; there are n of them.
    Tokens that fill a batch up, 0 in the `attention_mask` that the model is given, do not count. Layers that read the
    same tensor (queries, keys and values) share one matrix, computed and kept once. What comes after the last layer of
    interest is computed for the first batch only, unless a layer runs several times.

    Args:
        model: in evaluation mode.
        task: runs it.
        batches: inputs and labels, of which labels are not used.
        layers: those of `linear_layers(model)` that are of interest.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    first_with: dict[str, str] = {}  # a layer, and the first one with the same input
    read: dict[str, tuple[Tensor, int]] = {}  # what each first one was given in this pass, and which version of it
    calls: list[str] = []
    last = ""  # of the layers of interest, where each runs once

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            (x,) = (*arguments, *named.values())
            if name not in first_with:
                same = (other for other, (tensor, version) in read.items() if tensor is x and version == x._version)
                first_with[name] = next(same, name)
            if first_with[name] == name:
                read[name] = x, x._version
                matrix = as_rows(module, attended(x)).float()
                product = matrix.T @ matrix
                sums[name] = sums[name] + product if name in sums else product
                rows[name] = rows.get(name, 0) + len(matrix)
            calls.append(name)
            if name == last:
                raise _Enough

        return before

    with ExitStack() as stack:
        attended = stack.enter_context(attention_of(model))
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        for inputs, _ in batches:
            read.clear()
            calls.clear()
            with suppress(_Enough):
                task.predict(model, to_device(inputs, device_of(model)))
            if calls and len(set(calls)) == len(calls):  # else how often a layer runs may depend on the input
                last = calls[-1]
    means = {name: total.cpu() / rows[name] for name, total in sums.items()}
    return {name: means[first] for name, first in first_with.items()}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply their input with a matrix, by the names of their weights.

    These are linear ones, GPT-2's, and convolutions of one group.
    """

    def is_linear(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return is_matrix(module)

    return {f"{name}.weight".lstrip("."): module for name, module in model.named_modules() if is_linear(module)}


def matrices_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a module by the names of their weights.

    But for those whose weight is another's, too, as an output layer's that is the embedding.
    """
    # Of the module, and not of the files, which often hold one of the two names alone.
    places = Counter(id(weight) for part in module.modules() for weight in part.parameters(recurse=False))
    return {name: layer for name, layer in linear_layers(module).items() if places[id(layer.weight)] == 1}


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer multiplies what it is given, token by token, with a matrix: linear layers, and GPT-2's."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # of torch's own attention, which reads its tensors and never calls it
    return isinstance(layer, nn.Linear) or _is_conv1d(layer)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers', which need not be installed; its weight is (in, out)


def as_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as a matrix, `(rows, in)`, whose product with the layer's own matrix is its output."""
    if isinstance(layer, nn.Conv2d):
        how = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        patches = nn.functional.unfold(x, *how)  # type: ignore[arg-type]
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return x.reshape(-1, x.shape[-1])


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or several stacked, as matrices: `(..., out, in)`."""
    if isinstance(layer, nn.Conv2d):
        return weight.flatten(-3)
    return weight.mT if _is_conv1d(layer) else weight


def from_matrix(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The weight of a layer, in its own shape, whose matrix is `(out, in)`."""
    if isinstance(layer, nn.Conv2d):
        return matrix.reshape(layer.weight.shape)
    return matrix.mT if _is_conv1d(layer) else matrix
