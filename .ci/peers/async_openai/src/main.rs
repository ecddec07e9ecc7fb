//! async-openai, whose types are strict, over every endpoint of a running updraft-serve that it knows.
//!
//! ```sh
//! updraft-serve --model M --api-key token-abc123 --port 8000 &
//! cargo run --manifest-path .ci/peers/async_openai/Cargo.toml -- http://127.0.0.1:8000/v1
//! ```
//!
//! Prints one line a scenario; ends with 1 if any failed.

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::responses::{ResponseStreamEvent, Status};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> ExitCode {
    let url = std::env::args().nth(1).expect("usage: async-openai-scenarios URL [KEY]");
    let key = std::env::args().nth(2).unwrap_or("token-abc123".into());
    let with_key = |key: &str| {
        let config = OpenAIConfig::new().with_api_base(&url).with_api_key(key);
        Client::with_config(config)
    };
    let (client, stranger) = (with_key(&key), with_key("wrong"));
    let model = match client.models().list().await {
        Ok(models) => models.data[0].id.clone(),
        Err(error) => panic!("no models: {error}"),
    };
    let peer = Peer { client, stranger, model };
    let results = [
        ("models", peer.models().await),
        ("chat", peer.chat().await),
        ("chat streamed", peer.chat_streamed().await),
        ("completions", peer.completions().await),
        ("completions streamed", peer.completions_streamed().await),
        ("responses", peer.responses().await),
        ("responses streamed", peer.responses_streamed().await),
        ("responses kept", peer.responses_kept().await),
        ("responses in the background", peer.responses_in_background().await),
        ("embeddings", peer.embeddings().await),
        ("errors", peer.errors().await),
    ];
    let mut failed = 0;
    for (name, result) in &results {
        match result {
            Ok(()) => println!("ok      {name}"),
            Err(error) => {
                failed += 1;
                println!("FAILED  {name}: {error:#}");
            }
        }
    }
    println!("{} of {} scenarios pass", results.len() - failed, results.len());
    ExitCode::from(u8::from(failed > 0))
}

struct Peer {
    client: Client<OpenAIConfig>,
    stranger: Client<OpenAIConfig>,
    model: String,
}

impl Peer {
    /// A request as its own type reads it, for this model.
    fn of<T: DeserializeOwned>(&self, mut fields: Value) -> Result<T> {
        if fields.get("model").is_none() {
            fields["model"] = json!(self.model);
        }
        Ok(serde_json::from_value(fields)?)
    }

    async fn models(&self) -> Result<()> {
        let one = self.client.models().retrieve(&self.model).await?;
        ensure!(one.id == self.model && one.object == "model");
        code(self.client.models().retrieve("none").await, Some("model_not_found"))
    }

    async fn chat(&self) -> Result<()> {
        let request = self.of(json!({
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "max_completion_tokens": 12, "n": 2, "temperature": 0.8, "seed": 7, "logprobs": true,
            "top_logprobs": 3, "stop": ["zzz"], "presence_penalty": 0.5, "frequency_penalty": 0.5,
            "logit_bias": {"5": 1}, "user": "me", "response_format": {"type": "text"},
        }))?;
        let answer = self.client.chat().create(request).await?;
        ensure!(answer.choices.len() == 2);
        let logprobs = answer.choices[0].logprobs.as_ref().context("logprobs")?;
        let content = logprobs.content.as_ref().context("content")?;
        ensure!(content.iter().all(|token| token.top_logprobs.len() == 3));
        let usage = answer.usage.context("usage")?;
        ensure!(usage.prompt_tokens + usage.completion_tokens == usage.total_tokens);
        let request = self.of(json!({
            "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 100,
            "response_format": {"type": "json_schema", "json_schema": {
                "name": "n", "strict": true, "schema": {"type": "integer", "minimum": 0, "maximum": 99},
            }},
        }))?;
        let answer = self.client.chat().create(request).await?;
        let text = answer.choices[0].message.content.as_ref().context("text")?;
        ensure!(text.parse::<u8>().is_ok_and(|n| n < 100), "{text}");
        Ok(())
    }

