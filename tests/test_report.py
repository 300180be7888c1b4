"""report.py on hand-made runs, its statistics against numpy; run_all.sh from the first step to the page."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import report
from conftest import ROOT, metrics, refused, stage, table


def fake_run(place, stage_name, arch, init, seed, accuracy, split="abc", images=50, **changes):
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
    (folder / "args.json").write_text(json.dumps({"command": "made by hand", "versions": {"torch": "0"}}))
    rows = [f"{i}.png,a,{'a' if i < right else 'b'},{0.9 if i < right else 0.1},{0.1 if i < right else 0.9}"
            for i in range(images)]
    (folder / "predictions.csv").write_text("path,label,predicted,a,b\n" + "\n".join(rows) + "\n")
    return folder


def test_median_and_deviation_equal_numpy(tmp_path):
    scores = [0.62, 0.7, 0.66, 0.9, 0.58]
    for seed, score in enumerate(scores):
        fake_run(tmp_path, "finetune", "deit_small", "random", seed, score)
    runs, _ = report.read_runs([tmp_path])
    head, ((arch, cell),) = report.score_table(report.cells(runs), "finetune")
    assert (head, arch) == (["", "random"], "deit_small")
    assert cell == f"{np.median(scores):.3f} ± {np.std(scores, ddof=1):.3f} (n = 5)"
    assert report.summary([None, 0.5]) == (0.5, None, 1) and report.summary([None]) == (None, None, 0)


def test_paired_interval_equals_numpy(tmp_path):
    """Without predictions, the interval is that of resampled seeds, here enumerated by numpy."""
    differences = []
    for seed, (vit, cnn) in enumerate(((0.8, 0.6), (0.7, 0.68), (0.9, 0.66))):
        differences.append(vit - cnn)
        for arch, score in (("deit_small", vit), ("resnet50", cnn)):
            (fake_run(tmp_path, "finetune", arch, "random", seed, score) / "predictions.csv").unlink()
    found = report.cells(report.read_runs([tmp_path])[0])
    vit, cnn = (found["finetune", arch, "random"] for arch in ("deit_small", "resnet50"))
    difference, (low, high), seeds = report.paired_difference(vit, cnn, resamples=4000)
    every = [np.mean([differences[i], differences[j], differences[k]])
             for i in range(3) for j in range(3) for k in range(3)]
    assert seeds == 3 and difference == pytest.approx(np.mean(differences))
    assert low == pytest.approx(np.percentile(every, 2.5, method="inverted_cdf"), abs=1e-6)
    assert high == pytest.approx(np.percentile(every, 97.5, method="inverted_cdf"), abs=1e-6)


def test_paired_interval_resamples_images(tmp_path):
    """One seed, 40 of 50 against 30 of 50 right, the right ones nested: the standard error of the paired
    difference 0.2 is sqrt(0.2 * 0.8 / 50)."""
    for arch, score in (("deit_small", 0.8), ("resnet50", 0.6)):
        fake_run(tmp_path, "finetune", arch, "random", 0, score)
    found = report.cells(report.read_runs([tmp_path])[0])
    difference, (low, high), _ = report.paired_difference(
        *(found["finetune", arch, "random"] for arch in ("deit_small", "resnet50")), resamples=2000)
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
    done = stage("report.py", tmp_path, "--output", "report", cwd=tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "0.800 (n = 1)" in text and "0.200 (n = 1)" in text and "n = 2" not in text
    assert "do not belong together" in text
    assert ("damaged" in text and "running" in text
            and "incomplete" in done.stderr and "cannot be used" in done.stderr)


def test_answers_go_as_far_as_the_numbers(tmp_path):
    for seed in range(3):
        fake_run(tmp_path, "finetune", "deit_small", "random", seed, 0.4 + 0.02 * seed)
        fake_run(tmp_path, "finetune", "resnet50", "random", seed, 0.8)
        fake_run(tmp_path, "finetune", "deit_small", "imagenet", seed, 0.8 + 0.02 * (seed - 1))
        fake_run(tmp_path, "finetune", "resnet50", "imagenet", seed, 0.8)
    said = dict(report.answers(report.cells(report.read_runs([tmp_path])[0])))
    assert "the ViT is worse" in said["Does the ViT lose from scratch?"]
    assert "no difference shown" in said["Is the ViT on par from ImageNet weights?"]
    assert "3 seeds" in said["Is the ViT on par from ImageNet weights?"]
    assert "no runs to tell" in said["And after DINO on the dataset's own images?"]


def test_page_is_whole_and_mistakes_are_named(tmp_path):
    for arch in ("deit_small", "resnet50"):
        for init, score in (("random", 0.5), ("dino", 0.7)):
            fake_run(tmp_path / "runs", "finetune", arch, init, 0, score,
                     leakage={"test_in_train": 3}, collapse=None)
            fake_run(tmp_path / "runs", "knn_eval", arch, init, 0, score)
    stage("report.py", "runs", cwd=tmp_path)
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    # figures 1 and 3
    assert page.count("data:image/png;base64,") == 2 and page.count("Missing: no run has it.") == 3
    assert "leakage: 3 images test in train" in page and "http" not in page.replace("https://arxiv.org", "")
    assert len(table(tmp_path / "runs" / "report" / "results.csv")) == 8
    for name in ("figure1.png", "figure3.png"):
        with Image.open(tmp_path / "runs" / "report" / name) as image:
            assert len(image.convert("RGB").getcolors(100000)) > 4
    refused(stage("report.py", "nowhere", cwd=tmp_path, check=False), "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(stage("report.py", "empty", cwd=tmp_path, check=False), "no run folders")


def test_run_all_goes_on_where_it_stopped(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "RUNS": str(tmp_path / "runs"),
           "ARCHS": "test_resnet test_vit", "CAPACITY": "", "INITS": "random", "IMAGE_SIZE": "32",
           "EPOCHS": "1", "SEGMENT": "0", "DATA_FLAGS": f"--limit 64 --cache-dir {tmp_path}/cache",
           "SALIENCY_FLAGS": "--images 2", "ATTENTION_FLAGS": "--images 16"}

    def run_all(**changes):
        return subprocess.run(["bash", str(ROOT / "run_all.sh")], env={**env, **changes}, capture_output=True,
                              text=True)
    plan = run_all(DRY_RUN="1")
    assert plan.returncode == 0 and "6 steps, remaining unknown" in plan.stdout and "done" not in plan.stdout
    assert not (tmp_path / "runs").exists()
    first = run_all()
    assert first.returncode == 0, first.stdout + first.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert len(before) == 6 and (tmp_path / "runs" / "report" / "report.html").exists()
    assert metrics(tmp_path / "runs" / "finetune-test_vit-random-s0")["counts"]["train"] == 64
    second = run_all()
    assert second.returncode == 0 and second.stdout.count(": complete") == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")} == before
    assert "remaining about 0:00:00" in run_all(DRY_RUN="1").stdout

    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys\nlock = open(sys.argv[1], 'a')\n"
                               "fcntl.flock(lock, fcntl.LOCK_EX)\n"
                               "print('held', flush=True)\nsys.stdin.read()",
                               str(tmp_path / "runs" / ".lock")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    third = run_all()
    holder.communicate()
    assert third.returncode == 2 and "is in use by process" in third.stderr

    (tmp_path / "runs" / "finetune-test_vit-random-s0" / "metrics.json").unlink()
    (tmp_path / "runs" / "finetune-test_vit-random-s0" / "checkpoint.pt").write_bytes(b"damaged")
    fourth = run_all()
    assert fourth.returncode == 1 and "finetune-test_vit-random-s0: exit code 2" in fourth.stdout
    assert "checkpoint.pt cannot be read" in fourth.stdout and fourth.stdout.count(": complete") == 5
