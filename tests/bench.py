"""Images a second of the stages on this machine, data path included, beside a plain fp32 loop in one run.

    python tests/bench.py            # the table of BENCHMARKS.md; some minutes
    python tests/bench.py --quick    # one repetition of each
    python tests/bench.py --stage finetune --json bench.json

Ours and the plain version take turns; the table has medians and the ratio of medians. The plain versions are
what a user would write first: fp32, PyTorch's defaults, PIL and torchvision transforms in the loop.
"""
import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torchvision.transforms.v2 as T
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import finetune  # noqa: E402

MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def photographs(folder, count, size=(300, 400)):
    """`count` JPEG files of smooth noise, as a photograph compresses, and their paths."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        paths.append(str(Path(folder) / f"{i}.jpg"))
        Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def dataset_of(paths, folder, resize=256):
    """These files, cached, as a dataset of four classes whose splits are all the same images."""
    split = common.Split(paths, np.arange(len(paths)) % 4)
    dataset = common.Dataset("bench", "classes", list("abcd"), {"train": split}, mean=MEAN, std=STD)
    args = SimpleNamespace(cache_dir=folder, resize=resize, workers=2, skip_broken=False)
    common.attach_store(dataset, args)
    return dataset


def plain_loader(paths, batch_size, train):
    """A DataLoader over the files with torchvision's transforms in two worker processes."""
    steps = [T.Resize(256), T.CenterCrop(224)] if not train else [
        T.RandomResizedCrop(224, scale=(0.8, 1)), T.RandomHorizontalFlip(), T.RandomVerticalFlip(),
        T.RandomApply([T.ColorJitter(0.2, 0.2, 0.1, 0.1)], 0.8)]
    transform = T.Compose([*steps, T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            return transform(Image.open(paths[i]).convert("RGB")), i % 4

    return torch.utils.data.DataLoader(Files(), batch_size, shuffle=train, num_workers=2)


def plain_model(arch, classes, run):
    """timm's model as a user gets it: default memory layout, PyTorch's fused attention."""
    timm.layers.set_fused_attn(True)
    model = timm.create_model(common.ARCHS[arch], num_classes=classes).to(run.device)
    timm.layers.set_fused_attn(run.device.type != "cpu")
    return model


def bench_finetune(arch, paths, folder, run, batch_size=32):
    """(ours, plain): functions that train one pass over the files and return images a second."""
    args = SimpleNamespace(image_size=224, resize=256, scale=[0.8, 1], jitter=[0.2, 0.2, 0.1, 0.1], seed=0,
                           epochs=1, batch_size=batch_size, lr=1e-4, min_lr=1e-6, warmup_steps=0,
                           schedule="cosine", clip_grad=1.0, freeze=False, output="bench")
    dataset = dataset_of(paths, folder)
    model = common.to_device(common.create(arch, 4, 224), run)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-5, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=False)
    plain = plain_model(arch, 4, run)
    plain_optimizer = torch.optim.Adam(plain.parameters(), 1e-4, weight_decay=1e-5)

    def ours():
        return finetune.train_epoch(model, optimizer, scaler, dataset, args, run, 0, 0)[1]

    def reference():
        begin = time.time()
        plain.train()
        for images, labels in plain_loader(paths, batch_size, True):
            loss = torch.nn.functional.cross_entropy(plain(images.to(run.device)), labels.to(run.device))
            plain_optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            plain_optimizer.step()
        loss.item()
        return len(paths) / (time.time() - begin)

    return ours, reference


def bench_features(arch, paths, folder, run):
    """(ours, plain): functions that extract features of the files and return images a second."""
    args = SimpleNamespace(image_size=224, resize=256, batch_size=64, pool="auto")
    dataset = dataset_of(paths, folder)
    model = common.to_device(common.create(arch, 0, 224), run).eval()
    plain = plain_model(arch, 0, run).eval()

    def ours():
        begin = time.time()
        common.extract(model, dataset, dataset.splits["train"], args, run)
        return len(paths) / (time.time() - begin)

    def reference():
        begin = time.time()
        with torch.no_grad():
            torch.cat([plain(images.to(run.device)).cpu() for images, _ in plain_loader(paths, 64, False)])
        return len(paths) / (time.time() - begin)

    return ours, reference


def bench_loader(folder, run):
    """(ours, plain): reading 48 cached images of 3000x2000 from epoch 2 on, and decoding the PNGs by PIL."""
    rng, paths = np.random.default_rng(0), []
    for i in range(48):
        paths.append(str(Path(folder) / f"large{i}.png"))
        small = Image.fromarray(rng.integers(0, 256, (125, 188, 3), dtype=np.uint8))
        small.resize((3000, 2000), Image.Resampling.BICUBIC).save(paths[-1], compress_level=3)
    dataset = dataset_of(paths, folder)
    batches = common.epoch_order(48, 16, 0, 0)

    def ours():
        begin, count = time.time(), 0
        for _ in range(20):
            for images, _ in common.load_batches(dataset.store, batches, run.device):
                count += len(images)
        return count / (time.time() - begin)

    def reference():
        begin = time.time()
        for path in paths[:12]:
            Image.open(path).convert("RGB").resize((384, 256), Image.Resampling.BILINEAR)
        return 12 / (time.time() - begin)

    return ours, reference


def main():
    """Measure, print the table, keep it as JSON where asked."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--stage", choices=["finetune", "knn_eval", "loader"], help="this stage alone")
    parser.add_argument("--quick", action="store_true", help="one repetition instead of five")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--images", type=int, default=96, help="images a repetition (default 96)")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    run = common.start(SimpleNamespace(device=options.device, amp="auto"))
    print(f"{common.device_name(run.device)}, precision {run.amp}, Python {platform.python_version()}, "
          f"torch {torch.__version__}, timm {timm.__version__}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(folder, options.images)
        cases = [("finetune", f"{arch} training", lambda arch=arch: bench_finetune(arch, paths, folder, run))
                 for arch in ("deit_small", "resnet50")]
        cases += [("knn_eval", f"{arch} features", lambda arch=arch: bench_features(arch, paths, folder, run))
                  for arch in ("deit_small", "resnet50")]
        cases += [("loader", "loader, 3000x2000 PNG, from epoch 2", lambda: bench_loader(folder, run))]
        for stage, name, make in cases:
            if options.stage in (None, stage):
                ours, reference = make()
                ours()  # the first pass compiles kernels and allocates
                speeds = ([], [])
                for _ in range(1 if options.quick else 5):
                    for speed, function in zip(speeds, (ours, reference)):
                        speed.append(function())
                fast, plain = (statistics.median(speed) for speed in speeds)
                rows.append({"case": name, "ours": fast, "plain": plain, "ratio": fast / plain})
                print(f"{name}: {fast:.1f} against {plain:.1f}", flush=True)
    print("\n| images a second | ours | plain fp32 | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['ours']:.1f} | {row['plain']:.1f} | {row['ratio']:.1f} |")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
