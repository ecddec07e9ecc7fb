//! `GET /openapi.json`: what there is, for tools that read it.

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::schemas::{
    answers, array, boolean, integer, node, nullable, number, object, string, text_or_texts,
    token_ids, token_ids_up_to,
};
use crate::app::App;
use crate::limits::{
    MAX_BAD_WORD_BYTES, MAX_BAD_WORDS, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_BYTES,
    MAX_STOP_TOKEN_IDS,
};

/// The document, of OpenAPI 3.1.
pub(crate) async fn document(State(app): State<App>) -> Json<Value> {
    let mut paths = Map::new();
    for (path, summary, body, answer) in bodies() {
        paths.insert(path.into(), json!({"post": post(summary, &body, answer)}));
    }
    if app.options.runtime_adapters {
        let name = json!({"type": "string", "minLength": 1});
        let load = object(
            &["lora_name", "lora_path"],
            &json!({"lora_name": name, "lora_path": string(), "load_inplace": boolean()}),
        );
        let unload = object(&["lora_name"], &json!({"lora_name": name}));
        for (path, summary, body) in [
            ("/v1/load_lora_adapter", "Loads an adapter", load),
            ("/v1/unload_lora_adapter", "Unloads an adapter", unload),
        ] {
            paths.insert(
                path.into(),
                json!({"post": post(summary, &body, Answer::Text)}),
            );
        }
    }
    for (path, summary, answer) in [
        (
            "/v1/models",
            "Lists models and adapters",
            Answer::Json("ModelList"),
        ),
        (
            "/slots",
            "Which places in the batch are taken",
            Answer::Json("Slots"),
        ),
        ("/health", "Whether requests are taken", Answer::Empty),
        ("/ping", "Whether requests are taken", Answer::Empty),
        ("/load", "How many requests there are", Answer::Json("Load")),
        ("/version", "Which version runs", Answer::Json("Version")),
        ("/metrics", "Counters for Prometheus", Answer::Text),
        ("/openapi.json", "This document", Answer::Json("Document")),
    ] {
        paths.insert(path.into(), json!({"get": operation(summary, answer)}));
    }
    let by_id = |summary: &str, answer: Answer| {
        let mut operation = operation(summary, answer);
        operation["parameters"] = json!([{
            "name": "id", "in": "path", "required": true,
            "schema": {"type": "string", "minLength": 1},
        }]);
        operation
    };
    let model = by_id("One model or adapter", Answer::Json("Model"));
    paths.insert("/v1/models/{id}".into(), json!({"get": model}));
    let response = json!({
        "get": by_id("A response that was kept", Answer::Json("Response")),
        "delete": by_id("Forgets a response", Answer::Json("Deleted")),
    });
    paths.insert("/v1/responses/{id}".into(), response);
    let cancel = by_id(
        "Ends a response in the background",
        Answer::Json("Response"),
    );
    paths.insert("/v1/responses/{id}/cancel".into(), json!({"post": cancel}));
    Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "Updraft", "version": env!("CARGO_PKG_VERSION")},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": answers(),
        },
    }))
}

/// The form of a 200.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Empty,
    Text,
    /// Of this schema.
    Json(&'static str),
    /// Of this schema, or server-sent events of the other.
    Stream(&'static str, &'static str),
}

/// What is posted as JSON, always possible.
fn bodies() -> Vec<(&'static str, &'static str, Value, Answer)> {
    let messages = json!({"type": "array", "minItems": 1, "items": node("Message")});
    let chat = common(json!({
        "messages": messages, "logprobs": boolean(), "top_logprobs": integer(0, 20),
        "add_generation_prompt": boolean(), "continue_final_message": boolean(), "echo": boolean(),
        "max_completion_tokens": integer(1, u32::MAX), "reasoning_effort": nullable("string"),
    }));
    let text = common(json!({
        "prompt": text_or_texts(), "echo": boolean(), "logprobs": integer(0, 20),
        "add_special_tokens": boolean(),
    }));
    let response = json!({
        "model": nullable("string"), "instructions": nullable("string"),
        "input": {"anyOf": [{"type": "string", "minLength": 1}, messages]},
        "max_output_tokens": integer(1, u32::MAX), "temperature": number(0.0, 2.0),
        "top_p": number(0.01, 1.0), "stream": boolean(), "store": boolean(),
        "background": boolean(), "previous_response_id": nullable("string"),
        "metadata": {
            "type": ["object", "null"], "maxProperties": 16, "additionalProperties": string(),
        },
    });
    let embedding = json!({
        "model": nullable("string"), "input": text_or_texts(),
        "encoding_format": {"enum": ["float", "base64", null]},
    });
    let tokenize = json!({
        "model": nullable("string"), "prompt": nullable("string"), "content": nullable("string"),
        "messages": messages, "return_token_strs": boolean(), "with_pieces": boolean(),
        "add_special_tokens": boolean(),
    });
    let detokenize = json!({"model": nullable("string"), "tokens": token_ids(0)});
    let counted = json!({"model": nullable("string"), "messages": messages});
    let completion = json!({
        "prompt": {"anyOf": [{"type": "string", "minLength": 1}, token_ids(1)]},
        "model": nullable("string"), "n_predict": {"type": ["integer", "null"], "minimum": -1},
        "stream": boolean(), "stop": array(text_within(MAX_STOP_BYTES), 0, 16),
        "temperature": number(0.0, 2.0), "top_k": integer(0, u32::MAX), "top_p": number(0.01, 1.0),
        "min_p": number(0.0, 1.0), "repeat_penalty": number(0.01, 10.0), "ignore_eos": boolean(),
        "n_probs": integer(0, 20), "return_tokens": boolean(), "cache_prompt": boolean(),
    });
    let chat_chunk = Answer::Stream("ChatCompletion", "ChatChunk");
    vec![
        (
            "/v1/chat/completions",
            "Answers a conversation",
            object(&["messages"], &chat),
            chat_chunk,
        ),
        (
            "/chat/completions",
            "The same",
            object(&["messages"], &chat),
            chat_chunk,
        ),
        (
            "/v1/chat/completions/input_tokens",
            "Counts a conversation's tokens",
            object(&["messages"], &counted),
            Answer::Json("InputTokens"),
        ),
        (
            "/v1/completions",
            "Continues texts",
            object(&["prompt"], &text),
            Answer::Stream("Completion", "CompletionChunk"),
        ),
        (
            "/completion",
            "Continues a text, in llama.cpp's words",
            object(&["prompt"], &completion),
            Answer::Stream("LlamaCompletion", "LlamaChunk"),
        ),
        (
            "/v1/responses",
            "Answers an input",
            object(&["input"], &response),
            Answer::Stream("Response", "ResponseEvent"),
        ),
        (
            "/v1/embeddings",
            "Embeds texts",
            object(&["input"], &embedding),
            Answer::Json("Embeddings"),
        ),
        (
            "/tokenize",
            "Text or messages to token ids",
            object(&[], &tokenize),
            Answer::Json("Tokenized"),
        ),
        (
            "/detokenize",
            "Token ids to text",
            object(&["tokens"], &detokenize),
            Answer::Json("Detokenized"),
        ),
    ]
}