    async fn chat_streamed(&self) -> Result<()> {
        let fields = json!({
            "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 24,
            "temperature": 0.0,
        });
        let whole = self.client.chat().create(self.of(fields.clone())?).await?;
        let mut streamed = fields;
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let mut chunks = self.client.chat().create_stream(self.of(streamed)?).await?;
        let (mut text, mut usage) = (String::new(), None);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            usage = chunk.usage.or(usage);
            for choice in chunk.choices {
                text.push_str(&choice.delta.content.unwrap_or_default());
            }
        }
        ensure!(Some(&text) == whole.choices[0].message.content.as_ref(), "{text}");
        ensure!(usage.context("usage")?.total_tokens == whole.usage.context("usage")?.total_tokens);
        Ok(())
    }

    async fn completions(&self) -> Result<()> {
        for prompt in [json!("one"), json!(["one", "two"]), json!([1, 2]), json!([[1, 2], [3]])] {
            let request = self.of(json!({
                "prompt": prompt, "max_tokens": 4, "echo": true, "logprobs": 2,
            }))?;
            let answer = self.client.completions().create(request).await?;
            let logprobs = answer.choices[0].logprobs.as_ref().context("logprobs")?;
            ensure!(logprobs.tokens.len() == logprobs.token_logprobs.len());
        }
        Ok(())
    }

    async fn completions_streamed(&self) -> Result<()> {
        let fields = json!({"prompt": "one", "max_tokens": 8, "temperature": 0.0});
        let whole = self.client.completions().create(self.of(fields.clone())?).await?;
        let mut chunks = self.client.completions().create_stream(self.of(fields)?).await?;
        let mut text = String::new();
        while let Some(chunk) = chunks.next().await {
            text.extend(chunk?.choices.into_iter().map(|choice| choice.text));
        }
        ensure!(text == whole.choices[0].text, "{text}");
        Ok(())
    }

    async fn responses(&self) -> Result<()> {
        let request = self.of(json!({
            "input": [{"type": "message", "role": "user", "content": "Hello"}],
            "instructions": "Be brief.", "max_output_tokens": 100, "temperature": 0.5,
            "text": {"format": {
                "type": "json_schema", "name": "n", "schema": {"enum": ["yes", "no"]},
            }},
        }))?;
        let answer = self.client.responses().create(request).await?;
        let text = answer.output_text().context("text")?;
        ensure!(["\"yes\"", "\"no\""].contains(&text.as_str()), "{text}");
        ensure!(answer.usage.context("usage")?.output_tokens > 0);
        Ok(())
    }

    async fn responses_streamed(&self) -> Result<()> {
        let request = self.of(json!({"input": "Hello", "max_output_tokens": 8}))?;
        let mut events = self.client.responses().create_stream(request).await?;
        let (mut text, mut ended) = (String::new(), false);
        while let Some(event) = events.next().await {
            ensure!(!ended, "nothing comes after the end");
            match event? {
                ResponseStreamEvent::ResponseOutputTextDelta(delta) => text.push_str(&delta.delta),
                ResponseStreamEvent::ResponseOutputTextDone(done) => ensure!(done.text == text),
                ResponseStreamEvent::ResponseCompleted(_)
                | ResponseStreamEvent::ResponseIncomplete(_) => ended = true,
                _ => {}
            }
        }
        ensure!(ended, "no end");
        Ok(())
    }

    async fn responses_kept(&self) -> Result<()> {
        let responses = self.client.responses();
        let request = self.of(json!({"input": "Hello", "max_output_tokens": 8}))?;
        let first = responses.create(request).await?;
        let kept = responses.retrieve(&first.id).await?;
        ensure!(kept.output_text() == first.output_text());
        let request = self.of(json!({
            "input": "And?", "max_output_tokens": 8, "previous_response_id": first.id,
        }))?;
        let second = responses.create(request).await?;
        let tokens = |usage: Option<_>| -> Result<u32> {
            let usage: async_openai::types::responses::ResponseUsage = usage.context("usage")?;
            Ok(usage.input_tokens)
        };
        ensure!(tokens(second.usage)? > tokens(first.usage)?, "what was said before counts");
        ensure!(responses.delete(&first.id).await?.deleted);
        code(responses.retrieve(&first.id).await, None)
    }

    async fn responses_in_background(&self) -> Result<()> {
        let responses = self.client.responses();
        let fields = json!({"input": "Hello", "max_output_tokens": 8, "background": true});
        let mut response = responses.create(self.of(fields)?).await?;
        for _ in 0..1000 {
            if response.status != Status::InProgress {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            response = responses.retrieve(&response.id).await?;
        }
        ensure!(matches!(response.status, Status::Completed | Status::Incomplete));
        let again = responses.cancel(&response.id).await?;
        ensure!(again.status == response.status, "what has ended stays as it is");
        let request = self.of(json!({"input": "Hello", "max_output_tokens": 4}))?;
        let plain = responses.create(request).await?;
        code(responses.cancel(&plain.id).await, None)
    }

    async fn embeddings(&self) -> Result<()> {
        let fields = json!({"input": ["one", "two"]});
        let floats = self.client.embeddings().create(self.of(fields)?).await?;
        let fields = json!({"input": ["one", "two"], "encoding_format": "base64"});
        let packed = self.client.embeddings().create_base64(self.of(fields)?).await?;
        for (float, packed) in floats.data.iter().zip(packed.data) {
            let packed: Vec<f32> = packed.embedding.into();
            ensure!(float.embedding == packed);
        }
        Ok(())
    }

    async fn errors(&self) -> Result<()> {
        let ask = |more: Value| {
            let mut fields = json!({"messages": [{"role": "user", "content": "Hi"}]});
            for (key, value) in more.as_object().expect("fields") {
                fields[key] = value.clone();
            }
            fields
        };
        for (more, expected) in [
            (json!({"temperature": 9.0}), None),
            (json!({"n": 0}), None),
            (json!({"model": "none"}), Some("model_not_found")),
            (json!({"max_completion_tokens": 1_000_000}), Some("context_length_exceeded")),
        ] {
            code(self.client.chat().create(self.of(ask(more))?).await, expected)?;
        }
        let request = self.of(ask(json!({})))?;
        code(self.stranger.chat().create(request).await, Some("invalid_api_key"))
    }
}

/// An error the client could read, with this code.
fn code<T>(answer: Result<T, OpenAIError>, expected: Option<&str>) -> Result<()> {
    match answer {
        Err(OpenAIError::ApiError(error)) => {
            ensure!(error.api_error.code.as_deref() == expected, "{error:?}");
            Ok(())
        }
        Err(other) => bail!("{other}"),
        Ok(_) => bail!("no error"),
    }
}
