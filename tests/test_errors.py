"""Every mistake a user makes gets one clear line, exit code 2, and leaves nothing behind."""
import os
import pickle
import re
import shutil

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, prepare, refused, stage, table

TRAIN = ["--data", "demo", "--arch", "test_vit", "--epochs", "1", "--batch-size", "4", *TINY]
QUICK = [*TRAIN, "--output", "run"]


@pytest.fixture(autouse=True)
def demo_here(demo, tmp_path):
    """demo/ in the test's folder."""
    (tmp_path / "demo").symlink_to(demo)


def finetune(cwd, *args, **options):
    """finetune.py in the quickest setting, expected to refuse."""
    done = stage("finetune.py", *QUICK, *args, cwd=cwd, check=False, **options)
    assert not (cwd / "run").exists(), "a refused command left a run folder behind"
    return done


def test_data_that_is_not_prepared(tmp_path):
    refused(finetune(tmp_path, "--data", "nowhere"), "--data nowhere", "images.npy", "python prepare.py SOURCE")
    (tmp_path / "pictures").mkdir()
    refused(finetune(tmp_path, "--data", "pictures"), "--data pictures", "images.npy")


def damaged(tmp_path, name, change):
    """A copy of the demo in broken/ whose file `name` is change(its text)."""
    shutil.rmtree(tmp_path / "broken", ignore_errors=True)
    shutil.copytree(tmp_path / "demo", tmp_path / "broken")
    text = (tmp_path / "broken" / name).read_bytes()
    (tmp_path / "broken" / name).write_bytes(change(text))


def test_a_damaged_prepared_folder_is_named(tmp_path):
    cases = [("images.npy", lambda t: t[:5000], "damaged"), ("dataset.json", lambda t: t[:20], "damaged"),
             ("labels.csv", lambda t: b"\n".join(t.split(b"\n")[:-5]), "row i must describe image i"),
             ("labels.csv", lambda t: t.replace(b"split", b"part", 1), "no column 'split'"),
             ("labels.csv", lambda t: t.replace(b",train,", b",learn,", 1), "split 'learn' of 0000"),
             ("labels.csv", lambda t: t.replace(b"globular", b"globlar", 1), "label 'globlar' of 0000"),
             ("labels.csv", lambda t: t + b"a,b\n", "cells")]
    for name, change, words in cases:
        damaged(tmp_path, name, change)
        refused(finetune(tmp_path, "--data", "broken"), "broken", words)


def test_labels_that_a_stage_cannot_use(tmp_path):
    damaged(tmp_path, "labels.csv", lambda t: t.replace(b",test,", b",train,"))
    refused(finetune(tmp_path, "--data", "broken"), "no test images", "800 train")
    damaged(tmp_path, "labels.csv", lambda t: t.replace(b",train,", b",,"))
    refused(finetune(tmp_path, "--data", "broken"), "no train images")
    refused(finetune(tmp_path, "--limit", "2", "--batch-size", "2"), "no training image has the label", "--limit")
    damaged(tmp_path, "labels.csv", lambda t: b"\n".join(line.rpartition(b",")[0] for line in t.split(b"\n")[:-1]))
    damaged_json = tmp_path / "broken" / "dataset.json"
    damaged_json.unlink()
    refused(finetune(tmp_path, "--data", "broken"), "no labels", "segment.py")


def test_kappa_of_unordered_classes(tmp_path):
    refused(finetune(tmp_path, "--metric", "quadratic_kappa"), "--metric quadratic_kappa", "--ordinal")


def test_one_class(tmp_path):
    damaged(tmp_path, "labels.csv", lambda t: re.sub(rb"homogeneous|reticular|streaked", b"globular", t))
    (tmp_path / "broken" / "dataset.json").unlink()
    refused(finetune(tmp_path, "--data", "broken"), "one class, globular")


def test_checkpoint_of_another_architecture(tmp_path):
    import common
    torch.save(common.create("test_resnet", 4, 32).state_dict(), tmp_path / "other.pth")
    refused(finetune(tmp_path, "--init", "other.pth"),
            "other.pth", "missing: cls_token", "left over: conv1.0.weight")
    torch.save({"stage": "finetune", "arch": "test_resnet", "state_dict": common.create("test_resnet", 4, 32).state_dict()},
               tmp_path / "model.pt")
    refused(finetune(tmp_path, "--init", "model.pt"), "holds a test_resnet", "--arch")


class Harmful:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def test_a_pickle_cannot_run_code(tmp_path):
    with open(tmp_path / "plain.pt", "wb") as out:
        pickle.dump({"state_dict": Harmful()}, out)
    torch.save({"state_dict": {"weight": Harmful()}}, tmp_path / "zipped.pt")
    for name in ("plain.pt", "zipped.pt"):
        refused(finetune(tmp_path, "--init", name), name, "refused")
    assert not (tmp_path / "harm").exists()
    (tmp_path / "words.pt").write_text("no checkpoint")
    refused(finetune(tmp_path, "--init", "words.pt"), "words.pt")
    refused(finetune(tmp_path, "--init", "imagnet"), "imagnet", "no such file")


