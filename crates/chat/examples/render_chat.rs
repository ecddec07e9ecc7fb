//! Asks this crate how a model sees conversations: JSON lines in, JSON lines out.
//!
//! ```text
//! echo '{"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": true}' |
//!     cargo run -p updraft-chat --example render_chat -- --tokenizer path/to/model
//! ```
//!
//! In: `messages`, and where wanted `tools`, `documents`, `variables`,
//! `add_generation_prompt`, `continue_final_message`, `template` (a name) and
//! `now` (seconds since 1970, local). Out: `text`; `ids` where `--tokenizer DIR`
//! names a model folder; for a conversation that ends with an answer `spans`,
//! the ranges of `ids` to train, or `rejection`, why not; or just `error`.
//! `--template FILE` takes the place of the model's own template.

use std::error::Error;
use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use updraft_chat::{
    ByteTokenizer, Chat, ChatFiles, ChatTemplate, Conversation, LocalTime, RenderOptions,
    SpecialTokens, TemplateFiles,
};

#[derive(Deserialize)]
struct Request {
    #[serde(flatten)]
    conversation: Conversation,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    template: Option<String>,
    #[serde(default)]
    now: Option<i64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut tokenizer, mut template) = (None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().map(PathBuf::from);
        match argument.as_str() {
            "--tokenizer" => tokenizer = value,
            "--template" => template = value,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    let template = template.map(std::fs::read).transpose()?;
    let chat = load(tokenizer.as_deref(), template.as_deref())?;

    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = answer(&chat, tokenizer.is_some(), &line?)
            .unwrap_or_else(|error| json!({ "error": chain(&*error) }));
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn load(tokenizer: Option<&Path>, template: Option<&[u8]>) -> Result<Chat, Box<dyn Error>> {
    let Some(folder) = tokenizer else {
        let source = template.ok_or("give --tokenizer DIR, --template FILE, or both")?;
        let template = ChatTemplate::new(std::str::from_utf8(source)?, SpecialTokens::default())?;
        return Ok(Chat::new(template, Arc::new(ByteTokenizer::new([]))));
    };
    let read = |name: &str| std::fs::read(folder.join(name)).ok();
    let tokenizer_json = std::fs::read(folder.join("tokenizer.json"))?;
    let (config, generation) = (
        read("tokenizer_config.json"),
        read("generation_config.json"),
    );
    let (jinja, json) = (read("chat_template.jinja"), read("chat_template.json"));
    let special_tokens_map = read("special_tokens_map.json");
    let named = named_templates(&folder.join("additional_chat_templates"))?;
    let named: Vec<(&str, &[u8])> = named.iter().map(|(n, s)| (&n[..], &s[..])).collect();
    Ok(Chat::from_files(&ChatFiles {
        tokenizer_json: &tokenizer_json,
        template: TemplateFiles {
            chat_template_jinja: template.or(jinja.as_deref()),
            additional_chat_templates: if template.is_none() { &named } else { &[] },
            tokenizer_config: config.as_deref(),
            chat_template_json: json.as_deref(),
            special_tokens_map: special_tokens_map.as_deref(),
        },
        generation_config: generation.as_deref(),
    })?)
}

fn named_templates(folder: &Path) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut templates = Vec::new();
    for entry in folder.read_dir().into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "jinja") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            templates.push((name.into_owned(), std::fs::read(&path)?));
        }
    }
    Ok(templates)
}

fn answer(chat: &Chat, has_tokenizer: bool, line: &str) -> Result<Value, Box<dyn Error>> {
    let request: Request = serde_json::from_str(line)?;
    let options = RenderOptions {
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message,
        template: request.template,
        now: request.now.map(LocalTime::from_seconds),
    };
    let conversation = &request.conversation;
    let mut answer = json!({ "text": chat.template().render(conversation, &options)? });
    if !has_tokenizer {
        return Ok(answer);
    }
    answer["ids"] = json!(chat.prompt(conversation, &options)?);
    if !options.add_generation_prompt && !options.continue_final_message {
        let chat = match options.now {
            Some(now) => chat.clone().with_now(now),
            None => chat.clone(),
        };
        match chat.example(conversation) {
            Ok(example) => {
                let spans = example.loss_spans.iter();
                answer["spans"] = spans.map(|span| json!([span.start, span.end])).collect();
            }
            Err(rejection) => answer["rejection"] = json!(chain(&rejection)),
        }
    }
    Ok(answer)
}

fn chain(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}
