"""How many real tokens a second does torch + PEFT train on ragged conversations, padded?

The peer of `benches/train_ragged.rs`: the same model, conversations, cap and
labels, in shuffled batches of 8 padded to their longest member. Prints one JSON
line with real tokens per second and the padding ratio (computed / real tokens).

    pip install torch transformers peft pyarrow
    python train_ragged.py conv4k.qwen2.5.mask.parquet --threads 2
"""

import argparse
import json
import random
import time

import pyarrow.parquet as parquet
import torch

from train_step import VOCAB_SIZE, make_model

CAP = 2048
CONVERSATIONS = 2000


def batches(path, batch_size, seed):
    table = parquet.read_table(path).slice(0, CONVERSATIONS)
    rows = list(zip(table["input_ids"].to_pylist(), table["assistant_mask"].to_pylist()))
    random.Random(seed).shuffle(rows)
    for start in range(0, len(rows), batch_size):
        yield [(ids[:CAP], mask[:CAP]) for ids, mask in rows[start : start + batch_size]]


def collate(batch):
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    attention = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, (tokens, mask) in enumerate(batch):
        tokens = torch.tensor(tokens) % VOCAB_SIZE
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.tensor(mask) == 1, tokens, -100)
    return ids, labels, attention


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mask_parquet")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = make_model(torch.float32, max_position_embeddings=CAP)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-5)

    real = computed = seconds = 0
    for step, batch in enumerate(batches(args.mask_parquet, 8, args.seed)):
        if step > args.steps:
            break
        ids, labels, attention = collate(batch)
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step > 0:  # the first one warms up
            seconds += time.perf_counter() - start
            real += int(attention.sum())
            computed += ids.numel()
    print(json.dumps({
        "peer": "peft, padded", "threads": args.threads, "steps": args.steps,
        "real_tokens_per_second": round(real / seconds, 1), "padding_ratio": round(computed / real, 3),
    }))


if __name__ == "__main__":
    main()
