"""report.py on hand-made runs, its statistics against numpy; run_all.sh from the first step to the page."""
import html
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import common
import report
from conftest import ROOT, metrics, prepare, refused, stage, start_forks, table


def fake_run(place, stage_name, arch, init, seed, accuracy, split="abc", images=50, arguments=None,
             **changes):
    """A run folder with a metrics.json and predictions.csv whose accuracy is right for round(accuracy *
    images)."""
    folder = place / f"{stage_name}-{arch}-{init}-{seed}-{split}"
    folder.mkdir(parents=True)
    right = round(accuracy * images)
    content = {"stage": stage_name, "dataset": "made", "arch": arch, "init": init, "seed": seed,
               "metric": "accuracy", "val": {"accuracy": accuracy},
               "test": {"accuracy": right / images, "interval": [0, 1], "undefined": []},
               "counts": {"train": 9, "val": 9, "test": images}, "split": split, "image_size": 32,
               "parameters": 10 ** 6, "seconds": 1.0, "epochs": 1, "leakage": {}, **changes}
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "args.json").write_text(json.dumps({
        "command": "made by hand", "versions": {"torch": "0"},
        "arguments": {"epochs": 1, **(arguments or {})}}))
    rows = [f"{i}.png,,a,{'a' if i < right else 'b'},{0.9 if i < right else 0.1},{0.1 if i < right else 0.9}"
            for i in range(images)]
    (folder / "predictions.csv").write_text("image,group,label,predicted,a,b\n" + "\n".join(rows) + "\n")
    return folder


def page(folder):
    """The text of a report.html, with " | " for each tag."""
    text = (folder / "report.html").read_text()
    return " ".join(re.sub(r"(<[^>]*>)+", " | ", html.unescape(text.replace("&lt;", "<"))).split())


def tabulated(place):
    """The cells of all runs of a place; none is left out."""
    found, spare = report.cells(report.read_runs([place])[0])
    assert not spare
    return found


def runs_of(cells):
    """{architecture: runs} of cells, no two of one architecture."""
    runs = {cell.arch: cell.runs for cell in cells}
    assert len(runs) == len(cells)
    return runs


def test_median_and_deviation_equal_numpy(tmp_path):
    scores = [0.62, 0.7, 0.66, 0.9, 0.58]
    for seed, score in enumerate(scores):
        fake_run(tmp_path, "finetune", "deit_small", "random", seed, score)
    row, = report.score_table(tabulated(tmp_path))
    assert row == {"": "deit_small", "random": f"{np.median(scores):.3f} ± {np.std(scores, ddof=1):.3f} (n = 5)"}
    some = [{"metric": "auc", "test": {"auc": value}} for value in (None, 0.5, float("nan"))]
    assert report.summary(some) == (0.5, None, 1)
    assert report.summary(some[:1]) == report.summary([]) == (None, None, 0)


def test_paired_interval_equals_numpy(tmp_path):
    """Without predictions, the interval is that of resampled seeds, here enumerated by numpy."""
    differences = []
    for seed, (vit, cnn) in enumerate(((0.8, 0.6), (0.7, 0.68), (0.9, 0.66))):
        differences.append(vit - cnn)
        for arch, score in (("deit_small", vit), ("resnet50", cnn)):
            (fake_run(tmp_path, "finetune", arch, "random", seed, score) / "predictions.csv").unlink()
    runs = runs_of(tabulated(tmp_path))
    difference, (low, high), seeds, images = report.paired_difference(runs["deit_small"], runs["resnet50"], resamples=4000)
    every = [np.mean([differences[i], differences[j], differences[k]])
             for i in range(3) for j in range(3) for k in range(3)]
    assert (seeds, images) == (3, 0) and difference == pytest.approx(np.mean(differences))
    assert low == pytest.approx(np.percentile(every, 2.5, method="inverted_cdf"), abs=1e-6)
    assert high == pytest.approx(np.percentile(every, 97.5, method="inverted_cdf"), abs=1e-6)


