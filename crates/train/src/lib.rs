//! LoRA fine-tuning with Hugging Face's numbers, packed and resumable to the bit.
