"""The whole preparation at 10k, 100k and 1M rows: cost a row and memory.

`python benchmarks/prepare.py --sizes 10000 100000 1000000 --out benchmarks/results/prepare.json`

The rows are those of `benchmarks/dedup.py`, as JSON lines with a prompt (the first fifteen words) and a completion (the rest);
one in ten is nearly a copy. All default steps run. Memory is what the process holds itself, above what it held before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from dedup import Anonymous, generate

from rlhf.data_prep import DataConfig, Source, prepare


def write_rows(folder: Path, count: int) -> Path:
    """The source file."""
    generate(folder / "rows.arrow", count, seed=0)
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for batch in table.to_batches():
            for text in batch.column("text").to_pylist():
                words = text.split()
                row = {"prompt": " ".join(words[:15]), "completion": " ".join(words[15:])}
                out.write(json.dumps(row) + "\n")
    return file


def measure(file: Path, count: int) -> dict[str, Any]:
    """Figures of one preparation."""
    folder = file.parent / "out"
    config = DataConfig(sources=[Source(path=str(file))], output_dir=str(folder), on_leak="drop")
    with Anonymous() as memory:
        wall, processor = time.perf_counter(), time.process_time()
        prepare(config)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    card = json.loads((folder / "card.json").read_text())
    return {
        "rows": count,
        "used": card["records_used"],
        "megabytes": round(file.stat().st_size / 1e6, 1),
        "seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
        "processor_microseconds_a_row": round(1e6 * processor / count, 1),
        "memory_megabytes": memory.growth,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prepare.json"))
    arguments = parser.parse_args(argv)
    runs = []
    print("| rows | file, MB | processor s | microseconds a row | memory, MB |\n" + "|---" * 5 + "|")
    for count in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = write_rows(Path(folder), count)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                run = pool.submit(measure, file, count).result()
        runs.append(run)
        cells = [run[k] for k in ("megabytes", "processor_seconds", "processor_microseconds_a_row", "memory_megabytes")]
        print(f"| {count:,} | " + " | ".join(map(str, cells)) + " |", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
