"""A tiny model of random weights, for ours as a folder and for llama.cpp as a GGUF file of the same.

    python make_model.py LLAMA_CPP OUT      # writes OUT/model/ and OUT/model.gguf

LLAMA_CPP is a source tree of llama.cpp. The tokenizer and template are those of examples/assets/tiny.
Answers hardly ever end by themselves, which the tests of llama.cpp's server count on.
"""

import pathlib
import shutil
import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

llama_cpp, out = map(pathlib.Path, sys.argv[1:3])
tiny = pathlib.Path(__file__).parents[3] / "examples" / "assets" / "tiny"
folder = out / "model"

torch.manual_seed(7)
config = Qwen2Config.from_pretrained(tiny)
config.max_position_embeddings = 2048
config.initializer_range = 0.2
model = Qwen2ForCausalLM(config)
# The end's logit is 0, far below the others' highest.
model.model.embed_tokens.weight.data[config.eos_token_id] = 0
model = model.to(torch.bfloat16)
model.save_pretrained(folder)
for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
    shutil.copy(tiny / file, folder)

sys.path.insert(0, str(llama_cpp / "gguf-py"))
sys.path.insert(0, str(llama_cpp))
from conversion.base import TextModel  # noqa: E402

# The converter knows pre-tokenizers by a hash of what they make of a text, which also depends on the
# vocabulary. This one splits as Qwen2's.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"


def no_sentencepiece(self):
    raise FileNotFoundError


TextModel._set_vocab_sentencepiece = no_sentencepiece
import convert_hf_to_gguf  # noqa: E402

sys.argv[1:] = [str(folder), "--outfile", str(out / "model.gguf"), "--outtype", "bf16"]
convert_hf_to_gguf.main()
