//! Any text as a task file: an answer or an error that points into it, for pipelines, plans and the
//! warnings too.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use updraft_provision::{Catalog, EnvOverrides, Error, Pipeline, Plan};

static OVERRIDES: LazyLock<EnvOverrides> =
    LazyLock::new(|| EnvOverrides::new().with("WORD", "w").with_secret("TOKEN", "t"));

fuzz_target!(|text: &str| {
    // YAML ends lines at a lone carriage return too.
    let lines = text.matches(['\n', '\r']).count() as u64 + 1;
    match Pipeline::from_yaml(text, &OVERRIDES) {
        Ok(pipeline) => {
            for (index, task) in pipeline.tasks.iter().enumerate() {
                for warning in task.warnings(&pipeline.tasks[..index]) {
                    assert!(!warning.to_string().is_empty());
                }
                let plan = Plan::for_task(task, Catalog::built_in().into_offers());
                assert!(!plan.to_string().is_empty());
            }
        }
        Err(
            Error::UnknownField { line, .. }
            | Error::Unsupported { line, .. }
            | Error::InvalidField { line, .. },
        ) => assert!(line <= lines, "line {line} of {lines}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let _ = EnvOverrides::new().with_env_file(text);
    let _ = Catalog::from_csv("aws", text);
});
