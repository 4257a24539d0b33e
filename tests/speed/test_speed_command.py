"""`python main.py speed`: every kind of work runs, results are written, wrong input is named."""

import csv
import json
import os
import platform
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from vil_lightning import cli
from vil_lightning.errors import ConfigError
from vil_lightning.speed import command, timed
from vil_lightning.speed.cases import Entry, Resolution, Settings, entries, make_step
from vil_lightning.speed.timed import Here, InOwnProcess

CPU = torch.device("cpu")
SMALL = {"embed_dim": 32, "depth": 2}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """Two small networks in the place of the usual ones."""
    two = [
        Entry("ViL, auto", "vil2_tiny_patch16_224", SMALL),
        Entry("ViL as published", "vil2_tiny_patch16_224", SMALL, published=True),
    ]
    monkeypatch.setattr(command, "entries", lambda size, backends: two)
    monkeypatch.setattr(command, "matmul_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(command, "refuse_memory_in_time", lambda: None)
    return two


@pytest.mark.parametrize("work", ["forward", "train", "dino"])
@pytest.mark.parametrize("entry", entries("tiny", ["auto"]), ids=lambda entry: entry.label)
def test_make_step__runs_again_and_again(entry: Entry, work: str) -> None:
    settings = Settings(CPU, num_prototypes=16)
    kwargs = {"depth": 1, **({} if entry.kwargs == {} else entry.kwargs)}
    step = make_step(
        Entry(entry.label, entry.name, kwargs, entry.published, entry.fused_attn), Resolution(64), work, 2, settings
    )
    step()
    step()


def test_train_step__moves_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []
    original = Entry.build
    monkeypatch.setattr(Entry, "build", lambda *args: built.append(original(*args)) or built[-1])  # type: ignore[func-returns-value]
    step = make_step(Entry("x", "vil2_tiny_patch16_224", SMALL), Resolution(32), "train", 2, Settings(CPU))
    before = [p.detach().clone() for p in built[0].parameters()]
    for _ in range(3):
        step()
    names = [n for n, _ in built[0].named_parameters()]
    assert [n for n, p, b in zip(names, built[0].parameters(), before, strict=True) if torch.equal(p, b)] == []


@pytest.mark.parametrize("work", ["forward", "train", "dino"])
def test_flops__those_of_a_batch_are_a_multiple(work: str) -> None:
    entry, settings = Entry("x", "vil2_tiny_patch16_224", SMALL), Settings(CPU, num_prototypes=16)
    three = timed.count_flops(make_step(entry, Resolution(64), work, 3, settings))
    assert three == pytest.approx(3 * Here(False, entry, Resolution(64), work, 1, settings).flops(), rel=2e-3)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_count_flops__of_convolutions_forwards_and_backwards(groups: int) -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    forward = 2 * (2 * 16 * 5 * 7) * (8 // groups) * 9  # outputs, and what is multiplied for each
    assert timed.count_flops(lambda: conv(x)) == forward
    assert timed.count_flops(lambda: conv(x).sum().backward()) == 3 * forward
    assert timed.count_flops(lambda: conv(x.detach()).sum().backward()) == 2 * forward


@pytest.mark.parametrize("fused", [True, False])
def test_entry__sets_fused_attention_for_itself_only(fused: bool) -> None:
    model = Entry("x", "vit_tiny_patch16_224", {"depth": 1}, fused_attn=fused).build(Resolution(32))
    assert model.blocks[0].attn.fused_attn is fused  # type: ignore[union-attr,index]
    assert Entry("x", "vit_tiny_patch16_224", {"depth": 1}).build(Resolution(32)).blocks[0].attn.fused_attn  # type: ignore[union-attr,index]


def test_resolution__gives_all_networks_the_same_number_of_tokens() -> None:
    resolution = Resolution.parse("224/8")
    assert (resolution.num_tokens, str(resolution)) == (729, "224/8")
    vil = Entry("x", "vil2_tiny_patch16_224", {"depth": 1}).build(resolution)
    deit = Entry("x", "deit_tiny_patch16_224", {"depth": 1}).build(resolution)
    assert vil.patch_embed.num_patches == deit.patch_embed.num_patches == 729  # type: ignore[union-attr]
    assert Resolution.parse("512").of_vil == {"img_size": 512}
    assert (Resolution(224).local.size, Resolution(224).local.num_tokens) == (96, 36)
    assert resolution.local.num_tokens == 121  # of local views, too
    assert resolution.local.image_size(Entry("x", "deit_tiny_patch16_224")) == 11 * 16


def test_speed__writes_table_csv_json_and_picture(
    tmp_path: Path, small: list[Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "speed"
    args = ["--sizes", "32", "48", "--work", "forward", "--rounds", "3", "--tokens", "16", "--out", str(out)]
    cli.main(["speed", *args])
    assert "## forward, 48 px, 9 tokens, 2 images, eager" in capsys.readouterr().out
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["command"] == "python main.py speed " + " ".join(args[:-1]) + f" {out}"
    rows = content["rows"]
    assert [(r["network"], r["size"], r["batch"]) for r in rows] == [
        (e.label, s, b) for s, b in (("32", 4), ("48", 2)) for e in small
    ]
    for row in rows:
        assert row["low_ms"] <= row["milliseconds"] <= row["high_ms"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["milliseconds"])
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["milliseconds"] * 1000 / 1e9)
        assert row["flops"] > 0
    assert [r["times"] for r in rows[1::2]] == [1.0, 1.0]
    assert all(r["times_low"] <= r["times"] <= r["times_high"] for r in rows)
    with out.with_suffix(".csv").open() as file:
        assert [line["network"] for line in csv.DictReader(file)] == [r["network"] for r in rows]
    assert "| ViL as published | " in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000


def test_speed__a_network_that_fails_has_a_note_and_the_others_numbers(
    small: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = timed.make_step

    def fails(entry: Entry, *args: Any) -> Any:
        if entry.published:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(entry, *args)

    monkeypatch.setattr(timed, "make_step", fails)
    ours, published = command.run(["--sizes", "32", "--work", "forward", "--rounds", "2", "--tokens", "4"])
    assert published.note == "out of memory"
    assert published.milliseconds is None
    assert ours.milliseconds is not None
    assert ours.times is None  # nothing to compare with
    assert "out of memory" in "\n".join(command.table([ours, published]))


OWN = ["--sizes", "32", "--work", "forward", "--rounds", "3", "--tokens", "4", "--processes", "own"]


def test_speed__a_process_for_each_network_and_one_that_dies_between_rounds(
    small: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, bool, int]] = []

    class Recorded(InOwnProcess):
        def __init__(self, keep: bool, limit_memory: bool, entry: Entry, *case: Any) -> None:
            super().__init__(keep, limit_memory, entry, *case)
            made.append((entry.label, self.kept, self.process.pid or 0))
            self.count, self.dies = 0, entry.label == "other"

        def seconds(self) -> float:
            self.count += 1
            if self.dies and self.count == 4:  # the second round, after two steps to warm up
                self.process.kill()
            return super().seconds()

    monkeypatch.setattr(command, "InOwnProcess", Recorded)
    small.append(Entry("other", "vil2_tiny_patch16_224", SMALL))
    out = tmp_path / "speed"
    rows = command.run([*OWN, "--out", str(out)])
    keeps = platform.libc_ver()[0] == "glibc" and not any(
        name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ
    )
    assert [(label, kept) for label, kept, _ in made] == [
        ("ViL, auto", keeps),
        ("ViL as published", False),
        ("other", keeps),
    ]
    assert len({os.getpid(), *(pid for _, _, pid in made)}) == 4
    assert all(gone(pid) for _, _, pid in made)
    ours, published, other = rows
    assert ours.times is not None
    assert published.times == 1.0
    one = command.run([*OWN[:-2], "--networks", "ViL"])
    assert [r.flops for r in (ours, published)] == [r.flops for r in one]
    assert other.note == "its process ended with exit code -9"
    assert other.milliseconds is None
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["processes"] == "one for each network"
    if keeps:
        expected = "- memory that is freed: kept by 'ViL, auto' and 'other'; given back by 'ViL as published'\n"
        assert expected in out.with_suffix(".md").read_text()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_own_process__says_what_failed() -> None:
    with pytest.raises(RuntimeError, match="Unknown model"):
        InOwnProcess(False, False, Entry("x", "vil3"), Resolution(32), "forward", 1, Settings(CPU))


@pytest.mark.parametrize("keep", [True, False])
def test_own_process__is_set_up_as_told(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def kept() -> bool:
        calls.append("kept")
        return True

    monkeypatch.setattr(timed, "keep_freed_memory", kept)
    monkeypatch.setattr(timed, "refuse_memory_in_time", lambda: calls.append("limited"))
    monkeypatch.setattr(timed, "Here", lambda *case: calls.append("made"))
    monkeypatch.setattr(timed.signal, "signal", lambda *args: None)

    class Closed:
        sent: ClassVar[list[Any]] = []

        def send(self, answer: Any) -> None:
            self.sent.append(answer)

        def recv(self) -> str:
            raise EOFError

    timed._serve(Closed(), keep, keep, torch.get_num_threads(), ())  # type: ignore[arg-type]
    assert calls == ["kept", "limited"] * keep + ["made"]
    assert Closed.sent[-1] == (False, keep)


def test_speed__leaves_out_what_is_slower_than_the_limit(small: list[Entry]) -> None:
    rows = command.run(["--sizes", "32", "--work", "forward", "--rounds", "1", "--tokens", "4", "--limit", "1e-9"])
    assert all("more than --limit 1e-09" in row.note and row.milliseconds is None for row in rows)


@pytest.mark.parametrize(
    "args, match",
    [
        (["--sizes", "large"], "--sizes 'large' is neither"),
        (["--sizes", "100"], "--sizes '100': the size must be a multiple of 16"),
        (["--sizes", "224/32"], "the stride from 1 to 16"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--limit", "-1"], r"--limit -1\.0 must be positive"),
        (["--backends", "triton", "--device", "cpu"], "--backends triton runs on GPUs"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--networks", "resnet"], "--networks 'resnet' is in none of the labels: ViL, auto"),
    ],
)
def test_speed__wrong_input_is_named(args: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=match):
        command.run(args)
    with pytest.raises(SystemExit) as stop:
        cli.main(["speed", *args])
    assert stop.value.code == 2
    assert "error: --" in capsys.readouterr().err
