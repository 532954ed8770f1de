"""The architecture of clip-mini, and how pictures become its input."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase

from fusionbench_zoo.recipes.clip_mini.drawings import SIZE

MEAN, STD = 0.5, 0.5
MAX_TOKENS = 24
PROJECTION = 128


def new_model(vocab_size: int, bos: int, eos: int) -> CLIPModel:
    """Return an untrained model: about 1.8M parameters see, 1.1M read."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        num_hidden_layers=6,
        intermediate_size=384,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=8,
        projection_dim=PROJECTION,
        hidden_act="gelu",
    )
    text = CLIPTextConfig(
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=512,
        num_attention_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
        projection_dim=PROJECTION,
        hidden_act="gelu",
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def load(folder: Path) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """Read a model and its tokenizer: in float32, and as exact as the float16 that is vendored.

    So fine-tuning starts from the base that is published, and a task vector holds no rounding of it.
    """
    model = CLIPModel.from_pretrained(folder, dtype=torch.float16, local_files_only=True).float()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pixels(images: np.ndarray) -> torch.Tensor:
    """Turn grey (N, 32, 32) or RGB (N, 32, 32, 3) bytes into the model's input (N, 3, 32, 32)."""
    rgb = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
    return (torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def image_features(model: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return normalised features (N, 128)."""
    pooled = model.vision_model(pixel_values=pixel_values).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return normalised features (N, 128)."""
    pooled = model.text_model(input_ids=tokens).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def zero_shot_head(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, classes: list[str], templates: list[str]
) -> torch.Tensor:
    """Return one scaled text feature per class (C, 128), the mean over the templates."""
    features = []
    for template in templates:
        tokens = tokenizer([template.format(name) for name in classes], padding=True, return_tensors="pt").input_ids
        features.append(text_features(model, tokens))
    mean = torch.nn.functional.normalize(torch.stack(features).mean(0), dim=-1)
    return model.logit_scale.exp() * mean


@torch.no_grad()
def accuracy(model: CLIPModel, head: torch.Tensor, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of pictures whose nearest class is right."""
    model.eval()
    right = [
        (image_features(model, pixels(images[i : i + 500])) @ head.T).argmax(1).numpy() == labels[i : i + 500]
        for i in range(0, len(labels), 500)
    ]
    return float(np.concatenate(right).mean())
