"""Augmentation against torchvision and against independent slow versions."""
import math
from argparse import Namespace

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import RandomResizedCrop

import common
import finetune
import pretrain_dino
import segment


def random_images(count, side, channels=3, seed=0):
    """Random square images as read_batch gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, channels), dtype=torch.uint8, generator=generator)


def draws(count, key=0):
    """Draws of a single process."""
    return common.Draws(key, count, torch.arange(count), "cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_resize_equals_torchvision(channels):
    images = random_images(4, 61, channels)
    boxes = common.random_boxes(draws(4), 61, (0.1, 1.0))
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).bool()
    ours = common.crop_resize(images, boxes, 24, flips)
    for i, (top, left, height, width) in enumerate(boxes.int().tolist()):
        image = images[i].permute(2, 0, 1).float() / 255
        crop = TF.resized_crop(image, top, left, height, width, [24, 24], antialias=True)
        if flips[i, 0]:
            crop = TF.vertical_flip(crop)
        if flips[i, 1]:
            crop = TF.horizontal_flip(crop)
        assert (ours[i] - crop).abs().max() < 1e-5


def test_boxes_are_those_of_random_resized_crop():
    """Inside the image, of an area and an aspect within bounds, in distribution as torchvision's."""
    boxes = common.random_boxes(draws(4000), 130, (0.2, 0.8))
    top, left, height, width = boxes.T
    assert (boxes == boxes.round()).all() and (boxes >= 0).all()
    assert (top + height <= 130).all() and (left + width <= 130).all()
    area, aspect = height * width / 16900, width / height
    assert area.min() > 0.19 and area.max() < 0.82 and aspect.min() > 0.73 and aspect.max() < 1.37
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, 130, 130), [0.2, 0.8], [3 / 4, 4 / 3])
                           for _ in range(4000)]).float()
    assert abs(area.mean() - (theirs[:, 2] * theirs[:, 3] / 16900).mean()) < 0.01
    assert abs(aspect.mean() - (theirs[:, 3] / theirs[:, 2]).mean()) < 0.01
    assert abs((top / (130 - height).clamp(min=1)).mean() - 0.5) < 0.03
    whole = common.random_boxes(draws(5), 1000, (1.0, 1.0))
    assert whole[0].tolist() == [0, 0, 1000, 1000]  # no try fits, unless its aspect is 1


@pytest.mark.parametrize("side, corner, length", [(256, 16, 224), (28, 2, 24), (96, 6, 84)])
def test_evaluation_is_the_centre_seven_eighths(side, corner, length):
    """224 of 256 pixels as they are, as in the paper; other sides in proportion, resized."""
    images = random_images(2, side)
    assert common.centre_box(side) == (corner, length)
    view = common.eval_view(images, 56, [0.0] * 3, [1.0] * 3)
    centre = images[:, corner:corner + length, corner:corner + length].permute(0, 3, 1, 2).float() / 255
    assert (view - TF.resize(centre, [56, 56], antialias=True)).abs().max() < 1e-5
    assert (common.eval_view(images, length, [0.0] * 3, [1.0] * 3) - centre).abs().max() < 1e-6
    whole = common.eval_view(images, 56, [0.0] * 3, [1.0] * 3, whole=True)
    expected = TF.resize(images.permute(0, 3, 1, 2).float() / 255, [56, 56], antialias=True)
    assert (whole - expected).abs().max() < 1e-5


def test_rotation_equals_torchvision():
    """Within the circle that every turn leaves inside; what comes in at the corners is a mirror image, not black."""
    images = random_images(3, 41).permute(0, 3, 1, 2).float() / 255
    degrees = [30.0, -75.0, 180.0]
    ours = common.rotate(images, torch.tensor(degrees) * math.pi / 180)
    y, x = torch.meshgrid(torch.arange(41) - 20, torch.arange(41) - 20, indexing="ij")
    circle = torch.hypot(y.float(), x.float()) < 19
    for image, turned, angle in zip(images, ours, degrees):
        theirs = TF.rotate(image, angle, TF.InterpolationMode.BILINEAR)
        assert ((turned - theirs).abs() * circle).max() < 1e-3
    assert (common.rotate(torch.ones(1, 3, 20, 20), torch.tensor([0.6])) - 1).abs().max() < 1e-5
    assert common.rotate(images, None) is images
    angles = common.random_angles(draws(2000), 30)
    assert -math.pi / 6 <= angles.min() < -0.5 and 0.5 < angles.max() <= math.pi / 6


ORIENTATIONS = {"none": [(0, 0)], "horizontal": [(0, 0), (0, 1)], "vertical": [(0, 0), (1, 0)],
                "both": [(0, 0), (0, 1), (1, 0), (1, 1)]}


