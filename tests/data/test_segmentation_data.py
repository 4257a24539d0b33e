"""Masks stay with their images, through files, crops and processes; wrong ones are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vil_lightning.data.loading import view_generator
from vil_lightning.data.masks import (
    IGNORED,
    LabelRule,
    Masked,
    MaskError,
    SegmentationTransform,
    read_mask,
)
from vil_lightning.data.segmentation import SegmentationFolder, ShapesSegmentation, draw_shapes
from vil_lightning.data.transforms import MultiCrop
from vil_lightning.errors import ConfigError


def plain(size: int = 16, **kwargs: Any) -> SegmentationTransform:
    """Crops without a change of colours or scale, unless told."""
    settings: dict[str, Any] = {"base_size": (32, 16), "scale": (1.0, 1.0), "hflip_prob": 0.0, "max_class_share": 1.0}
    return SegmentationTransform(size, **{**settings, "color_jitter": (0, 0, 0, 0), **kwargs})


def write(root: Path, part: str, name: str, mask: np.ndarray, size: tuple[int, int] | None = None) -> None:
    """An image whose red is 10 times what the mask says."""
    height, width = size or mask.shape
    red = np.resize(10 * mask.astype(np.uint8), (height, width)) if size else 10 * mask.astype(np.uint8)
    for folder, suffix, array in (("images", ".png", np.stack([red] * 3, -1)), ("annotations", ".png", mask)):
        path = (root / folder / part / name).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(6):
        write(tmp_path, "training", f"a/{i}", rng.integers(0, 4, (20, 24), dtype=np.uint8))
    for i, size in enumerate([(18, 21), (20, 17), (16, 16)]):
        write(tmp_path, "validation", str(i), rng.integers(0, 4, size, dtype=np.uint8))
    return tmp_path


def folder(root: Path, **kwargs: Any) -> SegmentationFolder:
    settings: dict[str, Any] = {
        "batch_size": 2,
        "num_workers": 0,
        "train_transform": plain(),
        "num_classes": 3,
        "seed": 5,
    }
    return SegmentationFolder(str(root), **{**settings, **kwargs})


def finished(data: Any, batch: Any) -> tuple[Tensor, Tensor]:
    images, masks = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    return data.denormalize(images) * 255, masks


# --- files ------------------------------------------------------------------------------------------------------------


def test_labels__ade20k_and_plain_convention() -> None:
    values = np.array([[0, 1, 3, 255]], dtype=np.uint8)
    assert LabelRule(3, True, 255).labels(values, "x").tolist() == [[IGNORED, 0, 2, IGNORED]]
    assert LabelRule(4, False, 255).labels(values, "x").tolist() == [[0, 1, 3, IGNORED]]
    wide = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    assert LabelRule(300, True, 65535).labels(wide, "x").tolist() == [[IGNORED, 0, 299, IGNORED]]


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        (LabelRule(3, True, 255), "1 to 3, and 0 and 255 for pixels to ignore"),
        (LabelRule(4, False, None), "0 to 3. Check"),
        (LabelRule(4, False, 255), "0 to 3, and 255 for pixels to ignore"),
    ],
)
def test_labels__other_numbers_are_refused_by_name(rule: LabelRule, allowed: str) -> None:
    with pytest.raises(MaskError, match=r"some\.png: 2 pixels have the label\(s\) 4, 9\. Allowed are ") as caught:
        rule.labels(np.array([[1, 4, 2, 9]], dtype=np.uint8), "some.png")
    assert allowed in str(caught.value)


def test_read_mask__grey_palette_and_16_bits_hold_the_same(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette(list(range(255, 255 - 36, -1)))
    palette.save(tmp_path / "p.png")
    Image.fromarray(values).save(tmp_path / "l.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "i.png")
    for name in "pli":
        mask = read_mask(str(tmp_path / f"{name}.png"), LabelRule(11, True, None), (3, 4))
        assert mask.tolist() == (values.astype(int) - 1).tolist(), name


def test_folder__pairs_and_whole_images_in_evaluation(root: Path) -> None:
    data = folder(root)
    data.setup("fit")
    assert (data.num_classes, data.labelled) == (3, False)
    shapes = []
    for batch in data.val_dataloader():
        images, masks = finished(data, batch)
        shapes.append(tuple(masks.shape))
        torch.testing.assert_close(images[:, 0], 10 * (masks + 1.0), rtol=0, atol=1e-3)
    assert shapes == [(1, 18, 21), (1, 20, 17), (1, 16, 16)]


def test_folder__names_of_ade20k(root: Path) -> None:
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n3\tsky\n")
    assert folder(root).classes == ["wall", "building", "sky"]
    assert folder(root, num_classes=4).classes == ["0", "1", "2", "3"]


def test_folder__training_crops_keep_image_and_mask_together(root: Path) -> None:
    data = folder(root, train_transform=plain(hflip_prob=0.5, base_size=(24, 20)))
    data.setup("fit")
    flips = set()
    for batch in data.train_dataloader():
        images, masks = finished(data, batch)
        assert masks.shape == (2, 16, 16)
        torch.testing.assert_close(images[:, 0], 10 * (masks + 1.0), rtol=0, atol=1e-3)
        flips |= set(batch[0].view.parameters[:, 0].tolist())
    assert flips == {0.0}  # flipped together with the mask, not once more on the device


def test_folder__resumes_within_an_epoch(root: Path) -> None:
    straight = folder(root, train_transform=plain(scale=(0.5, 2.0), hflip_prob=0.5))
    straight.setup("fit")
    whole = list(straight.train_dataloader())
    assert len(whole) == 3
    resumed = folder(root, train_transform=plain(scale=(0.5, 2.0), hflip_prob=0.5))
    resumed.setup("fit")
    resumed.load_state_dict({"train_loader": {"batches_done": 1}})
    rest = list(resumed.train_dataloader())
    assert len(rest) == 2
    for (views, masks), (again, masks_again) in zip(whole[1:], rest, strict=True):
        assert torch.equal(views.view.image, again.view.image)
        assert torch.equal(masks, masks_again)


def test_folder__workers_give_the_same_and_their_errors_are_short(root: Path) -> None:
    settings: dict[str, Any] = {"train_transform": plain(scale=(0.5, 2.0), hflip_prob=0.5)}
    own, of_worker = folder(root, **settings), folder(root, num_workers=1, **settings)
    for data in (own, of_worker):
        data.setup("fit")
    for (views, masks), (others, other_masks) in zip(own.train_dataloader(), of_worker.train_dataloader(), strict=True):
        assert torch.equal(views.view.image, others.view.image)
        assert torch.equal(masks, other_masks)
    broken = folder(root, num_workers=1)
    broken.setup("fit")
    write(root, "validation", "1", np.full((20, 17), 9, dtype=np.uint8))
    with pytest.raises(ConfigError, match=r"^\S+1\.png: 340 pixels have the label\(s\) 9\."):
        list(broken.val_dataloader())


# --- wrong folders ----------------------------------------------------------------------------------------------------


def test_wrong__mask_of_another_size(root: Path) -> None:
    write(root, "training", "a/0", np.ones((9, 8), dtype=np.uint8), size=(20, 24))
    with pytest.raises(ConfigError, match=r"a/0\.png: the mask has 9 x 8 px, but its image 20 x 24"):
        folder(root).setup("fit")


def test_wrong__label_outside_the_classes(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"label\(s\) 3\. Allowed are 1 to 2, and 0 and 255 .*data\.num_classes=2"):
        folder(root, num_classes=2).setup("validate")


def test_wrong__mask_in_colours(root: Path) -> None:
    Image.new("RGB", (24, 20)).save(root / "annotations/training/a/0.png")
    with pytest.raises(ConfigError, match=r"a/0\.png: a mask of mode RGB\. Allowed is one number per pixel"):
        folder(root).setup("fit")


def test_wrong__missing_mask(root: Path) -> None:
    (root / "annotations/training/a/4.png").unlink()
    with pytest.raises(
        ConfigError, match=r"1 of 6 images in \S+ have no mask\. \S+images/training/a/4\.png needs \S+a/4\.png"
    ):
        folder(root).setup("fit")
    folder(root).setup("validate")  # does not need them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, r"data\.num_classes=1 must be between 2 and"),
        ({"ignore_label": 2}, r"data\.ignore_label=2 is one of the classes 1 to 3"),
        ({"train_transform": MultiCrop()}, r"data\.train_transform=MultiCrop does not cut out masks"),
        ({"batch_size": 0}, r"data\.batch_size=0 must be at least 1"),
    ],
)
def test_wrong__arguments(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder(root, **settings)


def test_wrong__folders(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match=r"there is no directory \S+images/training"):
        folder(empty).setup("fit")
    for part in ("images", "annotations"):
        (empty / part / "training").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"images/training holds no images"):
        folder(empty).setup("fit")
    with pytest.raises(ConfigError, match=r"data\.root=\S+nowhere is not a directory"):
        folder(root / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (2.0, 0.5)}, "scale"),
        ({"max_class_share": 0.0}, "max_class_share"),
        ({"hflip_prob": 1.5}, "hflip_prob"),
        ({"color_jitter": (0, 0, 0, 0.6)}, "color_jitter"),
        ({"base_size": (0, 3)}, "base_size"),
    ],
)
def test_wrong__transform(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.train_transform.*{message}"):
        plain(**settings)


# --- crops ------------------------------------------------------------------------------------------------------------


def crop(transform: SegmentationTransform, pair: Masked, index: int = 0) -> Any:
    return transform(pair, lambda view: view_generator(0, 0, index, view))


def test_crop__resizes_within_the_base_size_and_keeps_the_aspect() -> None:
    transform = SegmentationTransform(512)
    assert transform.resized(600, 800, 1.0) == [512, 683]
    assert transform.resized(600, 800, 0.5) == [256, 341]
    assert transform.resized(100, 1000, 2.0) == [410, 4096]  # the long side is what limits


def test_crop__small_images_are_padded_with_ignored_zeros(root: Path) -> None:
    data = folder(root, train_transform=plain(16, scale=(0.5, 0.5), color_jitter=(0.5, 0.5, 0.5, 0.25)))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch[0].size.tolist() == [[8, 10], [8, 10]]  # 20 x 24 to a short side of 16, and half of that
    images, masks = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[:8, :10] = False
    assert images.permute(0, 2, 3, 1)[:, outside].eq(0).all()
    assert images.permute(0, 2, 3, 1)[:, ~outside].ne(0).any(-1).all()
    assert masks[:, outside].eq(IGNORED).all()
    assert masks[:, ~outside].ne(IGNORED).any()


def test_crop__one_class_does_not_cover_too_much() -> None:
    mask = torch.zeros(16, 64, dtype=torch.int16)
    mask[:, 48:] = 1
    pair = Masked(torch.zeros(3, 16, 64, dtype=torch.uint8), mask)
    settings: dict[str, Any] = {"base_size": (64, 16)}

    def shares(limit: float) -> list[float]:
        crops = [crop(plain(16, max_class_share=limit, **settings), pair, i).mask.float().mean() for i in range(40)]
        return [max(float(mean), 1 - float(mean)) for mean in crops]

    assert sum(share < 0.75 for share in shares(1.0)) < 12  # 7 of 49 places
    assert sum(share < 0.75 for share in shares(0.75)) > 24  # 1 - (42 / 49)^10 = 0.79
    # Ignored pixels do not count: half of what is seen is of either class.
    mask[:, :48] = IGNORED
    mask[:8, :48] = 0
    mask[8:10, :48] = 1
    assert crop(plain(16, max_class_share=0.81, **settings), Masked(pair.image, mask)).mask.shape == (16, 16)


def test_crop__is_a_function_of_seed_epoch_and_index() -> None:
    pair, transform = draw_shapes(64, 0), plain(16, scale=(0.5, 2.0), hflip_prob=0.5, base_size=(64, 64))
    first, same, other = crop(transform, pair, 1), crop(transform, pair, 1), crop(transform, pair, 2)
    assert torch.equal(first.view.image, same.view.image)
    assert not torch.equal(first.view.image, other.view.image)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes__colour_is_the_class_and_images_never_change() -> None:
    data, other = (
        ShapesSegmentation(32, num_train=8, num_val=4, seed=0),
        ShapesSegmentation(32, num_train=8, num_val=4, seed=9),
    )
    for one in (data, other):
        one.setup()
    assert data.classes == ["ground", "red", "green", "blue", "yellow"]
    seen = set()
    for i in range(8):
        pair, mask = data.train_source[i]
        assert torch.equal(pair.image, other.train_source[i][0].image)
        for label in mask.unique().tolist():
            seen.add(label)
            red, green, blue = pair.image[:, mask == label].float().mean(1).tolist()
            brightest = {0: None, 1: red, 2: green, 3: blue}.get(label)
            if label == 0:
                assert max(red, green, blue) - min(red, green, blue) < 10
            elif label == 4:
                assert min(red, green) > 3 * blue
            else:
                assert brightest == max(red, green, blue) > 2 * sorted((red, green, blue))[1]
    assert seen == {0, 1, 2, 3, 4}
    assert not torch.equal(data.train_source[0][0].image, data.val_source[0][0].image)


def test_shapes__shuffled_masks_are_those_of_other_images() -> None:
    data, shuffled = (ShapesSegmentation(32, num_train=8, num_val=2, shuffle_masks=flag) for flag in (False, True))
    for one in (data, shuffled):
        one.setup()
    for i in range(8):
        assert torch.equal(data.train_source[i][0].image, shuffled.train_source[i][0].image)
        assert torch.equal(data.train_source[i - 1][1], shuffled.train_source[i][1])
        assert not torch.equal(data.train_source[i][1], shuffled.train_source[i][1])
    assert torch.equal(data.val_source[0][1], shuffled.val_source[0][1])


@pytest.mark.parametrize("settings", [{"img_size": 36}, {"img_size": 16}, {"num_train": 1}, {"num_val": 0}], ids=str)
def test_shapes__wrong_sizes(settings: dict[str, int]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=f"data.{key}={settings[key]} must be"):
        ShapesSegmentation(**settings)  # type: ignore[arg-type]
