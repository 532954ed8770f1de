"""Corruptions: what each does, by hand; sizes, severities and seeds of all; and tasks on corrupted images."""

import io
import json
import re
import runpy
import shlex
from pathlib import Path

import fusionbench_zoo
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import write_zoo

import fusionbench as fb
from fusionbench.cli import main
from fusionbench.config import build_taskpool
from fusionbench.corruptions import CORRUPTIONS, Length, corrupt

DOCS = Path(__file__).parent.parent / "docs"
PAPER = (
    "motion_blur",
    "impulse_noise",
    "gaussian_noise",
    "pixelate",
    "spatter",
    "contrast",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
# As published, saturation first falls, then rises; and snow of severity 2 has more, but smaller flakes than that of 3.
TURNS = {("saturate", 32): 2, ("saturate", 224): 2, ("snow", 224): 2}


def pictures(each: int, side: int = 32) -> np.ndarray:
    """Real pictures of five tasks of the zoo, enlarged where they are wanted larger."""
    found = []
    for task in ("climate", "emoji", "animals", "mnist", "letters"):
        with np.load(fusionbench_zoo.path("clip-mini", "tasks", f"{task}.npz")) as arrays:
            found += [Image.fromarray(image).convert("RGB") for image in arrays["test_images"][:each]]
    return np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in found])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_the_papers_seven_and_most_of_imagenet_c_are_there() -> None:
    assert set(PAPER) < set(CORRUPTIONS)
    assert len(CORRUPTIONS) == 18 and "frost" not in CORRUPTIONS


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_keep_type_and_size(name: str) -> None:
    for shape in ((2, 32, 32, 3), (1, 7, 40, 3), (1, 1, 1, 3), (0, 32, 32, 3)):
        changed = corrupt(noise(*shape), name, 5)
        assert changed.shape == shape and changed.dtype == np.uint8
    images = [Image.fromarray(noise(40, 25, 3)), Image.fromarray(noise(20, 20)), Image.fromarray(noise(16, 16, 4))]
    changed = corrupt(images, name, 1)
    assert [image.size for image in changed] == [(25, 40), (20, 20), (16, 16)]
    assert all(image.mode == "RGB" for image in changed)
    grey = noise(2, 16, 16)
    assert np.array_equal(corrupt(grey, name, 3), corrupt(np.repeat(grey[..., None], 3, -1), name, 3))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_numbers_depend_on_seed_and_number_only(name: str) -> None:
    images = noise(40, 32, 32, 3)
    images[1] = images[0]
    before = images.copy()
    whole = corrupt(images, name, 3, seed=7)
    assert np.array_equal(images, before)
    assert np.array_equal(whole[5:8], corrupt(images[5:8], name, 3, seed=7, numbers=[5, 6, 7]))
    order = np.random.default_rng(1).permutation(40)
    assert np.array_equal(whole[order], corrupt(images[order], name, 3, seed=7, numbers=order))
    alone = corrupt([Image.fromarray(image) for image in images], name, 3, seed=7)
    assert np.array_equal(whole, np.stack([np.asarray(image) for image in alone]))
    random = CORRUPTIONS[name].random
    assert np.array_equal(whole, corrupt(images, name, 3, seed=8)) == (not random)
    assert np.array_equal(whole[0], whole[1]) == (not random)


def test_chunks_of_large_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(20, 32, 32, 3)
    whole = {name: corrupt(images, name, 4) for name in CORRUPTIONS}
    monkeypatch.setattr("fusionbench.corruptions.CHUNK", 3 * images[0].size)
    assert all(np.array_equal(whole[name], corrupt(images, name, 4)) for name in CORRUPTIONS)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_rise(name: str, side: int) -> None:
    images = pictures(12 if side == 32 else 1, side).astype(float)
    far = []
    for severity in SEVERITIES:
        changed = corrupt(images.astype(np.uint8), name, severity).astype(float)
        pairs = zip(images, changed, strict=True)
        if name == "fog":  # its brightness says little: how much of what is seen, edges, is lost
            edges = [(np.diff(a, axis=1).ravel(), np.diff(b, axis=1).ravel()) for a, b in pairs]
            far.append(1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in edges]))
        else:
            far.append(((changed - images) ** 2).mean())
    rises = [a < b for a, b in zip(far, far[1:], strict=False)]
    expected = [True] * 4
    if (name, side) in TURNS:
        expected[TURNS[name, side] - 1] = False
    assert far[0] > 0 and rises == expected, far


