"""Every mistake a user makes gets one clear line, exit code 2, and leaves nothing behind."""
import os
import pickle
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, picture, refused, stage

QUICK = ["--arch", "test_vit", "--epochs", "1", "--batch-size", "4", "--output", "run", *TINY]


def finetune(cwd, *args, **options):
    """finetune.py in the quickest setting, expected to refuse."""
    done = stage("finetune.py", *QUICK, *args, cwd=cwd, check=False, **options)
    assert not (cwd / "run").exists(), "a refused command left a run folder behind"
    return done


def test_missing_folder(tmp_path):
    refused(finetune(tmp_path, "--dataset", "folder", "--data-dir", "nowhere"), "nowhere", "no such folder")
    refused(finetune(tmp_path, "--dataset", "folder"), "--data-dir")


def test_folder_without_train(tmp_path):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    refused(finetune(tmp_path, "--dataset", "folder", "--data-dir", "data"), "train/", "pictures")


def test_empty_class(folder_data):
    (folder_data / "train" / "vacant").mkdir()
    refused(finetune(folder_data.parent, "--dataset", "folder", "--data-dir", "data"), "vacant", "no images")


def test_label_unseen_in_train(folder_data, csv_data):
    (folder_data / "test" / "rare").mkdir()
    Image.fromarray(picture(np.random.default_rng(0), 2)).save(folder_data / "test" / "rare" / "a.png")
    refused(finetune(folder_data.parent, "--dataset", "folder", "--data-dir", "data"), "rare", "not in train")
    with open(csv_data / "labels.csv", "a") as out:
        out.write("00.png,strange,test,p99,0,0\n")
    refused(finetune(csv_data.parent, "--dataset", "csv", "--data-dir", "data", "--split-column", "split"),
            "strange", "no train image")


def test_undecodable_files_are_all_named(folder_data, tmp_path):
    (folder_data / "train" / "level" / "words.png").write_text("this is no image")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    half = (tmp_path / "whole.jpg").read_bytes()[:20000]
    (folder_data / "test" / "level" / "half.jpg").write_bytes(half)
    (folder_data / "test" / "level" / "link.png").symlink_to("nowhere.png")
    args = ["--dataset", "folder", "--data-dir", "data"]
    refused(finetune(tmp_path, *args), "3 of 40 images", "words.png", "half.jpg", "link.png",
            "--skip-broken")
    done = stage("finetune.py", *QUICK, *args, "--skip-broken", cwd=tmp_path)
    assert "13 test images" in done.stdout and "left out: 3 of 40" in done.stdout


def test_csv_mistakes(csv_data, tmp_path):
    args = ["--dataset", "csv", "--data-dir", "data"]
    refused(finetune(tmp_path, *args, "--label-column", "grade"), "no column 'grade'", "image, label, split")
    refused(finetune(tmp_path, *args, "--split-column", "label"), "none of train, val, test")
    refused(finetune(tmp_path, *args, "--label-column", "a,patient"), "0 or 1", "p0")
    refused(finetune(tmp_path, *args, "--csv", "data/none.csv"), "data/none.csv", "no such CSV")
    text = (csv_data / "labels.csv").read_text()
    (csv_data / "torn.csv").write_text(text)
    refused(finetune(tmp_path, *args, "--csv", "data/torn.csv", "--split-column", "split",
                     "--group-column", "patient"),
            "more than one split", "p1")
    (csv_data / "missing.csv").write_text(text + "gone1.png,u,train,p1,0,0\ngone2.png,u,train,p1,0,0\n")
    refused(finetune(tmp_path, *args, "--csv", "data/missing.csv"), "2 of 62", "gone1.png", "gone2.png")
    (csv_data / "blank.csv").write_text(text + "00.png,,train,p1,0,0\n")
    refused(finetune(tmp_path, *args, "--csv", "data/blank.csv"), "no label", "00.png")


