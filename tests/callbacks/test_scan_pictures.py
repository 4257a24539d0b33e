"""Pictures of scans: the right network, images and numbers, and no trace in the run."""

import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from small_runs import digits, digits_of_one_view, dino, fit, log_of, mae, val_digits
from torch import Tensor

from vil_lightning import VisionLSTM
from vil_lightning.backbones.inspection import ScanRecord, record_scans, rollout
from vil_lightning.callbacks import drawing, scan_pictures
from vil_lightning.callbacks.scan_pictures import (
    ScanPictures,
    attention_sheet,
    gate_sheet,
    half_life_sheet,
    number,
    shown_blocks,
)
from vil_lightning.errors import ConfigError

TAGS = ["scans/gates", "scans/half-life", "scans/implicit attention"]
SIZE = 32


def recorded(**kwargs: Any) -> tuple[list[ScanRecord], Tensor]:
    """Scans of two images, uint8 (2, 3, 16, 16), of 4 x 4 patches, by a network with random gates."""
    torch.manual_seed(3)
    model = VisionLSTM(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_classes": 0, **kwargs}
    ).eval()
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad(), record_scans(model) as records:
        model.forward_features(images.float() / 128 - 1)
    return records, images


class Sheets:
    """The tiles that sheets are made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[list[drawing.Tile]]] = []

        def noted(rows: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.rows.append([list(row) for row in rows])
            return drawing.sheet(rows, *args, **kwargs)

        monkeypatch.setattr(scan_pictures, "sheet", noted)


def cells(picture: Tensor, side: int = SIZE) -> Tensor:
    """Colours (3, 4, 4) amid the cells of a map of 4 x 4 patches."""
    step = side // 4
    return picture[:, step // 2 : side : step, step // 2 : side : step]


# --- what the sheets show ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [(2, 1), (0, 0)])
@pytest.mark.parametrize("design", ["alternating", "quaddirectional_shared"])
def test_attention__colours_are_the_shares_of_the_query(
    design: str, query: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, images = recorded(block_design=design, global_pool="bilateral_cls_avg")
    sheets = Sheets(monkeypatch)
    attention_sheet(records, images, query, SIZE)
    (rows,) = sheets.rows
    place = query[0] * 4 + query[1]
    shown = [record for record in records if design == "alternating" or record.block != 2]  # first, middle (1), last
    assert [len(row) for row in rows] == [len(shown) + 2] * 2
    for image, row in enumerate(rows):
        for record, tile in zip(shown, row[1:-1], strict=True):
            assert tile.above == f"block {record.block + 1} of 4"
            assert (
                tile.arrow
                == {(0, 0): "right", (0, 1): "left", (1, 0): "down", (1, 1): "up"}[tuple(map(int, record.scan))]
            )
            weights = record.attention()[image, :, 1 + place, 1:-1].numpy()  # class tokens before and after
            shares = weights / np.abs(weights).sum(1, keepdims=True)
            mean = shares.mean(0)
            assert float(tile.below.removeprefix("±")) == pytest.approx(np.abs(mean).max(), rel=0.06)
            colours = cells(tile.picture).flatten(1)
            for other in range(16):
                i, j = divmod(other, 4)
                order, now = ((j, i), (query[1], query[0])) if record.scan.columns else ((i, j), query)
                if (order < now) if record.scan.reverse else (order > now):
                    assert colours[:, other].tolist() == [170, 170, 170]
                else:
                    expected = drawing.diverging(torch.tensor([[mean[other]]]), np.abs(mean).max())[:, 0, 0]
                    assert (colours[:, other].int() - expected.int()).abs().max() <= 1
            # Below, two heads a row, each up to its own largest share: 15 px and 2 px of white around them.
            assert tile.picture.shape == (3, SIZE + 2 * 17 + 2, SIZE)
            for head in range(4):
                top, left = SIZE + 2 + 17 * (head // 2), 17 * (head % 2)
                small = tile.picture[:, top : top + 15, left : left + 15]
                for other in range(16):
                    colour = small[:, int((other // 4 + 0.5) * 15 / 4), int((other % 4 + 0.5) * 15 / 4)]
                    value = torch.tensor([[shares[head, other]]])
                    expected = drawing.diverging(value, np.abs(shares[head]).max())[:, 0, 0]
                    if colour.tolist() != [170, 170, 170]:
                        assert (colour.int() - expected.int()).abs().max() <= 1
                    else:
                        assert value == 0


def test_attention__query_is_framed_and_rollout_is_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    records, images = recorded()
    sheets = Sheets(monkeypatch)
    picture = attention_sheet(records, images, (1, 3), SIZE)
    assert picture.dtype == torch.uint8
    flow = rollout(records)[:, 1 * 4 + 3]
    for image, row in enumerate(sheets.rows[0]):
        for tile in row:
            frame = (tile.picture[:, :SIZE] == torch.tensor([40, 220, 90])[:, None, None]).all(0)
            assert frame[6:18, 22:].sum() == frame.sum() > 50  # cell rows 8 to 15, columns 24 to 31
        assert torch.equal(
            row[0].picture[:, 20:], images[image].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, 20:]
        )
        others = np.delete(flow[image].numpy(), 7)
        expected = drawing.heat(flow[image].view(4, 4), 0, float(others.max()))
        assert torch.equal(cells(row[-1].picture), expected)
        shown, own = row[-1].below.split(",\nof itself ")
        assert float(shown.removeprefix("0 to ")) == pytest.approx(float(others.max()), rel=0.06)
        assert float(own) == pytest.approx(float(flow[image, 7]), rel=0.06)


def test_attention__of_a_single_head_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    records, images = recorded(num_heads=1)
    sheets = Sheets(monkeypatch)
    attention_sheet(records, images, (0, 0), SIZE)
    assert {tile.picture.shape for row in sheets.rows[0] for tile in row} == {(3, SIZE, SIZE)}


@pytest.mark.parametrize("design", ["alternating", "bidirectional"])
def test_gates__maps_of_every_head_from_lowest_to_highest(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records, images = recorded(block_design=design)
    sheets = Sheets(monkeypatch)
    gate_sheet(records, images[1], 48)  # maps of 32 px
    top, rows = sheets.rows
    assert torch.equal(top[0][0].picture, images[1].repeat_interleave(3, 1).repeat_interleave(3, 2))
    tiles = [tile for row in rows for tile in row]
    assert len(rows) == 4
    assert len(tiles) == len(records) * 9
    for i, record in enumerate(records):
        label, *maps = tiles[9 * i : 9 * i + 9]
        assert label.picture.shape[1] == 32
        logs = [*record.igate_map()[0], *record.half_life_map()[0].log()]
        for j, (tile, values) in enumerate(zip(maps, logs, strict=True)):
            kind = "input gate" if j < 4 else "half-life"
            assert tile.above == (f"{kind}\nhead {j % 4 + 1}" if record.block == 0 else "")
            low, high = (float(text) for text in tile.below.split(" to "))
            ends = values if j < 4 else values.exp()
            assert low == pytest.approx(float(ends.min()), rel=0.06, abs=0.006)
            assert high == pytest.approx(float(ends.max()), rel=0.06, abs=0.006)
            assert values.max() - values.min() > 0.1
            assert torch.equal(cells(tile.picture), drawing.heat(values, float(values.min()), float(values.max())))


def test_gates__rounding_is_not_shown_as_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    records, images = recorded()
    record = records[0]
    flat = record.fgate.new_full(record.fgate.shape, 5.0) + 1e-6 * torch.randn(record.fgate.shape)
    still = [ScanRecord(0, record.scan, record.layout, record.q, record.k, flat, flat)]
    sheets = Sheets(monkeypatch)
    gate_sheet(still, images[0], 48)
    for tile in sheets.rows[1][0][1:]:
        assert tile.picture.flatten(1).int().diff().abs().max() <= 1
        assert tile.below in ("5.00 to 5.00", "103 to 103")


@pytest.mark.parametrize("design", ["alternating", "quaddirectional"])
def test_half_life__a_cell_for_every_head_and_block(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records, _ = recorded(block_design=design)
    written: dict[int, tuple[str, tuple[int, ...], str | None]] = {}
    original = drawing.cell

    def noted(text: str, width: int, height: int, colour: Any = (255, 255, 255), arrow: str | None = None) -> Tensor:
        picture = original(text, width, height, colour, arrow)
        written[id(picture)] = (text, tuple(colour), arrow)
        return picture

    monkeypatch.setattr(scan_pictures, "cell", noted)
    sheets = Sheets(monkeypatch)
    half_life_sheet(records)
    scans = 1 if design == "alternating" else 4
    (rows,) = sheets.rows
    assert [len(row) for row in rows] == [5] * 5 * scans
    table = [[written[id(tile.picture)] for tile in row] for row in rows]
    logs = torch.stack([record.half_life().log() for record in records])
    for scan in range(scans):
        header, *heads = table[5 * scan : 5 * scan + 5]
        assert [text for text, _, _ in header] == ["block", "1", "2", "3", "4"]
        assert [row[0][0] for row in heads] == ["head 1", "head 2", "head 3", "head 4"]
        for block in range(4):
            record = records[block * scans + scan]
            assert (record.block, header[block + 1][2]) == (block, scan_pictures._arrow(record.scan))
            for head in range(4):
                text, colour, _ = heads[head][block + 1]
                assert float(text) == pytest.approx(float(record.half_life()[head]), rel=0.06)
                expected = drawing.heat(record.half_life().log()[head].view(1, 1), float(logs.min()), float(logs.max()))
                assert (torch.tensor(colour) - expected[:, 0, 0].int()).abs().max() <= 1


def test_sheets__numbers_that_are_not_finite() -> None:
    records, images = recorded()
    for fgate, igate in ((1e4, 0.0), (math.nan, math.nan)):
        bad = [
            ScanRecord(
                r.block, r.scan, r.layout, r.q, r.k, torch.full_like(r.igate, igate), torch.full_like(r.fgate, fgate)
            )
            for r in records
        ]
        for picture in (attention_sheet(bad, images, (0, 0), 32), gate_sheet(bad, images[0], 32), half_life_sheet(bad)):
            assert picture.dtype == torch.uint8


@pytest.mark.parametrize(
    "design, depth, expected",
    [
        ("alternating", 24, [0, 1, 11, 12, 22, 23]),
        ("alternating", 29, [0, 1, 13, 14, 27, 28]),
        ("alternating", 2, [0, 1]),
        ("alternating", 1, [0]),
        ("unidirectional", 7, [0, 3, 6]),
        ("quaddirectional", 6, [0, 2, 5]),
        ("alternating_quad", 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("alternating_quad", 20, [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]),
    ],
)
def test_shown_blocks__show_every_direction(design: str, depth: int, expected: list[int]) -> None:
    records, _ = recorded(block_design=design, depth=depth, img_size=8, patch_size=8)
    assert shown_blocks(records) == expected
    for blocks in (expected[: len(expected) // 3], expected[-(len(expected) // 3) :]):
        kinds = {record.scan for record in records if record.block in blocks}
        assert not blocks or kinds == {record.scan for record in records}


@pytest.mark.parametrize(
    "value, text",
    [
        *[
            (0.0, "0"),
            (4.6e-5, "5e-05"),
            (0.0312, "0.031"),
            (-0.5, "-0.5"),
            (1.24, "1.2"),
            (9.96, "10"),
            (280.3, "280"),
        ],
        *[(9999.0, "9999"), (12345.0, "12k"), (1e6, ">1M"), (math.inf, ">1M"), (math.nan, "nan")],
    ],
)
def test_number__in_few_letters(value: float, text: str) -> None:
    assert number(value) == text


# --- in a run ---------------------------------------------------------------------------------------------------------


class Kept(ScanPictures):
    """Keeps what the network is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[tuple[Any, Tensor, bool]] = []

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def note(network: VisionLSTM, args: Any) -> None:
            if network.blocks[0].mixer._forward_pre_hooks:  # being recorded
                self.seen.append((network, args[0].clone(), network.training))

        networks = [part for part in pl_module.modules() if isinstance(part, VisionLSTM)]
        handles = [
            network.patch_embed.register_forward_pre_hook(lambda _, args, network=network: note(network, args))
            for network in networks
        ]
        super()._draw(trainer, pl_module)
        for handle in handles:
            handle.remove()