def test_paired_interval_resamples_images(tmp_path):
    """One seed, 40 of 50 against 30 of 50 right, the right ones nested: the standard error of the paired
    difference 0.2 is sqrt(0.2 * 0.8 / 50)."""
    for arch, score in (("deit_small", 0.8), ("resnet50", 0.6)):
        fake_run(tmp_path, "finetune", arch, "random", 0, score)
    runs = runs_of(tabulated(tmp_path))
    difference, (low, high), *_ = report.paired_difference(runs["deit_small"], runs["resnet50"], resamples=2000)
    error = 1.96 * np.sqrt(0.2 * 0.8 / 50)
    assert difference == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - error, abs=0.03) and high == pytest.approx(0.2 + error, abs=0.03)


def test_runs_that_do_not_belong_together_are_kept_apart(tmp_path):
    fake_run(tmp_path, "finetune", "deit_small", "random", 0, 0.8)
    fake_run(tmp_path, "finetune", "deit_small", "random", 1, 0.2, split="other")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "args.json").write_text("{}")
    (tmp_path / "damaged" / "metrics.json").write_text('{"stage": "finet')
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "args.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "comparison.png")
    (tmp_path / "comparison.json").write_text('{"runs": [')
    done = stage("report.py", tmp_path, "--output", "report", cwd=tmp_path)
    text = page(tmp_path / "report")
    assert "0.800 [0.000, 1.000] (n = 1)" in text and "0.200 [0.000, 1.000] (n = 1)" in text
    assert "n = 2" not in text
    assert "do not belong together" in text
    assert ("damaged" in text and "running" in text
            and "incomplete" in done.stderr and "cannot be used" in done.stderr)
    assert "comparison.json cannot be read" in text and (tmp_path / "report" / "figure2.png").exists()


def test_table_1_keeps_settings_of_a_dataset_apart(tmp_path):
    for folder, init, size, score in (("a", "random", 96, 0.5), ("b", "random", 224, 0.9), ("c", "imagenet", 96, 0.6)):
        fake_run(tmp_path / folder, "finetune", "resnet18", init, 0, score, dataset="A", image_size=size)
    fake_run(tmp_path / "d", "finetune", "resnet18", "random", 0, 0.7, dataset="B")
    rows = {row["init"]: row for row in report.table_of_datasets(tabulated(tmp_path))}
    small, large = "A (accuracy, 96 pixels, split abc)", "A (accuracy, 224 pixels, split abc)"
    assert rows["random"].keys() == {"init", "", small, large, "B (accuracy)"}
    assert [rows["random"][name][:5] for name in (small, large, "B (accuracy)")] == ["0.500", "0.900", "0.700"]
    assert rows["imagenet"][small][:5] == "0.600" and rows["imagenet"][large] == rows["imagenet"]["B (accuracy)"] == "missing"


def test_answers_go_as_far_as_the_numbers(tmp_path):
    for seed in range(3):
        fake_run(tmp_path, "finetune", "deit_small", "random", seed, 0.4 + 0.02 * seed)
        fake_run(tmp_path, "finetune", "resnet50", "random", seed, 0.8)
        fake_run(tmp_path, "finetune", "deit_small", "imagenet", seed, 0.8 + 0.02 * (seed - 1))
        fake_run(tmp_path, "finetune", "resnet50", "imagenet", seed, 0.8)
    table = tabulated(tmp_path)
    said = {question: lines[0] for question, lines in report.answers(table, report.comparisons(table)).items()}
    assert "the ViT is worse" in said["Does the ViT lose from scratch?"]
    assert "no difference shown" in said["Is the ViT on par from ImageNet weights, supervised?"]
    assert "3 seeds, 50 test images" in said["Is the ViT on par from ImageNet weights, supervised?"]
    assert "no runs to tell" in said["Is the ViT on par from ImageNet weights, self-supervised?"]
    assert "no runs to tell" in said["And after DINO on the dataset's own images?"]


