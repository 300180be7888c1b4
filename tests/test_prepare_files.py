"""Image files and masks: what prepare.py and --predict make of every kind, by value."""
import json
import os

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

import common
import prepare as script
from conftest import TINY, prepare, refused, square_by_pillow, stage, table

RNG = np.random.default_rng(0)


def noise(size=(24, 24), channels=()):
    """Random pixels, uint8."""
    return RNG.integers(0, 256, (*size, *channels), dtype=np.uint8)


def save(path, pixels, **options):
    """An image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def read(path, side=None):
    """The pixels alone of script.read_image."""
    return script.read_image(path, side)[0]


def names_of(folder):
    """The images of a prepared folder."""
    return {row["image"] for row in table(folder / "labels.csv")}


# ---------------------------------------------------------------- depth, modes, sizes -----------------------

def test_16_bit_greys_keep_their_range(tmp_path):
    ramp = np.linspace(1000, 60000, 64 * 64).reshape(64, 64)
    for name, values in (("a.png", ramp.astype(np.uint16)), ("b.tif", ramp.astype(np.float32)),
                         ("c.tif", ramp.astype(np.int32)), ("d.tif", ramp.astype(np.uint16))):
        Image.fromarray(values).save(tmp_path / name)
        pixels = read(tmp_path / name)
        assert pixels.shape == (64, 64, 1) and pixels.dtype == np.uint8
        assert np.abs(pixels[..., 0] - np.linspace(0, 255, 64 * 64).reshape(64, 64)).max() <= 0.51, name
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "flat.png")
    assert (read(tmp_path / "flat.png") == 0).all()


def write_png16(path, pixels):
    """A PNG of (H, W, C) uint16, which Pillow does not write."""
    import struct
    import zlib
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bit_colours_keep_their_range(tmp_path):
    """Values of 0 to 4000 of 65535 would be black at 8 bits; they are scaled over their own range, all channels alike."""
    values = RNG.integers(0, 4001, (20, 30, 3))
    values[0, 0] = 0, 4000, 2000
    write_png16(tmp_path / "deep.png", values)
    pixels, size, _ = script.read_image(tmp_path / "deep.png")
    assert size == (20, 30) and np.abs(pixels - values * 255 / 4000).max() <= 0.51
    clear = np.concatenate([values, np.full((20, 30, 1), 65535)], 2)
    clear[:, :10, 3] = 0
    write_png16(tmp_path / "clear.png", clear)
    assert (read(tmp_path / "clear.png")[:, :10] == 0).all() and read(tmp_path / "clear.png")[:, 10:].max() == 255
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    for i in range(3):
        save(tmp_path / "source" / "b" / f"{i}.png", noise((20, 30, 3)))
        write_png16(folder / f"{i}.png", RNG.integers(0, 4001, (20, 30, 3)))
    assert "bits a channel: 8 (3 images), 16 (3 images)" in prepare("source", "data", cwd=tmp_path).stdout
    Image.fromarray(noise((4, 4))).save(tmp_path / "fake.tif")
    with Image.open(tmp_path / "fake.tif") as image, pytest.raises(ValueError, match="PNG alone"):
        script.read_deep_colour(str(tmp_path / "fake.tif"), image)


@pytest.mark.parametrize("dtype, top", [(np.uint8, 255), (np.uint16, 65535)])
def test_white_is_zero(tmp_path, dtype, top):
    """TIFF scans whose 0 is white (photometric interpretation 0): white comes out as white."""
    values = np.linspace(0, top, 400).astype(dtype).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
        stored_as_is = np.asarray(image).flat[0] == values.flat[0]
    pixels = read(tmp_path / "a.tif")[..., 0]
    upright = np.linspace(0, 255, 400).reshape(20, 20)
    expected = 255 - upright if dtype == np.uint16 or not stored_as_is else upright
    assert np.abs(pixels - expected).max() <= 1


def test_modes_and_rotation(tmp_path):
    colour = noise((20, 30, 3))
    image, grey = Image.fromarray(colour), Image.fromarray(colour[..., 0])
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    grey.save(tmp_path / "grey.png")
    Image.merge("RGB", [grey] * 3).save(tmp_path / "grey3.png")
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.repeat([[0, 255]], 20, 0).repeat(15, 1).astype(np.uint8)))
    alpha.save(tmp_path / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    image.save(tmp_path / "turned.png", exif=turned)
    assert read(tmp_path / "palette.png").shape == (20, 30, 3)
    assert np.abs(read(tmp_path / "palette.png").astype(int) - colour).mean() < 30
    assert np.abs(read(tmp_path / "cmyk.tif").astype(int) - colour).max() <= 2
    assert (read(tmp_path / "grey.png")[..., 0] == colour[..., 0]).all() and read(tmp_path / "grey3.png").shape == (20, 30, 1)
    assert (read(tmp_path / "alpha.png")[:, :15] == 0).all() and (read(tmp_path / "alpha.png")[:, 15:] == colour[:, 15:]).all()
    assert (read(tmp_path / "turned.png") == np.rot90(colour, -1)).all()
    assert script.read_image(tmp_path / "turned.png")[1] == (30, 20)


def test_a_jpeg_is_never_decoded_below_twice_the_side(tmp_path):
    big = (np.indices((2048, 2048)).sum(0) // 2 % 2 * 255).astype(np.uint8)
    save(tmp_path / "big.jpg", big, quality=95)
    for side, least in ((2048, 2048), (1024, 2048), (600, 1200), (256, 512), (64, 128)):
        pixels, size, _ = script.read_image(tmp_path / "big.jpg", side)
        assert size == (2048, 2048) and least <= min(pixels.shape[:2]) <= 2048
    assert script.to_square(read(tmp_path / "big.jpg", 2048), 2048, "squash").std() > 100


def test_pages_are_named(tmp_path):
    first, second = Image.fromarray(noise()), Image.fromarray(noise())
    (tmp_path / "source").mkdir()
    for i in range(6):
        save(tmp_path / "source" / f"{i}.png", noise())
    first.save(tmp_path / "source" / "stack.tif", save_all=True, append_images=[second])
    done = prepare("source", "data", cwd=tmp_path)
    assert "stack.tif: 2 pages, the first is used" in done.stdout
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["notes"] == ["stack.tif: 2 pages, the first is used"]
    row = [r["image"] for r in table(tmp_path / "data" / "labels.csv")].index("stack.tif")
    assert (np.load(tmp_path / "data" / "images.npy")[row, ..., 0] == np.asarray(first)).all()


def test_fits_by_value(tmp_path):
    """A tall image whose lower end is white: squashed it is there, padded too, cropped it is lost."""
    pixels = np.zeros((90, 30, 1), np.uint8)
    pixels[60:] = 200
    squash, pad, crop = (script.to_square(pixels, 30, fit)[..., 0] for fit in ("squash", "pad", "crop"))
    assert (squash[21:] == 200).all() and (squash[:19] == 0).all()
    assert (pad[21:, 11:19] == 200).all() and (pad[:, :9] == 0).all() and (pad[:, 21:] == 0).all()
    assert (crop == 0).all()
    for fit in ("squash", "pad", "crop"):
        back = common.from_square(script.to_square(pixels, 30, fit), 90, 30, fit)
        assert back.shape == (90, 30)
        assert (back[70:] > 150).mean() == (0 if fit == "crop" else pytest.approx(1, abs=0.15))
    save(tmp_path / "source" / "0.png", pixels[..., 0])
    for i in range(1, 8):
        save(tmp_path / "source" / f"{i}.png", noise((90, 30)))
    for fit in ("squash", "pad", "crop"):
        prepare("source", fit, "--fit", fit, cwd=tmp_path)
        assert (np.load(tmp_path / fit / "images.npy")[0] == script.to_square(pixels, 30, fit)).all()


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("shape", [(300, 200, 3), (150, 301, 1), (70, 40, 3)])
def test_images_are_scaled_as_pillow_does(shape, fit):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = pixels[..., 0] if shape[2] == 1 else pixels
    wanted = square_by_pillow(picture, common.fit_box(*shape[:2], fit), 64, Image.Resampling.BILINEAR).reshape(64, 64, -1)
    square = script.to_square(pixels, 64, fit)
    assert square.shape == wanted.shape and square.dtype == np.uint8
    assert np.abs(square.astype(int) - wanted).max() <= 1


def test_side_is_never_larger_than_the_images(tmp_path):
    for i in range(9):
        save(tmp_path / "source" / f"{i}.png", noise((20 if i == 0 else 40, 60)))
    done = prepare("source", "data", cwd=tmp_path)
    assert np.load(tmp_path / "data" / "images.npy").shape == (9, 40, 40, 1)
    assert "side 40" in done.stdout and "1 of 9 images have a side below 40 pixels" in done.stdout
    prepare("source", "less", "--side", "32", cwd=tmp_path)
    assert np.load(tmp_path / "less" / "images.npy").shape == (9, 32, 32, 1)


@pytest.mark.parametrize("first_colour", [None, 0, 7, 19])
def test_the_first_colour_widens_what_was_written(tmp_path, first_colour):
    pictures = [noise((24, 24, 3)) if i == first_colour else noise() for i in range(20)]
    for i, pixels in enumerate(pictures):
        save(tmp_path / "source" / f"{i:02d}.png", pixels)
    prepare("source", "data", cwd=tmp_path)
    images = np.load(tmp_path / "data" / "images.npy")
    assert images.shape[3] == (1 if first_colour is None else 3)
    for pixels, expected in zip(images, pictures):
        assert (pixels == np.atleast_3d(expected)).all()
    assert not list((tmp_path / "data").glob("*.grey"))


# ---------------------------------------------------------------- which files -------------------------------

def test_every_file_is_used_or_counted(tmp_path):
    """Suffixes of Pillow's, links to folders, hidden and system folders, files that are no images."""
    source = tmp_path / "source"
    for name in "ab":
        for i in range(10):
            save(source / "train" / name / f"{i}.png", noise())
    for suffix, kind in (("jfif", "JPEG"), ("jpe", "JPEG"), ("jp2", "JPEG2000"), ("PNG", "PNG")):
        save(source / "train" / "a" / f"x.{suffix}", noise(), format=kind)
    save(tmp_path / "far" / "linked.png", noise())
    os.symlink(tmp_path / "far", source / "train" / "a" / "patient1")
    os.symlink(source, source / "train" / "b" / "round")  # a link to a folder above it
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        save(source / "train" / "a" / hidden / "0-checkpoint.png", noise())
    for i in range(7):
        (source / "train" / "b" / f"notes{i}.docx").write_text("words")
    (source / "Thumbs.db").write_text("")
    done = prepare("source", "data", cwd=tmp_path)
    found = names_of(tmp_path / "data")
    assert {"train/a/x.jfif", "train/a/x.jpe", "train/a/x.jp2", "train/a/x.PNG", "train/a/patient1/linked.png"} <= found
    assert len(found) == 25 and not any("checkpoint" in name or "MACOSX" in name for name in found)
    assert "7 files of" in done.stdout and "notes0.docx" in done.stdout and "and 2 more" in done.stdout