def test_output_folder_of_another_run(tmp_path):
    stage("finetune.py", *QUICK, "--limit", "8", cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for change, words in ((["--seed", "1"], "seed 0 there, 1 here"),
                          (["--lr", "0.5"], "lr 0.0001 there, 0.5")):
        done = stage("finetune.py", *QUICK, "--limit", "8", *change, cwd=tmp_path, check=False)
        refused(done, "run", words)
    done = stage("knn_eval.py", "--data", "demo", "--arch", "test_vit", "--output", "run", *TINY, cwd=tmp_path,
                 check=False)
    refused(done, "another run", "of finetune")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    done = stage("finetune.py", *QUICK, "--limit", "8", cwd=tmp_path)
    assert "is complete" in done.stdout and "epoch" not in done.stdout
    (tmp_path / "run" / "mine.txt").write_text("not the run's")
    stage("finetune.py", *QUICK, "--limit", "8", "--seed", "1", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "run" / "mine.txt").exists()
    assert (tmp_path / "run" / "model.pt").read_bytes() != before["model.pt"]


def test_batch_size_does_not_divide(tmp_path):
    done = stage("finetune.py", *QUICK, "--batch-size", "5", processes=2, fresh=True, cwd=tmp_path, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert "--batch-size 5" in errors[0] and "2 processes" in errors[0]
    refused(finetune(tmp_path, "--batch-size", "700"), "--batch-size 700", "600 training images")


def test_full_disk(folder_source, tmp_path):
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    refused(prepare("source", "full", cwd=tmp_path, check=False, first=small), "--output full", "cannot be written")
    assert not (tmp_path / "full").exists() and not (tmp_path / "full.partial").exists()
    (tmp_path / "file").write_text("")
    refused(prepare("source", "file/below", cwd=tmp_path, check=False), "--output file/below", "cannot be written")


def test_the_run_folder_knows_its_data(tmp_path):
    damaged(tmp_path, "labels.csv", lambda t: t)
    train = [*QUICK, "--data", "broken", "--limit", "8"]
    stage("finetune.py", *train, cwd=tmp_path)
    assert "is complete" in stage("finetune.py", *train, cwd=tmp_path).stdout
    (tmp_path / "broken").rename(tmp_path / "elsewhere")  # the same data at another place is the same
    assert "is complete" in stage("finetune.py", *train, "--data", "elsewhere", cwd=tmp_path).stdout
    first = table(tmp_path / "elsewhere" / "labels.csv")[0]
    text = (tmp_path / "elsewhere" / "labels.csv").read_text()
    row = ",".join(first.values())
    (tmp_path / "elsewhere" / "labels.csv").write_text(text.replace(row, row.replace("globular", "streaked"), 1))
    for finished in (True, False):
        done = stage("finetune.py", *train, "--data", "elsewhere", cwd=tmp_path, check=False)
        refused(done, "run holds a run on other data", "--overwrite")
        if finished:
            (tmp_path / "run" / "metrics.json").unlink()  # as if it had been interrupted


def test_two_processes_never_write_one_run_folder(tmp_path):
    stage("finetune.py", *QUICK, "--limit", "8", cwd=tmp_path)
    (tmp_path / "run" / "metrics.json").unlink()
    with filelock.FileLock(tmp_path / "run" / ".lock"):  # as another process holds it
        done = stage("finetune.py", *QUICK, "--limit", "8", cwd=tmp_path, check=False)
        refused(done, "run is being written by another process")
    assert "resuming" in stage("finetune.py", *QUICK, "--limit", "8", cwd=tmp_path).stdout


def test_output_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("")
    refused(stage("finetune.py", *QUICK, cwd=tmp_path, check=False), "--output run", "not a folder")
    refused(stage("finetune.py", *TRAIN, "--output", "run/below", cwd=tmp_path, check=False),
            "run/below", "cannot be written")


@pytest.mark.parametrize("args, words", [
    (["--epochs", "0"], ["--epochs 0", "at least 1"]), (["--lr", "-1"], ["--lr", "negative"]),
    (["--arch", "resnet51"], ["resnet51", "timm has no model"]),
    (["--lerning-rate", "1"], ["--lerning-rate"]), (["--scale", "0.9", "0.5"], ["--scale"]),
    (["--image-size", "40"], ["40", "16-pixel patches", "try"]),
    (["--device", "cuda"], ["--device cuda"]), (["--amp", "fp16"], ["--amp fp16"]),
    (["--dataset", "imagenet"], ["--dataset"]),
    (["--init-key", "student", "--init", "x.pt"], ["x.pt"])])
def test_wrong_arguments(tmp_path, args, words):
    refused(finetune(tmp_path, *args), *words)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = stage("finetune.py", *QUICK, "--lr", "1e30", "--clip-grad", "0",
                 "--schedule", "plateau", "--warmup-steps", "0", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "not finite by step" in line and "run/checkpoint.pt" in line
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_predict_mistakes(tmp_path):
    refused(finetune(tmp_path, "--predict", "new"), "--predict needs --init RUN/model.pt")
    stage("finetune.py", *TRAIN, "--limit", "8", "--output", "trained", cwd=tmp_path)
    known = ["--predict", "new", "--init", "trained/model.pt"]
    done = stage("finetune.py", *known, "--output", "out", *TINY, cwd=tmp_path, check=False)
    refused(done, "--predict new", "neither a folder nor a CSV")
    (tmp_path / "new").mkdir()
    refused(stage("finetune.py", *known, "--output", "out", *TINY, cwd=tmp_path, check=False), "no images")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "new" / "a.png")
    refused(stage("finetune.py", *known, "--output", "trained", *TINY, cwd=tmp_path, check=False),
            "--output trained", "new folder")
    (tmp_path / "new" / "words.png").write_text("this is no image")
    refused(stage("finetune.py", *known, "--output", "out", *TINY, cwd=tmp_path, check=False), "1 of 2 images", "words.png",
            "--skip-broken")
    assert not list(tmp_path.glob(".out*"))
    assert not (tmp_path / "out").exists()
    stage("finetune.py", *known, "--output", "out", "--skip-broken", *TINY, cwd=tmp_path)
    assert [row["image"] for row in table(tmp_path / "out" / "predictions.csv")] == ["a.png"]
