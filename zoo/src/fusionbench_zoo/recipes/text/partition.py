"""Which part the groups of sentences belong to."""

from fusionbench_zoo.recipes.parts import part_by_hash

PARTS = {"pretrain": 0.35, "train": 0.40, "calibration": 0.10, "test": 0.15}


def part_of(source: str, group: str) -> str:
    """Return the part that a group of a source belongs to, in every task alike."""
    return part_by_hash(f"{source}/{group}", PARTS)
