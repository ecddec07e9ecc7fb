"""How fast do Hugging Face datasets stream a JSONL or Parquet file into Parquet?

The peer of `benches/shards.rs`: opens the file with streaming=True and writes
`to_parquet`. Prints one JSON line; the time is from opening to written, without
the interpreter's start and the imports.

    pip install datasets
    python shards.py rows.jsonl out.parquet
"""

import argparse
import json
import pathlib
import time

import datasets
import pyarrow.parquet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    args = parser.parse_args()

    datasets.disable_progress_bars()
    kind = "parquet" if args.source.suffix == ".parquet" else "json"
    start = time.perf_counter()
    rows = datasets.load_dataset(kind, data_files=str(args.source), split="train", streaming=True)
    rows.to_parquet(str(args.target))
    seconds = time.perf_counter() - start
    num_rows = pyarrow.parquet.read_metadata(args.target).num_rows
    print(json.dumps({
        "peer": "datasets", "rows": num_rows, "seconds": round(seconds, 3),
        "rows_per_second": round(num_rows / seconds, 1), "datasets": datasets.__version__,
    }))


if __name__ == "__main__":
    main()
