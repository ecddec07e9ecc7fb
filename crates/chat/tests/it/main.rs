//! Parity with transformers and tokenizers, on the reference data that
//! `UPDRAFT_FIXTURES` names.

mod conformance;
mod fixtures;
mod span_parity;
mod template_parity;
mod token_parity;
