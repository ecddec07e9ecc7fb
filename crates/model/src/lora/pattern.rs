//! Regular expressions over module paths, as PEFT matches them.

use regex_lite::Regex;

use crate::error::{Error, Result};

/// Whether `target_modules` as one expression matches a whole path, as `re.fullmatch` does.
pub(crate) fn matches_path(pattern: &str, path: &str) -> bool {
    compile(&format!("^(?:{pattern})$")).is_some_and(|regex| regex.is_match(path))
}

/// Whether a key of `rank_pattern` or `alpha_pattern` matches the path or its end behind a dot.
pub(crate) fn matches_end(key: &str, path: &str) -> bool {
    compile(&format!(r"^(?:.*\.)?(?:{key})$")).is_some_and(|regex| regex.is_match(path))
}

/// Refuses what is no regular expression, or uses what only Python's know.
///
/// # Errors
/// [`Error::Config`] names the field and what is wrong.
pub(crate) fn check(field: &str, pattern: &str) -> Result<()> {
    match Regex::new(pattern) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Config {
            file: "adapter_config.json",
            field: field.to_owned(),
            reason: format!("{pattern:?} is no regular expression that is known here ({error})"),
        }),
    }
}

fn compile(pattern: &str) -> Option<Regex> {
    Regex::new(pattern).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_matches_whole_and_a_key_at_its_end() {
        let path = "model.layers.11.self_attn.q_proj";
        for (pattern, expected) in [
            (r".*\.(q|v)_proj", true),
            (r".*layers\.1\..*", false),
            (r"q_proj", false),
            (r".*layers\.(1[01])\.self_attn.*", true),
            (r"model.*|lm_head", true),
        ] {
            assert_eq!(matches_path(pattern, path), expected, "{pattern}");
        }
        for (key, expected) in [
            ("q_proj", true),
            ("_proj", false),
            ("layers.1.self_attn.q_proj", false),
            ("layers.11.self_attn.q_proj", true),
            ("(q|k)_proj", true),
            ("k_proj|q_proj", true),
            ("q", false),
        ] {
            assert_eq!(matches_end(key, path), expected, "{key}");
        }
        check("target_modules", "(?<=x)q").expect_err("look-behind is Python's");
    }
}
