"""Pictures of principal components: of all tokens together, with colours that stay, and no trace in the run."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import VIL, digits, digits_of_one_view, dino, fit, log_of, mae, val_digits
from torch import Tensor, nn

from vil_lightning.callbacks.pca_maps import TAG, PCAMaps, match_basis, patch_maps
from vil_lightning.errors import ConfigError


class Kept(PCAMaps):
    """Keeps the numbers behind the pictures."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drawn: list[tuple[Tensor, Tensor, list[float]]] = []  # token maps, components, shares

    def _components(self, maps: Tensor) -> tuple[Tensor, list[float]]:
        result = super()._components(maps)
        self.drawn.append((maps, *result))
        return result


def components_by_hand(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, h, w, 3) with free signs, and shares of the variance, from the eigenvectors of the covariance."""
    n, _, h, w = maps.shape
    tokens = np.array([maps[i, :, y, x].tolist() for i in range(n) for y in range(h) for x in range(w)])
    values, vectors = np.linalg.eigh(np.cov(tokens.T))
    scores = (tokens - tokens.mean(0)) @ vectors[:, ::-1][:, :3]
    return scores.reshape(n, h, w, 3), values[::-1][:3] / values.sum()


def test_pca_maps__are_the_components_of_the_tokens_of_all_images(tmp_path: Path) -> None:
    kept = Kept(num_images=5)
    _, model, data = fit(tmp_path, [kept], max_epochs=2)
    images, _ = val_digits(data, [0, 10, 20, 29, 39])
    backbone = model.teacher["backbone"]
    assert not torch.equal(kept.drawn[0][0], kept.drawn[-1][0])  # it has learned
    with torch.no_grad():
        tokens = backbone.forward_features(data.normalize(images))  # (5, 16, 32), no class tokens
    maps, components, shares = kept.drawn[-1]
    torch.testing.assert_close(maps, tokens.transpose(1, 2).reshape(5, 32, 4, 4))

    expected, expected_shares = components_by_hand(maps)
    assert sorted(shares, reverse=True) == pytest.approx(expected_shares.tolist(), rel=1e-3)
    order = np.argsort(shares)[::-1]
    for i in range(3):
        ours = components[:, int(order[i])].numpy()
        sign = np.sign((ours * expected[..., i]).sum())
        np.testing.assert_allclose(ours, sign * expected[..., i], atol=1e-3)


def test_pca_maps__picture_shows_image_colours_and_each_component(tmp_path: Path) -> None:
    kept = Kept(num_images=3, size=32)
    fit(tmp_path, [kept])
    picture = log_of(tmp_path).Images(TAG)[-1]
    (tmp_path / "sheet.png").write_bytes(picture.encoded_image_string)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)  # (H, W, 3)

    _, components, _ = kept.drawn[-1]
    limits = np.quantile(components.abs().numpy().transpose(1, 0, 2, 3).reshape(3, -1), 0.98, axis=1)
    unit = np.clip(components.numpy() / limits[:, None, None], -1, 1)  # (3 images, 3, 4, 4)
    colours = np.round(127.5 + 127.5 * unit).transpose(0, 2, 3, 1)
    images, _ = val_digits(digits(), [0, 20, 39])

    left, top = find(sheet, images[0].permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1))
    column_left = find_columns(sheet, top)
    row_step = 36  # 32 px and a gap of 4
    for row in range(3):
        y = top + row * row_step
        image = sheet[y : y + 32 : 2, left : left + 32 : 2]
        np.testing.assert_array_equal(image, images[row].permute(1, 2, 0).numpy())
        rgb = sheet[y + 4 : y + 32 : 8, column_left[1] + 4 : column_left[1] + 32 : 8]
        assert np.abs(rgb - colours[row]).max() <= 1
        for i in range(3):
            tile = sheet[y + 4 : y + 32 : 8, column_left[2 + i] + 4 : column_left[2 + i] + 32 : 8]
            positive, negative = unit[row, i] > 0.3, unit[row, i] < -0.3
            assert (tile[positive][:, 0] > tile[positive][:, 2] + 10).all()  # red
            assert (tile[negative][:, 2] > tile[negative][:, 0] + 10).all()  # blue
    assert (unit > 0.3).any() and (unit < -0.3).any()  # noqa: PT018


def find(sheet: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Where in the sheet (left, top) a part of it is."""
    height, width, _ = part.shape
    for y, x in itertools.product(range(sheet.shape[0] - height + 1), range(sheet.shape[1] - width + 1)):
        if (sheet[y, x] == part[0, 0]).all() and (sheet[y : y + height, x : x + width] == part).all():
            return x, y
    raise AssertionError("the part is not in the sheet")


def find_columns(sheet: np.ndarray, top: int) -> list[int]:
    """Left edges of the pictures: what lies between columns is white from top to bottom."""
    white = (sheet[top:] == 255).all((0, 2))
    starts = [x for x in range(1, len(white)) if white[x - 1] and not white[x]]
    return starts[:1] + [x for i, x in enumerate(starts[1:], 1) if x - starts[i - 1] >= 32]


# --- colours stay -----------------------------------------------------------------------------------------------------


def test_match_basis__takes_the_earlier_order_and_signs() -> None:
    previous, _ = torch.linalg.qr(torch.randn(9, 3))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            shuffled = previous[:, list(order)] * torch.tensor(signs)
            assert torch.equal(match_basis(shuffled, previous), previous)


