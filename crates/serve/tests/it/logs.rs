//! What operators read: one JSON object a line, by request.

use std::io::Write;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tracing_subscriber::filter::LevelFilter;

use crate::client::Server;

/// Takes what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .expect("nobody panicked")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// Those of one request, by their message.
    fn of(&self, id: &str) -> Vec<Value> {
        let bytes = self.0.lock().expect("nobody panicked").clone();
        let text = String::from_utf8(bytes).expect("UTF-8");
        let lines = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.filter(|line| line["span"]["id"] == id).collect()
    }
}

/// Every line names its request, also those of a stream, whose end comes after its handler's, and
/// none repeats what was said or the key it was said with.
#[tokio::test]
async fn each_line_names_its_request() {
    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt()
        .json()
        .with_max_level(LevelFilter::INFO)
        .with_writer(move || writer.clone())
        .finish();
    // For the whole process: tests beside this one run through the same code, and what is of
    // interest to nobody in one thread may be forgotten in another.
    tracing::subscriber::set_global_default(log).expect("no other test logs");
    let server = Server::echo().await;
    for stream in [false, true] {
        let id = format!("mine-{stream}");
        let body = json!({
            "messages": [{"role": "user", "content": "a secret"}], "stream": stream,
        });
        let headers = format!(
            "Content-Type: application/json\r\nX-Request-Id: {id}\r\n\
             Authorization: Bearer sk-hidden\r\n"
        );
        let path = "/v1/chat/completions";
        let answer = server
            .request("POST", path, &headers, Some(&body.to_string()))
            .await;
        assert_eq!(answer.header("x-request-id"), Some(id.as_str()));
        let told = lines.of(&id);
        let line = |message: &str| {
            let found = told
                .iter()
                .find(|line| line["fields"]["message"] == message);
            found.unwrap_or_else(|| panic!("no {message:?} in {told:?}"))
        };
        assert_eq!(line("answered")["fields"]["status"], 200);
        assert_eq!(line("answered")["span"]["path"], path);
        let completed = &line("completed")["fields"];
        assert_eq!(completed["finish_reason"], "stop");
        assert_eq!(
            (&completed["prompt_tokens"], &completed["completion_tokens"]),
            (&json!(8), &json!(9))
        );
        assert!(completed["first_token_seconds"].is_number() && completed["seconds"].is_number());
        let all = format!("{told:?}");
        assert!(
            !all.contains("secret") && !all.contains("sk-hidden"),
            "{all}"
        );
    }
}