@pytest.mark.parametrize("flips", list(ORIENTATIONS))
def test_images_are_turned_over_in_no_other_way_than_flips_says(flips):
    """In each of the three stages that train, each way about equally often."""
    image = random_images(1, 8)
    batch = image.expand(400, -1, -1, -1)
    whole = dict(image_size=8, scale=[1.0, 1.0], jitter=[0, 0, 0, 0], flips=flips, rotate=0)
    dino = dict(global_scale=[1.0, 1.0], local_crops=0, grey=0, blur=[0, 0, 0], solarize=0)
    plain = [0] * 3, [1] * 3
    views = [finetune.train_view(batch, draws(400), Namespace(**whole), *plain),
             segment.train_view(batch, batch[..., 0], draws(400), Namespace(**whole), *plain)[0],
             pretrain_dino.make_crops(batch, draws(400), Namespace(**whole, **dino), *plain)[0][:400]]
    ways = ORIENTATIONS[flips]
    for view in views:
        found = torch.zeros(len(ways))
        for k, (down, right) in enumerate(ways):
            turned = image[0].permute(2, 0, 1).float() / 255
            turned = turned.flip(1) if down else turned
            turned = turned.flip(2) if right else turned
            found[k] = ((view - turned).abs().amax((1, 2, 3)) < 1e-4).sum()
        assert found.sum() == 400 and found.min() > 0.7 * 400 / len(ways)


def slow_jitter(image, bright, contrast, saturation, turn):
    """One image (3, H, W): brightness, contrast, saturation by torchvision's definitions, hue by YIQ's."""
    image = image * bright
    image = contrast * image + (1 - contrast) * TF.rgb_to_grayscale(image).mean()
    image = saturation * image + (1 - saturation) * TF.rgb_to_grayscale(image)
    y, i, q = (sum(w * c for w, c in zip(row, image)) for row in common.YIQ)
    i, q = i * math.cos(turn) - q * math.sin(turn), i * math.sin(turn) + q * math.cos(turn)
    inverse = torch.linalg.inv(torch.tensor(common.YIQ))
    return torch.stack([a * y + b * i + c * q for a, b, c in inverse]).clamp(0, 1)


def test_color_jitter_equals_the_slow_version():
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = common.color_jitter(images, draws(32), (0.4, 0.4, 0.2, 0.1))
    same = draws(32)
    apply = same.uniform() < 0.8
    bright, contrast, saturation = (1 + apply * same.uniform(low=-s, high=s) for s in (0.4, 0.4, 0.2))
    turn = apply * same.uniform(low=-0.1, high=0.1) * 2 * math.pi
    assert 0 < apply.sum() < 32
    for i in range(32):
        slow = slow_jitter(images[i], bright[i], contrast[i], saturation[i], float(turn[i]))
        assert (ours[i] - slow).abs().max() < 1e-4
        assert apply[i] or (ours[i] - images[i]).abs().max() < 1e-5


def test_grey_images_jitter_like_the_same_image_in_colour():
    grey = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    strengths = (0.4, 0.4, 0.2, 0.1)
    colour = common.color_jitter(grey.expand(-1, 3, -1, -1), draws(16), strengths)
    assert (common.color_jitter(grey, draws(16), strengths) - colour).abs().max() < 1e-4


def test_draws_do_not_depend_on_the_number_of_processes():
    whole = common.Draws((0, 3, 7), 12, torch.arange(12), "cpu")
    parts = [common.Draws((0, 3, 7), 12, torch.arange(rank, 12, 4), "cpu") for rank in range(4)]
    for shape in ((), (5,), (2, 3)):
        values = whole.uniform(*shape)
        for rank, part in enumerate(parts):
            assert torch.equal(part.uniform(*shape), values[rank::4])
    other = common.Draws((0, 3, 8), 12, torch.arange(12), "cpu")
    assert not torch.equal(other.uniform(), common.Draws((0, 3, 7), 12, torch.arange(12), "cpu").uniform())


def test_an_epoch_shows_every_image_once():
    order = common.epoch_order(103, 10, 0, 5)
    assert order.shape == (10, 10) and len(set(order.flatten().tolist())) == 100
    assert (order != common.epoch_order(103, 10, 0, 6)).any()


def test_normalize_spreads_grey():
    view = common.normalize(torch.full((2, 1, 3, 3), 0.5), [0.5, 0.4, 0.3], [0.1, 0.1, 0.2])
    assert view.shape == (2, 3, 3, 3)
    assert torch.allclose(view[0, :, 0, 0], torch.tensor([0, 1, 1.0]), atol=1e-5)
