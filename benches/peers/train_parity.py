"""Trains with transformers and PEFT on what `benches/train_parity.rs` trained on, and compares the losses.

The same base, random adapter, batches and learning rates; AdamW and clipping by torch. Says whether the loss falls as far:
within 2 % of each other, and by at least half a nat, from the first step to the mean of the last five.

    pip install torch transformers peft
    python train_parity.py parity --device cpu
"""

import argparse
import json
import pathlib
import sys

import peft
import torch
import transformers
from peft import PeftModel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def batch_of(examples, device):
    """Padded on the right, as in any trainer."""
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        mask[row, :length] = 1
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}


def train(folder, run, device):
    base = transformers.AutoModelForCausalLM.from_pretrained(run["base"], dtype=DTYPES[run["dtype"]])
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=run["weight_decay"])
    scaler = torch.amp.GradScaler(device, enabled=run["dtype"] == "f16")
    size, losses = run["batch"], []
    for number, step in enumerate(run["steps"]):
        batch = batch_of(run["examples"][number * size : (number + 1) * size], device)
        optimizer.param_groups[0]["lr"] = step["learning_rate"]
        loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, run["max_grad_norm"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def decrease(losses):
    return losses[0] - sum(losses[-5:]) / 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    run = json.loads((args.folder / "run.json").read_text())
    ours = [step["loss"] for step in run["steps"]]
    theirs = train(args.folder, run, args.device)
    ratio = decrease(ours) / decrease(theirs)
    furthest = max(abs(a - b) for a, b in zip(ours, theirs))
    passed = abs(ratio - 1) <= 0.02 and decrease(ours) >= 0.5
    print(
        f"{'ok' if passed else 'FAILED'}: {run['dtype']} on {run['device']}, {len(ours)} steps: the loss fell by "
        f"{decrease(ours):.4f}, in PEFT by {decrease(theirs):.4f}, ratio {ratio:.4f}; no step's differ by more than "
        f"{furthest:.4f} (torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__})"
    )
    sys.exit(not passed)


if __name__ == "__main__":
    main()