def test_checkpoint_of_another_architecture(tmp_path):
    import common
    torch.save(common.create("test_resnet", 4, 32).state_dict(), tmp_path / "other.pth")
    refused(finetune(tmp_path, "--init", "other.pth"),
            "other.pth", "missing: cls_token", "left over: conv1.0.weight")
    torch.save({"arch": "test_resnet", "state_dict": common.create("test_resnet", 4, 32).state_dict()},
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
    done = stage("knn_eval.py", "--arch", "test_vit", "--output", "run", *TINY, cwd=tmp_path, check=False)
    refused(done, "another run", "of finetune")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    done = stage("finetune.py", *QUICK, "--limit", "8", cwd=tmp_path)
    assert "is complete" in done.stdout and "epoch" not in done.stdout
    (tmp_path / "run" / "mine.txt").write_text("not the run's")
    stage("finetune.py", *QUICK, "--limit", "8", "--seed", "1", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "run" / "mine.txt").exists()
    assert (tmp_path / "run" / "model.pt").read_bytes() != before["model.pt"]


def test_batch_size_does_not_divide(tmp_path):
    done = stage("finetune.py", *QUICK, "--batch-size", "5", processes=2, cwd=tmp_path, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert "--batch-size 5" in errors[0] and "2 processes" in errors[0]
    refused(finetune(tmp_path, "--batch-size", "700"), "--batch-size 700", "600 training images")


def test_full_disk(folder_data, tmp_path):
    args = ["--dataset", "folder", "--data-dir", "data"]
    refused(finetune(tmp_path, *args, "--resize", "2000000"), "--cache-dir cache", "GB are free", "--resize")
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # noqa: E731
    refused(finetune(tmp_path, *args, limit=small), "--cache-dir cache", "cannot be written")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    (tmp_path / "file").write_text("")
    refused(finetune(tmp_path, *args, "--cache-dir", "file"), "--cache-dir file", "cannot be written")


def test_output_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("")
    refused(stage("finetune.py", *QUICK, cwd=tmp_path, check=False), "--output run", "not a folder")
    refused(stage("finetune.py", *QUICK[:-8], "--output", "run/below", *TINY, cwd=tmp_path, check=False),
            "run/below", "cannot be written")


@pytest.mark.parametrize("args, words", [
    (["--epochs", "0"], ["--epochs 0", "at least 1"]), (["--lr", "-1"], ["--lr", "negative"]),
    (["--arch", "resnet51"], ["resnet51", "timm has no model"]),
    (["--lerning-rate", "1"], ["--lerning-rate"]), (["--scale", "0.9", "0.5"], ["--scale"]),
    (["--image-size", "40"], ["40", "16-pixel patches", "try"]),
    (["--device", "cuda"], ["--device cuda"]), (["--amp", "fp16"], ["--amp fp16"]),
    (["--dataset", "imagenet"], ["--dataset", "demo"]),
    (["--init-key", "student", "--init", "x.pt"], ["x.pt"])])
def test_wrong_arguments(tmp_path, args, words):
    refused(finetune(tmp_path, *args), *words)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = stage("finetune.py", *QUICK[:-8], "--output", "run", *TINY, "--lr", "1e30", "--clip-grad", "0",
                 "--schedule", "plateau", "--warmup-steps", "0", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "not finite by step" in line and "run/checkpoint.pt" in line
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_predict_mistakes(tmp_path):
    refused(finetune(tmp_path, "--predict", "new"), "--predict needs --init RUN/model.pt")
    stage("finetune.py", *QUICK[:-8], "--limit", "8", "--output", "trained", *TINY, cwd=tmp_path)
    known = ["--predict", "new", "--init", "trained/model.pt"]
    done = stage("finetune.py", *known, "--output", "out", *TINY, cwd=tmp_path, check=False)
    refused(done, "--predict new", "neither a folder nor a CSV")
    (tmp_path / "new").mkdir()
    refused(stage("finetune.py", *known, "--output", "out", *TINY, cwd=tmp_path, check=False), "no images")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "new" / "a.png")
    refused(stage("finetune.py", *known, "--output", "trained", *TINY, cwd=tmp_path, check=False),
            "--output trained", "new folder")
