"""The comparison table, with a stand-in for main.py: what is run, what is read back, what survives, what is reported."""

import csv
import dataclasses
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm

import vil_lightning  # noqa: F401
from vil_lightning.errors import ConfigError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENTRIES = BENCHMARKS / "entries"

# Logs what its arguments say, as a real run does: accuracy 10, 60, 50 + seed; a model called "resnet10t" crashes on seed 1.
STUB = """
import json, os, sys
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

args = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert not os.listdir(), "not an empty folder"
with open(os.environ["STUB_LOG"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
seed = int(args["--seed_everything"])
if args["--model.backbone.name"] == "resnet10t" and seed == int(os.environ.get("STUB_FAIL", "-1")):
    print("the reason"), sys.exit(3)
size = json.loads(args["--model.backbone.kwargs"]).get("img_size", 32)
folder = Path("logs") / args["--run_name"]
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(json.dumps({"data": {"init_args": {"img_size": size}}}))
writer = EventFileWriter(str(folder))
metric = args.get("--metric", "val/acc1")
for step, accuracy, speed in ((9, 10.0, 1.0), (19, 60.0, 100.0), (29, 50.0 + seed, 300.0)):
    scalars = [Summary.Value(tag=metric, simple_value=accuracy)]
    scalars.append(Summary.Value(tag="speed/images_per_second", simple_value=speed))
    if "--gpu" in args:
        scalars.append(Summary.Value(tag="speed/peak_memory_gib", simple_value=float(step)))
    writer.add_event(Event(wall_time=float(step), step=step, summary=Summary(value=scalars)))
writer.close()
"""

TINY = "ViL: {name: vil2_tiny_patch16_224, kwargs: {img_size: 16, patch_size: 8, embed_dim: 32, depth: 2}}\n"
RESNET = "ResNet: {name: resnet10t, args: [--lr, 3]}\n"


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    """The script as a module; it finds its neighbours as it does when it is run."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("compare_under_test", BENCHMARKS / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def work(tmp_path: Path, compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, entries and the stand-in for main.py."""
    (tmp_path / "main.py").write_text(STUB)
    (tmp_path / "recipe.yaml").write_text("seed_everything: 0\n")
    (tmp_path / "entries.yaml").write_text(TINY + RESNET)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "commands.txt"))
    return tmp_path


def arguments(work: Path, *more: str) -> list[str]:
    paths = ["--recipe", str(work / "recipe.yaml"), "--entries", str(work / "entries.yaml")]
    return [*paths, "--out", str(work / "out" / "table.v1"), *more]


def commands(work: Path) -> list[list[str]]:
    return [json.loads(line) for line in (work / "commands.txt").read_text().splitlines()]


def saved(work: Path) -> list[dict[str, Any]]:
    return json.loads((work / "out" / "table.v1.json").read_text())["runs"]  # type: ignore[no-any-return]


