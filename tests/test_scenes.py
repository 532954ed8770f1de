"""Scene understanding: a dilated ResNet under torchvision's names, one decoder per task, and scores checked by hand."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_tasks
from safetensors.torch import save_file
from torch import nn

import fusionbench as fb
from fusionbench.architectures._dilated_resnet import DilatedResNet, deep_lab_head
from fusionbench.batch_norm import recalibrated
from fusionbench.cli import main
from fusionbench.compare import score_of
from fusionbench.config import build_taskpool
from fusionbench.errors import InputError
from fusionbench.tasks.scenes import Depth, Normals, Segmentation

LAYERS, WIDTH, SIZE = [1, 1, 1, 1], 4, (24, 32)
OUTPUTS = {"segmentation": 13, "depth": 1, "normals": 3}


def write_zoo(folder: Path) -> None:
    torch.manual_seed(0)
    base = DilatedResNet(layers=LAYERS, width=WIDTH)
    config = json.dumps({"model_type": "dilated_resnet", "layers": LAYERS, "width": WIDTH, "rates": [2, 4]})
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text(config)
    save_file(base.state_dict(), folder / "base" / "model.safetensors")
    for name, outputs in OUTPUTS.items():
        head = deep_lab_head(32 * WIDTH, outputs, width=8, rates=(2, 4))
        moved = {
            k: v + 0.02 * torch.randn_like(v) if v.is_floating_point() else v for k, v in base.state_dict().items()
        }
        tensors = {f"encoder.{k}": v for k, v in moved.items()}
        tensors |= {f"decoder.{k}": v for k, v in head.state_dict().items()}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name / "model.safetensors")
    random = np.random.default_rng(0)
    for split, count in (("val", 5), ("calibration", 4)):
        arrays = {
            "image": random.random((count, *SIZE, 3), np.float32),
            "label": random.integers(-1, 13, (count, *SIZE)),
            "depth": random.random((count, *SIZE, 1), np.float32) * 3,
            "normal": random.normal(size=(count, *SIZE, 3)).astype(np.float32),
        }
        for kind, array in arrays.items():
            (folder / "scenes" / split / kind).mkdir(parents=True)
            for i in range(count):
                np.save(folder / "scenes" / split / kind / f"{i}.npy", array[i])
    (folder / "pool.yaml").write_text(
        "base: base\nmodels: {segmentation: segmentation, depth: depth, normals: normals}\n"
    )
    (folder / "tasks.yaml").write_text(
        "kind: scenes\ndata: scenes\ntasks:\n" + "".join(f"  {name}: {{head: {name}}}\n" for name in OUTPUTS)
    )


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_zoo(folder)
    return folder


def opened(zoo: Path) -> tuple[fb.ModelPool, fb.TaskPool]:
    return fb.load_modelpool(str(zoo / "pool.yaml")), fb.load_taskpool(str(zoo / "tasks.yaml"))


def test_the_default_is_a_resnet_50_under_torchvisions_names() -> None:
    with torch.device("meta"):
        model, head = DilatedResNet(), deep_lab_head(2048, 13)
    assert sum(p.numel() for p in model.parameters()) == 23_508_032  # torchvision's 25,557,032 without the classifier
    names = set(model.state_dict())
    assert {"layer1.0.downsample.0.weight", "layer3.5.bn3.running_var", "layer4.2.conv2.weight"} <= names
    assert {"0.convs.4.1.weight", "0.project.0.weight", "4.bias"} <= set(head.state_dict())


def test_the_encoder_keeps_an_eighth_of_the_resolution() -> None:
    model = DilatedResNet(layers=LAYERS, width=WIDTH).eval()
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 32 * WIDTH, 8, 12)
    small = DilatedResNet(layers=LAYERS, width=WIDTH, stem_stride=1).eval()
    assert small(torch.zeros(1, 3, 64, 96)).shape == (1, 32 * WIDTH, 16, 24)


def test_encoders_merge_and_decoders_stay(zoo: Path) -> None:
    pool, tasks = opened(zoo)
    assert not any(name.startswith(("encoder.", "decoder.")) for name in pool["depth"])
    report = tasks.evaluate(pool.build(fb.methods.simple_average(pool)))
    assert report["segmentation"].keys() == {"miou", "pixel_accuracy"}
    assert report["depth"].keys() == {"absolute_error", "relative_error", "within_1.25"}
    assert report["normals"].keys() == {"mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"}
    assert set(tasks.headline(report)) == {*OUTPUTS, "average"}


def test_segmentation_by_hand() -> None:
    """Truth 0 0 1, and one pixel unknown; predicted 0 1 1: intersections 1 and 1, unions 2 and 2."""
    predicted = torch.zeros(1, 13, 1, 4)
    for pixel, label in enumerate((0, 1, 1, 5)):
        predicted[0, label, 0, pixel] = 1.0
    metric = Segmentation()
    metric.add(predicted, torch.tensor([[[0, 0, 1, -1]]]))
    assert metric.scores() == pytest.approx({"miou": 0.5, "pixel_accuracy": 2 / 3})
    metric.add(predicted, torch.tensor([[[-1, -1, -1, 5]]]))
    first, second = metric.outcomes()["confusion"]
    assert first[:2, :2].tolist() == [[1, 1], [0, 1]] and first.sum() == 3 and second[5, 5] == second.sum() == 1


def test_depth_by_hand() -> None:
    metric = Depth()
    metric.add(
        torch.tensor([1.0, 3.0, 2.0, 9.0]).reshape(1, 1, 1, 4), torch.tensor([1.0, 2.0, 2.2, 0.0]).reshape(1, 1, 1, 4)
    )
    scores = metric.scores()
    assert scores["absolute_error"] == pytest.approx((0 + 1 + 0.2) / 3)
    assert scores["relative_error"] == pytest.approx((0 + 0.5 + 0.2 / 2.2) / 3)
    assert scores["within_1.25"] == pytest.approx(2 / 3)
    metric.add(torch.ones(2, 1, 1, 2), torch.tensor([1.0, 1.0, 5.0, 0.0]).reshape(2, 1, 1, 2))
    assert {name: counts.tolist() for name, counts in metric.outcomes().items()} == {
        "near": [2, 2, 0],
        "known": [3, 2, 1],
    }


def test_normals_by_hand() -> None:
    """Angles of 0, 45 and 90 degrees; the length of what is predicted makes no difference."""
    predicted = torch.tensor([[0, 0, 5.0], [0, 2.0, 2.0], [0, 1.0, 0], [1.0, 0, 0]]).T.reshape(1, 3, 1, 4)
    truth = torch.tensor([[0, 0, 1.0], [0, 0, 1.0], [0, 0, 1.0], [0, 0, 0]]).T.reshape(1, 3, 1, 4)
    metric = Normals()
    metric.add(predicted, truth)
    expected = {"mean_angle": 45, "median_angle": 45, "within_11.25": 1 / 3, "within_22.5": 1 / 3, "within_30": 1 / 3}
    assert metric.scores() == pytest.approx(expected, abs=0.05)  # acos is steep at 1
    assert {name: counts.tolist() for name, counts in metric.outcomes().items()} == {"near": [1], "known": [3]}


def test_of_every_image_is_kept_what_the_score_is_made_of(zoo: Path) -> None:
    pool, tasks = opened(zoo)
    outcomes: dict[str, dict[str, np.ndarray]] = {}
    model = pool.build("depth")
    report = tasks.evaluate(model, outcomes=outcomes)
    assert report == tasks.evaluate(model)
    for name, score in tasks.headline(report).items():
        assert name == "average" or score_of(outcomes[name]) == pytest.approx(score, rel=1e-6)
    _, labels = next(tasks["segmentation"].batches("test", 5))
    confusion = outcomes["segmentation"]["confusion"]
    assert confusion.shape == (5, 13, 13)
    for image, label in zip(confusion, labels.numpy(), strict=True):
        assert image.sum(1).tolist() == [(label == number).sum() for number in range(13)]
    _, depths = next(tasks["depth"].batches("test", 5))
    assert outcomes["depth"]["known"].tolist() == (depths > 0).flatten(1).sum(1).tolist()
    images, normals = next(tasks["normals"].batches("test", 5))
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(tasks["normals"].predict(model, images), normals)
    near = (cosine > np.cos(np.deg2rad(11.25))).flatten(1).sum(1).tolist()
    assert outcomes["normals"]["near"].tolist() == near and len(set(near)) > 1
    assert outcomes["normals"]["known"].tolist() == [SIZE[0] * SIZE[1]] * 5


def test_a_perfect_model_has_perfect_scores(zoo: Path) -> None:
    _, tasks = opened(zoo)
    for name, metric in (("segmentation", Segmentation()), ("depth", Depth()), ("normals", Normals())):
        for _, truth in tasks[name].batches("test", 2):
            classes = nn.functional.one_hot(truth.clamp(min=0).long(), 13) if name == "segmentation" else None
            metric.add(truth if classes is None else classes.movedim(-1, 1).float(), truth)
        assert metric.scores()[metric.primary] == pytest.approx(1.0)


def test_calibrated_statistics_are_those_of_the_merged_features(zoo: Path) -> None:
    pool, tasks = opened(zoo)
    merged = fb.methods.simple_average(pool)
    calibrated = recalibrated(merged, pool, tasks)
    changed = {name for name in merged if not torch.equal(merged[name], calibrated[name])}
    assert changed and all(name.endswith(("running_mean", "running_var")) for name in changed)
    images = next(tasks["depth"].batches("calibration", 100, seed=0))[0]
    first = pool.build(merged).get_submodule("conv1")(images)  # the first layer's statistics can be had directly
    torch.testing.assert_close(calibrated["bn1.running_mean"], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrated["bn1.running_var"], first.var((0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_calibrated_variances_are_those_of_all_tasks_together_also_where_the_last_batch_is_one_example() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    pool = fb.ModelPool({"a": base, "b": base}, base=base)
    tasks = random_tasks(pool, 33)
    for shift, task in enumerate(tasks.values()):
        task.inputs = torch.randn(33, 4) + 5 * shift  # type: ignore[attr-defined]
    calibrated = recalibrated(fb.methods.simple_average(pool), pool, tasks)
    features = base[0](torch.cat([task.inputs for task in tasks.values()])).detach()  # type: ignore[attr-defined]
    torch.testing.assert_close(calibrated["1.running_mean"], features.mean(0))
    torch.testing.assert_close(calibrated["1.running_var"], features.var(0))


def test_the_command_line_calibrates(zoo: Path, tmp_path: Path) -> None:
    words = ["run", "method=simple_average", f"modelpool={zoo}/pool.yaml", f"taskpool={zoo}/tasks.yaml"]
    assert main([*words, f"report={tmp_path}/merge.json"]) == 0
    assert main([*words, f"report={tmp_path}/calibrate.json", "batch_norm=calibrate"]) == 0
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("merge", "calibrate"))
    assert a["depth"] != b["depth"] and b["run"]["batch_norm"] == "calibrate"
    assert b["run"]["batch_norm_seen"]["calibration"] == "calibration:256"
    assert main([*words, "batch_norm=calibrat"]) == 2
    assert main([*words[:3], f"out={tmp_path}/x", "batch_norm=calibrate"]) == 2


def test_calibration_is_told_in_the_recipe_and_only_where_it_was_done(zoo: Path, tmp_path: Path) -> None:
    words = ["run", f"modelpool={zoo}/pool.yaml", f"taskpool={zoo}/tasks.yaml", "batch_norm=calibrate"]
    assert main([*words, "method=simple_average", f"out={tmp_path}/merged"]) == 0
    recipe = json.loads((tmp_path / "merged" / "recipe.json").read_text())
    assert "segmentation" in json.dumps(recipe["batch_norm"]["calibrated on"])
    assert main([*words, "method=simple_average", "~modelpool.models.depth", f"out={tmp_path}/two"]) == 0
    recipe = json.loads((tmp_path / "two" / "recipe.json").read_text())
    assert "depth" not in recipe["batch_norm"]["calibrated on"]  # scored on, but of no merged model
    assert main([*words, "method=individual", f"report={tmp_path}/report.json"]) == 0
    assert "batch_norm" not in json.loads((tmp_path / "report.json").read_text())["run"]


def test_a_damaged_scene_and_a_nonsense_config_are_one_line(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "zoo")
    pool, tasks = opened(tmp_path / "zoo")
    file = tmp_path / "zoo" / "scenes" / "val" / "depth" / "1.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(fb.InputError, match="1.npy' cannot be read"):
        tasks["depth"].score(pool.build("depth"))
    np.save(file, np.ones((3, 3, 1), np.float32))
    with pytest.raises(fb.InputError, match="scenes of one shape are expected"):
        tasks["depth"].score(pool.build("depth"))
    (tmp_path / "zoo" / "depth" / "config.json").write_text('{"model_type": "dilated_resnet", "layers": "lots"}')
    with pytest.raises(fb.InputError, match="layers must be four numbers of blocks"):
        pool.build("depth")


def test_scenes_in_one_file_are_those_of_a_folder(zoo: Path, tmp_path: Path) -> None:
    arrays = {}
    for split, name in (("val", "test"), ("calibration", "calibration")):
        for kind in ("image", "label", "depth", "normal"):
            files = sorted((zoo / "scenes" / split / kind).glob("*.npy"))
            arrays[f"{name}_{kind}"] = np.stack([np.load(file) for file in files])
    np.savez(tmp_path / "scenes.npz", **arrays)
    content = {"kind": "scenes", "tasks": {name: {"head": str(zoo / name)} for name in OUTPUTS}}
    pool = fb.load_modelpool(str(zoo / "pool.yaml"))
    model = pool.build("depth")
    ours = build_taskpool({**content, "data": str(tmp_path / "scenes.npz")})
    assert ours.evaluate(model) == build_taskpool({**content, "data": str(zoo / "scenes")}).evaluate(model)
    arrays["test_image"] = (255 * arrays["test_image"]).round().astype(np.uint8)  # bytes are read as 0 to 1
    np.savez(tmp_path / "bytes.npz", **arrays)
    bytes_ = build_taskpool({**content, "data": str(tmp_path / "bytes.npz")})
    found, wanted = (next(tasks["depth"].batches("test", 2))[0] for tasks in (bytes_, ours))
    assert torch.allclose(found, wanted, atol=0.002)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"PK"), "cannot be read"),
        (lambda path: np.savez(path, test_imag=np.zeros(3)), "has no 'test_image'. Did you mean 'test_imag'?"),
    ],
)
def test_a_damaged_file_of_scenes_is_one_line(damage, message: str, zoo: Path, tmp_path: Path) -> None:
    damage(tmp_path / "scenes.npz")
    content = {"kind": "scenes", "data": str(tmp_path / "scenes.npz"), "tasks": {"depth": {"head": str(zoo / "depth")}}}
    with pytest.raises(InputError, match=re.escape(message)):
        build_taskpool(content)["depth"].score(fb.load_modelpool(str(zoo / "pool.yaml")).build("depth"))


def test_variances_below_zero_are_told_of(zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["run", "method=task_arithmetic", f"modelpool={zoo}/pool.yaml", f"taskpool={zoo}/tasks.yaml"]
    assert main([*words, "method.scaling_factor=0.1"]) == 0
    assert main([*words, "method.scaling_factor=-1000", "batch_norm=calibrate"]) == 0
    assert "below zero" not in caplog.text
    assert main([*words, "method.scaling_factor=-1000"]) == 0
    assert "below zero" in caplog.text and "batch_norm=calibrate" in caplog.text


def test_without_batch_norms_there_is_nothing_to_calibrate(zoo: Path) -> None:
    _, tasks = opened(zoo)
    pool = fb.ModelPool({"a": nn.Linear(2, 2)}, base=nn.Linear(2, 2))
    with pytest.raises(fb.InputError, match="no batch norm"):
        recalibrated(fb.methods.simple_average(pool), pool, tasks)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["tasks"]["depth"].update(head="base"), "has no decoder"),
        (lambda c: c["tasks"]["depth"].update(head="normals"), "is \\(3, 8, 1, 1\\), \\(1, 8, 1, 1\\) is expected"),
        (lambda c: c["tasks"].update(deep={"head": "depth"}), "No metric of scenes is called 'deep'"),
        (lambda c: c.update(splits={"test": "vall"}), "has no scenes"),
        (lambda c: c.update(data="scene"), "Did you mean 'scenes'"),
    ],
)
def test_mistakes_are_one_line(zoo: Path, spoil, message: str) -> None:
    config = {"kind": "scenes", "data": "scenes", "tasks": {"depth": {"head": "depth"}}}
    spoil(config)
    pool, _ = opened(zoo)
    with pytest.raises(fb.InputError, match=message) as error:
        fb.config.build_taskpool(config, relative_to=zoo).evaluate(pool.build("depth"))
    assert "\n" not in str(error.value)
