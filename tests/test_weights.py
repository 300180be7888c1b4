"""Patches of any size, and weights of any origin: what --patch-size and --init do with the files that people have."""
import math

import pytest
import timm
import torch

import common
from conftest import TINY, metrics, refused, stage

SMALL = ["--data", "demo", "--arch", "test_vit", *TINY]
ONCE = ["--epochs", "1", "--limit", "8"]


@pytest.fixture
def here(demo, tmp_path):
    """A folder with demo/ in it."""
    (tmp_path / "demo").symlink_to(demo)
    return tmp_path


def seeded(name, **options):
    """A timm model in eval mode whose weights are random to the last bias, without a classifier."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=0, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def random_images(side, channels=3):
    """Two images (2, channels, side, side) in [0, 1]."""
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def built(folder, content, arch, image_size, **options):
    """build_model of --arch with --init on a file of this content."""
    torch.save(content, folder / "file.pth")
    return common.build_model(arch, str(folder / "file.pth"), image_size, 0, **options)[0].eval()


@torch.no_grad()
def assert_same(model, reference, side=32):
    """Both give the same features of the same images."""
    images = random_images(side)
    assert (model(images) - reference(images)).abs().max() < 1e-5


# ---------------------------------------------------------------- patches -----------------------------------

def test_the_patch_size_of_a_run_is_that_of_all_that_follows(here):
    """32 pixels in patches of 8 are 4 x 4 tokens, in the model and in every stage that takes its model.pt."""
    small = [*SMALL, "--patch-size", "8"]
    stage("pretrain_dino.py", *small, *ONCE, "--batch-size", "4", "--output", "dino", cwd=here)
    own = ["--data", "demo", "--init", "dino/model.pt", "--device", "cpu", "--amp", "off"]
    stage("finetune.py", *own, *ONCE, "--batch-size", "4", "--output", "tuned", cwd=here)
    stage("segment.py", *own, *ONCE, "--batch-size", "4", "--output", "masks", cwd=here)
    stage("knn_eval.py", *own, "--limit", "8", "--output", "knn", cwd=here)
    stage("attn_distance.py", *small, "--runs", "tuned", "random", "--images", "4", "--output", "reach", cwd=here)
    stage("saliency.py", "--data", "demo", "--runs", "tuned", "--images", "2", "--score-images", "2", "--output", "maps",
          "--device", "cpu", cwd=here)
    for name in ("dino", "tuned", "masks"):
        weights, meta = common.read_checkpoint(here / name / "model.pt")
        assert meta["patch_size"] == 8
        assert weights["patch_embed.proj.weight"].shape[2:] == (8, 8)
        assert weights["pos_embed"].shape[1] == 1 + 4 * 4
    assert metrics(here / "dino")["settings"]["local_size"] == 16  # 3/7 of 32 pixels in patches of 8
    assert [run["patch_size"] for run in metrics(here / "reach")["runs"]] == [8, 8]


def test_patch_embeddings_are_resampled(tmp_path, capsys):
    """Patches of 8 pixels, each enlarged to 16, are to the resampled model what they were to the model of the file."""
    model = seeded("test_vit", img_size=32, patch_size=8)
    large = built(tmp_path, model.state_dict(), "test_vit", 64)
    assert "patches of 8 pixels are resampled to 16" in capsys.readouterr().out
    images = random_images(32)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)
    patches = torch.nn.functional.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    enlarged = patches.view(2, 3, 4, 4, 16, 16).transpose(3, 4).reshape(2, 3, 64, 64)
    with torch.no_grad():
        assert (large(enlarged) - model(images)).abs().max() < 1e-4


@pytest.mark.parametrize("arch, patch, words", [
    ("resnet18", 8, ["--patch-size 8", "resnet18"]), ("test_vit", 5, ["--image-size 32", "5-pixel"]),
    ("test_vit", 0, ["--patch-size 0"]), ("test_vit", 64, ["--image-size 32", "64-pixel"])])
def test_patch_sizes_that_cannot_be(here, arch, patch, words):
    for script in ("finetune.py", "segment.py", "pretrain_dino.py"):
        done = stage(script, *SMALL, *ONCE, "--batch-size", "4", "--arch", arch, "--patch-size", patch, "--output", "run",
                     cwd=here, check=False)
        refused(done, *words)
        assert not (here / "run").exists()


# ---------------------------------------------------------------- image sizes -------------------------------

@pytest.mark.parametrize("arch, there, size, prefix", [
    ("test_vit", 64, 32, 1), ("deit_tiny_distilled_patch16_224", 64, 32, 2),
    ("deit3_small_patch16_224", 64, 32, 0), ("vit_small_patch14_reg4_dinov2", 70, 28, 0), ("flexivit_small", 32, 64, 0),
    ("vit_wee_patch16_reg1_gap_256", 64, 32, 0), ("cait_xxs24_224", 64, 32, 0), ("hiera_tiny_224", 64, 32, 0)])
def test_position_embeddings_of_any_vit_are_resampled(tmp_path, arch, there, size, prefix):
    """`prefix` of its position embeddings belong to no patch and stay; all other tensors are those of the file."""
    weights = seeded(arch, img_size=there).state_dict()
    model = built(tmp_path, weights, arch, size)
    loaded = model.state_dict()
    for name in weights.keys() - {"pos_embed"}:
        assert torch.equal(loaded[name], weights[name]), name
    places = weights["pos_embed"]
    side, side_now = (math.isqrt(p.shape[1] - prefix) for p in (places, loaded["pos_embed"]))
    assert side != side_now
    grid = places[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (side_now, side_now), mode="bicubic", antialias=True)
    expected = torch.cat([places[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)
    assert (loaded["pos_embed"] - expected).abs().max() < 1e-6
    assert model(random_images(size)).isfinite().all()


# ---------------------------------------------------------------- files of others ---------------------------

def test_the_arch_in_a_file_of_others_is_their_name(here):
    """It neither decides --arch, whose default stays deit_small, nor contradicts it."""
    torch.save({"arch": "vit_small", "state_dict": seeded("test_vit", img_size=32).state_dict()}, here / "moco.pth")
    run = ["--data", "demo", "--limit", "8", "--init", "moco.pth", *TINY]
    stage("knn_eval.py", *run, "--arch", "test_vit", "--output", "run", cwd=here)
    assert metrics(here / "run")["arch"] == "test_vit" and metrics(here / "run")["init"] == "moco"
    done = stage("knn_eval.py", *run, "--output", "other", cwd=here, check=False)
    refused(done, "moco.pth does not fit VisionTransformer", "missing: blocks.6", "cls_token (1, 1, 64) for (1, 1, 384)")


# ---------------------------------------------------------------- as commands -------------------------------

def test_xcit_in_every_stage(here):
    """Its attention is over channels, so that it gets Grad-CAM; its patches have their places."""
    run = ["--data", "demo", "--arch", "xcit_nano_12_p16_224", *ONCE, "--batch-size", "4", *TINY]
    stage("finetune.py", *run, "--output", "tuned", cwd=here)
    stage("segment.py", *run, "--init", "tuned/model.pt", "--output", "masks", cwd=here)
    stage("saliency.py", "--data", "demo", "--runs", "tuned", "--images", "2", "--score-images", "2", "--output", "maps",
          "--device", "cpu", cwd=here)
    assert metrics(here / "maps")["runs"][0]["method"] == "gradcam"


def test_models_without_a_map_are_refused(here):
    run = ["--data", "demo", "--arch", "levit_128s", *ONCE, "--batch-size", "4", *TINY]
    refused(stage("segment.py", *run, "--output", "masks", cwd=here, check=False), "no map of its patches")
    stage("finetune.py", *run, "--output", "tuned", cwd=here)
    done = stage("saliency.py", "--data", "demo", "--runs", "tuned", "--output", "maps", "--device", "cpu", cwd=here, check=False)
    refused(done, "no map of its patches")
    assert not (here / "masks").exists() and not (here / "maps").exists()


def test_batch_norm_of_one_image(here):
    run = ["--data", "demo", "--arch", "resnet18", *ONCE, "--batch-size", "1", *TINY]
    refused(stage("finetune.py", *run, "--output", "run", cwd=here, check=False), "--batch-size 1", "resnet18", "at least 2")
    done = stage("pretrain_dino.py", *run, "--local-crops", "1", "--output", "run", cwd=here, check=False)
    refused(done, "--batch-size 1", "resnet18", "--local-crops 2")
    assert not (here / "run").exists()
    stage("finetune.py", *run, "--freeze", "--output", "frozen", cwd=here)


def test_a_whole_model_is_refused_in_plain_letters(here):
    """What torch says of it has a part in bold."""
    torch.save(seeded("test_vit"), here / "whole.pth")
    done = stage("finetune.py", *SMALL, "--init", "whole.pth", "--output", "run", cwd=here, check=False)
    refused(done, "--init whole.pth: refused", "save its state_dict alone")
    assert "\x1b" not in done.stderr
