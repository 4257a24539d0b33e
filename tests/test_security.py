"""Nothing that is read can run code, or lead out of the folder in which it lies."""

import ast
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vil_lightning.cli import main
from vil_lightning.data.huggingface import HuggingFaceSource
from vil_lightning.data.images import BadImageError, EncodedImage
from vil_lightning.data.shards import Member, index_of, load_index, scan_shard, write_shard
from vil_lightning.data.streaming import ShardSource
from vil_lightning.errors import ConfigError

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("vil_lightning", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py"))


# --- code -------------------------------------------------------------------------------------------------------------


def dangers(source: str) -> list[str]:
    """Calls that run what a file or a user says, or that write wherever an archive says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        settings = {keyword.arg: keyword.value for keyword in node.keywords}
        last = name.rpartition(".")[2]

        def is_constant(key: str, value: Any, settings: dict[str | None, ast.expr] = settings) -> bool:
            return isinstance(setting := settings.get(key), ast.Constant) and setting.value is value

        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(name)
        elif name in ("torch.load", "torch.hub.load_state_dict_from_url") and not is_constant("weights_only", True):
            found.append(f"{name} without weights_only=True")
        elif last in ("load", "loads", "Unpickler") and name.split(".")[0] in (
            "pickle",
            "cPickle",
            "dill",
            "joblib",
            "marshal",
        ):
            found.append(name)
        elif last in ("load", "memmap") and name.split(".")[0] in ("np", "numpy") and "allow_pickle" in settings:
            if not is_constant("allow_pickle", False):
                found.append(f"{name} with allow_pickle")
        elif name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        elif "shell" in settings and not is_constant("shell", False):
            found.append(f"{name} with shell")
        elif (last == "extractall" or re.search(r"(tar|zip|archive).*\.extract$", name)) and "filter" not in settings:
            found.append(f"{name} without a filter")
        elif "trust_remote_code" in settings and not is_constant("trust_remote_code", False):
            found.append(f"{name} with trust_remote_code")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "pickle.load(file)",
        "pickle.loads(data)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "tar.extractall(folder)",
        "tarfile.open(path).extract(member)",
        "datasets.load_dataset(path, trust_remote_code=True)",
    ],
)
def test_dangers__finds(source: str) -> None:
    assert len(dangers(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "network.compile()",
        "tar.extractall(folder, filter='data')",
        "json.load(file)",
    ],
)
def test_dangers__passes(source: str) -> None:
    assert dangers(source) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code__runs_nothing_that_it_reads(path: Path) -> None:
    assert dangers(path.read_text()) == []


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of one shard of two images, with an index, beside a tar file that is none of its own."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shard = write_shard(folder / "a.tar", [Member("0", "png", b"1" * 9, 0), Member("1", "png", b"2" * 9, 1)])
    index_of(folder, [shard], ["cat", "dog"]).save()
    (tmp_path / "secret.tar").write_bytes((folder / "a.tar").read_bytes())
    return folder


@pytest.mark.parametrize("name", ["../secret.tar", "{}/secret.tar", "..", ".", "", "sub/a.tar", "..\\secret.tar", 7])
def test_index__names_no_file_outside_of_its_folder(name: Any, shards: Path) -> None:
    fields = json.loads((shards / "index.json").read_text())
    fields["shards"][0]["file"] = name.format(shards.parent) if isinstance(name, str) else name
    (shards / "index.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="no file of this folder"):
        load_index(shards)


@pytest.mark.parametrize(("offset", "length"), [(0, 9), (2**40, 9), (2**63, 9), (512, 2**31), (513, 9)])
def test_index__places_that_are_no_images_are_bad_images(offset: int, length: int, shards: Path) -> None:
    index = load_index(shards)
    source = ShardSource(index)
    index.samples[0]["offset"], index.samples[0]["length"] = np.uint64(offset), length
    with pytest.raises((BadImageError, OverflowError)) as raised:
        source[0][0].encoded()
    assert raised.type is BadImageError


def test_shard__links_and_devices_are_no_images(tmp_path: Path) -> None:
    """A link in a tar file may point anywhere; nothing here unpacks or follows one."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../d.png", "../../d.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"3"))
    before = sorted(tmp_path.rglob("*"))
    images = scan_shard(tmp_path / "a.tar")
    assert [(length, label) for _, length, label in images] == [(1, 3)]  # its name is a name only
    assert sorted(tmp_path.rglob("*")) == before


# --- tables of images -------------------------------------------------------------------------------------------------


def test_huggingface__a_table_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set" / "a.png", tmp_path / "set_of_others.png"
    inside.parent.mkdir()
    for path in (inside, outside):
        Image.new("RGB", (2, 2)).save(path)
    names = [str(inside), str(outside), f"{inside.parent}/../set_of_others.png", "/etc/passwd", "file:///etc/passwd"]
    table = [{"image": {"bytes": None, "path": name}} for name in names]
    source = HuggingFaceSource(table, "image", [0] * len(table), "x", [inside.parent])
    first = source[0][0]
    assert isinstance(first, EncodedImage)
    assert first.encoded() == inside.read_bytes()
    for index in range(1, len(table)):
        with pytest.raises(BadImageError, match="outside of the data set"):
            source[index]


# --- names on the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "."])
@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_run_name__is_a_folder_name(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--backbone.name", "vil2_tiny_patch16_224", "--data", "Digits"]
    recipe = {"fit": ["configs/train_supervised.yaml"], "evaluate": ["configs/evaluate.yaml", *network]}[command]
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", *recipe, "--run_name", name])
    assert stop.value.code == 2
    assert "must be a plain folder name" in capsys.readouterr().err
