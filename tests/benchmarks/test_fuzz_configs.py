"""The fuzzer of recipes: a few of its cases, and that its judge lets nothing pass that it should not."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_configs.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_configs_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CLEAR = "usage: main.py fit\nerror: model.base_lr=-1 must be positive.\n"


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        ("valid run", {"code": 0}),
        ("clear error", {"code": 2, "err": CLEAR}),
        ("not finite", {"code": 0, "finite": False}),
        ("traceback", {"code": None, "err": "Traceback (most recent call last):\n  ...\nTypeError: base_lr\n"}),
        ("traceback", {"code": 2, "err": "Traceback (most recent call last):\n  ...\n" + CLEAR}),
        ("traceback", {"code": 1, "err": CLEAR}),
        ("traceback", {"code": 2, "err": "base_lr is wrong\n"}),
        ("traceback", {"code": 2, "err": CLEAR + CLEAR}),
        ("keyless", {"code": 2, "err": "error: the learning rate must be positive.\n"}),
        ("keyless", {"code": 2, "err": "error: model.final_base_lr2=-1 must be positive.\n"}),
        ("keyless", {"code": 2, "err": "error: no.\n  Given value: {'base_lr': -1}\n"}),
        ("keyless", {"code": 2, "err": "base_lr is wrong\nerror: no.\n"}),
        ("page", {"code": 2, "err": CLEAR + "and so on\n" * 40}),
        ("page", {"code": 2, "err": "usage: main.py\n" + "  [--option]\n" * 40 + "error: base_lr.\n"}),
        ("late", {"code": 2, "err": CLEAR, "worked": True}),
        ("hang", {"code": None, "ended": "hang"}),
        ("crash", {"code": None, "ended": "crash"}),
    ],
)
def test_judge__only_a_run_or_one_message_with_the_key_passes(
    fuzz: ModuleType, verdict: str, outcome: dict[str, Any]
) -> None:
    mistake = fuzz.Mistake("out of range", "model.base_lr", "", fuzz.names_of(("model", "init_args", "base_lr")))
    assert fuzz.judge(fuzz.Outcome(**outcome), [mistake]) == verdict
    assert (verdict in fuzz.PASSED) == (verdict in ("valid run", "clear error"))


def run(fuzz: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, action: Any) -> str:
    """Run a case in which `action` takes the place of the command line; returns the verdict."""
    monkeypatch.setattr(fuzz.vil_lightning.cli, "main", lambda args: action())
    (folder / "checkpoints").mkdir()
    mistake = fuzz.Mistake("out of range", "base_lr", "", ["base_lr"])
    case = fuzz.Case(0, "a.yaml", [mistake], {}, ["fit", "--config", "a.yaml"])
    ((_, outcome),) = fuzz.run_cases(iter([case]), folder, 1)
    return fuzz.judge(outcome, case.mistakes)


def test_run_cases__an_exception_is_a_traceback(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("base_lr")

    assert run(fuzz, tmp_path, monkeypatch, fail) == "traceback"


def test_run_cases__a_message_and_exit_code_2_are_a_clear_error(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        print("\nerror: base_lr is wrong", file=sys.stderr)
        sys.exit(2)

    assert run(fuzz, tmp_path, monkeypatch, refuse) == "clear error"


def test_run_cases__what_does_not_end_hangs_and_what_dies_crashes(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert run(fuzz, tmp_path / "a", monkeypatch, lambda: fuzz.time.sleep(60)) == "hang"
    monkeypatch.setattr(fuzz, "SECONDS", 60)
    assert run(fuzz, tmp_path / "b", monkeypatch, lambda: fuzz.os._exit(7)) == "crash"


def test_make_case__repeats_itself_and_changes_what_it_says(fuzz: ModuleType) -> None:
    recipes = fuzz.load_recipes()
    for number in range(40):
        case, again = (fuzz.make_case(3, number, recipes) for _ in range(2))
        assert repr(case) == repr(again)  # nan is not equal to itself
        path = fuzz.CONFIGS / case.recipe
        assert repr(case.config) != repr(fuzz.shrink(recipes[path]))
        assert all(mistake.names and mistake.text for mistake in case.mistakes)


@pytest.mark.parametrize("name", ["trainer/debug", "trainer/ddp", "overlays/instruments"])
def test_command_of__an_overlay_lies_over_a_recipe(fuzz: ModuleType, name: str) -> None:
    path = fuzz.CONFIGS / f"{name}.yaml"
    recipe = fuzz.load_recipes()[path]
    assert fuzz.command_of(path, recipe)[:5] == ["fit", "--config", "base.yaml", "--config", path.name]
    assert "train_fraction" not in fuzz.shrink(recipe).get("data", {}).get("init_args", {})


def test_fuzz_configs__twenty_cases_end_as_they_should(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, str(SCRIPT), "--count", "20", "--seed", "5", "--out", str(report)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "20 cases of 20 of" in report.read_text()
    assert "20 end as they should, 0 do not" in report.read_text()
