//! Grammars by llguidance.

use std::fmt;
use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::json;
use tokio::sync::Semaphore;
use updraft_chat::{Chat, TokenizerExt};

use crate::constraint::Constraint;
use crate::error::{Error, Result};

/// Work that a schema's regular expressions may take: about 10 ms.
const COMPILE_FUEL: u64 = 500_000;

/// Compiles constraints for one vocabulary, which is laid out when first needed.
#[derive(Clone)]
pub(in super::super) struct Grammars(Arc<Shared>);

struct Shared {
    chat: Chat,
    vocab_size: usize,
    /// A permit for each processor: more at once would only be more threads.
    compilers: Arc<Semaphore>,
    factory: OnceLock<Result<ParserFactory, String>>,
}

/// How far one answer has come.
#[derive(Clone)]
pub(in super::super) struct Grammar {
    matcher: Matcher,
    end: u32,
}

impl Grammars {
    /// For a model of `vocab_size` tokens; ids that the tokenizer does not know are never allowed.
    pub(in super::super) fn new(chat: &Chat, vocab_size: usize) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Shared {
            chat: chat.clone(),
            vocab_size,
            compilers: Arc::new(Semaphore::new(processors)),
            factory: OnceLock::new(),
        }))
    }

    /// On a thread that may take its time; llguidance's fuel bounds it.
    pub(in super::super) async fn compile(&self, constraint: Constraint) -> Result<Grammar> {
        let shared = self.0.clone();
        let place = shared.compilers.clone().acquire_owned().await;
        let place = place.expect("this semaphore is never closed");
        let compiled = tokio::task::spawn_blocking(move || {
            let _held_until_done = place;
            shared.compile(constraint)
        });
        compiled.await.map_err(|panic| Error::Step {
            source: panic.into(),
        })?
    }
}

impl Shared {
    fn compile(&self, constraint: Constraint) -> Result<Grammar> {
        let refuse = |message: String| Error::invalid("response_format", message);
        let end = self.chat.end_ids().first().copied();
        let end = end.ok_or_else(|| refuse("the model has no token that ends an answer".into()))?;
        let factory = self.factory.get_or_init(|| self.factory(end));
        let factory = factory.as_ref().map_err(|cause| Error::Step {
            source: cause.as_str().into(),
        })?;
        let mut schema = match constraint {
            Constraint::JsonObject => json!({"type": "object"}),
            Constraint::JsonSchema(schema) => Arc::unwrap_or_clone(schema),
        };
        if let Some(fields) = schema.as_object_mut() {
            // As `json.dumps` writes it, which models have seen most; free white space would let a
            // weak model write nothing else.
            let form = json!({
                "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ",
            });
            fields.insert("x-guidance".into(), form);
        }
        let parser = factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let parser =
            parser.map_err(|cause| refuse(format!("the schema cannot be used: {cause}")))?;
        Ok(Grammar {
            matcher: Matcher::new(Ok(parser)),
            end,
        })
    }

    fn factory(&self, end: u32) -> Result<ParserFactory, String> {
        let tokenizer = self.chat.tokenizer();
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            match tokenizer.is_special(id) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                false => bytes.to_vec(),
            }
        };
        let vocab_size = u32::try_from(self.vocab_size).map_err(|error| error.to_string())?;
        let words: Vec<Vec<u8>> = (0..vocab_size).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().initial_lexer_fuel = COMPILE_FUEL;
        factory.limits_mut().verbose_errors = false;
        Ok(factory)
    }
}

impl Grammar {
    /// The logits with everything forbidden at minus infinity; the tokens that stop the request
    /// are allowed where the answer may end, besides where their text is.
    pub(in super::super) fn mask(&mut self, logits: &[f32], stops: &[u32]) -> Result<Vec<f32>> {
        let allowed = self.matcher.compute_mask_or_eos();
        let allowed = allowed.map_err(|cause| self.failure(&cause))?;
        let mut masked = vec![f32::NEG_INFINITY; logits.len()];
        for (id, (masked, logit)) in (0..).zip(masked.iter_mut().zip(logits)) {
            if allowed.is_allowed(id) {
                *masked = *logit;
            }
        }
        // Elsewhere they are allowed as what they say, such as a client's own stop at a brace.
        if allowed.is_allowed(self.end) {
            for &stop in stops {
                masked[stop as usize] = logits[stop as usize];
            }
        }
        Ok(masked)
    }

    /// Goes on by one token.
    pub(in super::super) fn accept(&mut self, token: u32) -> Result<()> {
        let accepted = self.matcher.consume_token(token);
        accepted.map_err(|cause| self.failure(&cause))
    }

    /// That a form cannot be followed is the request's fault: an expression may compile within its
    /// fuel and have more states than anybody can walk through.
    fn failure(&self, cause: &dyn fmt::Display) -> Error {
        tracing::warn!(%cause, "an answer's form could not be followed");
        let message = "the answer's form is too complex to follow; simplify the schema's patterns";
        Error::invalid("response_format", message)
    }

    /// Whether nothing may follow.
    pub(in super::super) fn is_over(&self) -> bool {
        self.matcher.is_stopped()
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar")
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
