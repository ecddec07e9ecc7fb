"""How many tokens a second does LoRA training take in transformers + PEFT on a GPU?

The peer of `benches/train_gpu.rs`: Qwen2.5-0.5B's shape with random weights, rank 16 on all seven projections, bf16
with f32 adapters, SDPA, micro-batches of conversations of 1,024 tokens, three quarters of them trained, fused AdamW,
clipping. Dense rows of one length need no padding, and the largest batch that fits the memory is taken, so this is torch at
its best. Prints one JSON line.

    pip install torch transformers peft
    python train_gpu.py
    python train_gpu.py --device cpu --batch 1 --layers 1 --steps 1     # whether it runs at all
"""

import argparse
import json
import statistics
import time

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32, help="conversations in a step, or as many as fit")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=args.layers,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, rope_theta=1e6,
        tie_word_embeddings=True, attn_implementation="sdpa",
    )
    with torch.device(args.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if args.compile else model
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def step_seconds(batch):
        seconds = []
        for _ in range(2 + args.steps):
            ids = torch.randint(0, 151_936, (batch, args.length), device=args.device)
            labels = ids.clone()
            labels[:, : args.length // 4] = -100
            synchronize()
            start = time.perf_counter()
            forward(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:])

    batch, step = args.batch, None
    while step is None:
        try:
            step = step_seconds(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        if step is None:  # outside of the handler, which holds on to what did not fit
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    print(json.dumps({
        "peer": "peft", "batch": batch, "seconds_per_step": round(step, 4),
        "tokens_per_second": round(batch * args.length / step, 1), "peak_gib": peak, "compile": args.compile,
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
    }))


if __name__ == "__main__":
    main()
