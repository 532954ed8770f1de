"""What a CLIP model brings to zero-shot classification besides its vision tower: preprocessing, and heads of text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.formats import read_config
from fusionbench.locations import cache_folder, find
from fusionbench.tasks._tokens import tokenizer_digest


class Clip:
    """A CLIP model's projections, tokenizer and image processor.

    Args:
        location: folder of a `transformers.CLIPModel` with tokenizer and `preprocessor_config.json`.
    """

    def __init__(self, location: str | Path) -> None:
        self.folder = find(location)
        self.checkpoint = Checkpoint.open(location)
        for name in ("visual_projection.weight", "text_projection.weight", "logit_scale"):
            if name not in self.checkpoint:
                raise InputError(f"'{location}' is not a full CLIP model: it lacks '{name}'.")

    @cached_property
    def visual_projection(self) -> Tensor:
        """`(projection, vision hidden size)`"""
        return self.checkpoint["visual_projection.weight"].float()

    @cached_property
    def logit_scale(self) -> float:
        return float(self.checkpoint["logit_scale"].float().exp())

    def key(self, classes: Sequence[str], templates: Sequence[str]) -> str:
        """A hash of all but the vision tower, of the tokenizer and preprocessing, the class names and templates."""
        names = {name: name for name in self.checkpoint if not name.startswith("vision_model.")}
        files = [tokenizer_digest(self.folder), self._processor]
        content = [self.checkpoint.rename(names).digest, *files, list(classes), list(templates)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The zero-shot classifier of class names: `(classes, projection)`, of unit rows.

        A row is the mean over templates of the normalised text embeddings, normalised again (Radford et al., 2021).
        Computed once, then kept on disk under its `key`.
        """
        file = cache_folder() / "heads" / f"{self.key(classes, templates)}.safetensors"
        if file.is_file():
            return Checkpoint.open(file)["head"]
        head = self._compute_head(classes, templates)
        _keep(file, {"head": head})
        return head

    @torch.no_grad()
    def _compute_head(self, classes: Sequence[str], templates: Sequence[str], batch_size: int = 256) -> Tensor:
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        config = CLIPConfig(**read_config(self.folder))
        model = CLIPModel(config).float().eval()  # a config that names a half precision makes a module of it
        known = model.state_dict()
        model.load_state_dict({name: t for name, t in self.checkpoint.items() if name in known})
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        prompts = [template.format(name) for name in classes for template in templates]
        rows = []
        for start in range(0, len(prompts), batch_size):
            tokens = tokenizer(
                prompts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=read_config(self.folder)["text_config"]["max_position_embeddings"],
                return_tensors="pt",
            )
            output = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            rows.append(nn.functional.normalize(model.text_projection(output.pooler_output), dim=-1))
        embeddings = torch.cat(rows).reshape(len(classes), len(templates), -1).mean(1)
        return nn.functional.normalize(embeddings, dim=-1)

    def preprocess(self, images: Sequence[Any] | np.ndarray) -> Tensor:
        """Images as the model takes them: `(batch, 3, height, width)`, float32, normalised.

        Takes a uint8 array, `(batch, height, width)` or `(batch, height, width, 3)`, or a list of PIL images.
        """
        if isinstance(images, np.ndarray) and images.shape[1:3] == self._image_size:
            pixels = torch.from_numpy(images).float() / 255
            pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
            mean, std = (torch.tensor(self._processor[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
            return (pixels - mean) / std
        from PIL import Image
        from transformers import CLIPImageProcessor

        processor = CLIPImageProcessor.from_pretrained(self.folder)
        pil = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
        return processor([image.convert("RGB") for image in pil], return_tensors="pt")["pixel_values"]

    @cached_property
    def _processor(self) -> dict[str, Any]:
        file = self.folder / "preprocessor_config.json"
        if not file.is_file():
            raise InputError(f"'{self.folder}' has no preprocessor_config.json: image preprocessing is not known.")
        return json.loads(file.read_text())

    @cached_property
    def _image_size(self) -> tuple[int, int]:
        size = read_config(self.folder)["vision_config"]["image_size"]
        return size, size


def _keep(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a small file of tensors, all of it or nothing."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    temporary.replace(file)
