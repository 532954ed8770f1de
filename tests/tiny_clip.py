"""A CLIP model of a few thousand parameters with fine-tunes and tasks, as the files that hubs and zoos hold."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel, PreTrainedTokenizerFast

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", "the", "red", "green", "blue", "dark"]
CLASSES = ["red", "green", "blue"]


def write_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """A full CLIP model with tokenizer and image processor, at 16x16 pixels."""
    torch.manual_seed(seed)
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layer, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**layer, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


def write_fine_tune(folder: Path, clip: CLIPModel, seed: int) -> None:
    """A vision tower near that of `clip`, saved as transformers saves a tower alone."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(clip.config.vision_config)
    tensors = {name.removeprefix("vision_model."): t for name, t in clip.vision_model.state_dict().items()}
    prefix = "vision_model." if next(iter(tower.state_dict())).startswith("vision_model.") else ""
    tower.load_state_dict({prefix + name: t + 0.05 * torch.randn_like(t) for name, t in tensors.items()})
    tower.save_pretrained(folder)


def write_task(file: Path, seed: int, *, grey: bool = False, size: int = 16) -> None:
    """Noisy images of three colours (or brightnesses), as an .npz with its .json."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split, count in (("test", 30), ("calibration", 12)):
        labels = random.integers(0, 3, count)
        shape = (count, size, size) if grey else (count, size, size, 3)
        arrays[f"{split}_images"] = random.integers(0, 255, shape).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)
    facts = {"classes": CLASSES, "templates": ["a photo of a {}", "the {}"], "version": 1}
    file.with_suffix(".json").write_text(json.dumps(facts))


def write_zoo(folder: Path) -> None:
    """A base, two fine-tunes, their two tasks, and the YAML of both pools."""
    clip = write_clip(folder / "base")
    for seed, name in enumerate(("colours", "greys"), 1):
        write_fine_tune(folder / name, clip, seed)
        write_task(folder / "tasks" / f"{name}.npz", seed, grey=name == "greys")
    (folder / "pool.yaml").write_text(
        "architecture: clip_vision\nbase: base\nmodels: {colours: colours, greys: greys}\n"
    )
    (folder / "tasks.yaml").write_text(
        "kind: zero_shot_classification\nclip: base\n"
        "tasks: {colours: {data: tasks/colours.npz}, greys: {data: tasks/greys.npz}}\n"
    )
