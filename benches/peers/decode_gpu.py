"""How many tokens a second does transformers decode on a GPU?

The peer of `benches/decode_gpu.rs`: Qwen2.5-0.5B's shape with random bf16 weights, prompts of 512 tokens, 128 greedy tokens
each, a static cache. `--compile` captures the step into CUDA graphs (`torch.compile`, reduce-overhead), which is
transformers at its best without another server.

    pip install torch transformers
    python decode_gpu.py --compile
    python decode_gpu.py --device cpu --layers 1 --batch 2 --prompt 8 --length 4      # whether it runs at all
"""

import argparse
import json
import time

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=args.layers,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, rope_theta=1e6,
        tie_word_embeddings=True, attn_implementation="sdpa",
    )
    with torch.device(args.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def one_token(token, position, cache):
        logits = model(token, cache_position=position, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    for batch in args.batch:
        torch._dynamo.reset()  # every batch size compiles anew, and is not counted against the others
        step = torch.compile(one_token, mode="reduce-overhead", fullgraph=True) if args.compile else one_token
        cache = StaticCache(config=config, max_batch_size=batch, max_cache_len=args.prompt + args.length,
                            device=args.device, dtype=torch.bfloat16)
        # Otherwise its tensors are made inside of the compiled step, which then cannot be captured into a graph.
        cache.early_initialization(batch, config.num_key_value_heads, config.hidden_size // config.num_attention_heads,
                                   torch.bfloat16, torch.device(args.device))
        prompt = torch.randint(0, 151_936, (batch, args.prompt), device=args.device)
        with torch.inference_mode():
            for _ in range(2):  # the first time warms up, and compiles
                cache.reset()
                synchronize()
                start = time.perf_counter()
                tokens = []
                for first in range(0, batch, 8):  # the cache takes whole batches, so the prompts are timed without it
                    part = prompt[first : first + 8]
                    tokens.append(model(part, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True))
                token = torch.cat(tokens)
                synchronize()
                prefill = time.perf_counter() - start
                start = time.perf_counter()
                for position in range(args.prompt, args.prompt + args.length):
                    token = step(token, torch.tensor([position], device=args.device), cache).clone()
                    token.cpu()  # whoever streams tokens sees each of them
                synchronize()
                decode = time.perf_counter() - start
        print(json.dumps({
            "peer": "transformers", "batch": batch, "compile": args.compile,
            "prompt_tokens_per_second": round(batch * args.prompt / prefill),
            "decode_tokens_per_second": round(batch * args.length / decode),
            "ms_a_step": round(decode / args.length * 1e3, 3),
            "torch": torch.__version__, "transformers": transformers.__version__,
        }), flush=True)


if __name__ == "__main__":
    main()