def test_features_and_statistics_are_told_apart(tmp_path):
    """Of 0.3 gained over random weights, the statistics of the weights give 0.1, the features 0.2."""
    for seed in range(3):
        for init, score in (("random", 0.5), ("imagenet-stats", 0.6), ("imagenet", 0.8)):
            fake_run(tmp_path, "finetune", "resnet50", init, seed, score + 0.02 * seed,
                     arguments={"init_stats": True} if init == "imagenet-stats" else None)
    table = tabulated(tmp_path)
    pairs = [pair for pair in report.comparisons(table) if pair[0] == "statistics"]
    assert [(first.init, second.init, round(found[0], 6)) for _, first, second, found in pairs] == [
        ("imagenet-stats", "random", 0.1), ("imagenet", "imagenet-stats", 0.2)]
    statistics, features = report.answers(table, pairs)["How much of the gain is features, how much statistics?"]
    assert statistics.startswith("resnet50, random to imagenet-stats: it helps (difference +0.100")
    assert features.startswith("resnet50, imagenet-stats to imagenet: it helps (difference +0.200")
    assert "How much of the gain in k-NN is features, how much statistics?" not in report.answers(table, pairs)


def test_page_is_whole_and_mistakes_are_named(tmp_path):
    for arch in ("deit_small", "resnet50"):
        for init, score in (("random", 0.5), ("dino", 0.7)):
            fake_run(tmp_path / "runs", "finetune", arch, init, 0, score,
                     leakage={"test_in_train": 3}, collapse=None)
            fake_run(tmp_path / "runs", "knn_eval", arch, init, 0, score)
    stage("report.py", "runs", cwd=tmp_path)
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    # figures 1 and 3
    assert page.count("data:image/png;base64,") == 2 and page.count("Missing: no run has it.") == 4
    assert "leaking: 3 images test in train" in page and "http" not in page.replace("https://arxiv.org", "")
    assert len(table(tmp_path / "runs" / "report" / "results.csv")) == 8
    for name in ("figure1.png", "figure3.png"):
        with Image.open(tmp_path / "runs" / "report" / name) as image:
            assert len(image.convert("RGB").getcolors(100000)) > 4
    refused(stage("report.py", "nowhere", cwd=tmp_path, check=False), "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(stage("report.py", "empty", cwd=tmp_path, check=False), "no run folders")


def test_a_model_that_says_one_thing_is_not_compared(tmp_path):
    for arch, one_class in (("deit_small", None), ("resnet50", "a")):
        test = {"accuracy": 0.6, "interval": [0.5, 0.7], "undefined": [], "guess": 0.6, "beats_guess": False, "one_class": one_class}
        fake_run(tmp_path, "finetune", arch, "random", 0, 0.6, test=test)
        fake_run(tmp_path, "knn_eval", arch, "random", 0, 0.6, k=20)
    table = tabulated(tmp_path)
    said = report.answers(table, report.comparisons(table))
    assert said["Does the ViT lose from scratch?"] == [
        "deit_small against resnet50, random: cannot be compared: resnet50 from random, seed 0, predicts a for every image"]
    stage("report.py", tmp_path, cwd=tmp_path)
    text = page(tmp_path / "report")
    assert "| always the most frequent class | 0.600 |" in text and "k-NN (k = 20)" in text
    knn = {"accuracy": 0.6, "interval": [0.5, 0.7], "undefined": [], "guess": 0.6, "beats_guess": False, "one_class": None}
    for cell in table:
        for run in cell.runs:
            run["test"] = knn
    said = report.answers(table, report.comparisons(table))["Does the ViT lose from scratch?"]
    assert "no difference shown" in said[0] and "deit_small and resnet50 did not beat always guessing" in said[0]
    assert "predicts a for every test image" in text and "does not beat always guessing the most frequent class" in text


def test_two_datasets_in_one_report(tmp_path):
    """Table 1 has a column a dataset, figure 1 a panel pair, figures 4 to 6 the pictures of both."""
    for dataset in ("skin", "eyes"):
        for arch in ("deit_small", "resnet50"):
            fake_run(tmp_path / dataset, "finetune", arch, "random", 0, 0.5, dataset=dataset, split=dataset)
            fake_run(tmp_path / dataset, "knn_eval", arch, "random", 0, 0.7, dataset=dataset, split=dataset)
        for name in ("saliency", "attn_distance", "layers"):
            folder = fake_run(tmp_path / dataset, name, "deit_small", "random", 0, 0.5, dataset=dataset, runs=[])
            Image.new("RGB", (80, 40), "red").save(folder / f"{name}.png")
    stage("report.py", "skin", "eyes", "--output", "both", cwd=tmp_path)
    stage("report.py", "skin", "--output", "one", cwd=tmp_path)
    text = page(tmp_path / "both")
    assert "skin, eyes: a pretrained ViT, or a CNN?" in text or "eyes, skin: a pretrained ViT, or a CNN?" in text
    assert text.count("test score by start and model on every dataset") == 2
    assert re.search(r"\| (skin|eyes) \(accuracy\) \| (skin|eyes) \(accuracy\) \| random \| resnet50 \| 0.700", text)
    sizes = {}
    for folder in ("both", "one"):
        for k in (1, 4, 5, 6):
            with Image.open(tmp_path / folder / f"figure{k}.png") as image:
                sizes[folder, k] = np.array(image.size)
    assert (sizes["both", 4] == sizes["one", 4] * [2, 1]).all() and (sizes["both", 5] == sizes["one", 5] * [1, 2]).all()
    assert (sizes["both", 6] == sizes["one", 6] * [1, 2]).all()
    assert sizes["both", 1][1] > 1.8 * sizes["one", 1][1]  # four panels, two rows


def test_drawn_images_are_named_at_the_top_of_their_section(tmp_path):
    """Of the demo, before any number; not of other data. Patches are no other recipe of a CNN, which has none."""
    for dataset, drawn in (("demo", True), ("eyes", False)):
        for arch, patch_size in (("resnet18", None), ("deit_tiny", 8)):
            fake_run(tmp_path, "finetune", arch, "random", 0, 0.8, split=dataset, dataset=dataset, drawn=drawn,
                     arguments={"patch_size": patch_size})
    stage("report.py", ".", cwd=tmp_path)
    text = page(tmp_path / "report")
    assert text.count("These images are drawn") == 1 and "patch_size" not in text
    assert text.index("| demo: classification") < text.index("These images are drawn") < text.index("on demo:")


def test_one_seed_without_predictions_tells_nothing(tmp_path):
    for arch, score in (("deit_small", 0.8), ("resnet50", 0.6)):
        (fake_run(tmp_path, "finetune", arch, "random", 0, score) / "predictions.csv").unlink()
    table = tabulated(tmp_path)
    assert report.comparisons(table)[0][3][1:] == (None, 1, 0)
    said = {question: lines[0] for question, lines in report.answers(table, report.comparisons(table)).items()}
    assert "cannot be told (difference +0.200, 1 seed, no interval" in said["Does the ViT lose from scratch?"]


def test_only_runs_made_alike_are_averaged(tmp_path):
    for seed in range(3):
        fake_run(tmp_path, "finetune", "deit_small", "random", seed, 0.8)
    fake_run(tmp_path, "finetune", "deit_small", "random", 3, 0.2, arguments={"epochs": 50})
    fake_run(tmp_path / "again", "finetune", "deit_small", "random", 0, 0.4)
    (tmp_path / "probes").mkdir()
    fake_run(tmp_path / "probes", "finetune", "deit_small", "random", 0, 0.6, freeze=True)
    found, spare = report.cells(report.read_runs([tmp_path])[0])
    assert sorted(why for _, why in spare) == ["another run of seed 0, as finetune-deit_small-random-0-abc",
                                               "made otherwise than the runs of its kind: epochs 50, not 1"]
    assert {(cell.kind, cell.arch, cell.init): len(cell.runs) for cell in found} == {
        ("finetune", "deit_small", "random"): 3, ("probe", "deit_small", "random"): 1}
    stage("report.py", tmp_path, cwd=tmp_path)
    text = page(tmp_path / "report")
    assert "(n = 3)" in text and "epochs 50, not 1" in text and "linear probe" in text


def test_segmentation_is_paired_by_image(tmp_path):
    """The mean IoU of two seeds by numpy, over the very resamples; images without the class do not count."""
    rng, scores = np.random.default_rng(1), {}
    for arch, level in (("deit_tiny", 0.6), ("resnet18", 0.7)):
        for seed in range(2):
            values = rng.random((30, 2)) * 0.2 + level
            values[:3, 1] = np.nan
            mean = np.nanmean(values, 0).mean()
            folder = fake_run(tmp_path, "segment", arch, "random", seed, mean, metric="iou", images=30,
                              test={"iou": mean, "dice": 0.5 + mean / 4, "hd95": None, "constant_iou": 0.25})
            rows = [f"{i}.png,{a},{'' if b != b else b}" for i, (a, b) in enumerate(values)]
            (folder / "predictions.csv").write_text("path,iou_x,iou_y\n" + "\n".join(rows) + "\n")
            scores[arch, seed] = values[np.argsort([f"{i}.png" for i in range(30)])]
    table, draws, expected = tabulated(tmp_path), np.random.default_rng(0), []
    for _ in range(500):
        chosen, rows = draws.integers(2, size=2), draws.integers(30, size=30)
        expected.append(np.mean([np.nanmean(scores["deit_tiny", s][rows], 0).mean()
                                 - np.nanmean(scores["resnet18", s][rows], 0).mean() for s in chosen]))
    (_, first, second, found), = report.comparisons(table)
    assert (first.arch, second.arch, found[2:]) == ("deit_tiny", "resnet18", (2, 30))
    assert found[1] == pytest.approx(np.percentile(expected, [2.5, 97.5]))
    row = [*next(report.segment_table(table)).values()]
    assert row[:2] == ["resnet18", "random"] and row[4:] == ["missing", "0.250 ± 0.000", "-", 2]


def test_several_labels_are_read_from_their_columns(tmp_path):
    rng = np.random.default_rng(0)
    truth, scores = rng.random((40, 2)) > 0.5, rng.random((40, 2)).round(6)
    areas = [common.roc_auc(truth[:, i], scores[:, i]) for i in range(2)]
    folder = fake_run(tmp_path, "finetune", "resnet18", "random", 0, 0.5, metric="roc_auc",
                      test={"roc_auc": float(np.mean(areas)), "roc_auc_by_label": {}})
    head = "image,group,label_No Finding,label_Edema,No Finding,Edema\n"
    rows = [",".join([f"{i:02d}.png", "", *map(str, flags.astype(int)), *map(str, values)])
            for i, (flags, values) in enumerate(zip(truth, scores))]
    (folder / "predictions.csv").write_text(head + "\n".join(rows) + "\n")
    run, = report.read_runs([tmp_path])[0]
    predictions = report.read_predictions(run)
    half = np.arange(20)
    assert len(predictions.paths) == 40 and predictions.score(half) == pytest.approx(np.mean(
        [common.roc_auc(truth[half, i], scores[half, i]) for i in range(2)]))
    (folder / "predictions.csv").write_text(head + "\n".join(rows[:9]))
    assert report.read_predictions(run) is None  # these are not the images of the run's score


def test_every_trouble_is_listed(tmp_path):
    fake_run(tmp_path, "finetune", "resnet18", "random", 0, 0.5, best_epoch=1)
    alone = fake_run(tmp_path, "finetune", "resnet18", "random", 1, 0.5)
    (alone / "args.json").unlink()  # somebody else's run, of which nothing else is known
    fake_run(tmp_path, "finetune", "resnet18", "random", 2, 0.5, test=[])
    fake_run(tmp_path, "knn_eval", "resnet18", "random", 0, 0.5, test={"accuracy": "high"})
    fake_run(tmp_path, "saliency", "resnet18", "random", 0, 0.5, runs=[{"name": "a"}])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "dino-a.failed").write_text("error: no such image\n")
    stage("report.py", tmp_path, cwd=tmp_path)
    text = page(tmp_path / "report")
    for words in ("| dino-a | failed: error: no such image |", "no usable test", "test accuracy is no number",
                  "best at its last epoch", "(n = 2)", "3 complete, 3 failed",
                  "lacks what a table needs (KeyError('images'))"):
        assert words in text, words
    (tmp_path / "file").write_text("")
    refused(stage("report.py", "file", cwd=tmp_path, check=False), "no such folder")
    refused(stage("report.py", ".", "--output", "file/out", cwd=tmp_path, check=False), "cannot be written")