def test_the_table_of_the_documents_has_these_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    table = runpy.run_path(str(DOCS / "corruptions.py"))["table"]()
    assert table in (DOCS / "corruptions.md").read_text()


def test_lengths_lie_on_a_line_and_grow_with_large_images() -> None:
    length = Length((1, 2, 3, 4, 5), (7, 8, 9, 10, 11))
    assert [length.pixels(1, side) for side in (8, 32, 128, 224, 448)] == [1, 1, 4, 7, 14]
    for name, corruption in CORRUPTIONS.items():
        for given in corruption.parameters.values():
            assert isinstance(given, Length) or len(given) == 5, name
    assert CORRUPTIONS["gaussian_blur"].values(5, 224) == {"sigma": 6}


@pytest.mark.parametrize(("severity", "side"), [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6)])
def test_pixelate_at_32_pixels_has_blocks_of_their_mean(severity: int, side: int) -> None:
    images = pictures(3)
    changed = corrupt(images, "pixelate", severity)
    for row in range(0, 32, side):
        for column in range(0, 32, side):
            block = np.s_[:, row : row + side, column : column + side]
            mean = images[block].mean((1, 2), keepdims=True)
            assert (abs(changed[block] - mean) <= 0.501).all()
            assert (np.ptp(changed[block], axis=(1, 2)) == 0).all()


@pytest.mark.parametrize(("severity", "factor"), list(zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True)))
def test_contrast_is_its_formula(severity: int, factor: float) -> None:
    images = pictures(3)
    mean = images.mean((1, 2), keepdims=True)
    assert (abs(corrupt(images, "contrast", severity) - (mean + factor * (images - mean))) < 0.51).all()


@pytest.mark.parametrize(("severity", "share"), list(zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True)))
def test_impulse_noise_changes_its_share_to_black_and_white(severity: int, share: float) -> None:
    grey = np.full((40, 32, 32, 3), 100, np.uint8)
    changed = corrupt(grey, "impulse_noise", severity)
    assert set(np.unique(changed)) == {0, 100, 255}
    assert (changed != grey).mean() == pytest.approx(share, abs=0.005)
    assert (changed == 255).mean() == pytest.approx(share / 2, abs=0.005)


def test_noise_has_its_deviation() -> None:
    grey = np.full((40, 32, 32, 3), 128, np.uint8)
    assert (corrupt(grey, "gaussian_noise", 1) / 255).std() == pytest.approx(0.08, rel=0.02)
    assert (corrupt(grey, "speckle_noise", 2) / 255).std() == pytest.approx(0.2 * 128 / 255, rel=0.02)
    photons = corrupt(grey, "shot_noise", 1) / 255
    assert photons.mean() == pytest.approx(128 / 255, rel=0.01)
    assert photons.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.02)


def test_grains_of_noise_grow_with_large_images() -> None:
    changed = corrupt(np.full((1, 448, 448, 3), 100, np.uint8), "impulse_noise", 5)
    assert np.array_equal(changed, np.repeat(np.repeat(changed[:, ::2, ::2], 2, 1), 2, 2))
    assert (changed != 100).mean() == pytest.approx(0.27, abs=0.01)


@pytest.mark.parametrize(("severity", "quality"), list(zip(SEVERITIES, (25, 18, 15, 10, 7), strict=True)))
def test_jpeg_is_pillows(severity: int, quality: int) -> None:
    images = pictures(1)
    for image, changed in zip(images, corrupt(images, "jpeg_compression", severity), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        assert np.array_equal(changed, np.asarray(Image.open(file)))


def test_brightness_and_saturation_by_hand() -> None:
    image = np.array([[[[0, 0, 0], [100, 50, 0], [255, 0, 0], [80, 80, 80]]]], np.uint8)
    # Severity 5 adds 0.5 to the value, at most 1: black becomes grey; (100, 50, 0) is scaled by 227.5 / 100.
    assert corrupt(image, "brightness", 5)[0, 0].tolist() == [[128] * 3, [228, 114, 0], [255, 0, 0], [208] * 3]
    # Severity 1 multiplies saturation by 0.3: (100, 50, 0) has 1, and gets 0.3.
    assert corrupt(image, "saturate", 1)[0, 0].tolist() == [[0] * 3, [100, 85, 70], [255, 178, 178], [80] * 3]
    assert corrupt(image, "saturate", 5)[0, 0].tolist() == [[0] * 3, [100, 50, 0], [255, 0, 0], [80, 64, 64]]


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n.endswith("blur")] + ["elastic_transform", "pixelate"])
@pytest.mark.parametrize("shape", [(32, 32), (50, 224)])
def test_grey_stays_grey_under_blurs(name: str, shape: tuple[int, int]) -> None:
    grey = np.full((2, *shape, 3), 117, np.uint8)
    for severity in SEVERITIES:
        assert np.array_equal(corrupt(grey, name, severity), grey)


