"""saliency.py: every equation against a slow independent version, then the stage as a user runs it."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import saliency
from conftest import TINY, metrics, prepare, refused, stage

SMALL = ["--image-size", "64", *TINY[2:]]
CPU = common.Run(0, 1, torch.device("cpu"), "off")


def slow_grad_cam(features, rest, column):
    """Selvaraju et al. 2017, eq. 1 and 2, a channel at a time. features (1, C, h, w); rest: features ->
    logits."""
    leaf = features.detach().clone().requires_grad_(True)
    rest(leaf)[0, column].backward()
    cam = torch.zeros(features.shape[2:])
    for k in range(features.shape[1]):
        weight = sum(leaf.grad[0, k].flatten().tolist()) / leaf.grad[0, k].numel()
        cam += weight * features[0, k].detach()
    return cam.clamp(min=0)


def relative(a, b):
    """Largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("targets", [None, [2, 0], [3, 1]])
def test_grad_cam_of_a_cnn_equals_the_slow_version(targets):
    torch.manual_seed(0)
    model = common.create("resnet18", 4, 96).eval()
    images, chosen = torch.randn(2, 3, 96, 96), None if targets is None else torch.tensor(targets)
    # as differing as a trained one's, so that maps are not blank
    model.get_classifier().weight.data.normal_()
    maps, logits = saliency.grad_cam(model, images, chosen)
    assert maps.shape == (2, 3, 3) and relative(logits, model(images)) < 1e-5
    assert maps.max() > 0
    for i, image in enumerate(images):
        features = model.layer4(model.layer3(model.layer2(model.layer1(
            model.maxpool(model.act1(model.bn1(model.conv1(image[None]))))))))
        target = int(logits[i].argmax()) if targets is None else targets[i]
        slow = slow_grad_cam(features, lambda f: model.fc(f.mean((2, 3))), target)
        assert (maps[i] - slow).abs().max() <= 1e-4 * slow.max()


def test_grad_cam_of_a_vit_equals_the_slow_version():
    torch.manual_seed(0)
    model = common.create("test_vit", 3, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    maps, _ = saliency.grad_cam(model, images, torch.tensor([1, 2]))
    last = model.blocks[-1]
    for i, image in enumerate(images):
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
        for block in model.blocks[:-1]:
            x = block(x)
        tokens = last.norm1(x)
        features = torch.stack([tokens[0, 1 + p] for p in range(16)], 1).view(1, -1, 4, 4)

        def rest(f):
            patches = f.flatten(2).transpose(1, 2)
            y = x + last.ls1(last.attn(torch.cat([tokens[:, :1], patches], 1)))
            y = y + last.ls2(last.mlp(last.norm2(y)))
            return model.head(model.fc_norm(model.norm(y)[:, 0]))
        assert relative(maps[i], slow_grad_cam(features, rest, (1, 2)[i])) < 1e-4 and maps[i].max() > 0


def test_attention_rollout_and_mass_equal_the_slow_versions():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 7, 7, generator=generator).softmax(3) for _ in range(4)]
    mine = saliency.cls_attention(maps[-1], (2, 3))
    assert mine.shape == (2, 2, 3) and mine[1, 1, 0].item() == pytest.approx(
        np.mean([maps[-1][1, h, 0, 1 + 3].item() for h in range(3)]))
    assert saliency.cls_attention(maps[-1], (2, 3), 2)[0, 0, 1].item() == pytest.approx(
        maps[-1][0, 2, 0, 2].item())
    for i in range(2):
        joint = np.eye(7)
        for attention in maps:
            joint = (0.5 * attention[i].double().numpy().mean(0) + 0.5 * np.eye(7)) @ joint
        slow = joint[0, 1:].reshape(2, 3)
        assert np.abs(saliency.rollout(maps, (2, 3))[i].numpy() - slow).max() < 1e-6
    values = torch.rand(5, 4, 4, generator=generator)
    for one, kept in zip(values, saliency.keep_mass(values, 0.5)):
        total, chosen = one.sum(), kept[kept > 0]
        assert set(chosen.tolist()) <= set(one.flatten().tolist())
        assert chosen.sum() >= 0.5 * total > chosen.sum() - chosen.min()  # no smaller set would do
        assert chosen.min() >= one[kept == 0].max()
    assert torch.equal(saliency.keep_mass(values, 1.0), values)