def study(place, **changes):
    """The environment of a run_all.sh as small as it gets, without a network; its Python is one that starts at once."""
    start_forks()
    return {**os.environ, "PYTHON": str(ROOT / "tests" / "forks.py"), "HF_HUB_OFFLINE": "1", "RUNS": str(place / "runs"),
            "ARCHS": "test_resnet test_vit", "CAPACITY": "", "INITS": "random", "SEEDS": "0",
            "IMAGE_SIZE": "32", "EPOCHS": "1", "SEGMENT": "0",
            "DATA": str(place / "demo"), "DATA_FLAGS": "--limit 64", "SALIENCY_FLAGS": "--images 2",
            "ATTENTION_FLAGS": "--images 13", **changes}


def run_all(place, **changes):
    """run_all.sh to its end."""
    return subprocess.run(["bash", str(ROOT / "run_all.sh")], env=study(place, **changes), cwd=place,
                          capture_output=True, text=True)


def test_run_all_goes_on_where_it_stopped(tmp_path, demo):
    (tmp_path / "demo").symlink_to(demo)
    plan = run_all(tmp_path, DRY_RUN="1")
    assert plan.returncode == 0 and plan.stdout.count("to do   ") == 7 and "done" not in plan.stdout
    assert not (tmp_path / "runs").exists()
    first = run_all(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert len(before) == 7 and (tmp_path / "runs" / "report" / "report.html").exists()
    assert metrics(tmp_path / "runs" / "finetune-test_vit-random-s0")["counts"]["train"] == 64
    pairs = metrics(tmp_path / "runs" / "layers")["pairs"]
    assert [pair["start"] for pair in pairs] == ["random test_resnet", "random test_vit"] and all(pair["moved"] for pair in pairs)
    assert "How much of a layer is kept from start to end" in page(tmp_path / "runs" / "report")
    second = run_all(tmp_path)
    assert second.returncode == 0 and second.stdout.count("done    ") == 7 and "starts" not in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")} == before

    (tmp_path / "runs" / "finetune-test_vit-random-s0" / "metrics.json").unlink()
    (tmp_path / "runs" / "finetune-test_vit-random-s0" / "checkpoint.pt").write_bytes(b"damaged")
    third = run_all(tmp_path)
    assert third.returncode == 1 and "FAILED  finetune-test_vit-random-s0: error:" in third.stdout
    assert "checkpoint.pt cannot be read" in third.stdout and "1 steps failed: finetune-test_vit-random-s0" in third.stdout
    assert len(metrics(tmp_path / "runs" / "saliency")["runs"]) == 1  # it does without the failed run
    assert len(metrics(tmp_path / "runs" / "layers")["pairs"]) == 1
    assert "| finetune-test_vit-random-s0 | failed: error:" in page(tmp_path / "runs" / "report")
    plan = run_all(tmp_path, DRY_RUN="1", EPOCHS="2")
    assert plan.stdout.count("to do   finetune") == 2 and plan.stdout.count("done    knn") == 2


def test_flags_of_vits_reach_vits_alone(tmp_path):
    plan = run_all(tmp_path, DRY_RUN="1", INITS="random dino", SEGMENT="1", SEGMENT_INITS="random", VIT_FLAGS="--patch-size 8")
    lines = [line for line in plan.stdout.splitlines() if " --arch " in line]
    assert len(lines) == 12 and all(("--patch-size 8" in line) == ("--arch test_vit" in line) for line in lines)


def test_run_all_takes_several_datasets(tmp_path):
    plan = run_all(tmp_path, DATA="data/skin data/eyes", DRY_RUN="1")
    assert plan.returncode == 0
    for name in ("skin", "eyes"):
        folder = tmp_path / "runs" / name / "finetune-test_vit-random-s0"
        assert f"--data {tmp_path}/data/{name} --limit 64" in plan.stdout and f"--output {folder}" in plan.stdout


def results(place):
    """{run folder: metrics.json without times} of a study."""
    found = {}
    for file in (place / "runs").glob("*/metrics.json"):
        content = json.loads(file.read_text().replace(str(place), "PLACE"))
        found[file.parent.name] = {k: v for k, v in content.items()
                                   if k not in ("seconds", "images_per_second")}
    return found


def interrupted(place, ready, end, **changes):
    """Start run_all.sh as the head of a process group, wait for ready(), call end(process); its output."""
    def hear():  # background tests are deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(["bash", str(ROOT / "run_all.sh")], env=study(place, **changes), cwd=place,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, preexec_fn=hear)
    while not ready():
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"it ended before it could be killed: {process.stdout.read()}")
    end(process)
    process.wait()
    return process.stdout.read() if process.returncode != -signal.SIGKILL else ""


