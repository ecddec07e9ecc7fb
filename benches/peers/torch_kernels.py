"""torch on the same shapes as `crates/kernels/benches/cuda.rs`: microseconds of each operation.

    python benches/peers/torch_kernels.py                         # on a GPU
    python benches/peers/torch_kernels.py --device cpu --tokens 64    # whether it runs at all
"""

import argparse
import time

import torch
import torch.nn.functional as F

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 896, 4864, 14, 2, 64, 151_936


def microseconds(run, synchronize, repeats=20):
    for _ in range(3):
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=65_536)
    args = parser.parse_args()
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    vocab = VOCAB if args.device == "cuda" else 1000

    def numbers(*shape):
        return torch.rand(*shape, dtype=torch.bfloat16, device=args.device) * 2 - 1

    def both_ways(forward, *inputs):
        """The forward pass alone, and the backward pass alone."""
        inputs = [x.requires_grad_() for x in inputs]
        out = forward(*inputs)
        dout = torch.rand_like(out)
        ahead = microseconds(lambda: forward(*inputs), synchronize)
        back = microseconds(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), synchronize)
        return ahead, back

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'}\n")
    print("| kernel | µs |\n| --- | --- |")
    tokens = args.tokens
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=args.device)
    residual = numbers(tokens, HIDDEN)
    ahead, back = both_ways(lambda x: F.rms_norm(x + residual, (HIDDEN,), weight, 1e-6), numbers(tokens, HIDDEN))
    print(f"| residual + RMSNorm | {ahead:.1f} |\n| RMSNorm backward | {back:.1f} |")
    ahead, back = both_ways(lambda gate, up: F.silu(gate) * up, numbers(tokens // 4, INNER), numbers(tokens // 4, INNER))
    print(f"| SwiGLU | {ahead:.1f} |\n| SwiGLU backward | {back:.1f} |")
    for length in (1024, 4096):
        if tokens // 4 < length:
            continue
        batch = tokens // 4 // length
        ahead, back = both_ways(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            numbers(batch, HEADS, length, HEAD_DIM),
            numbers(batch, KV_HEADS, length, HEAD_DIM),
            numbers(batch, KV_HEADS, length, HEAD_DIM),
        )
        print(f"| attention, {length} | {ahead:.1f} |\n| attention backward, {length} | {back:.1f} |")
    rows = tokens // 16
    head = numbers(vocab, HIDDEN)
    labels = torch.full((rows,), 7, device=args.device)
    hidden = numbers(rows, HIDDEN).requires_grad_()

    def head_and_loss():
        loss = F.cross_entropy((hidden @ head.T).float(), labels)
        return torch.autograd.grad(loss, hidden)

    print(f"| head and its loss, both ways | {microseconds(head_and_loss, synchronize, 5):.1f} |")
    # Keys and values lie side by side here: torch has no pages.
    for sequences, context in ((256, 2048), (1, 131_072)):
        if tokens * 8 < sequences * context:
            continue
        q = numbers(sequences, HEADS, 1, HEAD_DIM)
        k, v = (numbers(sequences, KV_HEADS, context, HEAD_DIM) for _ in range(2))
        taken = microseconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), synchronize)
        print(f"| decoding {sequences} after {context} | {taken:.1f} |")
    logits = torch.rand(64, vocab, device=args.device) * 20

    def nucleus():
        ordered, ids = torch.softmax(logits / 0.8, dim=-1).sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= 0.95, 0.0)
        return ids.gather(1, torch.multinomial(ordered, 1)).tolist()

    print(f"| greedy choice | {microseconds(lambda: logits.argmax(dim=-1).tolist(), synchronize):.1f} |")
    print(f"| nucleus sampling | {microseconds(nucleus, synchronize):.1f} |")
    params = [torch.zeros(14_336 if i % 2 == 0 else 38_016, device=args.device) for i in range(336)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = torch.optim.AdamW(params, lr=2e-4, fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    print(f"| clipping and AdamW | {microseconds(step, synchronize):.1f} |")


if __name__ == "__main__":
    main()
