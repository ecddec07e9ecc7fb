//! What a computed step comes to, for each of its requests: a token, an end, or an error.

use std::time::Instant;

use updraft_model::Hidden;

use super::super::guard::{Failure, guard};
use super::super::sequence::Row;
use super::Worker;
use crate::engine::{FinishReason, TokenEvent, TokenLogprobs};
use crate::error::{Error, Result};
use crate::sampler;
use crate::scheduler::{SequenceId, Step};

/// Rows of logits computed at once: enough to use the hardware, little memory at any vocabulary.
const LOGIT_ROWS: usize = 32;
/// The same on a GPU, which is waited for after each of them.
pub(in super::super) const LOGIT_ROWS_ON_GPU: usize = 128;

impl Worker {
    pub(super) fn use_hidden(&mut self, step: &Step, hidden: &Hidden, rows: &[Row]) {
        self.scheduler.computed(step);
        self.status
            .stepped(step.slices.iter().map(|slice| slice.len).sum());
        self.tell_embeddings(hidden, rows);
        let at_once = match self.decoder.is_on_gpu() {
            true => LOGIT_ROWS_ON_GPU,
            false => LOGIT_ROWS,
        };
        for (index, chunk) in rows.chunks(at_once).enumerate() {
            let first = index * at_once;
            if self.use_rows(hidden, first, chunk).is_ok() {
                continue;
            }
            for (offset, row) in chunk.iter().enumerate() {
                let alone = std::slice::from_ref(row);
                if let Err(failure) = self.use_rows(hidden, first + offset, alone) {
                    self.fail(row.id(), &failure.cause);
                }
            }
        }
        for slice in step.slices.iter().filter(|slice| slice.is_last) {
            self.finish_prompt_only(slice.id);
            self.suspects.retain(|&suspect| suspect != slice.id);
        }
    }

    fn tell_embeddings(&mut self, hidden: &Hidden, rows: &[Row]) {
        for (index, row) in rows.iter().enumerate() {
            let Row::Embed(id) = *row else { continue };
            let state = guard(|| Ok(hidden.rows(index..index + 1)?.to_vec()?));
            match (state, self.sequences.get(&id)) {
                (Ok(state), Some(sequence)) => sequence.tell(Ok(TokenEvent::Embedding(state))),
                (Err(failure), _) => self.fail(id, &failure.cause),
                (Ok(_), None) => {}
            }
        }
    }

    /// Computes the logits of some rows and does with each what it is for. After an error nothing was done.
    fn use_rows(&mut self, hidden: &Hidden, first: usize, rows: &[Row]) -> Result<(), Failure> {
        let hidden = guard(|| Ok(hidden.rows(first..first + rows.len())?))?;
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if self.decoder.is_on_gpu() {
            return self.use_rows_on_gpu(&hidden, rows);
        }
        let logits = guard(|| Ok(self.decoder.logits(&hidden)?.to_vec()?))?;
        self.use_logits(rows, &logits);
        Ok(())
    }

    pub(super) fn use_logits(&mut self, rows: &[Row], logits: &[f32]) {
        let vocab_size = logits.len() / rows.len();
        for (&row, logits) in rows.iter().zip(logits.chunks_exact(vocab_size)) {
            self.or_fail(row, |worker| worker.use_row(row, logits));
        }
    }

    /// What goes wrong with a row ends its request.
    pub(super) fn or_fail(&mut self, row: Row, work: impl FnOnce(&mut Self)) {
        let done = guard(|| {
            work(self);
            Ok(())
        });
        if let Err(failure) = done {
            tracing::error!(cause = failure.cause, "a token could not be chosen");
            self.fail(row.id(), &failure.cause);
        }
    }

    fn use_row(&mut self, row: Row, logits: &[f32]) {
        match row {
            Row::Prompt(id, position) => {
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.note_prompt(position, logits);
                }
            }
            Row::Next(id) => self.choose(id, logits),
            Row::Embed(_) => {} // Told already.
        }
    }

    fn choose(&mut self, id: SequenceId, logits: &[f32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.tell_prompt();
        let allowed = match sequence.allowed(logits) {
            Ok(allowed) => allowed,
            Err(error) => return self.end_with(id, error),
        };
        let choice = allowed.as_deref().unwrap_or(logits);
        let Some(token) = sequence.sample(choice) else {
            return match sampler::is_sound(logits) {
                true => self.refuse(id, "the request's own settings leave no token to choose"),
                false => self.fail(id, "the model gave no finite logit"),
            };
        };
        let logprobs = sequence.logprobs(logits, token);
        self.chosen(id, token, logprobs);
    }

    /// Tells of a token, and whether it was the last.
    pub(super) fn chosen(&mut self, id: SequenceId, token: u32, logprobs: Option<TokenLogprobs>) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let is_stop = sequence.request.stop_token_ids.contains(&token);
        sequence.push(token);
        if is_stop {
            return self.finish(id, FinishReason::Stop);
        }
        sequence.tell(Ok(TokenEvent::Token {
            id: token,
            logprobs,
        }));
        match sequence.is_over(token) {
            Ok(false) => {}
            Ok(true) => return self.finish(id, FinishReason::Stop),
            Err(error) => return self.end_with(id, error),
        }
        if sequence.generated().len() == sequence.request.max_tokens as usize {
            return self.finish(id, FinishReason::Length);
        }
        self.scheduler.appended(id, token);
    }

    /// A request for no tokens is done when its prompt is.
    fn finish_prompt_only(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id)
            && sequence.request.max_tokens == 0
        {
            sequence.tell_prompt();
            self.finish(id, FinishReason::Length);
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        self.pace.ended(Instant::now());
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.tell(Ok(TokenEvent::Finished {
                reason,
                usage: sequence.usage(),
            }));
        }
        self.forget(id);
    }

    /// What the request asks for contradicts itself, which shows only now.
    fn refuse(&mut self, id: SequenceId, message: &str) {
        let refused = Error::InvalidRequest {
            message: message.to_owned(),
            param: None,
        };
        self.end_with(id, refused);
    }

    pub(super) fn fail(&mut self, id: SequenceId, cause: &str) {
        let source = cause.into();
        self.end_with(id, Error::Step { source });
    }

    fn end_with(&mut self, id: SequenceId, error: Error) {
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.tell(Err(error));
        }
        self.forget(id);
    }
}
