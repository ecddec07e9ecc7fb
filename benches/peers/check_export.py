"""Do transformers + PEFT read what we exported, and get the logits that we get?

Loads the base with the adapter (PEFT) and the merged model (transformers),
both upcast to f32, runs the probe's ids through them and compares with our
logits. Also loads the merged folder's config, generation config and tokenizer
and renders its chat template. Exit code 1 names what is wrong.

    pip install torch transformers peft safetensors
    python check_export.py --base DIR --adapter DIR --merged DIR --probe FILE

The probe is a safetensors file with `ids` [T] (u32 or i64) and, in f32,
`tuned_logits` and `merged_logits` [T, V].
"""

import argparse
import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TOLERANCE = 1e-4


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids[None]).logits[0]


def check_logits(name, theirs, ours):
    if theirs.shape != ours.shape:
        sys.exit(f"{name}: transformers gives logits of shape {list(theirs.shape)}, the probe {list(ours.shape)}")
    difference = (theirs - ours).abs().max().item()
    print(f"{name}: largest difference {difference:.2e} (at most {TOLERANCE:.0e})")
    if not difference <= TOLERANCE:  # also catches NaN
        sys.exit(f"{name}: logits differ by {difference:.2e}")


def check_folder(folder):
    """The files beside the weights load and agree with each other."""
    config = AutoConfig.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > config.vocab_size:
        sys.exit(f"{folder}: {len(tokenizer)} tokens, but the model knows {config.vocab_size}")
    if generation.eos_token_id is None:
        sys.exit(f"{folder}: generation_config.json names no eos_token_id, so generation would not stop")
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello, you."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    lost = [message["content"] for message in messages if message["content"] not in text]
    if lost:
        sys.exit(f"{folder}: the chat template loses {lost}")
    print(f"{folder}: config, generation config, tokenizer and chat template load")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, type=pathlib.Path)
    parser.add_argument("--adapter", required=True, type=pathlib.Path)
    parser.add_argument("--merged", required=True, type=pathlib.Path)
    parser.add_argument("--probe", required=True, type=pathlib.Path)
    args = parser.parse_args()

    probe = load_file(args.probe)
    ids = probe["ids"].long()
    check_folder(args.merged)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, args.adapter)
    check_logits("base + adapter", logits(tuned, ids), probe["tuned_logits"])
    merged = AutoModelForCausalLM.from_pretrained(args.merged, dtype=torch.float32)
    check_logits("merged", logits(merged, ids), probe["merged_logits"])


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
