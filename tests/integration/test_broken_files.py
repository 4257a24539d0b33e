"""A folder in which every tenth file is broken."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shrunk import Command
from test_sources import SUPERVISED

COUNT, NUM_BROKEN = 400, 40


def encoded(kind: str, shade: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(shade).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


WAYS: list[Callable[[int], bytes]] = [
    lambda i: b"",
    lambda i: b"\x00" * 100,
    lambda i: b"<html>404 Not Found</html>",
    lambda i: encoded("PNG", i)[:200],
    lambda i: encoded("JPEG", i, 64)[:700],
    lambda i: encoded("PNG", i).replace(b"IDAT", b"IDAX"),
    lambda i: encoded("GIF", i)[:20],
    lambda i: encoded("WEBP", i)[:60],
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """400 training images, 40 of them broken, in eight ways; 20 good val images."""
    for i in range(COUNT):
        folder = tmp_path / "images" / "train" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        broken = i % 10 == 3
        (folder / f"{'broken' if broken else 'good'}{i:03d}.png").write_bytes(
            WAYS[i // 10 % len(WAYS)](i) if broken else encoded("PNG", i)
        )
    for i in range(20):
        folder = tmp_path / "images" / "val" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(encoded("PNG", 1000 + i))
    return tmp_path / "images"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_run__completes_and_names_every_broken_file(
    command: Command, root: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    args = ["--data", "ImageFolder", "--data.root", str(root), "--data.img_size", "16"]
    args += ["--data.num_workers", str(num_workers), "--data.max_bad_fraction", "0.1"]
    result = command(*SUPERVISED, *args)
    assert result.code == 0, result.err
    named = re.findall(r"unreadable image (\d+), skipped: (\S+\.png): ", "\n".join(caplog.messages))
    assert sorted(int(number) for number, _ in named) == list(range(1, NUM_BROKEN + 1))
    assert {name for _, name in named} == {str(path) for path in root.rglob("broken*")}
    assert "Unreadable images skipped by this process: 40" in result.out


def test_run__stops_with_the_list_above_the_limit(command: Command, root: Path) -> None:
    args = ["--data", "ImageFolder", "--data.root", str(root), "--data.img_size", "16", "--data.num_workers", "0"]
    result = command(*SUPERVISED, *args, "--data.max_bad_fraction", "0.05")
    assert result.code == 2
    message = result.err[result.err.index("error: ") :]
    number = int(re.match(r"error: (\d+) of 400 images cannot be read", message).group(1))  # type: ignore[union-attr]
    assert 20 < number <= NUM_BROKEN  # as soon as more than 5 % are known
    assert len(re.findall(r"^  \S+broken\d+\.png: ", message, flags=re.MULTILINE)) == number
    assert "raise data.max_bad_fraction" in message
