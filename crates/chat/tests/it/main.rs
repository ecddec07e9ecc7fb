//! Parity with transformers and tokenizers, on the reference data that
//! `UPDRAFT_FIXTURES` names.

mod conformance;
mod disputed;
mod fixtures;
mod hostile;
mod span_parity;
mod template_parity;
mod token_parity;
