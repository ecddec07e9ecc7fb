//! One decoder for training, prefill and decode, with LoRA adapters and PEFT files.
