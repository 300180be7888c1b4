"""Cross-validation: prepare.py --folds, --fold of every stage, and the report that joins the folds."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score

import common
import prepare as script
import report
from conftest import ROOT, TINY, metrics, picture, prepare, refused, stage, table

VIT = ["--arch", "test_vit", *TINY]
SHORT = [*VIT, "--epochs", "1", "--batch-size", "4", "--lr", "1e-3"]


class Folds:
    """The arguments that deal_folds reads."""
    folds, split_seed = 5, 42


def dealt(labels, splits=None, groups=None, digests=None, folds=5):
    """The folds that prepare.deal_folds gives images of some labels: class names, or a 0/1 matrix."""
    count = len(labels)
    multilabel = not isinstance(labels, list)
    classes = [f"L{k}" for k in range(labels.shape[1])] if multilabel else sorted(set(labels))
    rows = [script.Row(str(i), str(i), labels[i]) for i in range(count)]
    splits = splits or [("train", "train", "val", "test")[i % 4] for i in range(count)]
    script.fill(rows, split=splits, group=groups or [None] * count)
    args = Folds()
    args.folds = folds
    script.deal_folds(script.Source(rows, classes, multilabel=multilabel), digests or [f"d{i}" for i in range(count)], args)
    return [row.fold for row in rows]


def test_folds_hold_every_class_within_val_and_outside_of_it_in_proportion():
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 203, p=[0.6, 0.3, 0.1]).tolist()
    splits = rng.choice(["train", "val", "test"], 203, p=[0.7, 0.15, 0.15]).tolist()
    folds = dealt(labels, splits)
    assert max(Counter(folds).values()) - min(Counter(folds).values()) <= 1 and set(folds) == {0, 1, 2, 3, 4}
    for name in "abc":
        for inside in (True, False):
            counts = [sum(label == name and fold == k and (split == "val") == inside
                          for label, split, fold in zip(labels, splits, folds)) for k in range(5)]
            assert max(counts) - min(counts) <= 2, (name, inside, counts)
    assert folds == dealt(labels, splits)
    small = dealt([f"c{i // 5:02d}" for i in range(100)], ["train", "val"] * 50)
    assert max(Counter(small).values()) == 20  # twenty classes of five images, none of them all in one fold
    assert all(len(set(small[i:i + 5])) >= 4 for i in range(0, 100, 5))


def test_folds_of_several_labels():
    rng = np.random.default_rng(1)
    flags = (rng.random((300, 8)) < np.linspace(0.05, 0.5, 8)).astype(np.uint8)
    folds = np.array(dealt(flags))
    assert np.bincount(folds).tolist() == [60] * 5
    for label in range(8):
        counts = [flags[folds == k, label].sum() for k in range(5)]
        assert max(counts) - min(counts) <= max(3, 0.12 * sum(counts)), counts


def test_groups_and_twins_stay_in_one_fold():
    """Groups p0, p1, ... of 4; image 8 of p2 equals image 40 of p10, so that the two patients stay together."""
    groups = [f"p{i // 4}" for i in range(120)]
    digests = [f"d{i}" for i in range(120)]
    digests[40] = digests[8]
    folds = dealt(["ab"[i // 4 % 2] for i in range(120)], groups=groups, digests=digests)
    assert len(set(zip(groups, folds))) == 30 and folds[8] == folds[40]
    assert max(Counter(folds).values()) <= 28
    blank = dealt(["a", "b"] * 20, ["", *["train", "val", "train"] * 13], folds=4)
    assert blank[0] is None and None not in blank[1:]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """source/; data/, 40 images of two classes in groups of two, with 4 folds; f0 to f3, a run of test_vit on each."""
    place = tmp_path_factory.mktemp("study")
    (place / "source").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        label = i // 2 % 2
        Image.fromarray(picture(rng, label, (32, 32))).save(place / "source" / f"{i:02d}.png")
        rows.append([f"{i:02d}.png", ("upright", "level")[label], f"p{i // 2}"])
    with open(place / "source" / "labels.csv", "w", newline="") as out:
        csv.writer(out).writerows([["image", "label", "patient"], *rows])
    done = prepare("source", "data", "--folds", "4", "--group-column", "patient", cwd=place)
    assert "folds: 10, 10, 10, 10 images in 4 folds" in done.stdout
    for fold in range(4):
        stage("finetune.py", "--data", "data", *SHORT, "--fold", fold, "--output", f"f{fold}", cwd=place)
    return place


@pytest.fixture
def folds(study, tmp_path):
    """The data/ of a study of its own."""
    shutil.copytree(study, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


def test_every_image_is_tested_once_by_a_model_that_has_not_seen_it(folds, tmp_path):
    rows = table(folds / "labels.csv")
    assert list(rows[0]) == ["image", "split", "fold", "group", "height", "width", "label"]
    assert len({(row["group"], row["fold"]) for row in rows}) == 20
    tested = Counter()
    for fold in range(4):
        dataset = common.open_dataset(folds)
        common.choose_fold(dataset, fold)
        parts = [set(part) for part in dataset.rows.values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40
        assert {rows[i]["split"] for i in parts[1]} == {"val"} and {rows[i]["fold"] for i in parts[2]} == {str(fold)}
        assert str(fold) not in {rows[i]["fold"] for i in parts[0] | parts[1]}
        assert {rows[i]["split"] for i in parts[0]} == {"train", "test"}
        for row in table(tmp_path / f"f{fold}" / "predictions.csv"):
            tested[row["image"]] += 1
        assert metrics(tmp_path / f"f{fold}")["counts"] == dataset.counts
    assert len(tested) == 40 and set(tested.values()) == {1}
    counts = metrics(tmp_path / "f0")["counts"]
    dino = ["--batch-size", "8", "--out-dim", "32", "--local-crops", "0", "--epochs", "1"]
    stage("pretrain_dino.py", "--data", "data", *VIT, *dino, "--fold", "0", "--output", "dino", cwd=tmp_path)
    stage("knn_eval.py", "--data", "data", *TINY, "--init", "dino/model.pt", "--fold", "0", "--k", "1", "--output", "knn",
          cwd=tmp_path)
    assert metrics(tmp_path / "dino")["counts"] == metrics(tmp_path / "knn")["counts"] == counts
    stage("attn_distance.py", "--data", "data", *VIT, "--runs", "f1", "--fold", "1", "--output", "reach",
          cwd=tmp_path)
    assert metrics(tmp_path / "reach")["counts"]["test"] == 10


def test_a_model_of_another_fold_is_refused(folds, tmp_path):
    stage("finetune.py", "--data", "data", *SHORT, "--output", "all", cwd=tmp_path)
    for command, words in (
            (["finetune.py", "--fold", "7", *SHORT], "the folds 0, 1, 2, 3"),
            (["finetune.py", "--init", "f0/model.pt", *TINY, "--fold", "1"], "trained on this data with --fold 0"),
            (["knn_eval.py", "--init", "f0/model.pt", *TINY], "trained on this data with --fold 0"),
            (["knn_eval.py", "--init", "all/model.pt", *TINY, "--fold", "1"], "trained on this data without --fold"),
            (["saliency.py", "--runs", "f0", *TINY], "f0 was trained on this data with --fold 0"),
            (["attn_distance.py", "--runs", "f0", *TINY, "--fold", "2"], "f0 was trained on this data with --fold 0"),
            (["finetune.py", *SHORT, "--fold", "1", "--output", "f0"], "fold 0 there, 1 here")):
        refused(stage(*command, "--data", "data", cwd=tmp_path, check=False), words)
    done = stage("finetune.py", "--test", "data", "--init", "f0/model.pt", *TINY, cwd=tmp_path, check=False)
    refused(done, "--fold 0")
    prepare("source", "plain", cwd=tmp_path)
    done = stage("finetune.py", "--data", "plain", *SHORT, "--fold", "0", cwd=tmp_path, check=False)
    refused(done, "has no folds", "--folds 5")
    refused(prepare("source", "one", "--folds", "1", cwd=tmp_path, check=False), "--folds 1")
    done = prepare("source", "none", "--folds", "3", "--split", "1", "0", "0", cwd=tmp_path, check=False)
    refused(done, "--split 0.85 0.15 0")
    refused(prepare("source", "many", "--folds", "50", cwd=tmp_path, check=False), "too few")
    assert not any((tmp_path / name).exists() for name in ("one", "none", "many"))


def test_the_report_joins_the_folds(folds, tmp_path):
    for fold in range(4):
        shutil.copytree(tmp_path / f"f{fold}", tmp_path / "runs" / f"test_vit-f{fold}")
        stage("finetune.py", "--data", "data", *SHORT, "--arch", "test_resnet", "--fold", fold,
              "--output", f"runs/test_resnet-f{fold}", cwd=tmp_path)
    joined, spare = report.join_folds(report.read_runs([tmp_path / "runs"])[0])
    assert not spare and len(joined) == 2
    cells, _ = report.cells(joined)
    every = {}
    for run in joined:
        rows = []
        for fold in range(4):
            rows += table(tmp_path / "runs" / f"{run['arch']}-f{fold}" / "predictions.csv")
        every[run["arch"]] = {row["image"]: row for row in rows}
        truth = [row["label"] == "upright" for row in rows]
        area = common.roc_auc(np.array(truth), np.array([float(row["upright"]) for row in rows]))
        assert run["metric"] == "roc_auc" and run["test"]["roc_auc"] == pytest.approx(area)
        low, high = run["test"]["interval"]
        assert low <= area <= high
        accuracies = [metrics(tmp_path / "runs" / f"{run['arch']}-f{fold}")["test"]["accuracy"] for fold in range(4)]
        assert run["test"]["accuracy"] == pytest.approx(np.mean(accuracies))
        whole = accuracy_score(truth, [row["predicted"] == "upright" for row in rows])
        assert np.mean(accuracies) == pytest.approx(whole)  # folds of one size
        values = [metrics(tmp_path / "runs" / f"{run['arch']}-f{fold}")["test"]["roc_auc"] for fold in range(4)]
        shown = [row for row in report.fold_table(cells) if row["model"] == run["arch"]]
        spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
        assert shown[0]["mean ± standard deviation over folds"] == spread and shown[0]["images"] == 40
    (_, first, second, found), = report.comparisons(cells)
    areas = {run["arch"]: run["test"]["roc_auc"] for run in joined}
    assert (first.arch, second.arch, found[2:]) == ("test_vit", "test_resnet", (1, 40))
    assert found[0] == pytest.approx(areas["test_vit"] - areas["test_resnet"])
    images = sorted(every["test_vit"])
    truth = np.array([every["test_vit"][image]["label"] == "upright" for image in images])
    scores = {arch: np.array([float(rows[image]["upright"]) for image in images]) for arch, rows in every.items()}
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(500):
        rng.integers(1, size=1)  # the seed
        at = rng.integers(40, size=40)
        first, second = (common.roc_auc(truth[at], scores[arch][at]) for arch in ("test_vit", "test_resnet"))
        drawn.append(first - second)
    assert found[1] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))

    (tmp_path / "runs" / "test_vit-f2" / "metrics.json").unlink()
    done = stage("report.py", "runs", "--output", "report", cwd=tmp_path)
    assert "test_vit-f0: left out of the tables: of 4 folds only 0, 1, 3 can be joined" in done.stderr
    assert "Table: cross-validation" in (tmp_path / "report" / "report.html").read_text()
    shown = [row for row in table(tmp_path / "report" / "results.csv") if row["run"].endswith("to f3")]
    assert len(shown) == 1 and float(shown[0]["test"]) == pytest.approx(areas["test_resnet"])


def test_segmentation_and_run_all_by_folds(folds, tmp_path):
    """Masks beside the labels, on two of the images' four groups empty; --compare of one fold and of two."""
    masks = np.zeros((40, 32, 32), np.uint8)
    masks[:, 8:20, 8:20] = 1
    np.save(folds / "masks.npy", masks)
    meta = json.loads((folds / "dataset.json").read_text())
    (folds / "dataset.json").write_text(json.dumps({**meta, "mask_classes": ["background", "lesion"]}))
    for fold in range(4):
        for seed in (0, 1):
            stage("segment.py", "--data", "data", *SHORT, "--fold", fold, "--seed", seed,
                  "--output", f"runs/s{seed}-f{fold}", cwd=tmp_path)
    joined, _ = report.join_folds(report.read_runs([tmp_path / "runs"])[0])
    assert sorted(run["seed"] for run in joined) == [0, 1]
    rows = [row for fold in range(4) for row in table(tmp_path / "runs" / f"s0-f{fold}" / "predictions.csv")]
    assert len({row["image"] for row in rows}) == 40
    assert joined[0]["test"]["iou"] == pytest.approx(np.mean([float(row["iou_lesion"]) for row in rows]), abs=1e-6)
    assert joined[0]["test"]["n"] == joined[0]["test"]["lesions"] == 40
    stage("segment.py", "--compare", "runs/s0-f1", "runs/s1-f1", "--output", "runs/comparison.png", cwd=tmp_path)
    with Image.open(tmp_path / "runs" / "comparison.png") as image:
        assert min(image.size) > 200
    done = stage("segment.py", "--compare", "runs/s0-f1", "runs/s0-f2", "--output", "c.png", cwd=tmp_path, check=False)
    refused(done, "different folds, 1 and 2")
    stage("report.py", "runs", "--output", "report", cwd=tmp_path)
    assert "40 cross-validated images" in (tmp_path / "report" / "report.html").read_text()

    settings = {"DATA": str(folds), "RUNS": str(tmp_path / "study"), "ARCHS": "test_vit", "INITS": "random dino", "SEEDS": "0",
                "DINO_INIT": "random", "CAPACITY": "", "FOLDS": "0 2", "PYTHON": sys.executable, "DRY_RUN": "1"}
    plan = subprocess.run(["bash", str(ROOT / "run_all.sh")], env={**os.environ, **settings}, cwd=tmp_path, text=True,
                          capture_output=True).stdout
    for fold in "02":
        weights = f"study/dino-test_vit-f{fold}/model.pt"
        assert re.search(rf"to do   dino-test_vit-f{fold}: .*--fold {fold} ", plan), plan
        for name in ("finetune", "knn", "segment"):
            assert re.search(rf"to do   {name}-test_vit-dino-s0-f{fold}: .*--fold {fold} .*{weights} .*-f{fold}\n", plan), plan
    assert re.search(r"saliency.py --runs \S+-f0 \S+-f0 .*--fold 0", plan) and "--fold 1" not in plan


