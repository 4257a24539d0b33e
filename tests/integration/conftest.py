"""Fixtures that run the command line in a folder of its own."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from shrunk import PRETRAIN, Command, invoke


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("fit", "--config", …)` in an empty folder."""
    return lambda *args: invoke([str(arg) for arg in args], tmp_path)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished shrunk run: `folder`, `out`, `err`. Not to be changed."""
    folder = tmp_path_factory.mktemp("pretrained")
    result = invoke(PRETRAIN, folder)
    assert result.code == 0, result.err
    result.folder = folder
    return result


@pytest.fixture
def with_run(tmp_path: Path, pretrained: SimpleNamespace) -> Path:
    """The folder of `command`, with a copy of the finished run in it."""
    shutil.copytree(pretrained.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path
