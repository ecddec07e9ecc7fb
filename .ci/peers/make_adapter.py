"""A LoRA adapter of random weights, made by PEFT: python .ci/peers/make_adapter.py MODEL OUT"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model, out = sys.argv[1:]
torch.manual_seed(3)
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
for name, parameter in peft.named_parameters():
    if "lora_B" in name:  # Zero in a fresh one, which would change nothing.
        torch.nn.init.normal_(parameter, std=0.1)
peft.save_pretrained(out)