def test_a_blank_split_is_seen_by_no_fold(folds, tmp_path):
    lines = (folds / "labels.csv").read_text().splitlines(keepends=True)
    hidden = [line.split(",")[0] for line in lines[1::5]]
    for i in range(1, len(lines), 5):
        name, _, rest = lines[i].split(",", 2)
        lines[i] = f"{name},,{rest}"
    (folds / "labels.csv").write_text("".join(lines))
    for fold in range(4):
        dataset = common.open_dataset(folds)
        common.choose_fold(dataset, fold)
        seen = {dataset.paths[row] for rows in dataset.rows.values() for row in rows}
        assert len(seen) == 32 and not seen & set(hidden)


def test_corrected_labels_hide_no_fold(folds, tmp_path):
    """The folding is that of images, splits and folds alone; and a start of a start counts too."""
    text = (folds / "labels.csv").read_text()
    (folds / "labels.csv").write_text(text.replace("upright", "level", 1))
    known = ["--data", "data", *TINY, "--fold", "1"]
    refused(stage("knn_eval.py", *known, "--init", "f0/model.pt", cwd=tmp_path, check=False), "with --fold 0")
    prepare("source", "elsewhere", cwd=tmp_path)
    stage("finetune.py", "--data", "elsewhere", *SHORT[2:], "--init", "f0/model.pt", "--output", "on", cwd=tmp_path)
    refused(stage("knn_eval.py", *known, "--init", "on", cwd=tmp_path, check=False), "with --fold 0")


