"""Copy what is published of the text zoos into the package."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, T5ForConditionalGeneration

from fusionbench_zoo.recipes.fetch import folder_of
from fusionbench_zoo.recipes.text import gpt2, minilm, t5
from fusionbench_zoo.recipes.text.data import load_task
from fusionbench_zoo.recipes.text.partition import PARTS
from fusionbench_zoo.recipes.text.tasks import TASKS
from fusionbench_zoo.recipes.vendoring import made_with, publish, write_json

Tensors = dict[str, torch.Tensor]
PACKAGES = ["torch", "transformers", "tokenizers"]
# Licences that ask to go with every copy.
LICENCES = {
    "LICENSE-WordNet.txt": ("wordnet-base", "copyright"),
    "LICENSE-VADER.txt": ("vaderSentiment", "LICENSE.txt"),
}
FROZEN, TUNED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def vendor_tasks(work: Path, seed: int) -> None:
    """Write the test and calibration sentences of each task, and what it asks."""

    def fill(folder: Path) -> None:
        for task in TASKS:
            parts = {part: load_task(work, task.name, part) for part in ("test", "calibration")}
            lines = [{"split": part, **row} for part, rows in parts.items() for row in rows]
            text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
            (folder / f"{task.name}.jsonl").write_text(text + "\n")
            card = {
                "classes": task.classes,
                "text": task.text,
                "prompt": task.prompt,
                **({} if task.classes else {"answers": "{:.1f}", "metric": "spearman_rho"}),
                "source": task.source,
                "licence": task.licence,
                "splits": {part: len(rows) for part, rows in parts.items()},
            }
            write_json(folder / f"{task.name}.json", card)
        for name, (package, pattern) in LICENCES.items():
            shutil.copyfile(next(folder_of(work.parent, package).rglob(pattern)), folder / name)

    partition = {
        "shares": PARTS,
        "groups": {task.name: task.group for task in TASKS},
        "proof": json.loads((work / "data" / "partition.json").read_text()),
    }
    publish(work.name, fill, {"partition": partition, **made_with(work, seed, "text", ["numpy"])})


def vendor_gpt2(work: Path, seed: int) -> None:
    """Write the base and the fine-tuned classifiers, as `GPT2LMHeadModel` and `GPT2ForSequenceClassification`."""
    frozen = ("transformer.wte.", "transformer.wpe.", *(f"transformer.h.{i}." for i in range(gpt2.FROZEN)))

    def fill(folder: Path) -> None:
        model = GPT2LMHeadModel.from_pretrained(work / "base", dtype=torch.float16)
        base = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
        _write_model(folder / "base", base, model, frozen)
        AutoTokenizer.from_pretrained(work / "base").save_pretrained(folder / "base")
        for task in gpt2.CLASSIFICATION:
            model.config.architectures = ["GPT2ForSequenceClassification"]
            model.config.id2label = dict(enumerate(task.classes))
            model.config.label2id = {name: i for i, name in enumerate(task.classes)}
            _write_model(
                folder / task.name, load_file(work / "models" / f"{task.name}.safetensors"), model, frozen, base
            )

    publish(work.name, fill, made_with(work, seed, "text", PACKAGES))


def vendor_t5(work: Path, seed: int) -> None:
    """Write `t5-mini`, the base and the fine-tuned models, and `t5-mini-lora`, the adapters."""

    def fill(folder: Path) -> None:
        model = T5ForConditionalGeneration.from_pretrained(work / "base", dtype=torch.float16)
        # transformers leaves some of T5's layers in float32, whatever it is asked for.
        base = {name: t.half() for name, t in model.state_dict().items() if not name.endswith(t5.TIED)}
        _write_model(folder / "base", base, model, t5.FROZEN)
        AutoTokenizer.from_pretrained(work / "base").save_pretrained(folder / "base")
        for task in TASKS:
            _write_model(
                folder / task.name, load_file(work / "models" / f"{task.name}.safetensors"), model, t5.FROZEN, base
            )

    def fill_adapters(folder: Path) -> None:
        for task in TASKS:
            tensors = load_file(work / "adapters" / f"{task.name}.safetensors")
            _write_adapter(folder / task.name, tensors, t5.LORA, "t5-mini/base", "SEQ_2_SEQ_LM")

    facts = made_with(work, seed, "text", [*PACKAGES, "peft"])
    adapters = facts.pop("adapters")
    publish("t5-mini", fill, facts)
    publish("t5-mini-lora", fill_adapters, {"seed": seed, "models": adapters})


def vendor_minilm(work: Path, seed: int) -> None:
    """Write the adapters, and each task's head beside its adapter."""

    def fill(folder: Path) -> None:
        for task in gpt2.CLASSIFICATION:
            tensors = load_file(work / "models" / f"{task.name}.safetensors")
            head = {"score.weight": tensors.pop("score.weight")}
            base = "sentence-transformers/all-MiniLM-L6-v2"
            _write_adapter(folder / task.name, tensors, minilm.LORA, base, "FEATURE_EXTRACTION")
            save_file(head, folder / task.name / "head.safetensors", metadata={"format": "pt"})

    publish(work.name, fill, made_with(work, seed, "minilm", [*PACKAGES, "peft"]))


def _write_model(
    folder: Path, tensors: Tensors, model: PreTrainedModel, frozen: tuple[str, ...], base: Tensors | None = None
) -> None:
    """Write a model in two files: what fine-tuning leaves alone, the same file for all, and the rest."""
    folder.mkdir(parents=True)
    parts: dict[str, Tensors] = {FROZEN: {}, TUNED: {}}
    for name, tensor in tensors.items():
        part = FROZEN if name.startswith(frozen) else TUNED
        if base is not None and part == FROZEN and not torch.equal(tensor, base[name]):
            raise AssertionError(f"{folder.name}: {name} was to stay as it is in the base, and did not.")
        parts[part][name] = tensor.contiguous()
    for file, content in parts.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    places = {name: file for file, content in parts.items() for name in content}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    model.config.save_pretrained(folder)


def _write_adapter(folder: Path, tensors: Tensors, lora: LoraConfig, base: str, kind: str) -> None:
    folder.mkdir(parents=True)
    config = replace(lora, base_model_name_or_path=base, task_type=kind, inference_mode=True)
    config.target_modules = sorted(lora.target_modules or [])  # a set, of another order in every process
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
