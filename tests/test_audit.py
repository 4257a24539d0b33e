"""The audit of the dependencies never takes silence for an answer."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("audit_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


audit = load()
KNOWS = [{"name": "jinja2", "version": "2.10", "vulns": [{"id": "CVE-2019-10906"}]}]
GOOD, BAD = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "2", "vulns": [{"id": "CVE-1"}]}
SKIPPED = {"name": "c", "skip_reason": "could not be looked up"}


@pytest.mark.parametrize(
    ("control", "packages", "code", "said"),
    [
        (KNOWS, [GOOD], 0, "1 of 1 packages audited, 0 known"),
        (KNOWS, [GOOD, BAD], 1, "b 2: CVE-1"),
        (KNOWS, [BAD, SKIPPED], 1, "not audited: c"),
        (KNOWS, [GOOD, SKIPPED], 3, "not audited: c"),
        (KNOWS, [], 3, "not audited"),
        (KNOWS, "no answer within 5 s", 3, "not audited: no answer within 5 s"),
        ("no answer within 5 s", [GOOD], 3, "not audited: the vulnerability service is not reachable"),
        ([{"name": "jinja2", "version": "2.10", "vulns": []}], [GOOD], 3, "not audited: the vulnerability service"),
        ([{"name": "jinja2", "skip_reason": "not found"}], [GOOD], 3, "not audited: the vulnerability service"),
    ],
)
def test_report(control: Any, packages: Any, code: int, said: str) -> None:
    actual, text = audit.report(control, packages)
    assert actual == code
    assert said in text


def test_ask__gives_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("jinja2==2.10\n")
    assert audit.ask(tmp_path / "a.txt", 0.01) == "no answer within 0.01 s"


def test_ask__says_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        return subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nName or service not known\n")

    monkeypatch.setattr(subprocess, "run", broken)
    assert audit.ask(tmp_path / "a.txt", 5) == "Name or service not known"


@pytest.mark.parametrize(("options", "code"), [([], 3), (["--lenient"], 0)])
def test_main__where_nobody_can_be_asked(
    options: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(audit, "ask", lambda path, timeout: asked.append(path) or "no answer")
    monkeypatch.setattr(sys, "argv", ["audit.py", *options])
    assert audit.main() == code
    assert "not audited" in capsys.readouterr().out
    assert len(asked) == 1  # and the long list is not waited for
