"""LoRA adapters (Hu et al., 2022) in PEFT's format: read, merged exactly, and extracted from fine-tuned models."""

from fusionbench.lora.adapter import Adapter
from fusionbench.lora.extract import Extracted, extract
from fusionbench.lora.merge import Combined, combine

__all__ = ["Adapter", "Combined", "Extracted", "combine", "extract"]