def test_killed_studies_end_with_the_same_results(folder_data, tmp_path):
    """Ctrl-C, the script alone killed while its step lives on, all of it killed; two steps at once, in a folder with a blank;
    beside a study that was left alone, step by step."""
    data = folder_data.rename(tmp_path / "my data")
    changes = {"PYTHON": sys.executable, "DATA": str(data), "ARCHS": "test_resnet", "EPOCHS": "8", "DATA_FLAGS": "",
               "FINETUNE_FLAGS": "--batch-size 4", "JOBS": "2",
               "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}  # sums in the same order
    (tmp_path / "whole").mkdir()
    whole = run_all(tmp_path / "whole", **{**changes, "PYTHON": str(ROOT / "tests" / "forks.py"), "JOBS": "1"})
    assert whole.returncode == 0, whole.stdout + whole.stderr
    place, lines = tmp_path / "killed", 1
    place.mkdir()
    tuned, children = place / "runs" / "finetune-test_resnet-random-s0", []

    def epochs_are_done():
        return (tuned / "log.jsonl").exists() and (tuned / "log.jsonl").read_text().count("\n") >= lines
    output = interrupted(place, epochs_are_done, lambda p: os.killpg(p.pid, signal.SIGINT), **changes)
    assert "interrupted; the same command goes on from here" in output and not (tuned / "metrics.json").exists()
    assert subprocess.run(["pgrep", "-f", str(place)]).returncode == 1  # nothing of it runs on
    assert "\ninterrupted; the same command goes on" in (place / "runs" / "logs" / "finetune-test_resnet-random-s0.log").read_text()

    def kill_the_script_alone(process):
        own = ["pgrep", "-f", "-P", str(process.pid), "finetune.py"]
        children.append(int(subprocess.run(own, capture_output=True, text=True).stdout))
        os.kill(children[0], signal.SIGSTOP)
        process.kill()
    lines = 1 + (tuned / "log.jsonl").read_text().count("\n")
    interrupted(place, epochs_are_done, kill_the_script_alone, **changes)
    beside = run_all(place, **changes)
    assert beside.returncode == 1 and "is being written by another process" in beside.stdout, beside.stdout
    os.kill(children[0], signal.SIGKILL)

    interrupted(place, (place / "runs" / "logs" / "saliency.log").exists,
                lambda p: os.killpg(p.pid, signal.SIGKILL), **changes)
    made = (tuned / "metrics.json").stat().st_mtime_ns
    last = run_all(place, **changes)
    assert last.returncode == 0 and last.stdout.count("starts") == 2, last.stdout + last.stderr  # saliency, layers
    assert (tuned / "metrics.json").stat().st_mtime_ns == made
    assert results(place) == results(tmp_path / "whole") and len(results(place)) == 4


def test_steps_at_once(tmp_path, folder_data):
    """JOBS: what is pretrained is awaited by those that start from it, and by no others; what is named twice is done once.
    (That the results are those of one step at a time is tested above.)"""
    done = run_all(tmp_path, JOBS="3", DATA=str(folder_data), DATA_FLAGS="", ATTENTION_FLAGS="", INITS="random dino", DINO_EPOCHS="1",
                   DINO_INIT="random", DINO_FLAGS="--batch-size 4 --out-dim 64 --local-crops 1", FINETUNE_FLAGS="--batch-size 4",
                   CAPACITY="test_resnet")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [tuple(line.split()[:2]) for line in done.stdout.splitlines() if line.startswith(("starts ", "done "))]
    assert [what for what, _ in said][:4] == ["starts", "starts", "starts", "done"]
    names = [name for what, name in said if what == "starts"]
    assert len(names) == len(set(names)) == len(results(tmp_path)) == 13 and set(said) == {
        (what, name) for what in ("starts", "done") for name in names}
    for arch in ("test_resnet", "test_vit"):
        pretrained = said.index(("done", f"dino-{arch}"))
        assert all(pretrained < said.index(("starts", f"{stage}-{arch}-dino-s0")) for stage in ("finetune", "knn"))
    assert said.index(("starts", "finetune-test_resnet-random-s0")) < said.index(("done", "dino-test_vit"))
    assert max(said.index(("done", name)) for name in names if "-s0" in name) < min(
        said.index(("starts", name)) for name in ("saliency", "attn_distance", "layers"))


@pytest.mark.parametrize("changes, words", [
    ({"SEEDS": ""}, ["SEEDS is empty"]), ({"JOBS": "two"}, ["JOBS=two: give how many"]),
    ({"JOBS": "2", "LAUNCH": "torchrun"}, ["JOBS=2: with LAUNCH=", "one step runs at a time"]),
    ({"DATA": "gone"}, ["gone is no prepared folder", "python prepare.py SOURCE --output"]),
    ({"DATA": "new", "SOURCE": "gone"}, ["new is no prepared folder"]), ({"PYTHON": "python999"}, ["PYTHON=python999"]),
    ({"RUNS": "file/runs"}, ["file/runs cannot be written"])])
def test_mistakes_are_named_before_anything_runs(tmp_path, demo, changes, words):
    (tmp_path / "file").write_text("")
    done = run_all(tmp_path, **{"DATA": str(demo), **changes})
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if "command not found" not in line)
    refused(done, *words)
    assert "SOURCE" not in changes or "FAILED  prepare: error: SOURCE" in done.stdout
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize("changes, words", [({"INITS": "moco"}, "--init moco: no such file"),
                                            ({"ARCHS": "resnet999"}, "--arch resnet999"),
                                            ({"INITS": "random moco", "JOBS": "2"}, "--init moco: no such file"),
                                            ({"SEEDS": "0,1"}, "--seed: invalid int value: '0,1'")])