def test_localisation_by_hand_and_as_chance():
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    found = saliency.localisation(np.arange(16.0).reshape(4, 4), np.arange(16.0).reshape(4, 4), mask)
    assert found == {"energy": (0 + 1 + 4 + 5) / 120, "pointing": 0.0, "iou": 0.0}
    ideal = mask + np.arange(16).reshape(4, 4) / 100
    assert saliency.localisation(ideal, mask * 1.0, mask) == {"energy": 1.0, "pointing": 1.0, "iou": 1.0}
    for flat in (np.zeros((4, 4)), np.ones((4, 4))):
        found = saliency.localisation(flat, flat, mask)  # a quarter of the image: chance is a quarter
        assert found["energy"] == found["pointing"] == 0.25 and found["iou"] == pytest.approx(1 / 7)
    assert all(np.isnan(list(saliency.localisation(ideal, ideal, np.zeros((4, 4), bool)).values())))
    rng = np.random.default_rng(0)
    for _ in range(20):
        full, mask = rng.random((6, 5)), rng.random((6, 5)) < 0.3
        top = set(np.argsort(-full.flatten())[:mask.sum()].tolist())
        lesion = set(np.flatnonzero(mask).tolist())
        assert saliency.localisation(full, full, mask)["iou"] == pytest.approx(
            len(top & lesion) / len(top | lesion))


