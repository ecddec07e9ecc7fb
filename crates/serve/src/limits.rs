//! What a request may ask of any engine.

use crate::engine::GenerateRequest;
use crate::error::{Error, Result};

/// Tokens that end a completion at most, the model's own among them.
pub(crate) const MAX_STOP_TOKEN_IDS: usize = 1024;
/// Words that are never said at most; each is two token sequences.
pub(crate) const MAX_BAD_WORDS: usize = 1024;
/// Bytes of one of them at most.
pub(crate) const MAX_BAD_WORD_BYTES: usize = 128;
/// Log-probabilities told for each token at most, likeliest or named, as OpenAI's.
pub(crate) const MAX_LOGPROBS: usize = 20;
/// Biased tokens at most.
pub(crate) const MAX_LOGIT_BIASES: usize = 1024;
/// Allowed tokens at most: more than any vocabulary has.
pub(crate) const MAX_ALLOWED_TOKEN_IDS: usize = 1 << 18;
/// Bytes of one stop string at most.
pub(crate) const MAX_STOP_BYTES: usize = 1024;

/// Log-probabilities of one answer that is told whole at most: about a gigabyte of JSON.
const MAX_TOLD_LOGPROBS: u64 = 1 << 23;

/// Refuses what would be told whole and could fill a machine's memory.
pub(crate) fn check_told<'a>(
    requests: impl IntoIterator<Item = &'a GenerateRequest>,
) -> Result<()> {
    let told = |request: &GenerateRequest| {
        let each = |top: u32| 1 + u64::from(top).max(request.logprob_ids.len() as u64);
        let prompt = request.prompt_ids.len() as u64;
        let prompt = request.prompt_logprobs.map_or(0, |top| each(top) * prompt);
        let most = u64::from(request.max_tokens);
        prompt + request.logprobs.map_or(0, |top| each(top) * most)
    };
    match requests.into_iter().map(told).sum::<u64>() <= MAX_TOLD_LOGPROBS {
        true => Ok(()),
        false => Err(Error::invalid(
            "logprobs",
            format!(
                "one answer tells at most {MAX_TOLD_LOGPROBS} log-probabilities; stream it, or ask \
                 for fewer tokens, choices or alternatives"
            ),
        )),
    }
}

/// The checks of [`Engine::generate`](crate::Engine::generate) that every engine makes alike.
///
/// # Errors
/// As [`Engine::generate`](crate::Engine::generate), without
/// [`ModelNotFound`](crate::Error::ModelNotFound) and what depends on load.
pub fn check_request(
    request: &GenerateRequest,
    vocab_size: usize,
    max_model_len: u32,
) -> Result<()> {
    if request.prompt_ids.is_empty() {
        return Err(Error::invalid("prompt", "the prompt is empty"));
    }
    let (sampling, bad_words) = (&request.sampling, &request.bad_words);
    within(
        "stop_token_ids",
        request.stop_token_ids.len(),
        MAX_STOP_TOKEN_IDS,
    )?;
    within("logprob_token_ids", request.logprob_ids.len(), MAX_LOGPROBS)?;
    within("bad_words", bad_words.len(), 2 * MAX_BAD_WORDS)?;
    within("logit_bias", sampling.logit_bias.len(), MAX_LOGIT_BIASES)?;
    let allowed = sampling.allowed_token_ids.len();
    within("allowed_token_ids", allowed, MAX_ALLOWED_TOKEN_IDS)?;
    let biased = sampling.logit_bias.iter().map(|(id, _)| id);
    known("prompt", &request.prompt_ids, vocab_size)?;
    known("stop_token_ids", request.stop_token_ids.iter(), vocab_size)?;
    known("logit_bias", biased, vocab_size)?;
    known(
        "allowed_token_ids",
        sampling.allowed_token_ids.iter(),
        vocab_size,
    )?;
    known("logprob_token_ids", request.logprob_ids.iter(), vocab_size)?;
    known("bad_words", bad_words.iter().flatten(), vocab_size)?;
    sampling.validate()?;
    let prompt_tokens = u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX);
    if prompt_tokens.saturating_add(request.max_tokens) > max_model_len {
        let max_tokens = request.max_tokens;
        return Err(Error::ContextLength {
            prompt_tokens,
            max_tokens,
            max_model_len,
        });
    }
    Ok(())
}

/// Refuses a list that is too long, naming the field and the limit.
pub(crate) fn within(param: &str, len: usize, most: usize) -> Result<()> {
    if len <= most {
        return Ok(());
    }
    let message = format!("{param} has {len} entries; at most {most} are possible");
    Err(Error::invalid(param, message))
}

fn known<'a>(param: &str, ids: impl IntoIterator<Item = &'a u32>, vocab_size: usize) -> Result<()> {
    match ids.into_iter().find(|&&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(id) => {
            let message = format!("token id {id} is outside the vocabulary of {vocab_size}");
            Err(Error::invalid(param, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever calls an engine without HTTP meets the same limits.
    #[test]
    fn lists_are_bounded_and_named() {
        type Change = fn(&mut GenerateRequest, usize);
        let with = |change: Change, len| {
            let mut request = GenerateRequest::greedy("m", vec![1], 1);
            change(&mut request, len);
            check_request(&request, 300, 100)
        };
        let cases: [(&str, usize, Change); 5] = [
            ("stop_token_ids", MAX_STOP_TOKEN_IDS, |request, len| {
                request.stop_token_ids = vec![1; len].into();
            }),
            ("logprob_token_ids", MAX_LOGPROBS, |request, len| {
                request.logprob_ids = vec![1; len].into();
            }),
            ("bad_words", 2 * MAX_BAD_WORDS, |request, len| {
                request.bad_words = vec![vec![1]; len].into();
            }),
            ("logit_bias", MAX_LOGIT_BIASES, |request, len| {
                request.sampling.logit_bias = vec![(1, 1.0); len].into();
            }),
            (
                "allowed_token_ids",
                MAX_ALLOWED_TOKEN_IDS,
                |request, len| {
                    request.sampling.allowed_token_ids = vec![1; len].into();
                },
            ),
        ];
        for (field, most, change) in cases {
            assert!(with(change, most).is_ok(), "{field}");
            let error = with(change, most + 1).expect_err(field);
            assert!(error.to_string().contains(&most.to_string()), "{error}");
            assert!(
                matches!(error, Error::InvalidRequest { param: Some(param), .. } if param == field)
            );
        }
    }
}
