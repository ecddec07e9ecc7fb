//! One request under way: what it has so far, and what it needs of the next step.

use tokio::sync::mpsc;

use super::grammar::Grammar;
use super::registry::Generation;
use crate::engine::{GenerateRequest, TokenEvent, TokenLogprobs, Usage};
use crate::error::Result;
use crate::sampler::{self, Seen};
use crate::scheduler::{SequenceId, Slice};

/// One request under way.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Without its prompt.
    pub(super) request: GenerateRequest,
    pub(super) adapter: Option<Generation>,
    pub(super) grammar: Option<Grammar>,
    /// Prompt and completion.
    pub(super) tokens: Vec<u32>,
    prompt_len: usize,
    seen: Seen,
    pub(super) cached_tokens: u32,
    pub(super) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub(super) events: mpsc::UnboundedSender<Result<TokenEvent>>,
}

impl Sequence {
    /// Admitted, with nothing computed yet. The prompt moves to where the completion will follow it.
    pub(super) fn new(
        mut request: GenerateRequest,
        adapter: Option<Generation>,
        grammar: Option<Grammar>,
        events: mpsc::UnboundedSender<Result<TokenEvent>>,
    ) -> Self {
        let tokens = std::mem::take(&mut request.prompt_ids);
        Self {
            seen: Seen::new(&request.sampling, &tokens),
            prompt_len: tokens.len(),
            tokens,
            cached_tokens: 0,
            prompt_logprobs: Vec::new(),
            request,
            adapter,
            grammar,
            events,
        }
    }

    pub(super) fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len as u32,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.generated().len() as u32,
        }
    }

    /// The next token by the request's own settings; `None` if it may be none.
    pub(super) fn sample(&self, logits: &[f32]) -> Option<u32> {
        let past = self.request.past(&self.seen, self.generated());
        sampler::sample(logits, &self.request.sampling, past)
    }

    /// The same on a GPU, and what changes of the logits there first; `None` where somebody must see them.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(super) fn choice(
        &self,
        row: u32,
        edits: &mut Vec<updraft_model::Edit>,
    ) -> Option<updraft_model::Choice> {
        let GenerateRequest {
            logprobs,
            prompt_logprobs,
            sampling,
            ..
        } = &self.request;
        if self.grammar.is_some() || logprobs.is_some() || prompt_logprobs.is_some() {
            return None;
        }
        let past = self.request.past(&self.seen, self.generated());
        sampler::on_gpu::choice(row, sampling, past, edits)
    }

    /// One more token.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.seen.push(token);
    }

    /// The log-probabilities of a chosen token, if they were asked for.
    pub(super) fn logprobs(&self, logits: &[f32], token: u32) -> Option<TokenLogprobs> {
        let top = self.request.logprobs?;
        let named = &self.request.logprob_ids;
        Some(sampler::token_logprobs(logits, token, top, named))
    }

    /// The logits with what the grammar forbids at minus infinity; `None` if all is allowed.
    pub(super) fn allowed(&mut self, logits: &[f32]) -> Result<Option<Vec<f32>>> {
        let stops = &self.request.stop_token_ids;
        let grammar = self.grammar.as_mut();
        grammar
            .map(|grammar| grammar.mask(logits, stops))
            .transpose()
    }

    /// Whether the grammar allows nothing after this token.
    pub(super) fn is_over(&mut self, token: u32) -> Result<bool> {
        let Some(grammar) = &mut self.grammar else {
            return Ok(false);
        };
        grammar.accept(token)?;
        Ok(grammar.is_over())
    }

    /// The positions in a slice whose logits are wanted, and what for.
    pub(super) fn rows(&self, slice: &Slice) -> impl Iterator<Item = (u32, Row)> {
        let id = slice.id;
        let last = slice.start + slice.len - 1;
        // The logits at a position are of the token after it. What was noted before a preemption
        // is not noted again.
        let known = (self.prompt_logprobs.len().max(1) - 1) as u32;
        let wanted = self.request.prompt_logprobs.is_some();
        let end = if wanted {
            (last + 1).min(self.prompt_len as u32 - 1)
        } else {
            0
        };
        let prompt = slice.start.max(known)..end;
        let prompt = prompt.map(move |at| (at, Row::Prompt(id, at as usize + 1)));
        let next = slice.is_last && self.request.max_tokens > 0;
        let embed = slice.is_last && self.request.embed && self.generated().is_empty();
        prompt
            .chain(embed.then_some((last, Row::Embed(id))))
            .chain(next.then_some((last, Row::Next(id))))
    }

    pub(super) fn note_prompt(&mut self, position: usize, logits: &[f32]) {
        if self.prompt_logprobs.is_empty() {
            self.prompt_logprobs.push(None);
        }
        let top = self.request.prompt_logprobs.unwrap_or(0);
        let logprobs = sampler::token_logprobs(logits, self.tokens[position], top, &[]);
        self.prompt_logprobs.push(Some(logprobs));
    }

    /// Sends the prompt's log-probabilities before the first token.
    pub(super) fn tell_prompt(&mut self) {
        if self.request.prompt_logprobs.take().is_some() {
            let mut logprobs = std::mem::take(&mut self.prompt_logprobs);
            if logprobs.is_empty() {
                logprobs.push(None); // A prompt of one token.
            }
            self.tell(Ok(TokenEvent::Prompt(logprobs)));
        }
    }

    /// A client that has gone is found by the next sweep.
    pub(super) fn tell(&self, event: Result<TokenEvent>) {
        let _ = self.events.send(event);
    }
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row {
    /// The log-probability of the prompt's token at this position.
    Prompt(SequenceId, usize),
    /// The next token.
    Next(SequenceId),
    /// None: the hidden state itself is wanted.
    Embed(SequenceId),
}

impl Row {
    pub(super) fn id(self) -> SequenceId {
        match self {
            Self::Prompt(id, _) | Self::Next(id) | Self::Embed(id) => id,
        }
    }
}