/// The fields that both completion APIs have.
fn common(own: Value) -> Value {
    let stop = text_within(MAX_STOP_BYTES);
    let mut properties = json!({
        "model": nullable("string"), "stream": boolean(), "n": integer(1, 128),
        "max_tokens": integer(0, u32::MAX), "min_tokens": integer(0, u32::MAX),
        "stop": {"anyOf": [{"type": "null"}, stop, array(stop.clone(), 0, 4)]},
        "stop_token_ids": token_ids_up_to(MAX_STOP_TOKEN_IDS),
        "bad_words": array(text_within(MAX_BAD_WORD_BYTES), 0, MAX_BAD_WORDS),
        "allowed_token_ids": token_ids(1),
        "logprob_token_ids": token_ids_up_to(MAX_LOGPROBS),
        "seed": {"type": ["integer", "null"], "minimum": i64::MIN, "maximum": i64::MAX},
        "temperature": number(0.0, 2.0), "top_p": number(0.01, 1.0), "min_p": number(0.0, 1.0),
        "top_k": integer(0, u32::MAX), "frequency_penalty": number(-2.0, 2.0),
        "presence_penalty": number(-2.0, 2.0), "repetition_penalty": number(0.01, 10.0),
        "logit_bias": {
            "type": ["object", "null"], "propertyNames": {"pattern": "^[0-9]+$"},
            "maxProperties": MAX_LOGIT_BIASES,
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "stream_options": object(&[], &json!({
            "include_usage": boolean(), "continuous_usage_stats": boolean(),
        })),
        "response_format": object(&["type"], &json!({
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": object(&["schema"], &json!({"schema": {"type": "object"}})),
        })),
        "ignore_eos": boolean(), "skip_special_tokens": boolean(),
        "include_stop_str_in_output": boolean(), "cache_salt": nullable("string"),
        "prompt_logprobs": integer(0, 20), "return_token_ids": boolean(),
        "truncate_prompt_tokens": {"type": ["integer", "null"], "minimum": -1, "maximum": u32::MAX},
        "truncation_side": {"enum": ["left", "right"]}, "request_id": nullable("string"),
    });
    if let (Value::Object(all), Value::Object(own)) = (&mut properties, own) {
        all.extend(own);
    }
    properties
}

/// A text of so many bytes, whatever its characters are.
fn text_within(bytes: usize) -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": bytes / 4})
}

fn post(summary: &str, body: &Value, answer: Answer) -> Value {
    let mut operation = operation(summary, answer);
    operation["requestBody"] = json!({
        "required": true, "content": {"application/json": {"schema": body}},
    });
    operation
}

fn operation(summary: &str, answer: Answer) -> Value {
    let error = |description: &str| {
        let content = json!({"application/json": {"schema": node("Error")}});
        json!({"description": description, "content": content})
    };
    let mut answered = json!({"description": "the answer"});
    let json_of = |schema: &str| json!({"schema": node(schema)});
    match answer {
        Answer::Empty => {}
        Answer::Text => answered["content"] = json!({"text/plain": {"schema": string()}}),
        Answer::Json(schema) => answered["content"] = json!({"application/json": json_of(schema)}),
        Answer::Stream(whole, event) => {
            let about =
                format!("A `{event}`, an `Error` in its place, or the last one's `[DONE]`.");
            let data = json!({
                "type": "string", "description": about, "contentMediaType": "application/json",
                "contentSchema": node(event),
            });
            let of_event = object(&["data"], &json!({"event": string(), "data": data}));
            answered["content"] = json!({
                "application/json": json_of(whole),
                "text/event-stream": {"schema": of_event},
            });
        }
    }
    json!({
        "summary": summary,
        "responses": {
            "200": answered,
            "400": error("a field is wrong; `param` names it"),
            "401": error("a key is needed"),
            "404": error("there is no such model, response or path"),
            "405": error("not this method"),
            "408": error("the body took too long"),
            "413": error("the body is too large"),
            "415": error("the body is not JSON"),
            "429": error("the queue is full; see Retry-After"),
            "500": error("the model failed"),
            "503": error("the server is shutting down"),
            "504": error("the answer took too long"),
        },
    })
}