def test_the_blurs_of_a_point_by_hand() -> None:
    point = np.zeros((1, 224, 224, 3), np.uint8)
    point[:, 108:117, 108:117] = 255  # a single pixel's light would be rounded away
    rows, columns = np.mgrid[:224, :224]
    for name in ("gaussian_blur", "defocus_blur", "motion_blur"):
        spread = corrupt(point, name, 3)[0, ..., 0].astype(float)
        assert spread.sum() == pytest.approx(81 * 255, rel=0.03)
        centre = (spread * (columns - 112)).sum() / spread.sum(), (spread * (rows - 112)).sum() / spread.sum()
        if name == "motion_blur":  # the mean of half a normal distribution
            assert np.hypot(*centre) == pytest.approx(8 * (2 / np.pi) ** 0.5, rel=0.1)
            assert centre[0] > abs(centre[1])
        else:
            assert np.hypot(*centre) == pytest.approx(0, abs=0.05)
    spread = corrupt(point, "gaussian_blur", 3)[0, ..., 0].astype(float)
    variance = (spread * (rows - 112) ** 2).sum() / spread.sum()
    assert variance == pytest.approx(3**2 + (9**2 - 1) / 12, rel=0.05)  # of the blur and of the square


def test_what_cannot_be_corrupted_is_one_line() -> None:
    for arguments, message in (
        ((noise(1, 8, 8, 3), "motion_blurr", 1), r"Did you mean 'motion_blur'\?"),
        ((noise(1, 8, 8, 3), "fog", 6), "a severity is 1, 2, 3, 4 or 5; got 6"),
        ((noise(1, 8, 8, 3), "fog", "3"), "got '3'"),
        ((noise(1, 8, 8, 3).astype(float), "fog", 1), r"Images are uint8 of \(batch, H, W, 3\).*float64"),
        ((noise(1, 8, 8, 4), "fog", 1), r"got uint8 \(1, 8, 8, 4\)"),
    ):
        with pytest.raises(fb.InputError, match=message):
            corrupt(*arguments)  # type: ignore[arg-type]
    with pytest.raises(fb.InputError, match="a seed is a whole number of 0 or more; got -1"):
        corrupt(noise(1, 8, 8, 3), "fog", 1, seed=-1)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write_zoo(folder)
    return folder


TASKS = {
    "kind": "zero_shot_classification",
    "clip": "base",
    "tasks": {"colours": {"data": "tasks/colours.npz"}, "greys": {"data": "tasks/greys.npz"}},
}


def test_a_task_pool_is_corrupted_on_its_test_images_only(zoo: Path) -> None:
    clean = build_taskpool(TASKS, relative_to=zoo).calibrated_on("calibration:7")
    corrupted = clean.corrupted("gaussian_noise", 3, seed=2)
    assert corrupted.calibration == "calibration:7"
    for name in clean:
        images, _ = next(clean[name].batches("calibration", 100))
        assert torch.equal(images, next(corrupted[name].batches("calibration", 100))[0])
        images, labels = next(clean[name].batches("test", 100))
        changed, same = next(corrupted[name].batches("test", 100))
        assert torch.equal(labels, same) and not torch.equal(images, changed)
        with np.load(zoo / "tasks" / f"{name}.npz") as arrays:
            expected = corrupt(arrays["test_images"], "gaussian_noise", 3, seed=2)
        assert torch.equal(changed, clean[name].clip.preprocess(expected))  # type: ignore[attr-defined]
        assert torch.equal(torch.cat([batch for batch, _ in corrupted[name].batches("test", 4)]), changed)
        shuffled = torch.cat([batch for batch, _ in corrupted[name].batches("test", 4, seed=5)])
        assert torch.equal(shuffled.sum((1, 2, 3)).sort().values, changed.sum((1, 2, 3)).sort().values)
        told = corrupted[name].describe()
        assert told.pop("corruption") == {"name": "gaussian_noise", "severity": 3, "seed": 2, "version": 1}
        assert told == clean[name].describe()
    again = corrupted.corrupted("contrast", 1)
    assert again["colours"].describe()["corruption"]["name"] == "contrast"


