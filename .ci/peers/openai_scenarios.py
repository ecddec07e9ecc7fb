"""openai-python with strict response validation over every endpoint of a running updraft-serve.

    pip install openai
    updraft-serve --model M --api-key token-abc123 --runtime-adapters --port 8000 &
    python .ci/peers/openai_scenarios.py http://127.0.0.1:8000 [--adapter FOLDER]

Prints one line a scenario; ends with 1 if any failed.
"""

import argparse
import asyncio
import json
import sys
import traceback
import urllib.error
import urllib.request

import openai

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--key", default="token-abc123")
parser.add_argument("--adapter", help="a PEFT folder for the served model")
args = parser.parse_args()

base = args.url.rstrip("/")
client = openai.OpenAI(base_url=f"{base}/v1", api_key=args.key, max_retries=0,
                       _strict_response_validation=True)
model = client.models.list().data[0].id
# Where the client's own types are wrong about OpenAI's answers too: a streamed text completion has
# finish_reason null until its end, and embeddings are base64 unless floats are asked for.
lenient = openai.OpenAI(base_url=f"{base}/v1", api_key=args.key, max_retries=0)
user = [{"role": "user", "content": "How many r's are in strawberry?"}]
scenarios = []


def raw(path, body=None):
    """The status and text of an answer, for what openai-python has no call."""
    headers = {"Authorization": f"Bearer {args.key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(base + path, data, headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.read().decode()


def scenario(function):
    scenarios.append(function)
    return function


def refused(error, call, **fields):
    try:
        call(**fields)
    except error as caught:
        assert caught.code is None or isinstance(caught.code, str), caught.code
        return caught
    raise AssertionError(f"no {error.__name__} for {fields}")


@scenario
def models():
    assert client.models.retrieve(model).id == model
    refused(openai.NotFoundError, client.models.retrieve, model="no/such")


@scenario
def chat():
    answer = client.chat.completions.create(
        model=model, messages=user, max_tokens=12, n=2, temperature=0.8, seed=7, logprobs=True,
        top_logprobs=3, stop=["zzz"], presence_penalty=0.5, frequency_penalty=0.5, user="me",
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1})
    assert len(answer.choices) == 2 and answer.usage.prompt_tokens > 0
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    again = client.chat.completions.create(model=model, messages=user, max_tokens=12)
    assert again.usage.prompt_tokens_details.cached_tokens >= 0


@scenario
def chat_streamed_equals_whole():
    fields = dict(model=model, messages=user, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**fields)
    text, usage, reason = "", None, None
    for chunk in client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert text == whole.choices[0].message.content
    assert (reason, usage.total_tokens) == (whole.choices[0].finish_reason, whole.usage.total_tokens)


@scenario
def chat_stream_helper():
    with client.chat.completions.stream(model=model, messages=user) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.role == "assistant"


@scenario
def completions():
    for prompt in ["one two", ["one", "two"], [1, 2, 3], [[1, 2], [3]]]:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=4, echo=True,
                                           logprobs=2)
        assert answer.choices[0].logprobs.tokens
    *_, last = lenient.completions.create(model=model, prompt="one", max_tokens=4, stream=True)
    assert last.choices[0].finish_reason in ("stop", "length")


@scenario
def responses():
    answer = client.responses.create(model=model, input="Hello", max_output_tokens=16,
                                     instructions="Be brief.", temperature=0)
    assert answer.output_text and answer.usage.output_tokens > 0
    kinds = [event.type for event in client.responses.create(
        model=model, input=[{"role": "user", "content": "Hello"}], max_output_tokens=8, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


@scenario
def embeddings():
    packed = lenient.embeddings.create(model=model, input=["one", "two"])
    plain = client.embeddings.create(model=model, input=["one", "two"], encoding_format="float")
    pairs = zip(packed.data[1].embedding, plain.data[1].embedding, strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-6


@scenario
def errors():
    chat = client.chat.completions.create
    for field, value in [("temperature", 9), ("n", 0), ("top_p", 0), ("max_tokens", -1)]:
        caught = refused(openai.BadRequestError, chat, model=model, messages=user, **{field: value})
        assert caught.param == field
    caught = refused(openai.NotFoundError, chat, model="no/such", messages=user)
    assert caught.code == "model_not_found"
    caught = refused(openai.BadRequestError, chat, model=model,
                     messages=[{"role": "user", "content": "x " * 100_000}])
    assert caught.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{base}/v1", api_key="wrong", max_retries=0)
    caught = refused(openai.AuthenticationError, stranger.chat.completions.create, model=model,
                     messages=user)
    assert caught.code == "invalid_api_key"


@scenario
def tokenize():
    for body in [{"prompt": "hello"}, {"messages": user}, {"content": "hello"}]:
        tokens = json.loads(raw("/tokenize", body)[1])["tokens"]
        assert tokens
    assert json.loads(raw("/detokenize", {"tokens": tokens})[1])["prompt"] == "hello"


@scenario
def operation():
    for path in ["/health", "/version", "/metrics", "/openapi.json", "/"]:
        assert raw(path)[0] == 200, path


@scenario
def adapters():
    if not args.adapter:
        return "skipped: no --adapter"
    load = {"lora_name": "x", "lora_path": args.adapter}
    assert raw("/v1/load_lora_adapter", load)[0] == 200
    assert [m.parent for m in client.models.list().data if m.id == "x"] == [model]
    client.chat.completions.create(model="x", messages=user, max_tokens=4)
    assert raw("/v1/unload_lora_adapter", {"lora_name": "x"})[0] == 200
    refused(openai.NotFoundError, client.chat.completions.create, model="x", messages=user)


@scenario
def many_at_once():
    aclient = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=args.key, max_retries=0,
                                 _strict_response_validation=True)

    async def ask(number):
        answer = await aclient.chat.completions.create(
            model=model, messages=[{"role": "user", "content": f"Count to {number % 4}"}],
            max_tokens=16, temperature=0)
        return answer.choices[0].message.content

    async def all_of_them():
        return await asyncio.gather(*(ask(number) for number in range(32)))

    answers = asyncio.run(all_of_them())
    assert all(answer == answers[number % 4] for number, answer in enumerate(answers))


failed = 0
for one in scenarios:
    try:
        print(f"ok      {one.__name__} {one() or ''}")
    except Exception:
        failed += 1
        print(f"FAILED  {one.__name__}")
        traceback.print_exc()
print(f"{len(scenarios) - failed} of {len(scenarios)} scenarios pass")
sys.exit(failed > 0)
