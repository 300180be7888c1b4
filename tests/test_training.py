"""What fine-tuning and segmentation can be asked for beside the paper's protocol: class weights, patience, training on, the
linear probe, the test on another dataset. Run as a user runs them, their files read back."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

import common
import finetune
import segment
from conftest import TINY, metrics, prepare, refused, stage, table, write_prepared

VIT = ["--arch", "test_vit", *TINY]
SHORT = [*VIT, "--epochs", "2", "--batch-size", "4", "--lr", "1e-3"]


@pytest.fixture
def three_classes(csv_source, tmp_path):
    """csv_source prepared into data/ by its split column, with its classes l, n and u."""
    prepare("source", "data", "--split-column", "split", cwd=tmp_path)
    return tmp_path / "data"


def log_of(folder):
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def scores_of(file, classes):
    """(labels, probabilities (n, C)) of a predictions.csv by image: {image: (label, probabilities)}."""
    return {row["image"]: (row["label"], [float(row[name]) for name in classes]) for row in table(file)}


def edited(source, target, edit):
    """A copy of a prepared folder whose rows of labels.csv have gone through edit(row)."""
    shutil.copytree(source, target)
    rows = [edit(row) for row in table(source / "labels.csv")]
    with open(target / "labels.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    meta = json.loads((source / "dataset.json").read_text())
    names = [name for name in rows[0] if name not in ("image", "split", "group", "height", "width")]
    meta["name"] = target.name
    meta["classes"] = sorted({row["label"] for row in rows}) if "label" in rows[0] else names
    (target / "dataset.json").write_text(json.dumps(meta))
    return target


# ---------------------------------------------------------------- class weights -----------------------------

def test_weights_balance_the_loss():
    """Over all training images as PyTorch's own weighting; the mean of batches is the mean over images."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [30, 9, 3])
    logits = torch.tensor(rng.normal(size=(42, 3)), dtype=torch.float32)

    class Data:
        rows, task, classes = {"train": np.arange(42)}, "classes", ["a", "b", "c"]
    Data.labels = labels
    weights = finetune.class_weights(Data, "balanced", "cpu")
    assert weights.tolist() == pytest.approx([42 / (3 * n) for n in (30, 9, 3)])
    truth = torch.from_numpy(labels)
    whole = finetune.loss_function(logits, truth, weights)
    assert whole.item() == pytest.approx(F.cross_entropy(logits, truth, weights).item(), rel=1e-5)
    halves = [finetune.loss_function(logits[i::2], truth[i::2], weights) for i in (0, 1)]
    assert whole.item() == pytest.approx(torch.stack(halves).mean().item(), rel=1e-5)

    Data.task, Data.labels = "multilabel", np.array([[1, 0, 0]] * 6 + [[0, 1, 0]] * 36, np.float32)
    weights = finetune.class_weights(Data, "balanced", "cpu")
    assert weights.tolist() == pytest.approx([6, 1 / 6, 1])  # a label that no image has is left alone
    ours = finetune.loss_function(logits, torch.from_numpy(Data.labels), weights)
    probability = logits.sigmoid()
    truth = torch.from_numpy(Data.labels)
    slow = -(weights * truth * probability.log() + (1 - truth) * (1 - probability).log()).mean()
    assert ours.item() == pytest.approx(slow.item(), rel=1e-4)


def test_class_weights_of_a_run_with_one_and_two_processes(three_classes, tmp_path):
    edited(three_classes, tmp_path / "rare", lambda row: {**row, "split": "" if row["label"] == "u" and row["split"] == "train"
                                                          and int(row["image"][-6:-4]) > 20 else row["split"]})
    args = ["--data", "rare", *SHORT, "--lr", "2e-5", "--class-weights", "balanced"]
    done = stage("finetune.py", *args, "--output", "one", cwd=tmp_path)
    stage("finetune.py", *args, "--output", "two", cwd=tmp_path, processes=2)
    counts = np.bincount([["l", "n", "u"].index(row["label"]) for row in table(tmp_path / "rare" / "labels.csv")
                          if row["split"] == "train"])
    assert counts.tolist() == [10, 10, 4]
    assert "class weights: l 0.8, n 0.8, u 2" in done.stdout
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    stage("finetune.py", *args[:-2], "--output", "plain", cwd=tmp_path)
    assert log_of(tmp_path / "plain")[0]["loss"] != pytest.approx(log_of(tmp_path / "one")[0]["loss"], rel=1e-3)


