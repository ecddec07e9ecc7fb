//! An OpenAI-compatible server that batches continuously.
