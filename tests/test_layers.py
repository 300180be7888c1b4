"""layers.py: CKA against versions written out, the layers' votes against knn_eval.py, the stage as a user runs it."""
import argparse

import numpy as np
import pytest
import torch
from PIL import Image

import common
import knn_eval
import layers
from conftest import TINY, metrics, picture, refused, stage, table, write_prepared

CPU = common.Run(0, 1, torch.device("cpu"), "off")
DATA = ["--data", "data"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder of striped images in two classes: 20 train, 6 val, 13 test."""
    rng = np.random.default_rng(0)
    splits = ["train"] * 20 + ["val"] * 6 + ["test"] * 13
    images = np.stack([picture(rng, i % 2, (36, 36)) for i in range(len(splits))])[..., None]
    rows = [{"image": f"{i}.png", "split": split, "label": ("upright", "level")[i % 2]} for i, split in enumerate(splits)]
    return write_prepared(tmp_path_factory.mktemp("layers") / "data", images, rows)


def cka(*outputs):
    """CKA (L, L) of outputs (B, ...) in one minibatch."""
    return layers.cka_of(layers.hsic([layers.centred_gram(output) for output in outputs]))


def hsic_by_song(first, second):
    """Unbiased HSIC of features (n, d), written out after Song et al. 2012, eq. 5."""
    k, l = first @ first.T, second @ second.T
    k = k - torch.diag(k.diag())
    l = l - torch.diag(l.diag())
    n = len(k)
    ones = torch.ones(n, dtype=k.dtype)
    sums = (k @ l).trace() + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ l @ ones)
    return sums / (n * (n - 3))


def related(count, seed=0):
    """Two sets of features, (count, 20) and (count, 3, 4), of which the second is made of the first and of noise."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 20, generator=generator, dtype=torch.float64)
    mixed = first @ torch.randn(20, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(count, 12, generator=generator, dtype=torch.float64)
    return first + 3, (mixed + 4 * noise).unflatten(1, (3, 4))


def test_cka_knows_rotation_and_scale():
    first, second = related(50)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    stretched = first * torch.linspace(0.1, 5, 20)
    alike = cka(first, first @ rotation * 7 - 2, stretched, second)
    assert alike[0, 0].item() == pytest.approx(1, abs=1e-6) and alike[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert alike[0, 2] < 0.95 and 0.2 < alike[0, 3] < 0.95
    assert cka(first, torch.ones(50, 3))[0, 1].isnan()


def test_cka_of_one_minibatch_equals_the_published_formulas():
    first, second = related(40)
    flat = second.flatten(1)
    expected = hsic_by_song(first, flat) / (hsic_by_song(first, first) * hsic_by_song(flat, flat)).sqrt()
    assert cka(first, second)[0, 1].item() == pytest.approx(expected.item(), abs=1e-5)
    first, second = related(2000)  # where no bias is left, it is eq. 5 of Kornblith et al. 2019
    first, flat = first - first.mean(0), second.flatten(1) - second.flatten(1).mean(0)
    biased = (flat.T @ first).square().sum() / ((first.T @ first).norm() * (flat.T @ flat).norm())
    assert cka(first, second)[0, 1].item() == pytest.approx(biased.item(), abs=0.01)


def test_cka_of_minibatches_is_close_to_the_whole():
    first, second = related(1000)
    whole = cka(first, second)[0, 1].item()
    sums = [layers.hsic([layers.centred_gram(a), layers.centred_gram(b)])
            for a, b in zip(first.split(50), second.split(50))]
    assert layers.cka_of(sum(sums))[0, 1].item() == pytest.approx(whole, abs=0.02)


def opened(arch, size, seed=0):
    """(model, layers, facts, {}) of a random model, as open_models gives them."""
    model, _ = common.build_model(arch, "random", size, 0, seed)
    facts = {"arch": arch, "image_size": size}
    return model.eval(), layers.layers_of(model.eval(), arch, facts), facts, {"mean": [0.5] * 3, "std": [0.25] * 3}


def test_cka_of_two_models_keeps_one_sum(data):
    """The map equals that of all images' activations at once, and what is kept has the size of the layers alone."""
    dataset = common.open_dataset(data)
    vit, cnn = opened("test_vit", 32), opened("resnet18", 32)
    args = argparse.Namespace(images=1024, batch_size=1024, seed=0)
    found = layers.cka_map(vit, cnn, dataset, args, CPU)
    images = torch.from_numpy(dataset.images[dataset.rows["test"]])
    view = common.eval_view(images, 32, **vit[3])
    whole = [[output.flatten(1).double() for output in layers.read_layers(*one[:2], view, torch.clone)] for one in (vit, cnn)]
    assert found.shape == tuple(map(len, whole)) == (len(vit[0].blocks), 8)
    for i, a in enumerate(whole[0]):
        for j, b in enumerate(whole[1]):
            expected = hsic_by_song(a, b) / (hsic_by_song(a, a) * hsic_by_song(b, b)).sqrt()
            assert found[i, j].item() == pytest.approx(expected.item(), abs=1e-5)
    args.batch_size = 5  # 13 images in two minibatches
    assert (layers.cka_map(vit, vit, dataset, args, CPU).diag() - 1).abs().max() < 1e-6
    sizes = []
    for images in (torch.rand(4, 3, 32, 32), torch.rand(12, 3, 32, 32)):
        sizes.append(layers.hsic(layers.read_layers(*vit[:2], images, layers.centred_gram)).shape)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("arch, count, kinds", [
    ("test_vit", None, ["cls", "mean", "both"]), ("deit_tiny_distilled_patch16_224", 12, ["cls", "mean", "both"]),
    ("vit_pwee_patch16_reg1_gap_256", None, ["mean"]), ("resnet18", 8, ["pooled"]), ("test_convnext", None, ["pooled"])])
def test_features_of_the_last_layer_are_the_models_own(data, arch, count, kinds):
    model, modules, facts, _ = opened(arch, 64)
    count = count or len(getattr(model, "blocks", getattr(model, "stages", None)))
    args = argparse.Namespace(batch_size=7)
    dataset = common.open_dataset(data)
    scores, shares = layers.score_layers(model, modules, dataset, 64, args, CPU)
    assert [score["feature"] for score in scores] == kinds * count == [*kinds] * len(modules)
    assert scores[0]["depth"] == 1 / count and scores[-1]["depth"] == 1
    for kind, share in zip(kinds, shares[-len(kinds):]):
        pool = {"cls": "cls", "mean": "mean", "pooled": "auto"}.get(kind)
        if pool is None or arch == "test_convnext":  # its head has a norm between the map and the classifier
            continue
        features = {name: knn_eval.extract(model, dataset, rows, 64, CPU, pool) for name, rows in dataset.rows.items()}
        k = dataset.counts["train"]
        expected = common.vote_on(features, dataset, [k], 0.1, CPU.device)["test"][k]
        assert np.abs(share - expected).max() < 1e-5, kind


def test_weights_that_moved():
    start, end = opened("resnet18", 32)[1], opened("resnet18", 32)[1]
    with torch.no_grad():
        for p in end["layer2.0"].parameters():
            p *= 1.5
        end["layer3.1"].bn1.weight += 1  # a norm
    moved = dict(zip(start, layers.distances(start, end)))
    assert moved.pop("layer2.0") == pytest.approx(0.5) and set(moved.values()) == {0}
    assert layers.distances(start, opened("test_vit", 32)[1]) is None
    assert layers.distances(opened("test_vit", 32)[1], opened("deit_tiny", 32)[1]) is None


@pytest.fixture(scope="module")
def trained(data):
    """The folder of two runs of finetune.py, of a ViT and a CNN from random weights of seed 3; the first did not move."""
    for arch, lr in (("test_vit", "0"), ("resnet18", "3e-3")):
        stage("finetune.py", *DATA, "--arch", arch, "--epochs", "2", "--batch-size", "4", "--lr", lr, "--min-lr", "0",
              "--seed", "3", "--output", f"runs/{arch}", *TINY, cwd=data.parent)
    return data.parent


def test_the_stage_writes_what_it_says(trained):
    start, _ = common.build_model("resnet18", "random", 32, 2, seed=3)
    torch.save(start.state_dict(), trained / "start.pth")  # says nothing of its architecture
    args = [*DATA, "--runs", "runs/test_vit", "--pair", "random", "runs/test_vit", "--pair", "start.pth", "runs/resnet18",
            "--pair", "runs/test_vit", "runs/resnet18", "--pair", "random", "runs/resnet18", "--seed", "3", "--batch-size", "5", *TINY[2:]]
    stage("layers.py", *args, "--output", "one", cwd=trained)
    stage("layers.py", *args, "--output", "two", cwd=trained, processes=2)
    result, rows = metrics(trained / "one"), table(trained / "one" / "layers.csv")
    names = ["test_vit", "random test_vit", "resnet18", "start", "random resnet18"]
    assert [one["name"] for one in result["runs"]] == names and result["image_size"] == [32] * 5
    assert len(rows) == sum(len(one["layers"]) for one in result["runs"])
    for one in result["runs"]:
        assert one["best"]["val"] == max(score["val"] for score in one["layers"])
        assert one["gain"] == pytest.approx(one["best"]["test"] - one["last"]["test"])
        low, high = one["interval"]
        assert low <= one["gain"] <= high and result["test"][one["name"]] == one["best"]["test"]
    vit, cnn, both, again = result["pairs"]
    assert again["moved"] == cnn["moved"] and again["cka"] == cnn["cka"]
    assert not any(vit["moved"]), "random weights are those that the run started from, of as many classes"
    assert vit["same_layer"] == pytest.approx(np.ones(len(vit["cka"])), abs=1e-6)
    assert len(cnn["moved"]) == 8 and min(cnn["moved"]) > 0
    assert cnn["same_layer"] == [row[i] for i, row in enumerate(cnn["cka"])] and max(cnn["same_layer"]) < 1
    assert both["moved"] is both["same_layer"] is None and np.shape(both["cka"]) == (len(vit["cka"]), 8)
    with Image.open(trained / "one" / "layers.png") as image:
        assert min(image.size) > 600 and len(image.convert("RGB").getcolors(10 ** 6)) > 50
    again = metrics(trained / "two")
    assert again["world_size"] == 2 and again["test"] == result["test"]
    for one, two in zip(result["pairs"], again["pairs"]):
        assert np.abs(np.array(one["cka"]) - two["cka"]).max() < 1e-6 and one["moved"] == two["moved"]
    for one, two in zip(result["runs"], again["runs"]):
        assert [score["test"] for score in one["layers"]] == [score["test"] for score in two["layers"]]
    assert "is complete" in stage("layers.py", *args, "--output", "one", cwd=trained).stdout


def test_the_last_layer_has_the_score_of_knn_eval(trained):
    stage("layers.py", *DATA, "--runs", "runs/test_vit", "runs/resnet18", "--output", "layers", *TINY[2:], cwd=trained)
    for one in metrics(trained / "layers")["runs"]:
        stage("knn_eval.py", *DATA, "--init", f"{one['run']}/model.pt", "--output", f"knn-{one['arch']}", *TINY[2:], cwd=trained)
        knn = metrics(trained / f"knn-{one['arch']}")
        assert (one["last"]["val"], one["last"]["test"]) == (knn["val"][knn["metric"]], knn["test"][knn["metric"]])


@pytest.mark.parametrize("args, words", [
    (["--runs", "random", "--arch", "efficientnet_b0"], ["--runs random", "efficientnet_b0 cannot be taken apart"]),
    (["--runs", "random", "--arch", "cait_xxs24_224"], ["cait_xxs24_224 cannot be taken apart"]),
    (["--runs", "random", "--arch", "densenet121"], ["densenet121 cannot be taken apart"]),
    (["--runs", "nowhere", "--arch", "test_vit"], ["--runs nowhere", "no model.pt"]),
    (["--pair", "random", "--arch", "test_vit"], ["--pair", "2 arguments"]),
    (["--pair", "random", "random", "--arch", "test_vit", "--images", "3"], ["--pair", "at least 4 of --images"]),
    (["--arch", "test_vit", "--compile"], ["--compile"])])
def test_mistakes(data, args, words):
    refused(stage("layers.py", *DATA, *TINY, *args, "--output", "out", cwd=data.parent, check=False), *words)
    assert not (data.parent / "out").exists()


@pytest.mark.parametrize("script, patch, seed", [("finetune.py", 8, 1), ("finetune.py", 16, 2), ("segment.py", 16, 3)])
def test_random_is_what_a_run_started_from(trained, script, patch, seed):
    """By the seed, patches and classes of the run; a second pair with other patches has a start of its own."""
    rng = np.random.default_rng(0)
    folder = trained / "masks"
    if not folder.exists():
        images = rng.integers(0, 256, (24, 32, 32, 1), dtype=np.uint8)
        rows = [{"image": f"{i}", "split": ("train", "val", "test")[i // 8], "label": "ab"[i % 2]} for i in range(24)]
        write_prepared(folder, images, rows, rng.integers(0, 2, (24, 32, 32), dtype=np.uint8))
    known = ["--data", "masks", "--arch", "test_vit", "--epochs", "1", "--batch-size", "4", "--lr", "0", "--min-lr", "0", *TINY]
    name = f"still-{script[:-3]}-{patch}"
    stage(script, *known, "--patch-size", patch, "--seed", seed, "--output", name, cwd=trained)
    pairs = ["--pair", "random", name, "--pair", "random", "runs/test_vit"]
    stage("layers.py", "--data", "masks", *pairs, *TINY[2:], "--output", f"seen-{name}", cwd=trained)
    for pair in metrics(trained / f"seen-{name}")["pairs"]:
        assert not any(pair["moved"]) and pair["same_layer"] == pytest.approx(np.ones(len(pair["moved"])), abs=1e-6)