def test_run__teacher_and_the_same_val_images_every_time(tmp_path: Path) -> None:
    kept = Kept(num_images=3, every_n_epochs=1, size=32)
    _, model, data = fit(tmp_path, [kept], max_epochs=2)
    images, _ = val_digits(digits(), [0, 20, 39])
    assert len(kept.seen) == 3
    for network, x, training in kept.seen:
        assert network is model.teacher["backbone"]
        assert not training
        assert torch.equal(x, data.normalize(images))
    log = log_of(tmp_path)
    assert sorted(tag for tag in log.Tags()["images"]) == TAGS
    for tag in TAGS:
        assert [picture.step for picture in log.Images(tag)] == [0, 2, 4]
    first, *_, last = log.Images("scans/implicit attention")
    assert first.encoded_image_string != last.encoded_image_string  # it has learned


def test_run__picture_is_that_of_the_network(tmp_path: Path) -> None:
    _, model, data = fit(tmp_path, [ScanPictures(num_images=2, size=32, query=(3, 0))])
    images, _ = val_digits(digits(), [0, 39])
    backbone = model.teacher["backbone"].eval()
    with torch.no_grad(), record_scans(backbone) as records:
        backbone.forward_features(data.normalize(images))
    expected = {
        "scans/implicit attention": attention_sheet(records, images, (3, 0), 32),
        "scans/gates": gate_sheet(records, images[0], 32),
        "scans/half-life": half_life_sheet(records),
    }
    for tag, picture in expected.items():
        (tmp_path / "sheet.png").write_bytes(log_of(tmp_path).Images(tag)[-1].encoded_image_string)
        logged = torch.from_numpy(np.asarray(Image.open(tmp_path / "sheet.png")).copy()).permute(2, 0, 1)
        assert torch.equal(logged, picture), tag


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 2, 3]), (5, [0, 3])])
def test_run__every_few_epochs_and_at_the_end(tmp_path: Path, every: int, expected: list[int]) -> None:
    fit(tmp_path, [ScanPictures(num_images=1, every_n_epochs=every, size=16)], max_epochs=3, limit_train_batches=1)
    assert [picture.step for picture in log_of(tmp_path).Images(TAGS[0])] == expected


