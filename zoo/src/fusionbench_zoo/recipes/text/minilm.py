"""minilm: LoRA adapters for all-MiniLM-L6-v2, a sentence encoder with the weights its authors published."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from fusionbench_zoo import path
from fusionbench_zoo.recipes.text.finetune import Classifier, Plan, finetune_all, tuned_classifier
from fusionbench_zoo.recipes.text.gpt2 import CLASSIFICATION
from fusionbench_zoo.recipes.text.tasks import Task

PLAN = Plan(steps=150, rate=2e-3, batch=32, decay=1.0, longest=96)
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])


def finetune(work: Path, seed: int) -> None:
    """Write `work/models/<task>.safetensors`: the adapter under PEFT's names, and `score.weight`."""
    text = work.parent / "text"
    finetune_all(work, CLASSIFICATION, lambda task: _finetuned(text, task, seed))


def _finetuned(text: Path, task: Task, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path("minilm/base"), local_files_only=True)
    backbone = AutoModel.from_pretrained(path("minilm/base"), add_pooling_layer=False, local_files_only=True)
    adapted = get_peft_model(backbone, LORA)
    classifier = Classifier(adapted, tokenizer, task, text, PLAN.longest, "mean")
    accuracies = tuned_classifier(classifier, PLAN, [nn.ModuleList([adapted, classifier.head])])
    return {**get_peft_model_state_dict(adapted), "score.weight": classifier.head.weight.data}, accuracies
