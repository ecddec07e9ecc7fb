//! What a request cost, in OpenAI's words.

use serde::Serialize;

use crate::engine::Usage;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PromptTokensDetails {
    /// Computed before, for another request.
    cached_tokens: u32,
}

impl UsageBody {
    /// The sum over the completions of prompts: each prompt counts once, by its first choice.
    pub(crate) fn of(choices: &[Usage], choices_per_prompt: u32) -> Self {
        let prompts = choices.iter().step_by(choices_per_prompt.max(1) as usize);
        let prompt_tokens = prompts.clone().map(|usage| usage.prompt_tokens).sum();
        let cached_tokens = prompts.map(|usage| usage.cached_tokens).sum();
        let completion_tokens = choices.iter().map(|usage| usage.completion_tokens).sum();
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_counts_once_for_all_its_choices() {
        let usage = |prompt_tokens| Usage {
            prompt_tokens,
            completion_tokens: 3,
            cached_tokens: 2,
        };
        let body = UsageBody::of(&[usage(5), usage(5), usage(7), usage(7)], 2);
        assert_eq!(
            (
                body.prompt_tokens,
                body.completion_tokens,
                body.total_tokens
            ),
            (12, 12, 24)
        );
        assert_eq!(body.prompt_tokens_details.cached_tokens, 4);
    }
}