def test_match_basis__of_a_turned_basis_is_nearest() -> None:
    previous = torch.eye(6)[:, :3]
    turned, _ = torch.linalg.qr(previous + 0.2 * torch.randn(6, 3))
    matched = match_basis(turned[:, [2, 0, 1]] * torch.tensor([1.0, -1.0, -1.0]), previous)
    assert float((matched * previous).sum(0).min()) > 0.8


def cloud(first: list[float], second: list[float], deviations: tuple[float, float]) -> Tensor:
    """Token maps (4, 4, 6, 6) that vary along two directions."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4 * 36, 2, generator=generator)
    scores, _ = torch.linalg.qr(scores - scores.mean(0))  # exactly uncorrelated
    scores = scores * 12 * torch.tensor(deviations)
    noise = 0.01 * torch.randn(4 * 36, 4, generator=generator)
    tokens = scores @ torch.tensor([first, second]) + noise
    return tokens.view(4, 6, 6, 4).permute(0, 3, 1, 2)


def test_pca_maps__keep_their_colours_when_signs_and_order_change() -> None:
    # Whose largest entry is negative in the first and positive in the second, so that the sign of their own would flip.
    before = cloud([0.71, -0.70, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], (2.0, 1.0))
    after = cloud([0.70, -0.71, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], (1.0, 2.0))  # and the second is now the larger one
    callback, apart = PCAMaps(), PCAMaps()
    first, shares = callback._components(before)
    second, later_shares = callback._components(after)
    alone, _ = apart._components(after)
    assert shares[0] > shares[1]
    assert later_shares[0] < later_shares[1]
    assert not torch.allclose(alone, second, atol=0.1)
    for i, growth in ((0, 0.5), (1, 2.0)):
        torch.testing.assert_close(second[:, i], growth * first[:, i], atol=0.1, rtol=0)


def test_pca_maps__keep_their_colours_when_a_run_is_continued(tmp_path: Path) -> None:
    before = cloud([0.71, -0.70, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], (2.0, 1.0))
    after = cloud([0.70, -0.71, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], (1.0, 2.0))
    callback, continued = PCAMaps(), PCAMaps()
    callback._components(before)
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    continued.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(continued._components(after)[0], callback._components(after)[0])
    PCAMaps().load_state_dict(PCAMaps().state_dict())  # before the first picture there is nothing to keep


def test_pca_maps__of_fewer_tokens_than_components() -> None:
    components, shares = PCAMaps()._components(torch.randn(2, 5, 1, 1))
    assert components.shape == (2, 3, 1, 1)
    assert shares[0] == pytest.approx(1, abs=1e-5)
    assert shares[2] == 0


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "dim", "grid"),
    [
        (VIL, {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2}, 32, (4, 6)),
        (VIL, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "global_pool": "middle_cls"}, 32, (4, 4)),
        ("vit_tiny_patch16_224", {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 1}, 48, (4, 6)),
        ("resnet10t", {}, 512, (1, 2)),
    ],
)
def test_patch_maps__are_the_final_patch_tokens(name: str, kwargs: Any, dim: int, grid: tuple[int, int]) -> None:
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    images = torch.randn(2, 3, 32, 48 if kwargs.get("img_size") != 32 else 32)
    with torch.no_grad():
        maps, final = patch_maps(model, images), model.forward_features(images)
    assert maps.shape == (2, dim, *grid)
    if final.ndim == 3:
        patches = model.split_tokens(final)[0] if hasattr(model, "split_tokens") else final[:, -grid[0] * grid[1] :]
        final = patches.transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(maps, final)


class WithoutIntermediates(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the run has started")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_pca_maps__refuse_a_network_without_intermediates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Linear has no forward_intermediates.*model\.backbone\.name"):
        fit(tmp_path, [PCAMaps()], WithoutIntermediates(), digits_of_one_view())


@pytest.mark.parametrize("name", ["num_images", "every_n_epochs", "size"])
def test_pca_maps__refuse_counts_below_1(name: str) -> None:
    with pytest.raises(ConfigError, match=f"PCAMaps: {name}=0 must be at least 1"):
        PCAMaps(**{name: 0})


# --- when, and how ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 4, 6]), (5, [0, 6])])
def test_pca_maps__before_training_every_few_epochs_and_at_the_end(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    fit(tmp_path, [PCAMaps(num_images=1, every_n_epochs=every, size=8)], max_epochs=3)
    assert [picture.step for picture in log_of(tmp_path).Images(TAG)] == expected


def test_pca_maps__at_a_planned_number_of_steps(tmp_path: Path) -> None:
    fit(tmp_path, [PCAMaps(num_images=1, size=8)], max_epochs=9, max_steps=3)
    assert [picture.step for picture in log_of(tmp_path).Images(TAG)] == [0, 3]


def test_pca_maps__of_a_method_with_one_network_in_half_precision(tmp_path: Path) -> None:
    kept = Kept(num_images=2)
    fit(tmp_path, [kept], mae(), digits_of_one_view(), precision="bf16-mixed")
    for maps, components, _ in kept.drawn:
        assert maps.dtype == components.dtype == torch.float32
        assert components.isfinite().all()


def test_pca_maps__of_a_diverged_network_are_left_out(tmp_path: Path) -> None:
    model = dino()
    torch.nn.init.constant_(model.teacher["backbone"].norm.weight, torch.nan)
    kept = Kept()
    with pytest.raises(RuntimeError, match="The run has diverged"):
        fit(tmp_path, [kept], model)
    assert kept.drawn == []


def test_pca_maps__are_drawn_by_the_first_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    kept = Kept()
    fit(tmp_path, [kept], logger=False)
    assert kept.drawn == []
