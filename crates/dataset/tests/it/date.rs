//! Templates that ask for the date: the stage's own, never the clock's.

use std::sync::Arc;

use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, LocalTime, SpecialTokens};
use updraft_dataset::{Error, PretokenizeOptions, Result, pretokenize};
use updraft_store::{CancelToken, FinishedStage, NoProgress, Store};

use crate::world::{import_into, options, source};

const TURNS: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";

async fn stage(
    store: &Store,
    standardized: &FinishedStage,
    template: &str,
    date: Option<&str>,
) -> Result<FinishedStage> {
    let template = ChatTemplate::new(template, SpecialTokens::default()).expect("a template");
    // A chat's own clock runs, so the stage must not look at it.
    let now = LocalTime::utc(std::time::SystemTime::now());
    let chat = Chat::new(template, Arc::new(ByteTokenizer::new([]))).with_now(now);
    let options = PretokenizeOptions {
        date: date.map(str::to_owned),
        ..PretokenizeOptions::default()
    };
    let cancel = CancelToken::new();
    pretokenize(
        store,
        "tiny",
        "set",
        standardized,
        &chat,
        &options,
        &NoProgress,
        &cancel,
    )
    .await
}

#[tokio::test]
async fn the_date_belongs_to_the_key_where_the_template_asks() {
    let store = Store::memory();
    let standardized = import_into(&store, &source(20), &options())
        .await
        .expect("import");
    let asks = format!("{{{{ strftime_now('%d %b %Y %H:%M') }}}}\n{TURNS}");
    let stage = async |template: &str, date| stage(&store, &standardized, template, date).await;
    let first = stage(&asks, Some("2026-11-22")).await.expect("a date");
    let again = stage(&asks, Some("2026-11-22")).await.expect("the same");
    assert!(again.reused());
    assert_eq!(first.key(), again.key());
    let next = stage(&asks, Some("2026-11-23")).await.expect("another");
    assert_ne!(first.key(), next.key());

    let without = stage(TURNS, None).await.expect("no date");
    let with = stage(TURNS, Some("2026-11-22")).await.expect("a date");
    assert_eq!(without.key(), with.key());
}

#[tokio::test]
async fn a_template_that_needs_a_date_fails_the_stage_and_not_each_row() {
    let store = Store::memory();
    let standardized = import_into(&store, &source(20), &options())
        .await
        .expect("import");
    let needs = format!("{{{{ strftime_now('%Y') }}}}\n{TURNS}");
    let error = stage(&store, &standardized, &needs, None)
        .await
        .expect_err("no date");
    assert!(
        matches!(&error, Error::InvalidOption { option: "date", .. }),
        "{error}"
    );
    let error = stage(&store, &standardized, &needs, Some("22.11.2026"))
        .await
        .expect_err("no such form");
    assert_eq!(
        error.to_string(),
        "date is \"22.11.2026\": write it as 2026-11-22"
    );

    let may = format!(
        "{{% if strftime_now is defined %}}{{{{ strftime_now('%Y') }}}}{{% else %}}2024{{% endif %}}\n{TURNS}"
    );
    stage(&store, &standardized, &may, None)
        .await
        .expect("the template has a date of its own");
}
