"""Clients that connect, ask and vanish at random points: is the server's memory flat afterwards?

    updraft-serve --model M --port 8000 & python .ci/peers/vanish.py http://127.0.0.1:8000 $! [--rounds 12]

Rounds of 1,000 clients, 100 at a time. Prints what is resident after each; ends with 1 if anything
still runs, waits or holds blocks, or if the second half of the rounds grew by more than 4 MiB.
"""

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from urllib.parse import urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("pid", type=int)
parser.add_argument("--key", default="none")
parser.add_argument("--rounds", type=int, default=12)
args = parser.parse_args()
where = urlsplit(args.url)
draw = random.Random(1)


async def client(gate):
    async with gate:
        path = draw.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/completion"])
        text = "x " * draw.randrange(1, 60)
        several = draw.choice([1, 1, 2]) if path.endswith("completions") else 1
        body = json.dumps({"messages": [{"role": "user", "content": text}], "input": text,
                           "stream": draw.random() < .7, "max_tokens": 100, "n": several,
                           **({} if "responses" in path else {"prompt": text})})
        head = (f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {args.key}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
        whole = (head + body).encode()
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            # A part of the request, or all of it and a part of the answer.
            whole = whole[:draw.randrange(len(whole))] if draw.random() < .2 else whole
            writer.write(whole)
            await writer.drain()
            await asyncio.wait_for(reader.read(draw.randrange(1, 4000)), draw.random() * .3)
        except (TimeoutError, OSError):
            pass
        writer.transport.abort()


async def thousand():
    gate = asyncio.Semaphore(100)
    await asyncio.gather(*(client(gate) for _ in range(1000)))


def is_idle():
    text = urllib.request.urlopen(args.url + "/metrics").read().decode()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{")
    return all(line.endswith(" 0") for line in text.splitlines() if line.startswith(names))


def resident_mib():
    for line in open(f"/proc/{args.pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024


sizes = []
for round in range(args.rounds):
    asyncio.run(thousand())
    end = time.time() + 30
    while not is_idle():
        if time.time() > end:
            sys.exit("something still runs, waits or holds blocks after 30 s")
        time.sleep(.05)
    sizes.append(resident_mib())
    print(f"{(round + 1) * 1000} clients: {sizes[-1]:.1f} MiB", flush=True)
half = len(sizes) // 2
sys.exit(max(sizes[half:]) - max(sizes[:half]) > 4)
