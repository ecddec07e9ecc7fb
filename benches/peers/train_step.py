"""How many tokens a second does one LoRA step take in torch + PEFT?

The peer of `benches/train_step.rs`: a random Qwen2 (hidden 256, 6 layers, 4
query and 2 key/value heads, intermediate 1024, vocabulary 8192), rank 16 on
all seven projections, f32, dense batches of 8 x 256 tokens with every token
trained on. A step is forward, backward, clipping and AdamW. Prints one JSON
line with the median step.

    pip install torch transformers peft
    python train_step.py --threads 2
"""

import argparse
import json
import resource
import statistics
import time

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 8192
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(dtype, max_position_embeddings=512):
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = make_model({"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.01)

    seconds = []
    for _ in range(args.warmup + args.steps):
        ids = torch.randint(0, VOCAB_SIZE, (args.batch, args.seq))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[args.warmup :])
    print(json.dumps({
        "peer": "peft", "threads": args.threads, "dtype": args.dtype, "batch": args.batch, "seq": args.seq,
        "seconds_per_step": round(step, 4), "tokens_per_second": round(args.batch * args.seq / step, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
    }))


if __name__ == "__main__":
    main()
