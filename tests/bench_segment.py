"""Images a second of segment.py's training step beside plain fp32 torchvision DeepLabv3-ResNet50, in one run.

    python tests/bench_segment.py [--image-size 224] [--batch-size 8] [--rounds 3]
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import segment  # noqa: E402


def step_of(model, batch, run):
    """A function that trains one step of model, in run's precision, on the batch (images, targets)."""
    images, targets = batch
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=run.device.type in ("cpu", "cuda"))
    model.train()

    def step():
        if hasattr(model, "dropout"):
            model.dropout.seeds = list(range(len(images)))
        with run.autocast():
            logits = model(images)
        logits = logits["out"] if isinstance(logits, dict) else segment.upsample(logits, targets.shape[1:])
        loss = segment.loss_function(logits, targets, "ce+dice").mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device
    return step


def bench_segment(side=224, batch_size=8, rounds=3):
    """Print images a second, the best of interleaved rounds: other load then hits all alike. Returns them by
    name."""
    options = argparse.Namespace(device="auto", amp="auto", init="random", init_key=None, seed=0,
                                 image_size=side, output_stride=8)
    fast = common.start(options)
    plain = common.Run(0, 1, fast.device, "off")
    batch = (torch.rand(batch_size, 3, side, side, device=fast.device),
             torch.randint(0, 2, (batch_size, side, side), device=fast.device))
    steps = {}
    for arch in ("resnet50", "deit_small"):
        options.arch = arch
        model = common.to_device(segment.build_segmenter(options, 2)[0], fast)
        steps[f"{arch}, {fast.amp}"] = step_of(model, batch, fast)
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None,
                                                               num_classes=2)
    steps["torchvision resnet50, fp32"] = step_of(model.to(fast.device), batch, plain)
    best = {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number:  # the first is the warm-up
                best[name] = max(best.get(name, 0), batch_size / (time.perf_counter() - begin))
    base = best["torchvision resnet50, fp32"]
    common.print_table([f"training at {side}", "images/s", "times plain"],
                       [[name, f"{speed:.2f}", f"{speed / base:.2f}"] for name, speed in best.items()])
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in (("--image-size", 224), ("--batch-size", 8), ("--rounds", 3)):
        parser.add_argument(flag, type=int, default=value)
    args = parser.parse_args()
    bench_segment(args.image_size, args.batch_size, args.rounds)
