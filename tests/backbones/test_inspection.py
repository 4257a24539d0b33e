"""What is recorded of scans, against scan orders written out, the recurrence and loops."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from test_variants import SCANS_OF, order
from test_vision_lstm import VERSION_1, build, images
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning import VisionLSTM
from vil_lightning.backbones.inspection import ScanRecord, between_patches, record_scans, rollout
from vil_lightning.backbones.layers import ClassTokens, Layout
from vil_lightning.backbones.vision_lstm import BLOCK_DESIGNS, Scan
from vil_lightning.ops import mlstm

H, W = 3, 5
NAMES = {
    "rows": Scan(),
    "rows_reversed": Scan(reverse=True),
    "columns": Scan(columns=True),
    "columns_reversed": Scan(columns=True, reverse=True),
}


def vil(**kwargs: Any) -> VisionLSTM:
    return build(**{"img_size": (16 * H, 16 * W), "num_classes": 0, **kwargs}).double()


def recorded(model: VisionLSTM, visible: Tensor | None = None) -> list[ScanRecord]:
    with torch.no_grad(), record_scans(model) as records:
        model.forward_features(images(16 * H, 16 * W).double(), visible)
    return records


def visited(name: str, layout: Layout) -> Tensor:
    """Positions (B, S) in the order of the image at which a scan is after 0, 1, 2, … steps."""
    if layout.visible is None:
        return torch.tensor([order(name, layout.h, layout.w, layout.cls)] * 2)
    return torch.tensor([_visited_visible(name, layout, row) for row in layout.visible.tolist()])


def _visited_visible(name: str, layout: Layout, patches: list[int]) -> list[int]:
    """The same for the visible patches of one image; there are class tokens before and after them at most."""
    cls, count = layout.cls, len(patches)
    assert not cls.amid
    places = list(range(count))
    if "columns" in name:
        places.sort(key=lambda i: (patches[i] % layout.w, patches[i] // layout.w))
    whole = [*range(cls.before), *(cls.before + i for i in places)]
    whole += range(cls.before + count, cls.before + count + cls.after)
    return whole[::-1] if "reversed" in name else whole


def gather(x: Tensor, places: Tensor) -> Tensor:
    """(B, NH, S, C) and (B, S) -> (B, NH, S, C)."""
    return torch.stack([sample[:, index] for sample, index in zip(x, places, strict=True)])


class Noted:
    """q, k, v of every branch call, as the projections gave them, and what the mLSTM made of them."""

    def __init__(self, model: VisionLSTM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Tensor, ...], Tensor, bool]] = []

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            out = mlstm(*args, reverse=kwargs["reverse"], backend="recurrent")
            self.calls.append((args, out, kwargs["reverse"]))
            return out

        monkeypatch.setattr("vil_lightning.backbones.layers.mlstm", noted)


# --- attention, orders and maps, for every design ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pool, masked",
    [
        ("bilateral_concat", False),
        ("middle_cls", False),
        ("bilateral_cls_concat", False),
        ("bilateral_cls_concat", True),
    ],
)
@pytest.mark.parametrize("design", BLOCK_DESIGNS)
def test_records__of_every_design(design: str, pool: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    visible = torch.tensor([[0, 1, 4, 6, 7, 9, 13], [2, 3, 5, 8, 11, 12, 14]]) if masked else None
    version = VERSION_1 if design == "bidirectional" else {}
    model = vil(**{**version, "block_design": design, "global_pool": pool})
    noted = Noted(model, monkeypatch)
    records = recorded(model, visible)
    names = [(block, name) for block in range(4) for name in SCANS_OF[design][block]]
    assert [(record.block, record.scan) for record in records] == [(block, NAMES[name]) for block, name in names]
    assert len(noted.calls) == len(records)
    for (_, name), record, (args, hidden, reverse) in zip(names, records, noted.calls, strict=True):
        layout = record.layout
        assert (layout.h, layout.w, layout.cls) == (H, W, model.cls_layout)
        assert reverse == record.scan.reverse
        places = visited(name, layout)  # by step
        assert record.order().tolist() == places.argsort(1).tolist()
        # The sequence the branch saw, in the order of the image: its last token is what a reversed scan visits first.
        to_image = (places.flip(1) if reverse else places).argsort(1)
        v, h = (gather(x, to_image) for x in (args[2], hidden))
        weights = record.attention()
        torch.testing.assert_close(weights @ v, h, atol=1e-9, rtol=1e-9)
        steps = places.argsort(1)
        unseen = steps[:, None, :] > steps[:, :, None]  # token (row) is visited before token (column)
        assert not weights[unseen[:, None].expand_as(weights)].any()
        patches = [i for i in range(layout.seq_len) if i not in _class_places(layout)]
        igate, fgate = (gather(x[..., None], to_image)[:, :, patches, 0] for x in args[3:])
        where = torch.arange(H * W).expand(2, -1) if visible is None else visible
        for values, shown in (
            (igate, record.igate_map()),
            (math.log(2) / -F.logsigmoid(fgate), record.half_life_map()),
        ):
            expected = torch.full((2, 4, H * W), torch.nan, dtype=torch.float64)
            for image in range(2):
                expected[image][:, where[image]] = values[image]
            torch.testing.assert_close(shown, expected.view(2, 4, H, W), equal_nan=True)


def _class_places(layout: Layout) -> list[int]:
    count = layout.seq_len - sum(layout.cls)
    before, amid, after = layout.cls
    half = before + (count + 1) // 2
    return [*range(before), *range(half, half + amid), *range(layout.seq_len - after, layout.seq_len)]


@pytest.mark.parametrize("cls", [ClassTokens(), ClassTokens(1, 0, 1), ClassTokens(amid=1)])
def test_between_patches__leaves_class_tokens_out(cls: ClassTokens) -> None:
    layout = Layout(H, W, cls)
    weights = torch.randn(2, 4, layout.seq_len, layout.seq_len)
    kept = np.delete(np.delete(weights.numpy(), _class_places(layout), 2), _class_places(layout), 3)
    assert np.array_equal(between_patches(weights, layout).numpy(), kept)


# --- half-life --------------------------------------------------------------------------------------------------------


def test_half_life__that_of_the_initial_biases() -> None:
    torch.manual_seed(0)
    model = VisionLSTM(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=0).eval()
    with torch.no_grad(), record_scans(model) as records:
        model.forward_features(torch.randn(3, 3, 32, 32))
    expected = [math.log(2) / math.log1p(math.exp(-bias)) for bias in (3, 4, 5, 6)]  # 14.3, 38.2, 103, 280
    for record in records:
        assert record.half_life().tolist() == pytest.approx(expected, rel=1e-4)
        assert record.half_life_map().mean((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-4)


def test_half_life__after_it_half_is_left() -> None:
    record = recorded(vil(global_pool="middle_cls"))[1]
    product = record.fgate.sigmoid().prod(2).prod(0)  # (NH,): what all forget gates of the batch leave
    assert len(set(product.tolist())) == 4
    num_gates = record.fgate.shape[0] * record.fgate.shape[2]
    left = product ** (record.half_life() / num_gates)
    torch.testing.assert_close(left, torch.full((4,), 0.5, dtype=torch.float64))


def test_half_life__gate_that_never_forgets() -> None:
    record = recorded(vil())[0]
    stuck = ScanRecord(
        0, record.scan, record.layout, record.q, record.k, record.igate, torch.full_like(record.fgate, 1e4)
    )
    assert stuck.half_life().tolist() == [math.inf] * 4
    assert stuck.half_life_map().isinf().all()


# --- rollout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "middle_cls"])
@pytest.mark.parametrize("design", ["alternating", "quaddirectional_shared"])
def test_rollout__in_loops(design: str, pool: str) -> None:
    records = recorded(vil(block_design=design, global_pool=pool))
    count = records[0].layout.seq_len
    kept = [i for i in range(count) if i not in _class_places(records[0].layout)]
    actual = rollout(records)
    assert actual.shape == (2, H * W, H * W)
    for image in range(2):
        flow = np.eye(count)
        for block in range(4):
            step = np.zeros((count, count))
            scans = [record.attention()[image].numpy() for record in records if record.block == block]
            for t in range(count):
                for scan in scans:
                    for head in scan:
                        step[t] += np.abs(head[t]) / np.abs(head[t]).sum() / (len(scans) * len(scan))
            flow = (0.5 * np.eye(count) + 0.5 * step) @ flow
        np.testing.assert_allclose(flow.sum(1), 1)
        np.testing.assert_allclose(actual[image].numpy(), flow[np.ix_(kept, kept)], atol=1e-12)


def test_rollout__some_blocks_only() -> None:
    records = recorded(vil())
    torch.testing.assert_close(rollout(records[2:]) @ rollout(records[:2]), rollout(records))


@pytest.mark.parametrize("count", [0, 2])
def test_rollout__needs_one_forward_pass(count: int) -> None:
    model, x = vil(depth=1), images(16 * H, 16 * W).double()
    with torch.no_grad(), record_scans(model) as records:
        for _ in range(count):
            model(x)
    assert len(records) == count
    with pytest.raises(ValueError, match=rf"records of one forward pass, got {count} of {min(count, 1)} scans"):
        rollout(records)


# --- no trace in the model --------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("design", ["alternating", "quaddirectional_shared"])
def test_recording__leaves_the_model_as_it_was(design: str) -> None:
    model, x = vil(block_design=design), images(16 * H, 16 * W).double()
    before, expected, names = copy.deepcopy(model.state_dict()), model(x), attributes(model)
    with record_scans(model) as records:
        assert torch.equal(model(x), expected)
    count = len(records)
    assert hooks(model) == 0
    assert attributes(model) == names
    assert torch.equal(model(x), expected)
    assert len(records) == count > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recording__leaves_nothing_after_an_exception() -> None:
    model, x = vil(block_design="bidirectional_shared"), images(16 * H, 16 * W).double()

    def fail(*args: Any) -> None:
        raise RuntimeError("in mid-forward")

    handle = model.blocks[1].mixer.branches[0].norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in mid-forward"), record_scans(model):
        model(x)
    handle.remove()
    assert hooks(model) == 0
    with record_scans(model) as records:  # goes on after a pass that failed within a block
        handle = model.blocks[1].mixer.branches[0].norm.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in mid-forward"):
            model(x)
        handle.remove()
        records.clear()
        model(x)
    assert [(record.block, record.scan.reverse) for record in records] == [
        (b, r) for b in range(4) for r in (False, True)
    ]


def test_recording__adds_nothing_to_gradients() -> None:
    model, x = vil(), images(16 * H, 16 * W).double()
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with record_scans(model) as records:
        model(x).sum().backward()
    assert expected
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert not any(x.requires_grad for record in records for x in (record.q, record.k, record.igate, record.fgate))


def test_recording__compiled_model() -> None:
    model, x = vil(depth=1), images(16 * H, 16 * W).double()
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    with torch.no_grad():
        expected = model(x)
        count = len(compilations)
        with record_scans(model) as records:
            torch.testing.assert_close(model(x), expected)
        assert [record.block for record in records] == [0]
        assert torch.equal(model(x), expected)
    assert len(compilations) == count > 0


def test_recording__under_autocast_keeps_the_gates() -> None:
    model, x = vil().float(), images(16 * H, 16 * W)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record_scans(model) as records:
        model(x)
    assert {record.igate.dtype for record in records} == {record.fgate.dtype for record in records} == {torch.float32}
    assert rollout(records).dtype == torch.float32
    with torch.no_grad(), record_scans(model) as exact:
        model(x)
    torch.testing.assert_close(rollout(records), rollout(exact), atol=0.02, rtol=0)


def test_recording__finds_the_network_inside_another() -> None:
    model = vil()
    with torch.no_grad(), record_scans(nn.ModuleDict({"teacher": model})) as records:
        model(images(16 * H, 16 * W).double())
    assert [record.block for record in records] == [0, 1, 2, 3]


def test_recording__refuses_a_model_without_scans() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(ValueError, match=r"VisionTransformer has no mLSTM scans.*vil"), record_scans(model):
        pass
