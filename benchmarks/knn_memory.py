"""Memory and time of kNN on features that are memory-mapped: a slice of ImageNet-1k is measured, the whole extrapolated.

    OMP_NUM_THREADS=1 python benchmarks/knn_memory.py

Random bfloat16 features of 1/16 of 1,281,167 training images and 1/50 of 50,000 validation images, 1,536 wide, are written
to a temporary file, mapped, and scored with k up to 200. Memory is the resident size while that runs: the process's own, and
pages of the mapped files, which the system takes back when it needs them. The bank's length changes only how many chunks pass
by, not the process's own memory: run with another `--bank-share` to see it.
"""

import argparse
import datetime
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from vil_lightning.evaluation.knn import knn

IMAGENET, QUERIES, GIB = 1_281_167, 50_000, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank-share", type=int, default=16, help="the bank has 1 / this of ImageNet-1k's images")
    parser.add_argument("--query-share", type=int, default=50, help="there are 1 / this of its 50,000 queries")
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--query-chunk", type=int, default=1024)
    parser.add_argument("--bank-chunk", type=int, default=8192)
    args = parser.parse_args()
    count, num_queries = IMAGENET // args.bank_share, QUERIES // args.query_share
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bank = written(Path(folder) / "bank", count, args.dim, generator)
        queries = written(Path(folder) / "queries", num_queries, args.dim, generator)
        bank_labels = torch.randint(0, 1000, (count,), generator=generator)
        labels = torch.randint(0, 1000, (num_queries,), generator=generator)
        before = resident()
        with Watch() as watch:
            start, cpu = time.perf_counter(), time.process_time()
            correct = knn(bank, bank_labels, queries, labels, query_chunk=args.query_chunk, bank_chunk=args.bank_chunk)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    pairs, all_pairs = count * num_queries, IMAGENET * QUERIES
    full_mapped = (IMAGENET + QUERIES) * args.dim * 2

    print("# kNN in chunks: memory and time\n")
    print(f"- date: {datetime.date.today()}")
    print(f"- hardware: {cpu_name()}, {torch.get_num_threads()} torch threads; CPU only")
    print(f"- software: torch {torch.__version__}, Python {platform.python_version()}")
    print(f"- command: `python {' '.join(sys.argv)}`")
    print(
        f"- {args.dim} wide, bfloat16, memory-mapped; k = 10, 20, 100, 200; chunks of {args.query_chunk} x {args.bank_chunk}"
    )
    print(f"- top-1 at k=20 on random labels of 1,000 classes: {100 * correct[20].double().mean():.2f} %\n")
    print("| | measured | extrapolated to all |\n| --- | ---: | ---: |")
    print(f"| bank | {count:,} | {IMAGENET:,} |\n| queries | {num_queries:,} | {QUERIES:,} |")
    grown = watch.private - before[0]
    grown_full = grown * max(1.0, args.query_chunk / num_queries)
    print(f"| process before, GiB | {sum(before) / GIB:.2f} | {sum(before) / GIB:.2f} |")
    print(f"| + chunks and results, GiB | {grown / GIB:.2f} | {grown_full / GIB:.2f} |")
    print(f"| + pages of the mapped files, GiB | {watch.mapped / GIB:.2f} | at most {full_mapped / GIB:.2f} |")
    total = sum(before) + grown_full + full_mapped
    print(f"| highest resident size, GiB | {watch.total / GIB:.2f} | at most {total / GIB:.2f} |")
    print(f"| n x m matrix in float32, for comparison, GiB | {4 * pairs / GIB:.2f} | {4 * all_pairs / GIB:.0f} |")
    copies = [f"{images * args.dim * 4 / GIB:.2f}" for images in (count, IMAGENET)]
    print(f"| float32 copy of the bank, for comparison, GiB | {' | '.join(copies)} |")
    tiles = -(-count // args.bank_chunk) * -(-num_queries // args.query_chunk)
    print(f"| CPU time per pair of chunks, s | {cpu / tiles:.2f} | |")
    print(f"| CPU time | {cpu:.1f} s | {cpu * all_pairs / pairs / 3600:.1f} h |")
    print(f"| wall clock (machine may be shared) | {seconds:.1f} s | {seconds * all_pairs / pairs / 3600:.1f} h |")
    print(f"| billion multiply-adds per CPU second | {pairs * args.dim / cpu / 1e9:.1f} | |\n")
    print(
        "Measured: the middle column. Extrapolated: chunks and results to a full chunk of queries (they do not grow with the "
        "bank, see the head of the file), mapped pages with the size of the files, time with the number of pairs. Mapped "
        "pages are counted although the system may drop them at any time. Time is that of a CPU: `device` takes a GPU."
    )


def written(path: Path, count: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Random features (count, dim), bfloat16, in a file that is mapped; written 8,192 at a time."""
    with path.open("wb") as file:
        for first in range(0, count, 8192):
            part = torch.randn(min(8192, count - first), dim, generator=generator).bfloat16()
            file.write(part.view(torch.int16).numpy().tobytes())
    return torch.from_file(str(path), shared=False, size=count * dim, dtype=torch.bfloat16).view(count, dim)


def resident() -> tuple[int, int]:
    """Bytes of the process in memory: its own, and pages of files (the features, but also libraries)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, file = (int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return anonymous, file


class Watch:
    """Highest memory while inside, looked at 100 times a second: the process's own, and mapped pages beyond those before."""

    def __enter__(self) -> "Watch":
        self.private, self.mapped, self.total, self.first = 0, 0, 0, resident()[1]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.01):
            private, mapped = resident()
            self.private, self.mapped = max(self.private, private), max(self.mapped, mapped - self.first)
            self.total = max(self.total, private + mapped)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def cpu_name() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores visible"


if __name__ == "__main__":
    main()