def test_a_class_must_train_whatever_is_tested(folds, tmp_path):
    """One image of the class for training, one for val: no fold but the other's could train it."""
    rows = table(tmp_path / "source" / "labels.csv")
    splits = ["train", "val", *["train", "val", "test", "train"] * 10]
    with open(tmp_path / "source" / "labels.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "label", "split"])
        for i, row in enumerate(rows):
            writer.writerow([row["image"], "rare" if i < 2 else row["label"], splits[i]])
    done = prepare("source", "rare", "--folds", "3", "--split-column", "split", cwd=tmp_path, check=False)
    refused(done, "no image is left to train rare")


def test_folds_can_be_sent(folds, tmp_path):
    shutil.copy(folds / "labels.csv", tmp_path / "source" / "theirs.csv")
    columns = ["--split-column", "split", "--fold-column", "fold", "--group-column", "group"]
    prepare("source", "again", "--csv", "source/theirs.csv", *columns, cwd=tmp_path)
    assert (tmp_path / "again" / "labels.csv").read_text() == (folds / "labels.csv").read_text()
    done = prepare("source", "plain", "--csv", "source/theirs.csv", "--split-column", "split", cwd=tmp_path)
    assert "--fold-column fold takes it" in done.stdout


def test_folds_and_the_split_are_never_averaged(folds, tmp_path):
    for fold in range(4):
        stage("knn_eval.py", "--data", "data", *VIT, "--k", "1", "--fold", fold, "--output", f"runs/f{fold}", cwd=tmp_path)
    for seed in (0, 1):
        stage("knn_eval.py", "--data", "data", *VIT, "--k", "1", "--seed", seed, "--output", f"runs/s{seed}", cwd=tmp_path)
    done = stage("report.py", "runs", "--output", "report", cwd=tmp_path)
    assert "left out" not in done.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data, 4 folds: classification" in page and "data: classification" in page and page.count("(n = 2)") == 1
    (tmp_path / "runs" / "f1" / "predictions.csv").unlink()
    done = stage("report.py", "runs", "--output", "report", cwd=tmp_path)
    assert "f0: left out of the tables: a predictions.csv of its folds cannot be read" in done.stderr


def test_models_of_all_folds_are_tested_elsewhere_side_by_side(folds, tmp_path):
    """And a probe is never taken for a fine-tuned model, nor one that was trained otherwise for its twin."""
    prepare("source", "theirs", "--split", "0", "0", "1", cwd=tmp_path)
    for fold in range(2):
        stage("finetune.py", "--data", "data", *SHORT, "--fold", fold, cwd=tmp_path)
        model = f"runs/finetune-data-test_vit-random-s0-f{fold}"
        done = stage("finetune.py", "--test", "theirs", "--init", model, *TINY[2:], cwd=tmp_path)
        assert f"written: runs/finetune-data-on-theirs-test-test_vit-random-s0-f{fold}" in done.stdout
    stage("finetune.py", "--data", "data", *VIT, "--fold", "0", "--freeze", "--output", "probe", cwd=tmp_path)
    stage("finetune.py", "--data", "data", *SHORT, "--lr", "1e-4", "--fold", "0", "--seed", "5", "--output", "other", cwd=tmp_path)
    for name in ("probe", "other"):
        stage("finetune.py", "--test", "theirs", "--init", f"{name}/model.pt", *TINY[2:], "--output", f"runs/{name}", cwd=tmp_path)
    joined, _ = report.join_folds(report.read_runs([tmp_path / "runs"])[0])
    tested = [run for run in joined if run.get("trained_on")]
    cells, spare = report.cells(tested)
    assert {(cell.kind, len(cell.runs)) for cell in cells} == {("finetune", 2), ("probe", 1)}
    assert [(run["folder"].name, "lr of the training 0.0001, not 0.001" in why) for run, why in spare] == [("other", True)]
