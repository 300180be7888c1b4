"""Patches of any size, and weights of any origin: what --patch-size and --init do with the files that people have."""
import timm
import torch

import common
from conftest import TINY, metrics, refused, stage

SMALL = ["--data", "demo", "--arch", "test_vit", *TINY]
ONCE = ["--epochs", "1", "--limit", "8"]


def seeded(name, **options):
    """A timm model of random weights, none of them 0 or 1 as biases and norms begin, in eval mode."""
    torch.manual_seed(7)
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def test_the_patch_size_of_a_run_is_that_of_all_that_follows(demo, tmp_path):
    """32 pixels in patches of 8 are 4 x 4 tokens, in the model and in every stage that takes its model.pt."""
    (tmp_path / "demo").symlink_to(demo)
    small = [*SMALL, "--patch-size", "8"]
    stage("pretrain_dino.py", *small, *ONCE, "--batch-size", "4", "--output", "dino", cwd=tmp_path)
    own = ["--data", "demo", "--init", "dino/model.pt", "--device", "cpu", "--amp", "off"]
    stage("finetune.py", *own, *ONCE, "--batch-size", "4", "--output", "tuned", cwd=tmp_path)
    stage("segment.py", *own, *ONCE, "--batch-size", "4", "--output", "masks", cwd=tmp_path)
    stage("knn_eval.py", *own, "--limit", "8", "--output", "knn", cwd=tmp_path)
    stage("attn_distance.py", "--data", "demo", "--runs", "tuned", "random", "--images", "4", "--output", "reach", *TINY,
          "--arch", "test_vit", "--patch-size", "8", cwd=tmp_path)
    stage("saliency.py", "--data", "demo", "--runs", "tuned", "--images", "2", "--score-images", "2", "--output", "maps",
          "--device", "cpu", cwd=tmp_path)
    for name in ("dino", "tuned", "masks"):
        weights, meta = common.read_checkpoint(tmp_path / name / "model.pt")
        assert meta["patch_size"] == 8
        assert weights["patch_embed.proj.weight"].shape[2:] == (8, 8)
        assert weights["pos_embed"].shape[1] == 1 + 4 * 4
    assert metrics(tmp_path / "dino")["settings"]["local_size"] == 16  # 3/7 of 32 pixels in patches of 8
    assert [run["patch_size"] for run in metrics(tmp_path / "reach")["runs"]] == [8, 8]


def test_patch_embeddings_are_resampled(tmp_path, capsys):
    """Patches of 8 pixels, each enlarged to 16, are to the resampled model what they were to the model of the file."""
    model = seeded("test_vit", img_size=32, patch_size=8, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    large, _ = common.build_model("test_vit", str(tmp_path / "file.pth"), 64, 0)
    assert "patches of 8 pixels are resampled to 16" in capsys.readouterr().out
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)
    patches = torch.nn.functional.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    enlarged = patches.view(2, 3, 4, 4, 16, 16).transpose(3, 4).reshape(2, 3, 64, 64)
    with torch.no_grad():
        assert (large.eval()(enlarged) - model(images)).abs().max() < 1e-4


def test_patch_sizes_that_cannot_be(demo, tmp_path):
    (tmp_path / "demo").symlink_to(demo)
    for arch, patch, words in (("resnet18", 8, ["--patch-size 8", "resnet18"]), ("test_vit", 5, ["--image-size 32", "5-pixel"]),
                               ("test_vit", 0, ["--patch-size 0"]), ("test_vit", 64, ["--image-size 32", "64-pixel"])):
        for script in ("finetune.py", "segment.py", "pretrain_dino.py"):
            done = stage(script, *SMALL, *ONCE, "--batch-size", "4", "--arch", arch, "--patch-size", patch, "--output", "run",
                         cwd=tmp_path, check=False)
            refused(done, *words)
            assert not (tmp_path / "run").exists()
