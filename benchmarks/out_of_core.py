"""Merge eight fine-tunes of a CLIP ViT-B/32-sized model (88M parameters, float32, random weights) to disk.

Prints, for every method with one and with four workers, CPU and wall seconds, the peak memory of the whole process
(torch included) and the hash of the files written: the hash must not depend on the number of workers.

    python benchmarks/out_of_core.py [--folder /tmp/out_of_core] [--models 8]
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("simple_average", "task_arithmetic", "ties_merging")
MERGE = """
import sys
import fusionbench as fb
folder, method, workers, out = sys.argv[1:]
models = {path.name: path for path in sorted(__import__("pathlib").Path(folder).glob("model*"))}
pool = fb.ModelPool(models, base=folder + "/base", workers=int(workers))
fb.save(fb.algorithm(method).run(pool), out, workers=int(workers), overwrite=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fusionbench_out_of_core"))
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--make", action="store_true", help="only write the models")
    arguments = parser.parse_args()
    if arguments.make:
        make_models(arguments.folder, arguments.models)
        return
    # In a process of its own: a child's peak memory counts what its parent held when it was started.
    subprocess.run([sys.executable, __file__, "--make", *sys.argv[1:]], check=True)
    print(f"{'method':<18}{'workers':>8}{'CPU s':>9}{'wall s':>9}{'peak MB':>9}  sha256 of the files")
    for method in METHODS:
        hashes = set()
        for workers in (1, 4):
            out = arguments.folder / "merged"
            cpu, wall, peak = measured([sys.executable, "-c", MERGE, arguments.folder, method, str(workers), out])
            hashes.add(found := hash_of(out))
            print(f"{method:<18}{workers:>8}{cpu:>9.1f}{wall:>9.1f}{peak:>9.0f}  {found[:16]}", flush=True)
        print(f"{'':<18}{'same bytes' if len(hashes) == 1 else 'BYTES DIFFER'}")


def make_models(folder: Path, count: int) -> None:
    """Write a base and fine-tunes near it, unless they are there."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    import fusionbench as fb

    with torch.device("meta"):  # the default configuration is ViT-B/32's
        shapes = {name: tensor.shape for name, tensor in CLIPVisionModel(CLIPVisionConfig()).state_dict().items()}
    for i, name in enumerate(["base", *(f"model{i}" for i in range(count))]):
        if not (folder / name).is_dir():
            same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(i)
            tensors = {
                key: 0.02 * torch.randn(shape, generator=same) + (i > 0) * 0.001 * torch.randn(shape, generator=own)
                for key, shape in shapes.items()
            }
            fb.save(fb.Checkpoint.of(tensors), folder / name)


def measured(command: list[object]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak memory in MB of a process, by the operating system's account."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the merge failed with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss / 1000


def hash_of(folder: Path) -> str:
    """One hash over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