def test_broken_files_are_all_named(folder_source, tmp_path):
    (folder_source / "train" / "level" / "words.png").write_text("this is no image")
    save(tmp_path / "whole.jpg", noise((300, 300, 3)))
    half = (tmp_path / "whole.jpg").read_bytes()[:20000]
    (folder_source / "test" / "level" / "half.jpg").write_bytes(half)
    (folder_source / "test" / "level" / "link.png").symlink_to("nowhere.png")
    refused(prepare("source", "x", cwd=tmp_path, check=False), "3 of 40 images", "words.png", "half.jpg", "link.png",
            "--skip-broken")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
    done = prepare("source", "x", "--skip-broken", cwd=tmp_path)
    assert "left out: 3 of 40" in done.stdout and len(names_of(tmp_path / "x")) == 37
    assert len(json.loads((tmp_path / "x" / "dataset.json").read_text())["left_out"]["broken"]) == 3
    assert len(np.load(tmp_path / "x" / "images.npy")) == 37


def test_folders_that_are_no_layout_are_named(folder_source, tmp_path):
    refused(prepare("nowhere", "x", cwd=tmp_path, check=False), "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(prepare("empty", "x", cwd=tmp_path, check=False), "empty", "no images")
    (folder_source / "train" / "vacant").mkdir()
    (folder_source / "train" / "vacant" / "volume.nii").write_text("")
    refused(prepare("source", "x", cwd=tmp_path, check=False), "vacant", "no images", "volume.nii")
    (folder_source / "train" / "vacant" / "volume.nii").unlink()
    (folder_source / "train" / "vacant").rmdir()
    save(folder_source / "test" / "rare" / "a.png", noise())
    refused(prepare("source", "x", cwd=tmp_path, check=False), "'rare'", "not in train")
    (folder_source / "test" / "rare" / "a.png").rename(folder_source / "test" / "a.png")
    (folder_source / "test" / "rare").rmdir()
    refused(prepare("source", "x", cwd=tmp_path, check=False), "1 images stand in no class folder", "test/a.png")
    (folder_source / "test" / "a.png").rename(folder_source / "a.png")
    refused(prepare("source", "x", cwd=tmp_path, check=False), "below train/, val/ or test/")
    (folder_source / "a.png").unlink()
    (folder_source / "train").rename(tmp_path / "away")
    refused(prepare("source", "x", cwd=tmp_path, check=False), "train at least")


def test_class_folders_at_once_are_carved(tmp_path):
    for name in ("benign", "malignant"):
        for i in range(20):
            save(tmp_path / "source" / name / f"patient{i}" / "scan.png", noise())
    prepare("source", "data", cwd=tmp_path)
    rows = table(tmp_path / "data" / "labels.csv")
    assert {row["label"] for row in rows} == {"benign", "malignant"} and len(rows) == 40
    assert sorted(row["split"] for row in rows) == ["test"] * 6 + ["train"] * 28 + ["val"] * 6


def test_a_folder_called_demo_is_a_folder(tmp_path):
    for i in range(8):
        save(tmp_path / "demo" / "ab"[i % 2] / f"{i}.png", noise())
    prepare("demo", "data", cwd=tmp_path)
    assert len(names_of(tmp_path / "data")) == 8


# ---------------------------------------------------------------- DICOM and .npz ----------------------------

def write_dicom(path, values, **tags):
    """A DICOM file of (H, W) or (frames, H, W) uint16 values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    if values.ndim == 3:
        data.NumberOfFrames = len(values)
    data.PixelData = values.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


def test_dicom_by_value(tmp_path):
    values = np.linspace(0, 4000, 400).reshape(20, 20).astype(np.uint16)
    write_dicom(tmp_path / "plain.dcm", values)
    assert np.abs(read(tmp_path / "plain.dcm")[..., 0] - values * (255 / 4000)).max() <= 0.51
    write_dicom(tmp_path / "inverted.dcm", values, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(read(tmp_path / "inverted.dcm")[..., 0] - (255 - values * (255 / 4000))).max() <= 0.51
    window = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 40, "WindowWidth": 400}
    write_dicom(tmp_path / "window.dcm", values, **window)
    hounsfield = values * 2.0 - 1000
    expected = 255 * np.clip((hounsfield - 39.5) / 399 + 0.5, 0, 1)  # DICOM PS3.3, C.11.2.1.2.1
    assert np.abs(read(tmp_path / "window.dcm")[..., 0] - expected).max() <= 0.51
    write_dicom(tmp_path / "several.dcm", values, **window | {"WindowCenter": [40, 500], "WindowWidth": [400, 900]})
    assert (read(tmp_path / "several.dcm") == read(tmp_path / "window.dcm")).all()
    write_dicom(tmp_path / "exact.dcm", values, **window, VOILUTFunction="LINEAR_EXACT")
    expected = 255 * np.clip((hounsfield - 40) / 400 + 0.5, 0, 1)
    assert np.abs(read(tmp_path / "exact.dcm")[..., 0] - expected).max() <= 0.51
    write_dicom(tmp_path / "frames.dcm", np.stack([values, values[::-1]]))
    pixels, size, note = script.read_image(tmp_path / "frames.dcm")
    assert note == "2 frames, the first is used" and (pixels == read(tmp_path / "plain.dcm")).all() and size == (20, 20)
    (tmp_path / "plain.dcm").rename(tmp_path / "IM000001")  # as scanners name them
    assert script.files_under(tmp_path)[0].count("IM000001") == 1 and read(tmp_path / "IM000001").max() == 255


def test_a_folder_of_dicom_goes_through(tmp_path):
    for i in range(24):
        values = RNG.integers(0, 4000, (40, 48))
        write_dicom(tmp_path / "source" / "ab"[i % 2] / f"{i}.dcm", values if i else np.stack([values] * 2), BitsStored=12,
                    HighBit=11)
    done = prepare("source", "data", cwd=tmp_path)
    assert "bits a channel: 12 (24 images)" in done.stdout and "0.dcm: 2 frames" in done.stdout
    assert np.load(tmp_path / "data" / "images.npy").shape == (24, 40, 40, 1)
    args = ["--arch", "test_vit", *TINY]
    stage("finetune.py", "--data", "data", *args, "--epochs", "1", "--batch-size", "4", "--output", "run", cwd=tmp_path)
    stage("finetune.py", "--predict", "source/a", "--init", "run/model.pt", "--output", "out", *TINY, cwd=tmp_path)
    assert len(table(tmp_path / "out" / "predictions.csv")) == 12
    refused(prepare("source", "x", cwd=tmp_path, check=False, first="import sys; sys.modules['pydicom'] = None"),
            "pydicom", "pip install pydicom")


@pytest.mark.parametrize("side, channels, labels", [(28, (3,), 1), (64, (), 1), (28, (), 14)])
def test_medmnist(tmp_path, side, channels, labels):
    arrays = {}
    for part, count in (("train", 40), ("val", 10), ("test", 12)):
        arrays[f"{part}_images"] = noise((side, side), channels)[None].repeat(count, 0) + np.arange(
            count, dtype=np.uint8).reshape(-1, 1, 1, *[1] * len(channels))
        arrays[f"{part}_labels"] = ((np.arange(count) % 5)[:, None] if labels == 1 else
                                    RNG.integers(0, 2, (count, labels)))
    np.savez_compressed(tmp_path / "made.npz", **arrays)
    prepare("made.npz", "data/made", cwd=tmp_path)
    images = np.load(tmp_path / "data" / "made" / "images.npy")
    expected = np.concatenate([arrays[f"{part}_images"] for part in ("train", "val", "test")])
    assert (images == expected.reshape(62, side, side, -1)).all()
    dataset = common.open_dataset(tmp_path / "data" / "made")
    truth = np.concatenate([arrays[f"{part}_labels"] for part in ("train", "val", "test")])
    assert dataset.counts == {"train": 40, "val": 10, "test": 12}
    assert (dataset.labels == (truth[:, 0] if labels == 1 else truth)).all()
    assert dataset.metric == ("accuracy" if labels == 1 else "roc_auc") and not dataset.ordinal  # numbers of names
    if labels == 1:
        prepare("made.npz", "data/graded", "--classes", "0,1,2,3,4", "--ordinal", cwd=tmp_path)
        graded = common.open_dataset(tmp_path / "data" / "graded")
        assert graded.ordinal and graded.metric == "quadratic_kappa"
    stage("knn_eval.py", "--data", "data/made", "--arch", "test_vit", "--k", "1,5", "--output", "run", *TINY, cwd=tmp_path)


def test_npz_files_of_another_kind_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 8, 8), np.uint8))
    refused(prepare("x.npz", "data", cwd=tmp_path, check=False), "x.npz", "train_images", "found x")
    np.savez(tmp_path / "v.npz", train_images=np.zeros((3, 8, 8, 8), np.uint8), train_labels=np.zeros((3, 1)))
    refused(prepare("v.npz", "data", cwd=tmp_path, check=False), "volumes are no images")
    (tmp_path / "b.npz").write_bytes(b"PK no")
    refused(prepare("b.npz", "data", cwd=tmp_path, check=False), "b.npz", "not a readable .npz")


# ---------------------------------------------------------------- masks -------------------------------------

DISC = np.hypot(*np.mgrid[-16:16, -16:16] + 0.5) < 8


def mask_kinds():
    """{name of a file: how to save the disc into it}."""
    palette = Image.fromarray((~DISC).astype(np.uint8), "P")
    palette.putpalette([255] * 3 + [0] * 765)  # index 0 is white: the lesion
    opaque = Image.fromarray(np.dstack([np.zeros((32, 32, 3), np.uint8), 255 * DISC.astype(np.uint8)]))
    white = Image.fromarray(np.dstack([np.full((32, 32, 3), 255, np.uint8), 255 * DISC.astype(np.uint8)]))
    red = np.zeros((32, 32, 3), np.uint8)
    red[DISC] = 255, 0, 0
    grey = Image.fromarray(DISC.astype(np.uint8) * 251)
    return {"palette.png": palette, "alpha.png": opaque, "white.png": white, "red.png": Image.fromarray(red),
            "251.png": grey, "01.png": Image.fromarray(DISC.astype(np.uint8)), "bits.png": Image.fromarray(DISC),
            "grey.gif": grey, "grey.tif": grey, "deep.png": Image.fromarray(DISC.astype(np.uint16) * 60000),
            "noisy.jpg": Image.fromarray(DISC.astype(np.uint8) * 255)}


@pytest.mark.parametrize("name", list(mask_kinds()))
def test_masks_of_two_classes_go_by_brightness(tmp_path, name):
    mask_kinds()[name].save(tmp_path / name)
    mask, note = script.read_mask([(None, str(tmp_path / name))], 2, None)
    assert ((mask > 0) != DISC).mean() < (0.02 if name == "noisy.jpg" else 1e-9) and note == ""


def mask_source(folder, masks, suffix=""):
    """images/ and masks/ of one mask each, (H, W) uint8 or an Image."""
    for i, mask in enumerate(masks):
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        save(folder / "images" / f"{i}.png", noise(mask.size[::-1]))
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{i}{suffix}.png")


@pytest.mark.parametrize("suffix", ["", "_mask", "_segmentation", "_seg", "_gt", "_1"])
def test_masks_are_found_by_their_names(tmp_path, suffix):
    mask_source(tmp_path / "source", [255 * np.roll(DISC, i, 0).astype(np.uint8) for i in range(8)], suffix)
    prepare("source", "data", cwd=tmp_path)
    masks = np.load(tmp_path / "data" / "masks.npy")
    for i, row in enumerate(table(tmp_path / "data" / "labels.csv")):
        assert (masks[i] == np.roll(DISC, int(row["image"][7:-4]), 0)).all()


@pytest.mark.parametrize("images, masks", [("imgs", "labels"), ("image", "GT"), ("img", "label"), ("images", "gt")])
def test_folders_of_masks_have_many_names(tmp_path, images, masks):
    for split in ("train", "val", "test"):
        place = tmp_path / "source" / split
        mask_source(place, [255 * DISC.astype(np.uint8)] * 4)
        (place / "images").rename(place / images)
        (place / "masks").rename(place / masks)
    prepare("source", "data", cwd=tmp_path)
    assert np.load(tmp_path / "data" / "masks.npy").shape == (12, 32, 32)
    assert {row["split"] for row in table(tmp_path / "data" / "labels.csv")} == {"train", "val", "test"}


def test_several_masks_of_one_image_are_united(tmp_path):
    """As a published ultrasound set has them: name.png, name_mask.png, name_mask_1.png in the class folder."""
    left, right = DISC.copy(), DISC.copy()
    left[:, 16:], right[:, :16] = False, False
    for i in range(8):
        place = tmp_path / "source" / ("benign", "malignant")[i % 2]
        save(place / f"scan ({i}).png", noise((32, 32)))
        save(place / f"scan ({i})_mask.png", 255 * left.astype(np.uint8))
        save(place / f"scan ({i})_mask_1.png", 255 * right.astype(np.uint8))
    prepare("source", "data", cwd=tmp_path)
    assert len(names_of(tmp_path / "data")) == 8 and (np.load(tmp_path / "data" / "masks.npy") == DISC).all()
    assert set(row["label"] for row in table(tmp_path / "data" / "labels.csv")) == {"benign", "malignant"}


def test_masks_that_do_not_fit_are_named(tmp_path):
    source = tmp_path / "source"
    mask_source(source, [255 * DISC.astype(np.uint8)] * 10)
    save(source / "masks" / "stray.png", noise())
    done = prepare("source", "data", cwd=tmp_path)
    assert "1 masks belong to no image" in done.stdout and "masks/stray.png" in done.stdout
    (source / "masks" / "3.png").unlink()
    refused(prepare("source", "x", cwd=tmp_path, check=False), "1 of 10 images have no mask", "images/3.png")
    save(source / "masks" / "3.png", np.zeros((32, 31), np.uint8))
    refused(prepare("source", "x", cwd=tmp_path, check=False), "images/3.png", "31x32", "32x32")
    save(source / "masks" / "3.png", np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) % 4)
    refused(prepare("source", "x", cwd=tmp_path, check=False), "0, 1, 2, 3", "--mask-classes")
    done = prepare("source", "x", "--skip-broken", cwd=tmp_path)
    assert len(names_of(tmp_path / "x")) == 9 and "left out: 1 of 10" in done.stdout
    refused(prepare("source", "y", "--mask-classes", "lesion", cwd=tmp_path, check=False), "--mask-classes")


@pytest.mark.parametrize("value, word", [(0, "empty"), (255, "full")])
def test_masks_that_are_all_alike_are_warned_of(tmp_path, value, word):
    mask_source(tmp_path / "source", [np.full((32, 32), value, np.uint8)] * 8)
    assert f"WARNING: all 8 of 8 masks are {word}" in prepare("source", "data", cwd=tmp_path).stdout


def test_masks_of_several_classes(tmp_path):
    indices = np.zeros((32, 32), np.uint8)
    indices[:16, :16], indices[16:, 16:], indices[0] = 1, 2, 255
    coloured = Image.fromarray(indices, "P")
    coloured.putpalette([9, 9, 9, 250, 0, 0, 0, 250, 0] + [99] * 759)
    mask_source(tmp_path / "source", [indices, coloured] * 4)
    classes = ["--mask-classes", "background,red,green"]
    refused(prepare("source", "x", *classes, cwd=tmp_path, check=False), "value 255", "--ignore")
    prepare("source", "data", *classes, "--ignore", "255", cwd=tmp_path)
    assert (np.load(tmp_path / "data" / "masks.npy") == indices).all()
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert facts["mask_classes"] == ["background", "red", "green"] and facts["ignore"] == 255
    for i in range(8):
        (tmp_path / "source" / "masks" / f"{i}.png").unlink()
        save(tmp_path / "source" / "masks" / f"{i}.jpg", indices)
    refused(prepare("source", "y", *classes, cwd=tmp_path, check=False), "JPEG", "PNG")
    with pytest.raises(ValueError, match="colour"):
        save(tmp_path / "colour.png", noise((8, 8, 3)))
        script.read_indices(tmp_path / "colour.png", 3, None)


def test_maps_with_classes_are_laid_on_each_other(tmp_path):
    first, second = np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8)
    first[1:3], second[2:, 1:] = 255, 1
    save(tmp_path / "a.png", first)
    save(tmp_path / "b.png", second)
    mask, _ = script.read_mask([(3, str(tmp_path / "a.png")), (1, str(tmp_path / "b.png"))], 4, None)
    assert (mask == np.where(second > 0, 1, np.where(first > 0, 3, 0))).all() and mask.dtype == np.uint8


def regions(mask):
    """The number of pieces of a mask, by sides and corners, counted by flooding."""
    left = {tuple(place) for place in np.argwhere(mask)}
    count = 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            y, x = front.pop()
            near = {(y + i, x + k) for i in (-1, 0, 1) for k in (-1, 0, 1)} & left
            left -= near
            front += near
    return count


@pytest.mark.parametrize("size", [512, 1000, 1300])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_thin_structures_stay_in_one_piece(size, width):
    """A curve some 1,000 pixels long, as a vessel: one region before, one after, and where it was."""
    turn = np.linspace(0, 2.5 * np.pi, 6000)
    radius = size * (0.05 + 0.35 * turn / turn.max())
    y = (size / 2 + radius * np.sin(turn)).astype(int)
    x = (size / 2 + radius * np.cos(turn)).astype(int)
    mask = np.zeros((size, size), np.uint8)
    for i in range(width):
        for k in range(width):
            mask[y + i, x + k] = 1
    small = script.reduce_mask(mask, 256, "squash", 2, None)
    assert regions(mask) == regions(small) == 1
    back = np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST))
    assert back[mask > 0].mean() > 0.85  # it covers what it stands for
    wide = script.widen_by_one(script.widen_by_one(mask)) if size < 600 else None
    assert wide is None or (small.sum() > 0 and back[~wide].mean() < 0.02)


def test_thick_masks_keep_their_area_and_vessels_hang_on_them():
    y, x = np.mgrid[:1000, :1000]
    disc = (np.hypot(y - 400, x - 400) < 180).astype(np.uint8)
    small = script.reduce_mask(disc, 256, "squash", 2, None)
    assert small.mean() == pytest.approx(disc.mean(), rel=0.005)
    slow = np.zeros((250, 250), np.uint8)
    for i, k in np.ndindex(250, 250):
        slow[i, k] = disc[4 * i:4 * i + 4, 4 * k:4 * k + 4].mean() >= 0.5
    assert (script.reduce_mask(disc, 250, "squash", 2, None) == slow).all()
    disc[395:397, 500:900] = 1  # a vessel out of it
    small = script.reduce_mask(disc, 256, "squash", 2, None)
    assert regions(small) == 1 and small[:, 200:].any()
    three = np.zeros((1000, 1000), np.uint8)
    three[:500], three[500:] = 1, 2
    three[:, 700:] = 0
    small = script.reduce_mask(three, 250, "squash", 3, None)
    assert (small == three[2::4, 2::4]).all()


def test_masks_follow_the_fit(tmp_path):
    mask = np.zeros((60, 100), np.uint8)
    mask[20:40, 70:90] = 255
    mask_source(tmp_path / "source", [mask] * 8)
    for fit in ("squash", "pad", "crop"):
        prepare("source", fit, "--fit", fit, "--side", "50", cwd=tmp_path)
        ours = np.load(tmp_path / fit / "masks.npy")[0]
        picture = script.to_square(mask[..., None], 50, fit)[..., 0]
        assert ((picture > 127) != ours).mean() < 0.02 and ours.any()


def test_predict_decodes_as_the_data_were_prepared(tmp_path):
    """finetune.py --predict on the files that a folder was prepared from, for each fit: the tested probabilities."""
    for i in range(24):
        pixels = noise((40, 80))
        pixels[:, :40] //= 1 + 3 * (i % 2)
        save(tmp_path / "source" / "ab"[i % 2] / f"{i}.png", pixels)
    for fit in ("squash", "pad", "crop"):
        prepare("source", fit, "--fit", fit, cwd=tmp_path)
        stage("finetune.py", "--data", fit, "--arch", "test_vit", "--epochs", "1", "--batch-size", "4", "--output",
              f"run-{fit}", *TINY, cwd=tmp_path)
        stage("finetune.py", "--predict", "source", "--init", f"run-{fit}/model.pt", "--output", f"out-{fit}", *TINY[2:],
              cwd=tmp_path)
        found = {row["image"]: row for row in table(tmp_path / f"out-{fit}" / "predictions.csv")}
        tested = table(tmp_path / f"run-{fit}" / "predictions.csv")
        assert len(found) == 24 and tested
        for row in tested:
            assert float(found[row["image"]]["a"]) == pytest.approx(float(row["a"]), abs=1e-5)
    assert torch.load(tmp_path / "run-pad" / "model.pt", weights_only=True)["fit"] == "pad"
