"""Who may see what: a hash decides the part of a group, the same on every machine."""

import hashlib
from collections.abc import Mapping


def part_by_hash(key: str, shares: Mapping[str, float]) -> str:
    """Return one of the parts, each as often as its share."""
    position = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    for part, share in shares.items():
        position -= share
        if position < 0:
            return part
    return list(shares)[-1]