def test_layer_decay_keeps_the_stem(three_classes, tmp_path):
    """At a tiny decay the layers below the classifier stay what they were; the rate that is logged is the classifier's."""
    weights = {}
    for decay in ("1", "1e-6"):
        stage("finetune.py", "--data", "data", *SHORT, "--layer-decay", decay, "--output", decay, cwd=tmp_path)
        weights[decay] = torch.load(tmp_path / decay / "model.pt", weights_only=True)["state_dict"]
    start = common.build_model("test_vit", "random", 32, 3, 0)[0].state_dict()
    for name, start_of in start.items():
        moved = {decay: (trained[name] - start_of).abs().max().item() for decay, trained in weights.items()}
        assert moved["1"] > 1e-4, name
        assert (moved["1e-6"] > 1e-4) == name.startswith("head"), name
    assert log_of(tmp_path / "1")[-1]["lr"] == log_of(tmp_path / "1e-6")[-1]["lr"]
    refused(stage("finetune.py", "--data", "data", *SHORT, "--layer-decay", "0", cwd=tmp_path, check=False), "--layer-decay 0")


# ---------------------------------------------------------------- patience, training on ---------------------

@pytest.mark.parametrize("script", ["finetune.py", "segment.py"])
def test_patience_ends_a_run(script, demo, tmp_path):
    """At a rate of 0 a classifier's first epoch stays the best; the head of a segmenter has batch norm, whose statistics
    settle within some epochs."""
    args = ["--data", demo, *SHORT, "--lr", "0", "--min-lr", "0", "--epochs", "60", "--limit", "8", "--patience", "2",
            "--output", "run"]
    done = stage(script, *args, cwd=tmp_path)
    log = log_of(tmp_path / "run")
    scores = [entry["score"] for entry in log]
    assert metrics(tmp_path / "run")["epochs"] == len(log) < 60
    assert scores.index(max(scores)) == len(log) - 3  # the best, and two that are not better
    assert script == "segment.py" or len(log) == 3
    assert "has not improved for 2 epochs" in done.stdout and f"of {len(log)}, 200 test images" in done.stdout
    (tmp_path / "run" / "metrics.json").unlink()  # killed before its end: it goes on to the same end
    stage(script, *args, cwd=tmp_path)
    assert log_of(tmp_path / "run") == log


def test_a_run_is_trained_on_with_its_classifier(three_classes, tmp_path):
    stage("finetune.py", "--data", "data", *SHORT, "--output", "first", cwd=tmp_path)
    still = [*SHORT[2:], "--lr", "0", "--min-lr", "0", "--init", "first/model.pt"]
    done = stage("finetune.py", "--data", "data", *still, "--output", "on", cwd=tmp_path)
    assert "the same classes, so its classifier is trained on" in done.stdout
    names = ["l", "n", "u"]
    first, on = (scores_of(tmp_path / name / "predictions.csv", names) for name in ("first", "on"))
    assert max(np.abs(np.subtract(first[image][1], on[image][1])).max() for image in first) < 1e-5
    assert metrics(tmp_path / "on")["init"] == "finetuned"
    edited(three_classes, tmp_path / "other", lambda row: {**row, "label": row["label"] + "2"})
    done = stage("finetune.py", "--data", "other", *still, "--output", "anew", cwd=tmp_path)
    assert "its classes are others (l, n, u), so the classifier begins anew" in done.stdout


def test_a_segmenter_is_trained_on_with_its_head(demo, tmp_path):
    args = ["--data", demo, *SHORT, "--epochs", "1", "--limit", "8"]
    stage("segment.py", *args, "--output", "first", cwd=tmp_path)
    done = stage("segment.py", *args, "--lr", "0", "--min-lr", "0", "--init", "first/model.pt", "--output", "on", cwd=tmp_path)
    assert "its classifier is trained on" in done.stdout
    first, on = (torch.load(tmp_path / name / "model.pt", weights_only=True)["state_dict"] for name in ("first", "on"))
    moved = {name for name in first if not torch.equal(first[name], on[name])}
    assert "classifier.4.weight" not in moved
    assert all("running" in name or "num_batches" in name for name in moved)


# ---------------------------------------------------------------- the linear probe --------------------------

