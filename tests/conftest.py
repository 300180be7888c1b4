"""What the tests share: running a stage as a user would, and small image sets to run it on."""
import atexit
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import forks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = ["--image-size", "32", "--device", "cpu", "--amp", "off"]
WITHOUT_MATPLOTLIB = "import sys; sys.modules['matplotlib'] = None"


def start_forks():
    """Start the process whose forks the commands are (forks.py), once."""
    if "FORKS_SOCKET" not in os.environ:
        folder = tempfile.mkdtemp()
        os.environ["FORKS_SOCKET"] = os.path.join(folder, "forks")
        os.environ["FORKS_PYTHON"] = sys.executable
        # no network and no weights, whatever this machine has; the hub's client reads that as it is imported
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": folder, "TORCH_HOME": folder, "https_proxy": "http://127.0.0.1:9"}
        command = [sys.executable, str(ROOT / "tests" / "forks.py"), "--serve", os.environ["FORKS_SOCKET"]]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, **offline})
        atexit.register(server.communicate)  # which closes its stdin, as a kill of the tests would
        assert server.stdout.readline() == "ready\n"


def environments(processes):
    """What torchrun puts into the environment of each of several processes, {} of one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
              "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def forked(command, cwd, processes, first):
    """Run [script, arguments...] as forks of the process that has the packages imported."""
    start_forks()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = forks.ask(command, cwd, environments(processes), out.fileno(), err.fileno(), first)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return subprocess.CompletedProcess(command, code, *texts)


def stage(script, *args, cwd, processes=1, first="", fresh=False, root=ROOT, check=True):
    """Run a script as a command in cwd, after the Python `first` (or with `fresh` in a new interpreter, of several processes
    by torchrun); returns the finished process with its text output."""
    command = [str(root / script), *map(str, args)]
    if fresh:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run([sys.executable, *(launcher if processes > 1 else []), *command], cwd=cwd,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True)
    else:
        done = forked(command, cwd, processes, first)
    if check:
        assert done.returncode == 0, f"{script} {args}\n{done.stdout}\n{done.stderr}"
    return done


def killed(script, *args, cwd, log, lines, text):
    """Start a stage and SIGKILL it once its log.jsonl has `lines` lines and `text` then shows on stderr."""
    start_forks()
    reading, writing = os.pipe()
    command = [str(ROOT / script), *map(str, args)]
    with open(reading, "rb", 0) as stderr, tempfile.TemporaryFile() as out:
        answer = forks.start(command, cwd, [{}], out.fileno(), writing)
        os.close(writing)
        seen = b""
        while text.encode() not in seen or not log.exists() or log.read_text().count("\n") < lines:
            more = stderr.read(1)
            assert more, "it ended before it could be killed"
            seen += more
        os.kill(int(answer.readline()), signal.SIGKILL)
        assert int(answer.readline()) == signal.SIGKILL


def refused(done, *words):
    """The contract of an error: exit code 2, one line on stderr, it starts with error:, has all `words`."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines()
             if line.strip() and not re.search("(preparing|predicting): ", line) and not line.startswith("Downloading: ")]
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


def write_prepared(folder, images, rows, masks=None, **meta):
    """A prepared folder from arrays: images (N, S, S, C) uint8, rows of labels.csv as dicts, masks (N, S, S) uint8; meta
    goes into dataset.json, which is left out without any."""
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)
    if masks is not None:
        np.save(folder / "masks.npy", masks)
    with open(folder / "labels.csv", "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if meta:
        (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


def square_by_pillow(pixels, box, side, resample):
    """The box of common.fit_box out of (H, W) or (H, W, 3) uint8, at (side, side)."""
    top, left, height, width = box
    part = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    return np.asarray(part.resize((side, side), resample))


def prepare(source, output, *args, cwd, **how):
    """Run prepare.py; returns the finished process."""
    return stage("prepare.py", source, "--output", output, "--workers", "0", *args, cwd=cwd, **how)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """source/train/ (24) and source/test/ (13, an odd number) with two classes of striped images; data/ prepared of it, with
    4 images carved for val."""
    place = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (12, 12)), ("test", (6, 7))):
        for label, count in enumerate(counts):
            folder = place / "source" / split / ("upright", "level")[label]
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(rng, label)).save(folder / f"{i}.png")
    prepare("source", "data", "--leakage", "error", cwd=place)
    return place


@pytest.fixture
def folder_source(folders, tmp_path):
    """source/ of the folders, for the test to alter."""
    return shutil.copytree(folders / "source", tmp_path / "source")


@pytest.fixture
def folder_data(folders, folder_source, tmp_path):
    """data/ of the folders, beside their source/."""
    return shutil.copytree(folders / "data", tmp_path / "data")


@pytest.fixture
def csv_source(tmp_path):
    """source/labels.csv with image, label, split, patient, and 0/1 columns a, b; 60 images under source/images/."""
    rng, folder = np.random.default_rng(1), tmp_path / "source"
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


@pytest.fixture
def csv_data(csv_source, tmp_path):
    """csv_source prepared into data/ by its split column, with the labels a and b."""
    prepare("source", "data", "--label-column", "a,b", "--split-column", "split", cwd=tmp_path)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The built-in demo, prepared once; in TESTS_DEMO by whichever half of the tests comes first, the other waits for it."""
    folder = Path(os.environ.get("TESTS_DEMO") or tmp_path_factory.mktemp("demo")) / "demo"
    stage("prepare.py", "demo", "--layout", "demo", "--output", folder, cwd=folder.parent)
    return folder
