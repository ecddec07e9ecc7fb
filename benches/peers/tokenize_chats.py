"""How many tokens a second do Hugging Face datasets + transformers make of conversations?

The peer of `benches/tokenize.rs`: reads a ShareGPT Parquet file (column
`conversations`: list of from/value), renders each row with the tokenizer's
chat template, tokenizes it and writes Parquet. Prints one JSON line; the time
is from reading to written, without start-up and loading of the tokenizer.

    pip install datasets transformers
    python tokenize_chats.py --data conversations.parquet --tokenizer DIR --num-proc 2

(Not `tokenize.py`: that name would hide the standard library's module.)
"""

import argparse
import json
import pathlib
import tempfile
import time

import datasets
import transformers
from transformers import AutoTokenizer

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def tokenize(row, tokenizer):
    messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return {"input_ids": tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path, help="folder with tokenizer.json and chat template")
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--rows", type=int, help="only the first ROWS rows")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rows = datasets.load_dataset("parquet", data_files=str(args.data), split="train", cache_dir=folder)
        if args.rows:
            rows = rows.select(range(args.rows))
        tokenized = rows.map(
            tokenize, fn_kwargs={"tokenizer": tokenizer}, num_proc=args.num_proc, remove_columns=rows.column_names
        )
        tokenized.to_parquet(f"{folder}/out.parquet")
        seconds = time.perf_counter() - start
        tokens = sum(len(row["input_ids"]) for row in tokenized)
    print(json.dumps({
        "peer": "datasets", "num_proc": args.num_proc, "rows": len(tokenized), "tokens": tokens,
        "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1),
        "rows_per_second": round(len(tokenized) / seconds, 1),
        "datasets": datasets.__version__, "transformers": transformers.__version__,
    }))


if __name__ == "__main__":
    main()
