"""What the tests share: running a stage as a user would, and small image sets to run it on."""
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = ["--image-size", "32", "--device", "cpu", "--amp", "off", "--workers", "2"]


def stage(script, *args, cwd, processes=1, env=None, root=ROOT, check=True, limit=None):
    """Run a script as a command in cwd; returns the finished process with its text output."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*command, str(root / script), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}, preexec_fn=limit)
    if check:
        assert done.returncode == 0, f"{script} {args}\n{done.stdout}\n{done.stderr}"
    return done


def killed(script, *args, cwd, log, lines, text):
    """Start a stage and SIGKILL it once its log.jsonl has `lines` lines and `text` then shows on stderr."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
    seen = b""
    while text.encode() not in seen or not log.exists() or log.read_text().count("\n") < lines:
        seen += process.stderr.read(1)
        assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def refused(done, *words):
    """The contract of an error: exit code 2, one line on stderr that starts with error:, all `words` in it."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "caching: " not in line]
    assert done.returncode == 2, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


def metrics(folder):
    """The metrics.json of a run folder."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def table(file):
    """A CSV file as a list of dicts."""
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def picture(rng, label, size=(40, 48)):
    """A grey image whose stripes are upright for label 0, level for 1, absent for 2."""
    y, x = np.mgrid[:size[0], :size[1]]
    wave = [np.sin(x * 1.2), np.sin(y * 1.2), np.zeros(size)][label]
    return (128 + 60 * wave + rng.normal(0, 15, size)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder_data(tmp_path):
    """train/ (24) and test/ (13, an odd number) with two classes of striped images."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", (12, 12)), ("test", (6, 7))):
        for label, count in enumerate(counts):
            folder = tmp_path / "data" / split / ("upright", "level")[label]
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(rng, label)).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def csv_data(tmp_path):
    """labels.csv with image, label, split, patient, and 0/1 columns a, b; 60 images under images/."""
    rng, folder = np.random.default_rng(1), tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(60):
        label = i % 3
        Image.fromarray(picture(rng, label)).save(folder / "images" / f"{i:02d}.png")
        rows.append([f"{i:02d}.png", ("u", "l", "n")[label], ("train", "train", "val", "test")[i // 3 % 4],
                     f"p{i // 6}", int(label == 0), int(label == 1)])
    with open(folder / "labels.csv", "w", newline="") as out:
        csv.writer(out).writerows([["image", "label", "split", "patient", "a", "b"], *rows])
    return folder
