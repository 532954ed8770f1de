"""Upscale a language model on disk: it is read block by block, and never held in memory.

Prints the size of what is written, CPU and wall seconds, and the peak memory of the whole process (torch and
transformers included; what importing them takes is the first row).

    python benchmarks/upscaling.py [--folder /tmp/fusionbench_upscaling] [--layers 12]
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from out_of_core import measured

HIDDEN, MLP, VOCABULARY = 2048, 5632, 32000  # as TinyLlama's, of 22 layers
UPSCALE = """
import sys
import fusionbench as fb
folder, method, out, *given = sys.argv[1:]
import fusionbench.sparse, transformers
transformers.LlamaConfig
if method != "imports":
    settings = dict(word.split("=") for word in given)
    settings = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
    pool = fb.ModelPool({"model": folder})
    fb.save(fb.algorithm(method, **settings).run(pool), out, memory="256MB", workers=2)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fusionbench_upscaling"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dense, out = arguments.folder / "dense", arguments.folder / "out"
    if arguments.make:
        make(dense, arguments.layers)
        return
    # In a process of its own: a child's peak memory counts what its parent held when it was started.
    subprocess.run([sys.executable, __file__, "--make", *sys.argv[1:]], check=True)
    print(f"{'':<48}{'MB written':>11}{'CPU s':>8}{'wall s':>8}{'peak MB':>9}   dense model: {megabytes(dense):.0f} MB")
    half = arguments.layers * 3 // 4
    deeper = f"layers=0:{half}+{arguments.layers - half}:{arguments.layers}"
    for words in (["imports"], ["depth_upscaling", deeper], ["moe_upscaling", "experts=4"]):
        shutil.rmtree(out, ignore_errors=True)
        cpu, wall, peak = measured([sys.executable, "-c", UPSCALE, dense, words[0], out, *words[1:]])
        size = megabytes(out) if out.exists() else 0
        print(f"{' '.join(words):<48}{size:>11.0f}{cpu:>8.1f}{wall:>8.1f}{peak:>9.0f}", flush=True)


def make(folder: Path, layers: int) -> None:
    """Write a Llama of random numbers in bfloat16, unless it is there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fusionbench as fb

    if folder.is_dir():
        return
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    tensors = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}
    model = fb.Checkpoint.of(tensors, config={**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    fb.save(model, folder)


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
