"""The load of benches/load.rs, asked by openai-python: an independent check of its numbers, and the
way to put another server (llama-server, vLLM) beside ours.

    pip install openai
    python benches/peers/load.py http://127.0.0.1:8000/v1 [--key K] [--requests 8]
"""

import argparse
import asyncio
import time

from openai import AsyncOpenAI

CONCURRENCY = [1, 2, 4, 8, 16, 32, 64]


def quantile(times, part):
    times = sorted(times)
    return 1e3 * times[round((len(times) - 1) * part)] if times else float("nan")


async def ask(client, model, number, first, after):
    words = " ".join(f"w{(number * 31 + at * 17) % 900}" for at in range(20))
    asked, last, tokens = time.perf_counter(), None, 0
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": words}], max_tokens=64, temperature=0,
        stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            now = time.perf_counter()
            first.append(now - asked) if last is None else after.append(now - last)
            last = now
    return tokens


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--key", default="none")
    parser.add_argument("--requests", type=int, default=8, help="of each client")
    args = parser.parse_args()
    client = AsyncOpenAI(base_url=args.url, api_key=args.key, max_retries=0)
    model = (await client.models.list()).data[0].id
    print(f"{'clients':>7} {'ttft p50':>9} {'ttft p99':>9} {'itl p50':>9} {'itl p99':>9} {'tokens/s':>9}")
    for clients in CONCURRENCY:
        first, after = [], []

        async def one(number):
            return sum([await ask(client, model, number * 1000 + request, first, after)
                        for request in range(args.requests)])

        begun = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(number) for number in range(clients))))
        rate = tokens / (time.perf_counter() - begun)
        print(f"{clients:>7} {quantile(first, .5):>9.1f} {quantile(first, .99):>9.1f} "
              f"{quantile(after, .5):>9.1f} {quantile(after, .99):>9.1f} {rate:>9.0f}", flush=True)


asyncio.run(main())