def test_a_yaml_and_the_command_line_corrupt(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = build_taskpool({**TASKS, "corruption": {"name": "fog", "severity": 2}}, relative_to=zoo)
    assert pool["greys"].describe()["corruption"] == {"name": "fog", "severity": 2, "seed": 0, "version": 1}
    for wrong, message in (
        ("fog", "is a table of name, severity and seed"),
        ({"name": "fog"}, "has no 'severity'"),
        ({"name": "fog", "severity": 2, "sede": 1}, r"Did you mean 'seed'\?"),
        ({"name": "fgo", "severity": 2}, r"Did you mean 'fog'\?"),
    ):
        with pytest.raises(fb.InputError, match=message):
            build_taskpool({**TASKS, "corruption": wrong}, relative_to=zoo)
    monkeypatch.chdir(zoo)
    commands = re.findall(r"```sh\n(fusionbench .*?)```", (DOCS / "corruptions.md").read_text(), re.DOTALL)[0]
    run, evaluate = commands.replace("modelpool=clip-mini", "modelpool=pool.yaml").splitlines()
    evaluate = evaluate.replace("eval clip-mini", "eval pool.yaml")
    for command, out in ((run, tmp_path / "run"), (evaluate, tmp_path / "eval.json")):
        words = shlex.split(command.replace("=clip-mini", "=tasks.yaml").removeprefix("fusionbench "))
        assert main([*words, f"report={out}"]) == 0
    reports = [json.loads(file.read_text()) for file in (tmp_path / "run").rglob("*.json")]
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert len(reports) == 2 and len(evaluated) > 2
    for report in (*reports, *evaluated.values()):
        told = [task["corruption"] for task in report["run"]["taskpool"].values()]
        assert told == [{"name": "motion_blur", "severity": 3, "seed": 0, "version": 1}] * 2
    for wrong, message in (
        ("motion_blur", "is a name and a severity of 1 to 5, as motion_blur:3; got 'motion_blur'"),
        ("motion_blr:3", "Did you mean 'motion_blur'?"),
        ("motion_blur:6", "6"),
    ):
        for words in (["eval", "pool.yaml"], ["run", "method=simple_average", "modelpool=pool.yaml"]):
            capsys.readouterr()
            assert main([*words, "taskpool=tasks.yaml", f"corruption={wrong}"]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
    assert main(["run", "method=simple_average", "modelpool=pool.yaml", "out=x", "corruption=fog:1"]) == 2
    assert "corruption needs a taskpool=" in capsys.readouterr().err


def test_tasks_without_images_cannot_be_corrupted() -> None:
    with pytest.raises(fb.InputError, match="has no images: it cannot be corrupted by fog"):
        fb.load_taskpool("gpt2-mini").corrupted("fog", 1)


def test_scenes_take_what_moves_nothing() -> None:
    tasks = fb.load_taskpool("resnet-mini")
    changed = tasks.corrupted("contrast", 5)
    for split in ("test", "calibration"):
        images, truth = next(tasks["depth"].batches(split, 4))
        less, same = next(changed["depth"].batches(split, 4))
        assert torch.equal(truth, same) and less.shape == images.shape
        assert float(less.std() / images.std()) == pytest.approx(
            0.05 if split == "test" else 1, abs=0.5 * (split == "test")
        )
    assert changed["depth"].describe()["corruption"]["name"] == "contrast"
    with pytest.raises(fb.InputError, match="elastic_transform moves what is seen"):
        tasks.corrupted("elastic_transform", 1)


def test_a_fine_tuned_model_of_the_zoo_knows_less_of_corrupted_pictures() -> None:
    pool, task = fb.load_modelpool("clip-mini"), fb.load_taskpool("clip-mini")["animals"]
    model = pool.build("animals").eval()

    def right(task: fb.Task) -> float:
        images, labels = next(task.batches("test", 300))
        with torch.no_grad():
            return float((task.predict(model, images).argmax(-1) == labels).float().mean())

    clean = right(task)
    assert clean > 0.9
    for name in ("gaussian_noise", "pixelate", "contrast"):
        assert right(task.corrupted(name, 5)) < clean - 0.3  # type: ignore[attr-defined]
