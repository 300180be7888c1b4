"""finetune.py and knn_eval.py, run as a user runs them, their files read back."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import common
from conftest import ROOT, TINY, killed, metrics, picture, refused, stage, table, write_prepared

DATA = ["--data", "data"]
FAST = ["--arch", "test_vit", "--epochs", "3", "--batch-size", "4", "--lr", "1e-3", "--output", "run"]


def weights(folder):
    """The tensors of a run's model.pt and checkpoint.pt."""
    model = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {**model, **{f"last.{k}": v for k, v in checkpoint["model"].items()}}


def equal(a, b, tolerance=0.0):
    """Whether two dicts of tensors have the same names and values."""
    return a.keys() == b.keys() and all((a[k].double() - b[k].double()).abs().max() <= tolerance for k in a)


def test_finetune_learns_and_writes_what_the_design_names(folder_data, tmp_path):
    done = stage("finetune.py", *DATA, "--arch", "resnet18", "--epochs", "6", "--batch-size", "8",
                 "--lr", "2e-3", "--output", "run", *TINY, cwd=tmp_path)
    run = tmp_path / "run"
    result, log = metrics(run), [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert result["test"]["accuracy"] > 0.75, done.stdout
    assert result["counts"] == {"train": 20, "val": 4, "test": 13}
    assert len(log) == 6 and result["val"] == log[result["best_epoch"] - 1]["val"]
    assert {"stage", "dataset", "arch", "init", "pretrained_on", "seed", "metric", "val", "test", "counts",
            "epochs", "parameters", "seconds", "images_per_second", "device", "amp",
            "world_size"} <= result.keys()
    rows = table(run / "predictions.csv")
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    assert len(rows) == 13 and right == pytest.approx(result["test"]["accuracy"])
    assert sum(float(rows[0][name]) for name in ("level", "upright")) == pytest.approx(1, abs=1e-5)
    low, high = result["test"]["interval"]
    assert low <= result["test"]["accuracy"] <= high
    model = torch.load(run / "model.pt", weights_only=True)
    assert {"arch", "init", "num_classes", "image_size", "mean", "std", "classes",
            "state_dict"} <= model.keys()
    for name in ("curves.png", "confusion.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 200
    assert json.loads((run / "args.json").read_text())["versions"]["torch"] == torch.__version__
    assert not list(run.glob("*.partial*"))


@pytest.mark.parametrize("arch", ["test_vit", "resnet18"])
def test_two_processes_equal_one(folder_data, tmp_path, arch):
    """test_vit for layer norm, resnet18 for the batch norm over both processes; 13 test images are odd. (Adam makes large
    what differs in the last digit: hence a small learning rate.)"""
    args = [*DATA, "--arch", arch, "--epochs", "3", "--batch-size", "8", "--lr", "2e-5", *TINY, "--image-size", "64"]
    stage("finetune.py", *args, "--output", "one", cwd=tmp_path)
    stage("finetune.py", *args, "--output", "two", cwd=tmp_path, processes=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two["world_size"] == 2 and one["counts"] == two["counts"]
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for a, b in zip(*logs):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], rel=1e-2)
    rows = [table(tmp_path / name / "predictions.csv") for name in ("one", "two")]
    assert [row["image"] for row in rows[0]] == [row["image"] for row in rows[1]] and len(rows[1]) == 13
    for a, b in zip(*rows):
        assert float(a["level"]) == pytest.approx(float(b["level"]), abs=0.02)


def test_resumed_after_sigkill_bit_for_bit(folder_data, tmp_path):
    args = [*DATA, "--arch", "test_vit", "--epochs", "8", "--batch-size", "4", "--schedule", "plateau",
            *TINY]
    stage("finetune.py", *args, "--output", "whole", cwd=tmp_path)
    killed("finetune.py", *args, "--output", "killed", cwd=tmp_path,
           log=tmp_path / "killed" / "log.jsonl", lines=3,
           text="epoch 4/8")  # the bar of the fourth epoch: inside an epoch
    assert not (tmp_path / "killed" / "metrics.json").exists()
    done = stage("finetune.py", *args, "--output", "killed", cwd=tmp_path)
    assert "resuming killed after epoch" in done.stdout
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert whole["test"] == resumed["test"] and whole["val"] == resumed["val"]
    (tmp_path / "killed" / "metrics.json").unlink()
    (tmp_path / "killed" / "checkpoint.pt").write_bytes(b"damaged")
    refused(stage("finetune.py", *args, "--output", "killed", cwd=tmp_path, check=False),
            "checkpoint.pt", "--overwrite")


def test_freeze_trains_the_classifier_alone(folder_data, tmp_path):
    stage("finetune.py", *DATA, *FAST[:-2], "--output", "first", *TINY, "--arch", "test_resnet",
          cwd=tmp_path)
    stage("finetune.py", *DATA, *FAST[2:-2], "--freeze", "--init", "first/model.pt", "--output", "probe",
          *TINY, cwd=tmp_path)
    first, probe = (torch.load(tmp_path / name / "model.pt", weights_only=True)
                    for name in ("first", "probe"))
    changed = {name for name, value in probe["state_dict"].items()
               if not torch.equal(value, first["state_dict"][name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert probe["pretrained_on"] == "data" and metrics(tmp_path / "probe")["init"] == "finetuned"


def test_multilabel(csv_data, tmp_path):
    stage("finetune.py", *DATA, *FAST, *TINY, cwd=tmp_path)
    result = metrics(tmp_path / "run")
    assert result["metric"] == "roc_auc" and "quadratic_kappa" not in result["test"]
    stage("knn_eval.py", *DATA, "--init", "run/model.pt", "--k", "1,5", "--output", "knn", *TINY, cwd=tmp_path)
    assert set(metrics(tmp_path / "knn")["by_k"]) == {"1", "5"}
    row = table(tmp_path / "knn" / "predictions.csv")[0]
    assert list(row) == ["image", "group", "label_a", "label_b", "a", "b"] and row["label_a"] in "01"


def test_predict_gives_the_test_probabilities_again(folder_data, tmp_path):
    stage("finetune.py", *DATA, *FAST, *TINY, cwd=tmp_path)
    (tmp_path / "new").mkdir()
    known = {}
    for row in table(tmp_path / "run" / "predictions.csv"):
        name = row["image"].replace("/", "_")
        shutil.copy(tmp_path / "source" / row["image"], tmp_path / "new" / name)
        known[name] = row
    colour = np.stack([picture(np.random.default_rng(0), 0, (90, 70))] * 3, 2)
    colour[..., 0] //= 2
    Image.fromarray(colour).save(tmp_path / "new" / "another_size_in_colour.png")
    shutil.copytree(tmp_path / "data", tmp_path / ".out.images" / "data")  # of one that was killed, on other images
    stage("finetune.py", "--predict", "new", "--init", "run/model.pt", "--output", "out", *TINY[2:],
          cwd=tmp_path)
    assert not list(tmp_path.glob("**/*cache*")) and not list(tmp_path.glob(".out*"))
    rows = table(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 14 and {row["label"] for row in rows} == {""}
    for row in rows:
        if row["image"] in known:
            assert float(row["level"]) == pytest.approx(float(known[row["image"]]["level"]), abs=1e-5)
            assert row["predicted"] == known[row["image"]]["predicted"]
    (tmp_path / "new" / "list.csv").write_text("image\n" + rows[0]["image"] + "\n")
    stage("finetune.py", "--predict", "new/list.csv", "--init", "run/model.pt", "--output", "out2", *TINY[2:],
          cwd=tmp_path, processes=2)
    (row,) = table(tmp_path / "out2" / "predictions.csv")
    assert row["predicted"] == rows[0]["predicted"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, of PyTorch on Linux, what it was told")
@pytest.mark.parametrize("own, turns", [({}, "2000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_wait_briefly_unless_told_otherwise(tmp_path, own, turns):
    set_here = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by common.py too, which these tests import
    clean = {name: value for name, value in os.environ.items() if name not in set_here}
    done = subprocess.run([sys.executable, ROOT / "knn_eval.py", "--help"], capture_output=True, text=True, cwd=tmp_path,
                          env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **own})
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


@pytest.mark.parametrize("stage", ["pretrain_dino", "finetune", "knn_eval", "segment", "saliency", "attn_distance", "layers"])
def test_every_stage_sets_this_before_it_loads_pytorch(stage):
    lines = (ROOT / f"{stage}.py").read_text().splitlines()
    imports = [line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))]
    assert imports.index("common") < min(imports.index(name) for name in ("torch", "torchvision", "timm") if name in imports)


def test_a_stage_and_common_copied_alone(folder_data, tmp_path):
    (tmp_path / "alone").mkdir()
    for name in ("finetune.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path / "alone" / name)
    stage("finetune.py", "--data", "../data", *FAST, *TINY, cwd=tmp_path / "alone", root=tmp_path / "alone", fresh=True)
    assert metrics(tmp_path / "alone" / "run")["counts"] == {"train": 20, "val": 4, "test": 13}
    done = stage("finetune.py", *FAST, *TINY, cwd=tmp_path / "alone", root=tmp_path / "alone", check=False)
    refused(done, "data/demo", "python prepare.py demo")


def test_arrays_of_ones_own_suffice(tmp_path):
    """The five lines of the README: images.npy and labels.csv."""
    rng = np.random.default_rng(0)
    images = np.stack([picture(rng, i % 2, (36, 36)) for i in range(40)])[..., None]
    rows = [{"image": f"{i}", "split": ("train", "train", "val", "test")[i // 10], "label": "ab"[i % 2]} for i in range(40)]
    write_prepared(tmp_path / "mine", images, rows)
    stage("knn_eval.py", "--data", "mine", "--arch", "test_vit", "--k", "1", "--output", "run", *TINY, cwd=tmp_path)
    assert metrics(tmp_path / "run")["counts"] == {"train": 20, "val": 10, "test": 10}
    dataset = common.open_dataset(tmp_path / "mine")
    assert dataset.classes == ["a", "b"] and dataset.name == "mine" and dataset.masks is None
    train = images[:20] / 255
    assert dataset.mean == pytest.approx([train.mean()] * 3, abs=1e-4)
    assert dataset.std == pytest.approx([train.std()] * 3, abs=1e-4)


def test_the_demo_prepares_itself_for_two_processes(tmp_path):
    done = stage("finetune.py", *FAST, "--epochs", "1", "--batch-size", "64", *TINY, cwd=tmp_path, processes=2, fresh=True)
    assert done.stdout.count("written: data/demo") == 1
    result = metrics(tmp_path / "run")
    assert result["counts"] == {"train": 600, "val": 100, "test": 200} and result["dataset"] == "demo"
    assert "prepared already" not in stage("finetune.py", *FAST, "--epochs", "1", "--batch-size", "64", *TINY,
                                           cwd=tmp_path).stdout


def test_image_size_is_that_of_the_start(folder_data, tmp_path):
    stage("finetune.py", *DATA, *FAST, *TINY, cwd=tmp_path)
    stage("knn_eval.py", *DATA, "--init", "run/model.pt", "--k", "1", "--output", "knn", *TINY[2:], cwd=tmp_path)
    assert metrics(tmp_path / "knn")["image_size"] == 32
    done = stage("knn_eval.py", *DATA, "--init", "run/model.pt", "--image-size", "64", "--k", "1", "--output", "knn64",
                 *TINY[2:], cwd=tmp_path)
    assert "35 pixels of data are enlarged to --image-size 64" in done.stdout


def test_mixed_precision_and_any_timm_model(folder_data, tmp_path):
    args = [*DATA, "--epochs", "1", "--batch-size", "4", "--image-size", "128", "--device", "cpu",
            "--amp", "bf16"]
    stage("finetune.py", *args, "--arch", "test_convnext", "--output", "a", cwd=tmp_path)
    stage("knn_eval.py", *args[:2], *args[6:], "--init", "a/model.pt", "--pool", "mean", "--output", "b",
          cwd=tmp_path)
    assert metrics(tmp_path / "a")["amp"] == "bf16" and metrics(tmp_path / "b")["arch"] == "test_convnext"


def slow_vote(train, labels, query, k, temperature):
    """The vote for one query, written out."""
    similarity = sorted(((float(query @ t) / float(query.norm() * t.norm()), i) for i, t in enumerate(train)),
                        reverse=True)[:k]
    total = torch.zeros(labels.shape[1])
    for s, i in similarity:
        total += np.exp(s / temperature) * labels[i]
    return total / sum(np.exp(s / temperature) for s, _ in similarity)


@pytest.mark.parametrize("count,k", [(7, 7), (100, 5), (5003, 20), (5000, 1), (9000, 1000)])
def test_nearest_equals_topk(count, k):
    generator = torch.Generator().manual_seed(0)
    train, queries = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (count, 33))

    def both(train, queries):
        blocks = [torch.cat(parts) for parts in zip(*common.nearest(train, queries, k, tile=10 * count))]
        return blocks, queries @ train.T
    (values, rows), products = both(train, queries)
    assert torch.allclose(values, products.topk(k).values, atol=1e-12)
    assert torch.equal(rows, products.topk(k).indices)  # no ties in so many digits
    (values, rows), products = both(train.round(), queries.round())  # many ties: any may be taken, none twice
    assert torch.equal(values, products.topk(k).values)
    assert torch.equal(values, products.gather(1, rows))
    assert all(len(set(row)) == k for row in rows.tolist())


def test_vote_equals_the_slow_version_and_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(300, 8, generator=generator), torch.randn(37, 8, generator=generator)
    classes = torch.randint(0, 3, (300,), generator=generator)
    labels = torch.nn.functional.one_hot(classes, 3).float()
    unit = torch.nn.functional.normalize
    for tile in (16, 100, 4096):  # the tiles must not show
        shares = common.vote(unit(train, dim=1), labels, unit(queries, dim=1), [1, 5, 300], 0.07, tile)
        for k in (1, 5, 300):
            slow = torch.stack([slow_vote(train, labels, query, k, 0.07) for query in queries])
            assert (shares[k] - slow).abs().max() < 1e-4, (tile, k)
    theirs = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(train, classes)
    assert np.abs(theirs.predict_proba(queries) - shares[5].numpy()).max() < 1e-4


def test_knn_cuts_k_and_takes_one_test_image(folder_data, tmp_path):
    lines = (folder_data / "labels.csv").read_text().splitlines(keepends=True)
    tests = [i for i, line in enumerate(lines) if ",test," in line]
    keep = next(i for i in tests if "upright" in lines[i])
    for i in tests:
        lines[i] = lines[i] if i == keep else lines[i].replace(",test,", ",,")
    (folder_data / "labels.csv").write_text("".join(lines))
    done = stage("knn_eval.py", *DATA, "--arch", "test_vit", "--k", "1,5,200", "--output", "run", *TINY,
                 cwd=tmp_path)
    result = metrics(tmp_path / "run")
    train = result["counts"]["train"]
    assert f"there are {train} training images" in done.stdout
    assert set(result["by_k"]) == {"1", "5", str(train)}
    assert result["counts"]["test"] == 1 and result["test"]["undefined"] == ["level"]
    saved = np.load(tmp_path / "run" / "features.npz")
    assert saved["test_features"].shape[0] == 1 and len(saved["train_images"]) == train
    assert np.isfinite(saved["train_features"]).all()


def test_knn_with_two_processes_equals_one(folder_data, tmp_path):
    args = [*DATA, "--arch", "test_vit", *TINY]
    for name, processes in (("one", 1), ("two", 2)):
        stage("knn_eval.py", *args, "--output", name, cwd=tmp_path, processes=processes)
    one, two = (np.load(tmp_path / name / "features.npz") for name in ("one", "two"))
    for part in ("train", "val", "test"):
        assert (one[f"{part}_images"] == two[f"{part}_images"]).all()
        assert np.abs(one[f"{part}_features"] - two[f"{part}_features"]).max() < 1e-4
    assert metrics(tmp_path / "one")["test"] == metrics(tmp_path / "two")["test"]