def test_run__query_in_the_centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = []

    def noted(records: Any, images: Any, query: Any, size: int) -> Tensor:
        queries.append(query)
        return attention_sheet(records, images, query, size)

    monkeypatch.setattr(scan_pictures, "attention_sheet", noted)
    fit(tmp_path, [ScanPictures(num_images=1, size=16)], mae(), digits_of_one_view())
    assert queries == [(2, 2)] * 2


def test_run__weights_and_surroundings_as_without(tmp_path: Path) -> None:
    class Around(ScanPictures):
        def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.teacher["backbone"].patch_embed.train()  # parts that a user keeps in another mode
            pl_module.student["backbone"].patch_embed.eval()
            before = self.surroundings(pl_module)
            super()._draw(trainer, pl_module)
            assert self.surroundings(pl_module) == before

        def surroundings(self, module: L.LightningModule) -> tuple[Any, ...]:
            modes = [child.training for child in module.modules()]
            hooks = sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in module.modules())
            gradients = [p.grad is None or float(p.grad.abs().sum()) for p in module.parameters()]
            return modes, hooks, gradients, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    _, plain, _ = fit(tmp_path / "plain", [], max_epochs=2)
    _, watched, _ = fit(tmp_path / "watched", [Around(every_n_epochs=1, size=16)], max_epochs=2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_run__in_bfloat16(tmp_path: Path) -> None:
    fit(tmp_path, [ScanPictures(num_images=1, size=16)], precision="bf16-mixed")
    assert sorted(log_of(tmp_path).Tags()["images"]) == TAGS


@pytest.mark.parametrize("first", [True, False])
def test_run__first_process_alone_without_collectives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"collective operation in {sys._getframe(1).f_code.co_name}")

    model, data = dino(), digits()
    data.setup("fit")
    model.configure_model()
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=logger, enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda self: first))
    for owner in (torch.distributed, L.pytorch.strategies.SingleDeviceStrategy, L.LightningModule):
        for name in ("all_gather", "all_reduce", "barrier", "broadcast", "reduce"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, refuse)
    kept = Kept(num_images=1, size=16)
    kept.on_train_epoch_end(trainer, model)
    assert len(kept.seen) == int(first)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_refused__network_without_scans(tmp_path: Path) -> None:
    vit = dino(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=True
    )
    with pytest.raises(ConfigError, match=r"backbone of DINO is a VisionTransformer.*model\.backbone\.name.*vil2_"):
        fit(tmp_path, [ScanPictures()], vit)


@pytest.mark.parametrize("query", [(4, 0), (0, 4), (-1, 0)])
def test_refused__query_outside_the_image(tmp_path: Path, query: tuple[int, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"none of the 4 x 4 patches.*from \(0, 0\) to \(3, 3\), or to center"
    ) as error:
        fit(tmp_path, [ScanPictures(query=query)])
    assert str(query) in str(error.value)


@pytest.mark.parametrize("name, value", [("num_images", 0), ("every_n_epochs", 0), ("size", 15)])
def test_refused__too_small(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"ScanPictures: {name}={value} must be at least"):
        ScanPictures(**{name: value})
