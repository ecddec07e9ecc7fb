//! What a computed step comes to, for each of its requests: a token, an end, or an error.

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::super::guard::{Failure, guard};
use super::super::sequence::Row;
use super::Worker;
use crate::engine::{FinishReason, TokenEvent};
use crate::error::{Error, Result};
use crate::sampler;
use crate::scheduler::{SequenceId, Step};

/// Rows of logits computed at once: enough to use the hardware, little memory at any vocabulary.
const LOGIT_ROWS: usize = 32;

impl Worker {
    pub(super) fn use_hidden(&mut self, step: &Step, hidden: &Tensor, rows: &[Row]) {
        self.scheduler.computed(step);
        self.status
            .stepped(step.slices.iter().map(|slice| slice.len).sum());
        self.tell_embeddings(hidden, rows);
        for (index, chunk) in rows.chunks(LOGIT_ROWS).enumerate() {
            let first = index * LOGIT_ROWS;
            if let Ok(logits) = self.logits(hidden, first, chunk.len()) {
                self.use_logits(chunk, &logits);
                continue;
            }
            for (offset, &row) in chunk.iter().enumerate() {
                match self.logits(hidden, first + offset, 1) {
                    Ok(logits) => self.use_logits(&[row], &logits),
                    Err(failure) => self.fail(row.id(), &failure.cause),
                }
            }
        }
        for slice in step.slices.iter().filter(|slice| slice.is_last) {
            self.finish_prompt_only(slice.id);
            self.suspects.retain(|&suspect| suspect != slice.id);
        }
    }

    fn tell_embeddings(&mut self, hidden: &Tensor, rows: &[Row]) {
        for (index, row) in rows.iter().enumerate() {
            let Row::Embed(id) = *row else { continue };
            let state = guard(|| {
                let state = hidden.narrow(0, index, 1)?.to_dtype(DType::F32)?;
                Ok(state.flatten_all()?.to_vec1()?)
            });
            match (state, self.sequences.get(&id)) {
                (Ok(state), Some(sequence)) => sequence.tell(Ok(TokenEvent::Embedding(state))),
                (Err(failure), _) => self.fail(id, &failure.cause),
                (Ok(_), None) => {}
            }
        }
    }

    /// The logits of some rows, `[len, V]`.
    fn logits(&self, hidden: &Tensor, first: usize, len: usize) -> Result<Vec<f32>, Failure> {
        guard(|| {
            let hidden = hidden.narrow(0, first, len)?;
            let logits = self.decoder.logits(&hidden)?.to_dtype(DType::F32)?;
            Ok(logits.flatten_all()?.to_vec1()?)
        })
    }

    fn use_logits(&mut self, rows: &[Row], logits: &[f32]) {
        let vocab_size = logits.len() / rows.len();
        for (&row, logits) in rows.iter().zip(logits.chunks_exact(vocab_size)) {
            let used = guard(|| {
                self.use_row(row, logits);
                Ok(())
            });
            if let Err(failure) = used {
                tracing::error!(cause = failure.cause, "a token could not be chosen");
                self.fail(row.id(), &failure.cause);
            }
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
        let is_stop = sequence.request.stop_token_ids.contains(&token);
        let logprobs = sequence.logprobs(logits, token);
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
