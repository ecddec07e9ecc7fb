//! Real chat templates against what transformers renders.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::{Map, Value};
use updraft_chat::{ChatTemplate, Conversation, LocalTime, Message, RenderOptions, SpecialTokens};

use crate::fixtures;

#[derive(Deserialize)]
struct Parity {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    case: String,
    template: String,
    msgs: Vec<Message>,
    tools: Option<Value>,
    documents: Option<Value>,
    agp: bool,
    kw: Map<String, Value>,
    ok: bool,
    out: Option<String>,
    err: Option<String>,
}

/// When the reference was rendered: 2026-11-22.
const RENDERED: i64 = 1_795_305_600;

#[derive(Default)]
struct Tally {
    same: usize,
    announced: usize,
    silent: Vec<String>,
    refused: usize,
    lenient: Vec<String>,
}

#[test]
fn template_parity_with_transformers() {
    let Some(root) = fixtures::root("template_parity_with_transformers") else {
        return;
    };
    for path in fixtures::files(&root.join("templates"), ".json") {
        let bytes = std::fs::read(&path).expect("a readable file");
        let parity: Parity = serde_json::from_slice(&bytes).expect("the form of parity.json");
        let tally = check(&parity);
        let rendered = tally.same + tally.announced + tally.silent.len();
        report(&path, &tally, rendered);
        assert!(tally.silent.is_empty(), "differ without saying so");
        assert!(tally.same * 100 >= rendered * 99, "less than 99% the same");
    }
}

#[expect(clippy::print_stdout, reason = "the numbers are the point")]
fn report(path: &std::path::Path, tally: &Tally, rendered: usize) {
    println!(
        "{}: {} of {rendered} byte-identical, {} announced divergences; \
         of what transformers refuses {} refused, {} rendered",
        fixtures::name(path),
        tally.same,
        tally.announced,
        tally.refused,
        tally.lenient.len(),
    );
    for case in tally.silent.iter().chain(&tally.lenient) {
        println!("  {case}");
    }
}

fn check(parity: &Parity) -> Tally {
    let compiled: HashMap<&str, ChatTemplate> = parity
        .templates
        .iter()
        .map(|(name, source)| {
            let template = ChatTemplate::new(source, SpecialTokens::default());
            (
                name.as_str(),
                template.unwrap_or_else(|error| panic!("{name}: {error:?}")),
            )
        })
        .collect();
    let mut tally = Tally::default();
    for case in &parity.cases {
        let template = &compiled[case.template.as_str()];
        let conversation = Conversation {
            messages: case.msgs.clone(),
            tools: case.tools.clone(),
            documents: case.documents.clone(),
            variables: case.kw.clone(),
        };
        let options = RenderOptions {
            add_generation_prompt: case.agp,
            now: Some(LocalTime::from_seconds(RENDERED)),
            ..RenderOptions::default()
        };
        let rendered = template.render(&conversation, &options);
        let label = format!("{} {}", case.template, case.case);
        match (case.ok, rendered) {
            (true, Ok(text)) if Some(&text) == case.out.as_ref() => tally.same += 1,
            (true, _) if !template.divergences().is_empty() => tally.announced += 1,
            (true, Ok(text)) => {
                let expected = case.out.as_deref().unwrap_or_default();
                tally
                    .silent
                    .push(format!("{label}: {}", difference(&text, expected)));
            }
            (true, Err(error)) => tally.silent.push(format!("{label}: {}", chain(&error))),
            (false, Err(_)) => tally.refused += 1,
            (false, Ok(_)) => {
                let reason = case.err.as_deref().unwrap_or_default();
                tally.lenient.push(format!("{label}: {reason}"));
            }
        }
    }
    tally
}

fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(chain);
    format!("{error}: {}", cause.unwrap_or_default())
}

fn difference(found: &str, expected: &str) -> String {
    let at = found
        .char_indices()
        .zip(expected.chars())
        .find(|&((_, a), b)| a != b)
        .map_or(found.len().min(expected.len()), |((at, _), _)| at);
    let tail = |text: &str| {
        text.get(at..)
            .unwrap_or_default()
            .chars()
            .take(60)
            .collect::<String>()
    };
    format!(
        "at byte {at}: {:?}, expected {:?}",
        tail(found),
        tail(expected)
    )
}
