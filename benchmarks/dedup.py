"""Near-duplicates at 10k, 100k and 1M rows: cost a row, memory, precision and recall; rensa, datasketch and rensa's own index.

`python benchmarks/dedup.py --sizes 10000 100000 1000000 --out benchmarks/results/dedup.json`

Rows are invented: 40 to 80 words of a vocabulary of 20,000, frequent ones more often. One row in ten is a copy of an earlier
row with 0 to 8 words replaced. Pairs whose exact Jaccard similarity reaches 0.8 have to be found. Each run is a process of its
own. On a shared machine read the processor seconds; the memory is what the process holds itself (files mapped from disk, which
the system may drop at any time, are left out), on top of what it held before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf.data_prep.prepare import dedup

SIMILARITY = 0.8
#: Rows up to which a method is run: the others take too long, or too much memory.
METHODS = {"ours (rensa)": 10**9, "datasketch": 10_000, "rensa's index": 10**5}
_BATCH = 10_000


def generate(file: Path, count: int, seed: int) -> list[tuple[int, int]]:
    """Writes the rows as an Arrow file; returns (copy, original) pairs."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(generator.choice(letters, size=generator.integers(2, 10))) for _ in range(20_000)])
    weights = 1 / np.arange(10, 20_010)
    edges = np.cumsum(weights / weights.sum())
    planted, batch_words = [], []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, count, _BATCH):
            rows = [
                vocabulary[np.searchsorted(edges, generator.random(generator.integers(40, 80)))]
                for _ in range(min(_BATCH, count - start))
            ]
            for row in range(9, len(rows), 10):
                original = int(generator.integers(row - 9, row))
                words = rows[original].copy()
                changed = generator.integers(0, len(words), size=generator.integers(0, 9))
                words[changed] = vocabulary[generator.integers(0, 20_000, size=len(changed))]
                rows[row] = words
                planted.append((start + row, start + original))
            batch_words = [" ".join(words) for words in rows]
            writer.write_batch(pa.record_batch([batch_words], names=["text"]))
    return planted


class Anonymous:
    """Peak of the memory that this process holds itself, sampled ten times a second, in megabytes above the start."""

    def __enter__(self) -> Anonymous:
        self.start = self.peak = _anonymous_megabytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> float:
        return round(self.peak - self.start, 1)

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.peak = max(self.peak, _anonymous_megabytes())


def _anonymous_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def with_ours(texts: dedup.Texts, count: int, scratch: Path) -> np.ndarray:
    """(N,) bool: rows that are near-duplicates of an earlier one."""
    return dedup.near_duplicates(texts, count, SIMILARITY, scratch) != np.arange(count)


def with_datasketch(texts: dedup.Texts, count: int, _: Path) -> np.ndarray:
    """The same by datasketch's signatures and index, on the same shingles."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILARITY, num_perm=dedup.NUM_PERMUTATIONS)
    flags = np.zeros(count, dtype=bool)
    for row in range(count):
        text = texts(row, row + 1)[0][0].encode()
        signature = MinHash(num_perm=dedup.NUM_PERMUTATIONS)
        signature.update_batch([text[i : i + dedup.SHINGLE_BYTES] for i in range(max(1, len(text) - 5))])
        flags[row] = bool(index.query(signature))
        index.insert(row, signature)
    return flags


def with_rensa_index(texts: dedup.Texts, count: int, _: Path) -> np.ndarray:
    """rensa's own index on the same shingles; every row that shares a band with another is flagged, the first one too."""
    from rensa import RMinHash, RMinHashLSH

    bands, _rows = dedup.band_rows(SIMILARITY)
    bands = next(b for b in range(bands, dedup.NUM_PERMUTATIONS + 1) if dedup.NUM_PERMUTATIONS % b == 0)
    index = RMinHashLSH(threshold=SIMILARITY, num_perm=dedup.NUM_PERMUTATIONS, num_bands=bands)
    flags = np.zeros(count, dtype=bool)
    for start in range(0, count, _BATCH):
        stop = min(start + _BATCH, count)
        sets = [dedup.shingles(parts[0]) for parts in texts(start, stop)]
        offsets = np.zeros(len(sets) + 1, dtype=np.uint64)
        np.cumsum([len(s) for s in sets], out=offsets[1:])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(sets), offsets, dedup.NUM_PERMUTATIONS, 42
        )
        flags[start:stop] = index.insert_matrix_and_query_duplicate_flags(matrix, start)
    return flags


_RUN: dict[str, Callable[..., np.ndarray]] = {
    "ours (rensa)": with_ours, "datasketch": with_datasketch, "rensa's index": with_rensa_index,
}  # fmt: skip


def measure(method: str, file: Path, count: int, near: Sequence[int]) -> dict[str, Any]:
    """Figures of one method on one file of rows; `near` are the rows that it should call near-duplicates."""
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    column = table.column("text")
    ends = np.cumsum([len(chunk) for chunk in column.chunks])

    def texts(start: int, stop: int) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        while start < stop:
            number = int(np.searchsorted(ends, start, side="right"))
            first = int(ends[number - 1]) if number else 0
            until = min(stop, int(ends[number]))
            found += [(t,) for t in column.chunk(number).slice(start - first, until - start).to_pylist()]
            start = until
        return found

    with tempfile.TemporaryDirectory() as scratch, Anonymous() as memory:
        wall, processor = time.perf_counter(), time.process_time()
        flags = _RUN[method](texts, count, Path(scratch))
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    called, wanted = set(np.flatnonzero(flags).tolist()), set(near)
    return {
        "method": method,
        "rows": count,
        "seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
        "processor_microseconds_a_row": round(1e6 * processor / count, 1),
        "memory_megabytes": memory.growth,
        "near_duplicates": len(wanted),
        "called": len(called),
        "precision": round(len(called & wanted) / max(1, len(called)), 4),
        "recall": round(len(called & wanted) / max(1, len(wanted)), 4),
    }


def _near(file: Path, planted: Sequence[tuple[int, int]]) -> list[int]:
    column = pa.ipc.open_file(pa.memory_map(str(file))).read_all().column("text")
    chunk = len(column.chunk(0))

    def text(row: int) -> str:
        return column.chunk(row // chunk)[row % chunk].as_py()

    return [copy for copy, original in planted if dedup.jaccard(text(copy), text(original)) >= SIMILARITY]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dedup.json"))
    arguments = parser.parse_args(argv)
    runs = []
    print("| method | rows | processor s | microseconds a row | memory, MB | precision | recall |\n" + "|---" * 7 + "|")
    for count in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.arrow"
            near = _near(file, generate(file, count, arguments.seed))
            for method in (name for name, most in METHODS.items() if count <= most):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    run = pool.submit(measure, method, file, count, near).result()
                runs.append(run)
                cells = [
                    run[k]
                    for k in (
                        "processor_seconds",
                        "processor_microseconds_a_row",
                        "memory_megabytes",
                        "precision",
                        "recall",
                    )
                ]
                print(f"| {method} | {count:,} | " + " | ".join(map(str, cells)) + " |", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
