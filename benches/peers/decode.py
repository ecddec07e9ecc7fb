"""How many tokens a second does llama.cpp decode?

The peer of `benches/decode.rs`: a file of Qwen2.5-0.5B's shape with random
weights, run by llama.cpp's `llama-batched-bench`. Each of `--batch` sequences
starts from one token and makes 64. The file is made once and kept beside the
program. Prints one JSON line with the best of `--repeat` runs.

    pip install gguf numpy
    python decode.py --llama-batched-bench PATH --dtype q8_0 --threads 2 --batch 8
"""

import argparse
import json
import pathlib
import subprocess

import gguf
import numpy

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 151936, 896, 4864, 24, 14, 2
KV_DIM = HIDDEN // HEADS * KV_HEADS
LENGTH = 64
KINDS = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16,
         "q8_0": gguf.GGMLQuantizationType.Q8_0}


def tensors():
    """Every name, and the shape as it is stored."""
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for layer in range(LAYERS):
        for name, d_out, d_in in [("attn_q", HIDDEN, HIDDEN), ("attn_k", KV_DIM, HIDDEN), ("attn_v", KV_DIM, HIDDEN),
                                  ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", INNER, HIDDEN),
                                  ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER)]:
            yield f"blk.{layer}.{name}.weight", (d_out, d_in)
            if name in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{layer}.{name}.bias", (d_out,)
        yield f"blk.{layer}.attn_norm.weight", (HIDDEN,)
        yield f"blk.{layer}.ffn_norm.weight", (HIDDEN,)


def write_model(path, kind):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    random = numpy.random.default_rng(0)
    for name, shape in tensors():
        own = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        values = random.standard_normal(shape, dtype=numpy.float32) / shape[-1] ** 0.5
        writer.add_tensor(name, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-batched-bench", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", choices=KINDS, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    model = args.llama_batched_bench.parent / f"qwen2-0.5b-random-{args.dtype}.gguf"
    if not model.exists():
        unfinished = model.with_suffix(".part")
        write_model(unfinished, KINDS[args.dtype])
        unfinished.rename(model)
    command = [args.llama_batched_bench, "-m", model, "-t", str(args.threads), "-tb", str(args.threads), "-c", "2048",
               "-npp", "1", "-ntg", str(LENGTH), "-npl", str(args.batch), "--output-format", "jsonl"]
    speeds = []
    for _ in range(args.repeat):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        speeds.append(lines[-1]["speed_tg"])
    print(json.dumps({"engine": "llama.cpp", "dtype": args.dtype, "threads": args.threads, "batch": args.batch,
                      "tokens_per_s": max(speeds), "all": speeds}))


if __name__ == "__main__":
    main()