def standardised(features):
    """By the mean and deviation of train."""
    mean, std = features["train"].mean(0), features["train"].std(0)
    return {name: (values - mean) / np.where(std > 0, std, 1) for name, values in features.items()}


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regression_equals_scikit_learn(classes, balanced):
    rng = np.random.default_rng(classes)
    labels = rng.choice(classes, 150, p=[0.7, 0.3] if classes == 2 else [0.5, 0.2, 0.2, 0.1])
    features = rng.normal(size=(150, 12)) + labels[:, None] * rng.normal(size=12)
    weights = torch.tensor(len(labels) / (classes * np.bincount(labels))) if balanced else None
    for strength in (1e-3, 0.1, 10):
        theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=10000, class_weight="balanced" if balanced else None)
        theirs.fit(features, labels)
        x = torch.from_numpy(features)
        weight, bias = finetune.logistic_regression(x, torch.from_numpy(labels), classes, strength, weights)
        ours = (x @ weight.T + bias).softmax(1).numpy()
        assert np.abs(ours - theirs.predict_proba(features)).max() < 1e-3


@pytest.mark.parametrize("labels", ["label", "a,b"])
def test_the_probe_is_scikit_learns_at_the_strength_of_validation(labels, csv_source, tmp_path):
    """On the features that knn_eval.py writes; of several labels one regression each. In model.pt the scale is part of the
    classifier."""
    prepare("source", "data", "--split-column", "split", "--label-column", labels, cwd=tmp_path)
    stage("finetune.py", "--data", "data", *SHORT, "--output", "first", cwd=tmp_path)
    stage("knn_eval.py", "--data", "data", "--init", "first/model.pt", *TINY, "--k", "1", "--output", "knn", cwd=tmp_path)
    args = ["--data", "data", "--init", "first/model.pt", "--freeze", *TINY]
    done = stage("finetune.py", *args, "--output", "probe", cwd=tmp_path)
    stage("finetune.py", *args, "--output", "two", cwd=tmp_path, processes=2)
    saved = np.load(tmp_path / "knn" / "features.npz")
    x = standardised({name: saved[f"{name}_features"].astype(float) for name in ("train", "val", "test")})
    names = saved["classes"].tolist()
    result, log = metrics(tmp_path / "probe"), log_of(tmp_path / "probe")
    best = max(log, key=lambda entry: entry["val"][result["metric"]])
    assert result["C"] == best["C"] and f"best C {best['C']:g}" in done.stdout and len(log) == 9
    rows = table(tmp_path / "probe" / "predictions.csv")
    ours = np.array([[float(row[name]) for name in names] for row in rows])
    theirs = np.zeros_like(ours)
    truth = saved["train_labels"]
    if labels == "label":
        theirs[:] = LogisticRegression(C=best["C"], tol=1e-9, max_iter=10000).fit(x["train"], truth).predict_proba(x["test"])
        accuracy = np.mean(theirs.argmax(1) == saved["test_labels"])
        assert result["test"]["accuracy"] == pytest.approx(accuracy, abs=0.005)
    else:
        for k in range(2):
            model = LogisticRegression(C=best["C"], tol=1e-9, max_iter=10000).fit(x["train"], truth[:, k])
            theirs[:, k] = model.predict_proba(x["test"])[:, 1]
    assert np.abs(ours - theirs).max() < 0.005
    two = table(tmp_path / "two" / "predictions.csv")
    assert np.abs(ours - [[float(row[name]) for name in names] for row in two]).max() < 0.005
    file = tmp_path / "probe" / "args.json"
    content = json.loads(file.read_text())
    del content["arguments"]["layer_decay"], content["arguments"]["defaults"]["layer_decay"]
    file.write_text(json.dumps(content))  # a run of before there was that flag
    assert "complete" in stage("finetune.py", *args, "--output", "probe", cwd=tmp_path).stdout
    first, probe = (torch.load(tmp_path / name / "model.pt", weights_only=True)["state_dict"] for name in ("first", "probe"))
    assert {name for name in first if not torch.equal(first[name], probe[name])} == {"head.weight", "head.bias"}
    assert (tmp_path / "probe" / "curves.png").exists()
    stage("finetune.py", "--predict", "source/images", "--init", "probe/model.pt", "--output", "out", *TINY[2:], cwd=tmp_path)
    new = {row["image"]: row for row in table(tmp_path / "out" / "predictions.csv")}
    for row, values in zip(rows, ours):
        seen = [float(new[row["image"].removeprefix("images/")][name]) for name in names]
        assert np.abs(values - seen).max() < 1e-4


# ---------------------------------------------------------------- another dataset ---------------------------