def test_compare__runs_every_pair_and_writes_the_table(
    work: Path, compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main(arguments(work, "--seeds", "0", "2", "--no_plot", "--", "--trainer.max_epochs", "3"))
    assert [(run["entry"]["label"], run["seed"]) for run in saved(work)] == [
        *(("ViL", 0), ("ResNet", 0), ("ViL", 2), ("ResNet", 2)),
    ]
    first, second, *_ = commands(work)
    assert first[:3] == ["fit", "--config", str(work / "recipe.yaml")]
    sent = dict(zip(first[1::2], first[2::2], strict=True))
    assert sent["--model.backbone.name"] == "vil2_tiny_patch16_224"
    assert json.loads(sent["--model.backbone.kwargs"]) == {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
    assert (sent["--seed_everything"], sent["--trainer.max_epochs"]) == ("0", "3")
    assert second[-4:] == ["--trainer.max_epochs", "3", "--lr", "3"]  # an entry's own arguments come last, and win

    text = (work / "out" / "table.v1.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    model = timm.create_model("vil2_tiny_patch16_224", num_classes=10, img_size=16, patch_size=8, embed_dim=32, depth=2)
    parameters = sum(p.numel() for p in model.parameters())
    (row,) = [line for line in text.splitlines() if line.startswith("| ViL |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["ViL", "2", "51.00 ± 1.41", "60.00 ± 0.00", f"{parameters / 1e6:.2f}"]
    assert cells[6] == "200"  # median of the speeds without the first
    assert 0.005 < float(cells[7]) < 32  # of the stand-in process, but no less than this one had when it forked
    for part in (
        "# Comparison under recipe.yaml",
        "torch 2",
        "cores visible",
        "`python benchmarks/compare.py --recipe",
    ):
        assert part in text
    with (work / "out" / "table.v1.csv").open() as file:
        assert [line["last"] for line in csv.DictReader(file)] == ["51.0", "51.0"]


def test_compare__macs_are_those_at_the_size_of_the_run(work: Path, compare: ModuleType) -> None:
    compare.main(arguments(work, "--no_plot"))
    macs = {run["entry"]["label"]: run["macs"] for run in saved(work)}
    dim, seq_len = 32, 4
    # Down and up projections, q/k/v, 3 x 3 convolution, gates; half of the cell. The inner width is 64 = 2 dim.
    block = seq_len * (6 * dim**2 + 24 * dim + 18 * dim + 48 * dim + 2 * seq_len * dim)
    assert macs["ViL"] == seq_len * 192 * dim + 2 * block + 10 * 2 * dim
    assert macs["ResNet"] == compare.count_macs(timm.create_model("resnet10t", num_classes=10), 32).causal


def test_compare__does_what_is_missing_and_keeps_what_is_there(
    work: Path, compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "entries.yaml").write_text(RESNET + TINY)
    monkeypatch.setenv("STUB_FAIL", "0")
    with pytest.raises(SystemExit, match=r"1 run\(s\) failed"):
        compare.main(arguments(work, "--no_plot"))
    assert "exit code 3" in (err := capsys.readouterr().err)
    assert "the reason" in err
    assert [run["entry"]["label"] for run in saved(work)] == ["ViL"]  # the failure cost only itself
    kept = saved(work)[0]
    monkeypatch.delenv("STUB_FAIL")
    compare.main(arguments(work, "--no_plot"))
    assert [run["entry"]["label"] for run in saved(work)] == ["ViL", "ResNet"]
    assert saved(work)[0] == kept
    assert len(commands(work)) == 3


def test_compare__writes_after_every_run(work: Path, compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    train, calls = compare.train, []

    def crash_on_second(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return train(*args)

    monkeypatch.setattr(compare, "train", crash_on_second)
    with pytest.raises(MemoryError):
        compare.main(arguments(work, "--no_plot"))
    assert [run["entry"]["label"] for run in saved(work)] == ["ViL"]
    assert "| ViL |" in (work / "out" / "table.v1.md").read_text()


def test_compare__does_not_mix_budgets_or_entries(
    work: Path, compare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "entries.yaml").write_text(TINY)
    compare.main(arguments(work, "--no_plot"))
    for more, recipe, entries, message in (
        (["--", "--trainer.max_epochs", "9"], "seed_everything: 0\n", TINY, "another budget: extra was"),
        ([], "seed_everything: 1\n", TINY, "another budget: recipe_sha256 was"),
        ([], "seed_everything: 0\n", TINY.replace("depth: 2", "depth: 3"), "runs of another entry 'ViL'"),
    ):
        (work / "recipe.yaml").write_text(recipe)
        (work / "entries.yaml").write_text(entries)
        with pytest.raises(SystemExit) as stop:
            compare.main(arguments(work, "--no_plot", *more))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert len(commands(work)) == 1


def test_compare__parallel_runs_all_land_in_the_file(work: Path, compare: ModuleType) -> None:
    compare.main(arguments(work, "--no_plot", "--parallel", "2"))
    assert sorted(run["entry"]["label"] for run in saved(work)) == ["ResNet", "ViL"]
    assert "several runs shared the machine" in (work / "out" / "table.v1.md").read_text()


def test_train__reads_gpu_memory_if_logged_and_wants_an_accuracy(work: Path, compare: ModuleType) -> None:
    entry = compare.Entry("ViL", "vil2_tiny_patch16_224")
    result = compare.train(entry, 0, work / "recipe.yaml", ["--gpu", "1"])
    assert (result["peak_memory_gib"], result["memory_of"], result["img_size"]) == (29.0, "GPU", 32)
    with pytest.raises(RuntimeError, match=r"logged no val/acc1\. Logged were: speed/images_per_second, val/knn"):
        compare.train(entry, 0, work / "recipe.yaml", ["--metric", "val/knn"])


def test_compare__plot_is_a_labelled_png(work: Path, compare: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    compare.main(arguments(work, "--seeds", "0", "1"))
    assert (work / "out" / "table.v1.png").read_bytes().startswith(b"\x89PNG")
    path = work / "plot.svg"
    compare.plot(compare.summarise(saved(work)), path, title="A title")
    drawn = path.read_text()
    for text in ("ViL", "ResNet", "MMACs per image", "training time in s", "val/acc1 at the end", "A title"):
        assert f"<!-- {text}" in drawn


def test_compare__says_what_the_plot_needs_before_anything_runs(
    work: Path, compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        compare.main(arguments(work))
    err = capsys.readouterr().err
    assert "pip install 'vil-lightning[bench]'" in err
    assert "--no_plot" in err
    assert not (work / "commands.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot be read"),
        ("[]", "must hold a mapping"),
        ("a: resnet18", "entry 'a' is 'resnet18'"),
        ("a: {kwargs: {}}", "with the key name"),
        ("a: {name: resnet18, kwarg: {}}", "'kwarg'"),
        ("a: {name: resnet18, args: --lr 3}", "args a list"),
        ("a: {name: resnet18, kwargs: {init_values: null}}", r"kwargs\.init_values is null"),
    ],
)
def test_read_entries__names_what_is_wrong(tmp_path: Path, compare: ModuleType, content: str, message: str) -> None:
    path = tmp_path / "entries.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        compare.read_entries(path)


@pytest.mark.parametrize("entry", ["{name: vil3_tiny}", "{name: vil2_tiny_patch16_224, kwargs: {depht: 3}}"])
def test_compare__refuses_a_model_that_cannot_be_built_before_anything_runs(
    work: Path, compare: ModuleType, entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "entries.yaml").write_text(f"{TINY}wrong: {entry}\n")
    with pytest.raises(SystemExit):
        compare.main(arguments(work, "--no_plot"))
    assert "Entry 'wrong'" in capsys.readouterr().err
    assert not (work / "commands.txt").exists()


def built(compare: ModuleType, file: str) -> dict[str, int]:
    """Parameters of all entries of a shipped file."""
    entries = compare.read_entries(ENTRIES / file)
    return {entry.label: sum(p.numel() for p in entry.build(10).parameters()) for entry in entries}


def test_entries__backbones_have_equal_size(compare: ModuleType) -> None:
    sizes = built(compare, "backbones_32px.yaml")
    assert set(sizes) == {"ViL v2", "ViL v1", "DeiT", "Vim", "ConvNeXt (isotropic)"}
    middle = (min(sizes.values()) + max(sizes.values())) / 2
    assert max(sizes.values()) < 1.1 * middle


def test_entries__block_designs_differ_in_nothing_else(compare: ModuleType) -> None:
    entries = compare.read_entries(ENTRIES / "block_designs_32px.yaml")
    designs = {entry.kwargs.pop("block_design"): entry.kwargs.pop("global_pool") for entry in entries}
    assert designs.pop("unidirectional") == "last"
    assert len(designs) == 6
    assert set(designs.values()) == {"bilateral_concat"}
    assert len({json.dumps([entry.name, entry.kwargs]) for entry in entries}) == 1
    assert len(built(compare, "block_designs_32px.yaml")) == 7


def test_parse__keeps_the_runs_own_arguments_apart(compare: ModuleType) -> None:
    line = "--recipe a.yaml --entries b.yaml --out c --seeds 0 1 -- --seeds 7"
    args = compare.parse(shlex.split(line))
    assert (args.seeds, args.extra) == ([0, 1], ["--seeds", "7"])


def test_summarise__has_no_spread_of_a_single_seed(compare: ModuleType) -> None:
    entry = dataclasses.asdict(compare.Entry("a", "resnet18"))
    run = {"entry": entry, "seed": 0, "last": 1.0, "best": 2.0, "parameters": 3, "macs": 4.0, "peak_memory_gib": 5.0}
    (row,) = compare.summarise([{**run, "seconds": 6.0}])
    assert (row["last"], row["last_std"], row["images_per_second"]) == (1.0, None, None)
