//! Parity with transformers and tokenizers, on the reference data that
//! `UPDRAFT_FIXTURES` names.

mod fixtures;
mod template_parity;
mod token_parity;