def test_a_step_that_cannot_be_done_fails_with_its_line(tmp_path, demo, changes, words):
    done = run_all(tmp_path, **{"DATA": str(demo), "ARCHS": "test_vit", **changes})
    assert done.returncode == 1 and words in done.stdout and "steps failed: finetune-" in done.stdout


def test_runs_on_corrected_labels_are_never_averaged(csv_source, tmp_path):
    """The same split, one training label corrected: another fingerprint, another table."""
    args = ["--arch", "test_vit", "--k", "1", "--image-size", "32", "--device", "cpu", "--amp", "off"]
    prepare("source", "old", "--split-column", "split", cwd=tmp_path)
    stage("knn_eval.py", "--data", "old", *args, "--output", "runs/a", cwd=tmp_path)
    text = (csv_source / "labels.csv").read_text()
    (csv_source / "labels.csv").write_text(text.replace("00.png,u,train", "00.png,l,train"))
    prepare("source", "new/old", "--split-column", "split", cwd=tmp_path)
    stage("knn_eval.py", "--data", "new/old", *args, "--seed", "1", "--output", "runs/b", cwd=tmp_path)
    assert metrics(tmp_path / "runs" / "a")["dataset"] == metrics(tmp_path / "runs" / "b")["dataset"]
    stage("report.py", "runs", cwd=tmp_path)
    text = page(tmp_path / "runs" / "report")
    assert "Runs that do not belong together" in text and "n = 2" not in text


def test_run_all_prepares_its_source_first(csv_source, tmp_path):
    changes = {"DATA": "mine", "SOURCE": str(csv_source), "PREPARE_FLAGS": "--split-column split --label-column a,b",
               "ARCHS": "test_vit", "DATA_FLAGS": "", "INITS": "dino", "DINO_INIT": "random", "DINO_EPOCHS": "1",
               "CLASSIFY": "0", "DINO_FLAGS": "--batch-size 8 --out-dim 64 --local-crops 1"}
    plan = run_all(tmp_path, **changes, DRY_RUN="1")
    assert plan.returncode == 0 and "to do   prepare: " in plan.stdout and not (tmp_path / "mine").exists()
    done = run_all(tmp_path, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(tmp_path / "runs" / "dino-test_vit")["dataset"] == "mine"
    assert "done    prepare in" in done.stdout and "done    prepare" not in run_all(tmp_path, **changes).stdout