def test_external_test_matches_classes_by_name(three_classes, tmp_path):
    """Two of the three classes, in another order, and one that the model does not know."""
    stage("finetune.py", "--data", "data", *SHORT, "--seed", "3", "--output", "runs/model", cwd=tmp_path)
    new_names = {"u": "a new one", "l": "l", "n": "n"}
    edited(three_classes, tmp_path / "other", lambda row: {
        **row, "split": "test" if row["split"] else "", "label": new_names[row["label"]]})
    args = ["--init", "runs/model/model.pt", *TINY[2:]]
    done = stage("finetune.py", "--test", "other", *args, "--output", "runs/other", cwd=tmp_path)
    assert "does not know a new one of other: 20 images of it are left out" in done.stdout
    assert "the model's u is not in other" in done.stdout
    all_of_it = stage("finetune.py", "--test", "data", "--split", "all", *args, "--output", "runs/all", cwd=tmp_path)
    assert "is what this model was trained on" in all_of_it.stdout
    names = ["l", "n", "u"]
    whole, other = (scores_of(tmp_path / "runs" / name / "predictions.csv", names) for name in ("all", "other"))
    assert len(whole) == 60 and set(other) == {image for image, (label, _) in whole.items() if label != "u"}
    assert max(np.abs(np.subtract(other[image][1], whole[image][1])).max() for image in other) < 1e-5
    result = metrics(tmp_path / "runs" / "other")
    truth = [names.index(label) for label, _ in other.values()]
    predicted = [int(np.argmax(values)) for _, values in other.values()]
    assert result["test"]["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert result["test"]["recall"] == pytest.approx(recall_score(truth, predicted, labels=[0, 1], average="macro"))
    assert result["test"]["undefined"] == ["u"]
    assert (result["trained_on"], result["dataset"], result["seed"], result["init"]) == ("data", "other", 3, "random")
    assert result["counts"] == {"train": 0, "val": 0, "test": 40} and len(result["test"]["interval"]) == 2
    assert (tmp_path / "runs" / "other" / "confusion.png").exists()
    done = stage("finetune.py", "--test", "other", *args, "--output", "runs/other", cwd=tmp_path)
    assert "runs/other is complete" in done.stdout
    two = stage("finetune.py", "--test", "other", *args, "--output", "runs/two", cwd=tmp_path, processes=2)
    assert metrics(tmp_path / "runs" / "two")["test"]["accuracy"] == result["test"]["accuracy"], two.stdout
    stage("report.py", "runs", "--output", "report", cwd=tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data, tested on other" in page
    shown = [row for row in table(tmp_path / "report" / "results.csv") if row["run"].endswith("other")]
    assert shown[0]["dataset"] == "data, tested on other"


def test_external_test_refuses_what_does_not_belong(three_classes, csv_source, tmp_path):
    stage("finetune.py", "--data", "data", *SHORT, "--epochs", "1", "--output", "run", cwd=tmp_path)
    edited(three_classes, tmp_path / "none", lambda row: {**row, "label": {"u": "p", "l": "q", "n": "r"}[row["label"]]})
    args = ["--init", "run/model.pt", *TINY[2:]]
    refused(stage("finetune.py", "--test", "none", *args, cwd=tmp_path, check=False), "none", "p, q, r", "l, n, u")
    prepare("source", "several", "--split-column", "split", "--label-column", "a,b", cwd=tmp_path)
    refused(stage("finetune.py", "--test", "several", *args, cwd=tmp_path, check=False), "several labels")
    refused(stage("finetune.py", "--test", "data", *TINY[2:], cwd=tmp_path, check=False), "--init RUN/model.pt")
    both = ["--test", "data", "--predict", "source"]
    refused(stage("finetune.py", *both, *args, cwd=tmp_path, check=False), "either --predict or --test")
    refused(stage("finetune.py", "--data", "data", "--split", "all", *args, cwd=tmp_path, check=False), "is for --test")
    refused(stage("finetune.py", "--test", "data", *args, "--image-size", "64", cwd=tmp_path, check=False), "32 pixels")
    refused(stage("segment.py", "--test", "data", *args, cwd=tmp_path, check=False), "classifier")
    prepare("source", "padded", "--split", "0", "0", "1", "--fit", "pad", cwd=tmp_path)
    done = stage("finetune.py", "--test", "padded", *args, "--output", "out", cwd=tmp_path)
    assert "is prepared by --fit pad, what the model has seen by --fit squash" in done.stdout
    assert metrics(tmp_path / "out")["counts"]["test"] == 60


def test_external_test_of_several_labels(csv_data, tmp_path):
    stage("finetune.py", "--data", "data", *SHORT, "--output", "run", cwd=tmp_path)
    args = ["--init", "run/model.pt", *TINY[2:]]

    def swap(row):
        row["split"] = "test"
        row["c"], row["b"] = "0", row.pop("b")
        return {name: row[name] for name in row if name != "a"}
    edited(csv_data, tmp_path / "other", swap)
    done = stage("finetune.py", "--test", "other", *args, "--output", "other_run", cwd=tmp_path)
    assert "the model's a is not in other" in done.stdout and "does not know c of other" in done.stdout
    stage("finetune.py", "--test", "data", "--split", "all", *args, "--output", "all", cwd=tmp_path)
    rows, whole = (table(tmp_path / name / "predictions.csv") for name in ("other_run", "all"))
    assert list(rows[0]) == ["image", "group", "label_b", "b"]
    assert [row["b"] for row in rows] == [row["b"] for row in whole] and len(rows) == 60
    area = roc_auc_score([int(row["label_b"]) for row in rows], [float(row["b"]) for row in rows])
    assert metrics(tmp_path / "other_run")["test"]["roc_auc"] == pytest.approx(area, abs=1e-4)


def test_external_test_of_a_segmenter(tmp_path):
    """Classes 1 and 2 of masks are swapped, and a third is unknown: its pixels count nowhere."""
    rng = np.random.default_rng(0)
    masks = np.zeros((24, 32, 32), np.uint8)
    masks[:, 4:14, 4:20], masks[:, 20:28, 8:30] = 1, 2
    images = (np.array([30, 120, 220])[masks] + rng.integers(0, 30, (24, 32, 32))).astype(np.uint8)[..., None]
    rows = [{"image": f"{i}", "split": ("train", "val", "test")[min(i // 8, 2)]} for i in range(24)]
    write_prepared(tmp_path / "data", images, rows, masks, mask_classes=["background", "vessel", "disc"])
    other = np.array([0, 3, 1], np.uint8)[masks]
    other[:, :2] = 2
    rows = [{**row, "split": "test"} for row in rows]
    write_prepared(tmp_path / "other", images, rows, other, mask_classes=["background", "disc", "tool", "vessel"])
    half = np.where(masks == 2, 1, 0).astype(np.uint8)
    write_prepared(tmp_path / "half", images, rows, half, mask_classes=["background", "disc"])
    write_prepared(tmp_path / "alien", images, rows, half, mask_classes=["background", "lesion"])
    stage("segment.py", "--data", "data", *SHORT, "--epochs", "12", "--lr", "3e-3", "--output", "run", cwd=tmp_path)
    args = ["--init", "run/model.pt", *TINY[2:]]
    stage("segment.py", "--test", "data", "--split", "all", *args, "--output", "all", cwd=tmp_path)
    done = stage("segment.py", "--test", "other", *args, "--output", "out", cwd=tmp_path)
    assert "does not know tool of other: its pixels count nowhere" in done.stdout
    whole, out = metrics(tmp_path / "all"), metrics(tmp_path / "out")
    assert out["trained_on"] == "data" and out["counts"]["test"] == 24
    predicted = segment.read_masks(tmp_path / "all" / "test_masks", range(24), 3)
    for k, name in ((1, "vessel"), (2, "disc")):
        hit, either = ((f(predicted == k, masks == k)[:, 2:]).sum((1, 2)) for f in (np.logical_and, np.logical_or))
        assert out["test"]["classes"][name]["iou"] == pytest.approx(np.mean(hit / either), abs=1e-6)
    assert whole["test"]["classes"]["disc"]["iou"] > 0.1
    assert whole["test"]["classes"]["disc"]["iou"] != pytest.approx(whole["test"]["classes"]["vessel"]["iou"], abs=1e-3)
    done = stage("segment.py", "--test", "half", *args, "--output", "part", cwd=tmp_path)
    assert "has no masks of the model's vessel: not scored" in done.stdout
    part = metrics(tmp_path / "part")["test"]
    assert part["iou"] == pytest.approx(whole["test"]["classes"]["disc"]["iou"])
    assert set(part["classes"]) == {"background", "disc"}
    assert list(table(tmp_path / "part" / "predictions.csv")[0])[2:] == [
        f"{what}_disc" for what in ("iou", "dice", "hd95", "pixels", "predicted")]
    refused(stage("segment.py", "--test", "alien", *args, cwd=tmp_path, check=False), "lesion", "vessel, disc", "dataset.json")
