"""The view of supervised training: 10,000 measured draws against the numbers of the papers, determinism, refusals."""

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from measured import assert_rate, assert_uniform, draw, image, parameters_of
from torchvision.transforms.v2 import RandomResizedCrop

from vil_lightning.data import TrainTransform, transforms
from vil_lightning.data.loading import EpochSampler, ResumableLoader, TransformedDataset, ViewGenerators, collate
from vil_lightning.errors import ConfigError

DRAWS = 10_000
DEIT = {"rand_augment": "rand-m9-mstd0.5-inc1", "three_augment": False, "color_jitter": (0.0, 0.0, 0.0, 0.0)}
QUIET: dict[str, Any] = {"hflip_prob": 0.0, "three_augment": False, "color_jitter_prob": 0.0}


# --- the recipe of the ViL paper --------------------------------------------------------------------------------------


def test_train_transform__recipe_of_the_paper() -> None:
    (view,) = parameters_of(TrainTransform(8), DRAWS)
    three = {"grayscale": view["grayscale"] > 0, "solarize": view["solarize"] > 0, "blur": view["sigma"] > 0}
    assert torch.equal(
        sum(which.int() for which in three.values()), torch.ones(DRAWS, dtype=torch.int32)
    )  # exactly one
    for which in three.values():
        assert_rate(which.sum(), DRAWS, 1 / 3, deviations=3)
    assert_uniform(view["sigma"][three["blur"]], 0.1, 2.0)
    assert_rate(view["flip"].sum(), DRAWS, 0.5, deviations=3)
    for name in ("brightness", "contrast", "saturation"):  # always, in any order
        assert_uniform(view[name], 0.7, 1.3)
    assert not view["hue"].any()
    for order in range(24):
        assert_rate((view["order"] == order).sum(), DRAWS, 1 / 24)
    assert TrainTransform.stages == ("flip", "grayscale", "solarize", "blur", "jitter")


def test_train_transform__crops_are_those_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = []

    def record(picture: torch.Tensor, wanted: list[Any], sizes: list[int]) -> list[torch.Tensor]:
        boxes.extend(wanted)
        assert sizes == [8]
        return [picture]

    monkeypatch.setattr(transforms, "crop_all", record)
    transform, picture = TrainTransform(8, **QUIET), image(256)
    for i in range(DRAWS):
        transform(picture, draw(i))
    assert len(boxes) == DRAWS
    assert all(0 <= top <= top + h <= 256 and 0 <= left <= left + w <= 256 for top, left, h, w in boxes)
    areas = torch.tensor([h * w / 256**2 for _, _, h, w in boxes])
    ratios = torch.tensor([w / h for _, _, h, w in boxes])
    slack = 0.015  # sides are whole pixels, the shortest of which are 63
    assert 0.08 * (1 - slack) <= float(areas.min()) < 0.085
    assert 0.95 < float(areas.max()) <= 1
    assert 3 / 4 * (1 - slack) <= float(ratios.min()) < 0.76
    assert 1.32 < float(ratios.max()) <= 4 / 3 * (1 + slack)
    # The same distributions as in torchvision's own operation: mean and spread of area, ratio and place.
    reference = RandomResizedCrop(8)
    drawn = [reference.make_params([picture]) for _ in range(DRAWS)]
    ours = torch.tensor(boxes, dtype=torch.float64)
    theirs = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn], dtype=torch.float64)
    for values in (ours, theirs):
        values[:, :2] += values[:, 2:] / 2  # the middle of a box
        values[:, 2:] = torch.stack([values[:, 2:].prod(1) / 256**2, (values[:, 3] / values[:, 2]).log()], dim=1)
    error = (ours.var(0) / DRAWS + theirs.var(0) / DRAWS).sqrt()
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all())
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.04, atol=0)


# --- other crops and policies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"crop": "simple"}, DEIT, {"rotation": 20.0}], ids=str)
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 20, 31), (3, 50, 9), (3, 1, 400)])
def test_train_transform__size_and_dtype(settings: dict[str, Any], shape: tuple[int, int, int]) -> None:
    picture = torch.randint(0, 256, shape, dtype=torch.uint8)
    before, transform = picture.clone(), TrainTransform(16, **settings)
    for i in range(20):
        view = transform(picture, draw(i)).image
        assert (view.shape, view.dtype) == ((3, 16, 16), torch.uint8)
    assert torch.equal(picture, before)


