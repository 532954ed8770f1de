"""Draw scenes of resnet-mini: what is seen, what is true, and what the fine-tuned and the averaged model make of it.

python docs/scenes.py FILE
"""

import sys

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

import fusionbench as fb

SHOWN = 4
ENLARGED = 2
GAP = 4


@torch.inference_mode()
def main() -> None:
    pool, tasks = fb.load_modelpool("resnet-mini"), fb.load_taskpool("resnet-mini")
    average = pool.build(fb.methods.simple_average(pool)).eval()
    columns = []
    for name, task in tasks.items():
        images, truth = next(task.batches("test", SHOWN))
        models = (pool.build(name).eval(), average)
        shown = [truth if truth.dim() > 3 else truth[:, None], *(task.predict(model, images) for model in models)]
        if name == "segmentation":
            shown[1:] = [logits.argmax(1, keepdim=True) for logits in shown[1:]]
        if not columns:
            columns.append(images.permute(0, 2, 3, 1).numpy())
        columns += [coloured(name, values.float()) for values in shown]
    tiles = [np.pad(column, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=1.0) for column in columns]
    sheet = np.concatenate([np.concatenate(list(column), 0) for column in tiles], 1)
    picture = Image.fromarray((255 * sheet.clip(0, 1)).astype(np.uint8))
    picture.resize((picture.width * ENLARGED, picture.height * ENLARGED), Image.Resampling.NEAREST).save(sys.argv[1])


def coloured(name: str, values: torch.Tensor) -> np.ndarray:
    """Classes, depth or normals `(batch, channels, H, W)` as colours `(batch, H, W, 3)`."""
    if name == "normals":
        return ((torch.nn.functional.normalize(values, dim=1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    palette = colormaps["tab20" if name == "segmentation" else "viridis"]
    scale = 20 if name == "segmentation" else 8.0
    return palette(values[:, 0].numpy() / scale)[..., :3]


if __name__ == "__main__":
    main()
