"""clip-mini: pictures with captions, a small CLIP, and eight fine-tunes of its vision tower."""