def test_simple_crop__any_window_of_the_reflected_image() -> None:
    picture = torch.arange(12 * 20, dtype=torch.uint8).view(1, 12, 20).expand(3, -1, -1).contiguous()
    padded = torch.from_numpy(np.pad(picture.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"))
    transform = TrainTransform(12, crop="simple", **QUIET)  # the short side is 12 already: nothing is resized
    places = [(top, left) for top in range(9) for left in range(17)]
    windows = {padded[:, t : t + 12, left : left + 12].numpy().tobytes(): (t, left) for t, left in places}
    assert len(windows) == len(places)
    seen = [windows[transform(picture, draw(i)).image.numpy().tobytes()] for i in range(2000)]
    assert set(seen) == set(places)  # the rarest of 153 windows is missed with probability 3e-4
    assert_rate(sum(top == 0 for top, _ in seen), 2000, 1 / 9)
    assert_rate(sum(left == 16 for _, left in seen), 2000, 1 / 17)


def test_simple_crop__resizes_the_short_side() -> None:
    halves = torch.zeros(3, 40, 80, dtype=torch.uint8)
    halves[:, :, 40:] = 200
    transform = TrainTransform(8, crop="simple", **QUIET)  # 8 x 16 px, of which at most 4 columns are reflected
    shares = [float((transform(halves, draw(i)).image > 100).float().mean()) for i in range(200)]
    assert (min(shares), max(shares)) == (0.0, 1.0)


def test_rand_augment__draws_from_the_generator_of_the_view_alone() -> None:
    transform, picture = TrainTransform(32, **DEIT), image(40)
    expected = [transform(picture, draw(i)).image for i in range(8)]
    random.seed(1)
    np.random.seed(2)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    assert all(torch.equal(transform(picture, draw(i)).image, view) for i, view in enumerate(expected))
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


def test_rand_augment__acts_on_the_flipped_picture() -> None:
    still = {**DEIT, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip_prob": 1.0}
    transform, picture = TrainTransform(16, **still), image(16)
    transform._policy = lambda seen: seen
    view = transform(picture, draw())
    assert torch.equal(view.image, picture.flip(-1))
    assert view.parameters[0] == 0  # and is not flipped again


def test_rand_augment__restores_the_generators_after_an_error() -> None:
    transform = TrainTransform(8, **DEIT)

    def fails(picture: Any) -> None:
        random.random()
        np.random.rand()
        raise ZeroDivisionError

    transform._policy = fails
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ZeroDivisionError):
        transform(image(), draw())
    assert random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_rand_augment__is_the_policy_of_deit() -> None:
    policy = TrainTransform(224, **DEIT)._policy
    assert (policy.num_layers, len(policy.ops), policy.choice_weights) == (2, 15, None)
    for op in policy.ops:
        assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
        assert op.kwargs == {"fillcolor": (124, 116, 104), "resample": transforms.Image.Resampling.BICUBIC}
        assert op.hparams["translate_const"] == 100
    assert {op.name for op in policy.ops} >= {"PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "Invert"}


def test_rand_augment__changes_pictures() -> None:
    still = TrainTransform(16, **{**DEIT, "hflip_prob": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)})
    picture = image(16)
    views = [still(picture, draw(i)).image for i in range(200)]
    changed = sum(not torch.equal(view, picture) for view in views)
    assert 100 < changed < 190  # each of two operations does nothing in half of the cases
    assert len({view.numpy().tobytes() for view in views}) > 80


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"crop": "simple"}, DEIT], ids=["vil", "simple", "deit"])
def test_train_transform__depends_on_seed_epoch_and_index_alone(settings: dict[str, Any]) -> None:
    picture = image(24)

    def view(seed: int, epoch: int, index: int) -> bytes:
        random.seed()
        np.random.seed()
        torch.rand(1)
        made = TrainTransform(16, **settings)(picture, ViewGenerators(seed, epoch, index))
        return made.image.numpy().tobytes() + made.parameters.numpy().tobytes()

    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    views = {key: view(*key) for key in keys}
    assert all(view(*key) == views[key] for key in keys)
    assert len(set(views.values())) == len(keys)


def test_train_transform__independent_of_worker_processes() -> None:
    class Pictures:
        labels = list(range(12))

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.arange(3 * 16 * 16, dtype=torch.uint8).view(3, 16, 16) + index, index

    def batches(num_workers: int) -> list[Any]:
        dataset = TransformedDataset(Pictures(), TrainTransform(16, **DEIT), seed=5)
        sampler = EpochSampler(dataset, 1, 0, shuffle=True, seed=5, drop_last=True)
        return list(ResumableLoader(dataset, 4, sampler=sampler, num_workers=num_workers, collate_fn=collate))

    for alone, helped in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone[0].image, helped[0].image)
        assert torch.equal(alone[0].parameters, helped[0].parameters)
        assert torch.equal(alone[1], helped[1])


def test_train_transform__can_be_sent_to_workers() -> None:
    transform, picture = TrainTransform(16, **DEIT), image(16)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(picture, draw()).image, transform(picture, draw()).image)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 0}, r"img_size=0 must be at least 1"),
        ({"img_size": 4, "crop": "simple"}, r"img_size=4 must be at least 5 with crop='simple'"),
        ({"scale": (0.0, 1.0)}, r"scale=\(0\.0, 1\.0\) must satisfy"),
        ({"scale": (0.5, 0.4)}, r"scale="),
        ({"scale": (0.5, 1.4)}, r"scale="),
        ({"ratio": (0.0, 1.0)}, r"ratio="),
        ({"ratio": (2.0, 1.0)}, r"ratio="),
        ({"crop": "centre"}, r"crop='centre' must be 'random_resized' or 'simple'"),
        ({"hflip_prob": 1.5}, r"hflip_prob=1\.5 must be in \[0, 1\]"),
        ({"color_jitter_prob": -0.1}, r"color_jitter_prob=-0\.1"),
        ({"color_jitter": (0.3, 0.3, -0.3, 0.0)}, r"color_jitter="),
        ({"color_jitter": (0.3, 0.3, 0.3, 0.6)}, r"color_jitter=.*at most 0\.5"),
        ({"color_jitter": (0.3, 0.3, 0.3)}, r"color_jitter=.*four numbers"),
        ({"rotation": -1.0}, r"rotation=-1\.0 must not be negative"),
        ({"rand_augment": "rand-m9"}, r"rand_augment='rand-m9' replaces 3-Augment.*three_augment to false"),
        ({"rand_augment": "augmix-m5", "three_augment": False}, r"rand_augment='augmix-m5' is no RandAugment"),
        ({"rand_augment": "rand-x9", "three_augment": False}, r"rand_augment='rand-x9' is no"),
        ({"rand_augment": "rand-tnone", "three_augment": False}, r"rand_augment='rand-tnone' is no"),
    ],
)
def test_train_transform__bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.train_transform\.{message}"):
        TrainTransform(**arguments)
