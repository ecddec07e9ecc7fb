"""Makes the tiny model in this folder: tokenizer, chat template and pre-trained weights.

A Qwen2 of 0.66 M parameters and its own byte-level BPE, from nothing but the
synthetic chats of `chats.py` and a seed. Run, in this folder:

    pip install torch==2.15.0 transformers==5.23.0 tokenizers safetensors
    OMP_NUM_THREADS=1 python generate.py

The bytes of `model.safetensors` depend on the library versions and the CPU;
what the model can do does not.
"""

import argparse
import collections
import copy
import itertools
import json
import pathlib
import random
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import chats

VOCAB_SIZE = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["system", "user", "assistant"]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 512,
    "pad_token": "<|endoftext|>",
}
# As Qwen2 splits text: words with their space, single digits, runs of punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer():
    """A byte-level BPE that grows tokens only from the start of a word.

    Each merge appends one letter to " ", to punctuation or to a capital, so " the" and " letter"
    are one token while a quoted word stays a row of letters: a model of this
    size then need not memorise how each token is spelled.
    """
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab_left = VOCAB_SIZE - len(alphabet) - len(SPECIAL) - len(ROLES)
    counts = {f"Ġ{letter}": 10**9 for letter in "abcdefghijklmnopqrstuvwxyz"}
    rng = random.Random(0)
    for _ in range(5000):
        for message in chats.conversation(rng):
            for token, _ in split.pre_tokenize_str(message["content"]):
                if not token[0].islower() and not token[0].isdigit():
                    for end in range(2, len(token) + 1):
                        counts[token[:end]] = counts.get(token[:end], 0) + 1
    # A prefix is never rarer than what it begins, so parents come first.
    grown = sorted(counts, key=lambda token: (-counts[token], len(token), token))[:vocab_left]
    vocab = {token: i for i, token in enumerate(alphabet + grown)}
    tokenizer = Tokenizer(models.BPE(vocab, [(token[:-1], token[-1]) for token in grown]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_special_tokens(SPECIAL)
    # Roles open every turn and would cost a token per letter.
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENIZER_CONFIG)


def make_model(tokenizer):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=512,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))
    init_embeddings(model, tokenizer)
    return model


@torch.no_grad()
def init_embeddings(model, tokenizer):
    """Tokens start as the sum of their characters, so that "r" and " r" are alike from the beginning."""
    weight = model.model.embed_tokens.weight
    characters = collections.defaultdict(lambda: torch.randn(weight.shape[1]))
    for row, token in zip(weight, tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE))):
        parts = [token] if token in SPECIAL + ROLES else token
        vector = sum(characters[part] * (0.5 if part == "Ġ" else 1.0) for part in parts)
        row.copy_(vector / vector.norm() * model.config.initializer_range * len(row) ** 0.5)


def encode(tokenizer, messages):
    """Token ids, and labels that keep only what the assistant says."""
    ids, labels = [], []
    for i, message in enumerate(messages):
        # The template has no state, so a conversation is its messages one after the other.
        turn = tokenizer(tokenizer.apply_chat_template([message], tokenize=False), add_special_tokens=False)["input_ids"]
        head = 3 if message["role"] == "assistant" else len(turn)  # <|im_start|> assistant \n
        ids += turn
        labels += [-100] * head + turn[head:]
    return ids, labels


def pad(rows, width, value):
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(tokenizer, rng, size):
    """Endless batches of conversations of like length: words grow from 2 letters to 10, then all skills."""
    for stage in itertools.count():
        longest = 2 if stage < 6 else min(stage - 2, chats.LONGEST)
        skills = chats.CORE if stage < 16 else chats.SKILLS
        rows = [encode(tokenizer, chats.conversation(rng, longest, skills)) for _ in range(size * 16)]
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            width = len(group[-1][0])
            yield pad([ids for ids, _ in group], width, 0), pad([labels for _, labels in group], width, -100)


def exactness(model, tokenizer, skill, count=200):
    """The share of judged words on which greedy decoding gives exactly the skill's answer."""
    rng = random.Random(1)
    right = 0
    for _ in range(count):
        question, answer = skill(rng, chats.word_from(rng, judged=True))
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, labels = encode(tokenizer, chat)
        with torch.no_grad():
            guess = model(torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
        right += all(g == label for g, label in zip(guess, labels[1:]) if label != -100)
    return right / count


def pretrain(model, tokenizer, steps, batch_size, folder):
    """Muon for the matrices inside, AdamW for the rest; saves as it goes."""
    inner = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    outer = {n: p for n, p in model.named_parameters() if n not in inner}
    optimizers = [
        torch.optim.Muon(inner.values(), lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(outer.values(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    # Up over 40 steps, level, then down over the second half.
    shape = lambda step: min(1.0, (step + 1) / 40, (steps - step) / (0.5 * steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in optimizers]
    source = batches(tokenizer, random.Random(1), batch_size)
    start, tokens = time.time(), 0
    for step in range(steps):
        ids, labels = next(source)
        tokens += ids.numel()
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, s in zip(optimizers, schedules):
            o.step()
            s.step()
            o.zero_grad()
        if step % 250 == 249:
            save(model, tokenizer, folder)
            shown = " ".join(f"{s.__name__} {exactness(model, tokenizer, s, 100):.2f}" for s in (chats.mark, chats.mark_with, chats.spell, chats.contains, chats.series))
            print(f"step {step + 1} loss {loss.item():.4f} {tokens / (time.time() - start):.0f} tokens/s {shown}", flush=True)


def save(model, tokenizer, folder):
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer"} | TOKENIZER_CONFIG
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch-size", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, tokenizer, args.steps, args.batch_size, args.out)


if __name__ == "__main__":
    main()
