//! Asking the served models, as any OpenAI client would.

use anyhow::{Context, Result, bail};
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};

use crate::letters::{Question, parse_answer};

/// Questions that are in flight at once; the server batches them.
const CONCURRENCY: usize = 32;

/// A client of one server.
pub struct Client {
    http: reqwest::Client,
    base_url: String,
}

/// A question with what a model said.
pub struct Answer {
    pub text: String,
    pub correct: bool,
}

impl Client {
    pub fn new(base_url: &str) -> Self {
        // reqwest asks for a TLS provider even to speak plain HTTP; somebody may have installed one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self {
            http: reqwest::Client::new(),
            base_url: base_url.to_owned(),
        }
    }

    /// Greedy answers to all questions, in order.
    pub async fn judge(
        &self,
        model: &str,
        questions: &[Question],
        mut on_answer: impl FnMut(usize),
    ) -> Result<Vec<Answer>> {
        let ask = |question: Question| async move {
            let text = self.ask(model, &question.prompt).await?;
            let correct = parse_answer(&text) == Some(question.answer);
            anyhow::Ok(Answer { text, correct })
        };
        let mut answers = stream::iter(questions.iter().cloned())
            .map(ask)
            .buffered(CONCURRENCY);
        let mut judged = Vec::with_capacity(questions.len());
        while let Some(answer) = answers.next().await {
            judged.push(answer?);
            on_answer(judged.len());
        }
        Ok(judged)
    }

    /// One greedy answer.
    pub async fn ask(&self, model: &str, prompt: &str) -> Result<String> {
        let response = self.post(&request(model, prompt, false)).await?;
        let body: Value = response
            .json()
            .await
            .context("the server's answer is not JSON")?;
        let content = body["choices"][0]["message"]["content"].as_str();
        Ok(content
            .context("the server's answer has no message")?
            .to_owned())
    }

    /// The same, streamed: `on_text` sees each piece as it comes.
    pub async fn ask_streamed(
        &self,
        model: &str,
        prompt: &str,
        mut on_text: impl FnMut(&str),
    ) -> Result<String> {
        let response = self.post(&request(model, prompt, true)).await?;
        let mut body = response.bytes_stream();
        let (mut buffer, mut text) = (Vec::new(), String::new());
        while let Some(bytes) = body.next().await {
            buffer.extend_from_slice(&bytes.context("the stream broke off")?);
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = buffer.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event);
                let Some(data) = event
                    .trim()
                    .strip_prefix("data: ")
                    .filter(|data| *data != "[DONE]")
                else {
                    continue;
                };
                let chunk: Value = serde_json::from_str(data).context("a chunk is not JSON")?;
                if let Some(piece) = chunk["choices"][0]["delta"]["content"].as_str() {
                    on_text(piece);
                    text.push_str(piece);
                }
            }
        }
        Ok(text)
    }

    async fn post(&self, body: &Value) -> Result<reqwest::Response> {
        let url = format!("{}/v1/chat/completions", self.base_url);
        let response = self
            .http
            .post(&url)
            .json(body)
            .send()
            .await
            .with_context(|| format!("POST {url}"))?;
        if !response.status().is_success() {
            bail!(
                "POST {url} answered {}: {}",
                response.status(),
                response.text().await.unwrap_or_default()
            );
        }
        Ok(response)
    }
}

fn request(model: &str, prompt: &str, stream: bool) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 96,
        "stream": stream,
    })
}

/// Correct answers, in percent.
pub fn accuracy(answers: &[Answer]) -> f64 {
    let correct = answers.iter().filter(|answer| answer.correct).count();
    100.0 * correct as f64 / answers.len().max(1) as f64
}