def test_curves_equal_the_slow_version():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, 3)).eval()
    images, maps, targets = torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16), torch.tensor([1, 2])
    found = saliency.curves(model, images, maps, targets, "classes", CPU)
    for i in range(2):
        order = sorted(range(256), key=lambda p: -maps[i].flatten()[p].item())
        blurred = images[i].mean((1, 2), keepdim=True).expand(3, 16, 16).clone()  # one cell at 16 pixels
        areas = {}
        for name, start, end in (("deletion", images[i], torch.zeros(3, 16, 16)),
                                 ("insertion", blurred, images[i])):
            points = []
            for step in range(21):
                picture = start.clone()
                for p in order[:round(step / 20 * 256)]:
                    picture[:, p // 16, p % 16] = end[:, p // 16, p % 16]
                points.append(model(picture[None]).softmax(1)[0, targets[i]].item())
            areas[name] = sum((a + b) / 2 for a, b in zip(points, points[1:])) / 20
        assert found[i] == pytest.approx(areas, abs=1e-5)


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_masks_and_maps_keep_their_places(fit):
    """A lesion in a source of 200 x 300 pixels: prepared, seen by a model, and its map put back, by loops."""
    side, size, height, width = 64, 56, 200, 300
    mask = np.zeros((height, width), bool)
    mask[90:150, 60:140] = True
    top, left, box_height, box_width = common.fit_box(height, width, fit)
    square = np.zeros((side, side), np.uint8)
    for y, x in np.ndindex(side, side):
        v, u = int(top + (y + 0.5) * box_height / side), int(left + (x + 0.5) * box_width / side)
        square[y, x] = 3 * (0 <= v < height and 0 <= u < width and mask[v, u])
    view = saliency.view_mask(square, size)
    corner, length = common.centre_box(side)
    for y, x in np.ndindex(size, size):
        assert view[y, x] == (square[corner + int((y + 0.5) * length / size), corner + int((x + 0.5) * length / size)] > 0)
    assert not saliency.view_mask(square, size, ignore=3).any()
    whole, seen = saliency.place_map(torch.from_numpy(view.astype(np.float32)), side, height, width, fit)
    expected = np.zeros_like(mask)
    for v, u in np.ndindex(height, width):
        y, x = (v + 0.5 - top) * side / box_height, (u + 0.5 - left) * side / box_width
        expected[v, u] = corner <= y < corner + length and corner <= x < corner + length
    assert whole.shape == mask.shape and (seen != expected).mean() < 0.02
    inner = mask & expected
    assert ((whole > 0.5) != inner).mean() < 0.02 and inner.sum() > 1000


def test_gains_are_paired_and_signed():
    rng = np.random.default_rng(0)
    base = rng.random(50)
    scores = {kind: [{"deletion": b + shift, "iou": b + shift if i else np.nan} for i, b in enumerate(base)]
              for kind, shift in (("map", 0.1), ("gaussian", 0.0), ("random", 0.1))}
    result = saliency.summarise(scores, None, 0)
    assert result["gain_over_gaussian"]["iou"]["mean"] == pytest.approx(0.1)
    assert (result["gain_over_gaussian"]["iou"]["beats"]
            and not result["gain_over_gaussian"]["deletion"]["beats"])
    assert result["gain_over_gaussian"]["deletion"]["interval"] == pytest.approx([-0.1, -0.1])
    assert not result["gain_over_random"]["iou"]["beats"]
    assert result["map"]["iou"]["mean"] == pytest.approx(base[1:].mean() + 0.1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo):
    """cnn/ and vit/, trained for an epoch on the demo set, which stands beside them."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "demo").symlink_to(demo)
    for name, arch in (("cnn", "test_resnet"), ("vit", "test_vit")):
        stage("finetune.py", "--data", "demo", "--arch", arch, "--epochs", "1", "--limit", "128", "--batch-size", "32",
              "--output", name, *SMALL, cwd=folder)
    return folder


def test_the_grid_on_masks(runs):
    args = ["saliency.py", "--data", "demo", "--runs", "cnn", "vit", "--images", "5", "--score-images", "24", *TINY[2:]]
    said = stage(*args, "--output", "out", cwd=runs).stdout
    assert "Grad-CAM of cnn has only 2 x 2 places at 64 pixels" in said and "of vit has" not in said
    result = metrics(runs / "out")
    assert [(run["name"], run["method"]) for run in result["runs"]] == [("cnn", "gradcam"),
                                                                        ("vit", "attention")]
    for run in result["runs"]:
        assert run["images"] == 24
        for kind in ("map", "gaussian", "random"):
            for name in ("energy", "pointing", "iou"):
                low, high = run[kind][name]["interval"]
                assert 0 <= low <= run[kind][name]["mean"] <= high <= 1
    cnn, vit = result["runs"]
    assert cnn["gaussian"]["iou"] == vit["gaussian"]["iou"]  # the same images, the same prior
    # it is cut to its top half as well
    assert vit["gaussian"]["energy"]["mean"] > cnn["gaussian"]["energy"]["mean"]
    for name in ("cnn", "vit"):
        saved = np.load(runs / "out" / f"maps-{name}.npz")
        assert (len(saved["paths"]) == 5 and saved["map_4"].shape == (128, 128)
                and saved["map_4"].dtype == np.float32)
        assert saved["probabilities"].sum(1) == pytest.approx(1, abs=1e-5)
    kept = saved["map_0"][8:120, 8:120]  # the view: the centre 112 of 128 pixels
    assert 0 < (kept > 0).mean() < 0.75
    with Image.open(runs / "out" / "saliency.png") as image:
        assert image.width > 5 * 190 and image.height > 3 * 190
    assert "is complete" in stage(*args, "--output", "out", cwd=runs).stdout


def test_own_images_in_their_own_size(runs, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 150, 3)).astype(np.uint8)).save(tmp_path / "wide.png")
    turned = Image.fromarray(rng.integers(0, 255, (90, 150)).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    turned.save(tmp_path / "not_asked_for.png")
    args = ["saliency.py", "--runs", "cnn", "vit", "--files", tmp_path / "wide.png", tmp_path / "turned.jpg",
            *TINY[2:]]
    for method in ("rollout", "gradcam"):
        done = stage(*args, "--method", method, "--target", "streaked", "--output", method, cwd=runs)
        assert "not_asked_for" not in done.stdout
        result, saved = metrics(runs / method), np.load(runs / method / "maps-vit.npz")
        assert saved["map_0"].shape == (90, 150) and saved["map_1"].shape == (150, 90)
        assert saved["explained"].tolist() == ["streaked"] * 2
        assert (result["runs"][1]["method"] == method
                and set(result["runs"][0]["map"]) == {"deletion", "insertion"})
        assert result["runs"][0]["right"] is None and result["dataset"] == "files"


def test_masks_of_a_csv_dataset_and_multilabel(csv_source, tmp_path):
    (csv_source / "masks").mkdir()
    for i in range(60):
        mask = np.zeros((40, 48), np.uint8)
        mask[10:30, 10:30] = 255 * (i % 2)  # every other image has no lesion
        Image.fromarray(mask).save(csv_source / "masks" / f"{i:02d}.png")
    prepare("source", "data", "--label-column", "a,b", "--split-column", "split", cwd=tmp_path)
    data = ["--data", "data"]
    stage("finetune.py", *data, "--arch", "test_vit", "--epochs", "1", "--batch-size", "8", "--output", "run",
          *TINY, cwd=tmp_path)
    stage("saliency.py", "--runs", "run", *data, "--head", "1", "--output", "out", *TINY[2:], cwd=tmp_path)
    run, = metrics(tmp_path / "out")["runs"]
    assert run["images"] == 15 and 0 <= run["right"] <= 1 and 0 < run["map"]["energy"]["mean"] < 1
    (tmp_path / "data" / "masks.npy").unlink()
    stage("saliency.py", "--runs", "run", "run/model.pt", "run/model.pt", *data, "--score-images", "3", "--images", "2",
          "--output", "plain", *TINY[2:], cwd=tmp_path)
    result = metrics(tmp_path / "plain")
    assert ([one["images"] for one in result["runs"]] == [3, 3, 3]
            and len({one["name"] for one in result["runs"]}) == 3)
    assert len(list((tmp_path / "plain").glob("maps-*.npz"))) == 3


def test_images_of_one_name_keep_their_own_masks(tmp_path):
    """test/a/0.png has its lesion above, test/b/0.png below; masks/ mirrors the class folders."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2), ("test", 2)):
        for name in "ab":
            for root in ("source", "source/masks"):
                (tmp_path / root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (64, 64), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "source" / part / name / f"{i}.png")
                mask = np.zeros((64, 64), np.uint8)
                mask[slice(0, 16) if name == "a" else slice(48, 64)] = 255
                Image.fromarray(mask).save(tmp_path / "source" / "masks" / part / name / f"{i}.png")
    prepare("source", "data", cwd=tmp_path)
    dataset = common.open_dataset(tmp_path / "data")
    assert len(dataset.paths) == 20
    for row, path in enumerate(dataset.paths):
        above = path.split("/")[1] == "a"
        assert dataset.masks[row, :16].all() == above and dataset.masks[row, 48:].all() != above, path


@pytest.mark.parametrize("args,words", [
    (["--runs", "nowhere"], ["--runs nowhere", "no model.pt"]),
    (["--runs", "empty"], ["--runs empty", "no model.pt"]),
    ([], ["--runs"]),
    (["--runs", "cnn", "--images", "300"], ["--images 300", "only 200 test images"]),
    (["--runs", "cnn", "--target", "round"], ["--target round", "globular"]),
    (["--runs", "vit", "--head", "9"], ["--head 9", "heads 0 to"]),
    (["--runs", "vit", "--mass", "0"], ["--mass"]),
    (["--runs", "vit", "--files", "none.png"], ["none.png", "no such file"]),
    (["--runs", "vit", "--init", "imagenet"], ["--runs"])])
def test_mistakes(runs, args, words):
    (runs / "empty").mkdir(exist_ok=True)
    done = stage("saliency.py", "--data", "demo", *args, "--output", "mistake", *TINY[2:], cwd=runs, check=False)
    refused(done, *words)
    assert not (runs / "mistake").exists()


@pytest.mark.skipif("MEDVIT_DATA" not in os.environ, reason="MEDVIT_DATA names the folder of the real images")
def test_real_masks(tmp_path):
    prepare(Path(os.environ["MEDVIT_DATA"]) / "ph2", "data", "--label-column", "diagnosis", cwd=tmp_path)
    stage("finetune.py", "--data", "data", "--arch", "test_resnet", "--epochs", "1", "--output", "run", *SMALL,
          cwd=tmp_path)
    stage("saliency.py", "--data", "data", "--runs", "run", "--output", "out", *TINY[2:], cwd=tmp_path)
    run, = metrics(tmp_path / "out")["runs"]
    # lesions are photographed in the middle
    assert run["gaussian"]["iou"]["mean"] > run["random"]["iou"]["mean"]
    assert run["images"] > 20
