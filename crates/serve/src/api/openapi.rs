//! `GET /openapi.json`: what there is, for tools that read it.

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use crate::app::App;

/// The document, of OpenAPI 3.1.
pub(crate) async fn document(State(app): State<App>) -> Json<Value> {
    let mut paths = Map::new();
    let chat = json!({
        "type": "object", "required": ["messages"],
        "properties": common(json!({
            "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}},
            "logprobs": boolean(), "top_logprobs": integer(0, 20),
        })),
    });
    let text = json!({
        "type": "object", "required": ["prompt"],
        "properties": common(json!({
            "prompt": texts(), "echo": boolean(), "logprobs": integer(0, 20),
        })),
    });
    let response = json!({
        "type": "object", "required": ["input"],
        "properties": {
            "model": nullable("string"), "input": {"type": "string", "minLength": 1},
            "instructions": nullable("string"), "max_output_tokens": integer(1, u32::MAX),
            "temperature": number(0.0, 2.0), "stream": boolean(),
        },
    });
    let embedding = json!({
        "type": "object", "required": ["input"],
        "properties": {
            "model": nullable("string"), "input": texts(),
            "encoding_format": {"enum": ["float", "base64"]},
        },
    });
    let tokenize = json!({
        "type": "object",
        "properties": {
            "model": nullable("string"), "prompt": nullable("string"), "content": nullable("string"),
            "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}},
            "return_token_strs": boolean(), "add_special_tokens": boolean(),
        },
    });
    let detokenize = json!({
        "type": "object", "required": ["tokens"],
        "properties": {
            "model": nullable("string"), "tokens": {"type": "array", "items": token_id()},
        },
    });
    for (path, summary, body) in [
        ("/v1/chat/completions", "Answers a conversation", chat),
        ("/v1/completions", "Continues texts", text),
        ("/v1/responses", "Answers an input", response),
        ("/v1/embeddings", "Embeds texts", embedding),
        ("/tokenize", "Text or messages to token ids", tokenize),
        ("/detokenize", "Token ids to text", detokenize),
    ] {
        paths.insert(path.into(), json!({"post": post(summary, &body)}));
    }
    if app.options.runtime_adapters {
        let name = json!({"type": "string", "minLength": 1});
        let load = json!({
            "type": "object", "required": ["lora_name", "lora_path"],
            "properties": {"lora_name": name, "lora_path": string(), "load_inplace": boolean()},
        });
        let unload = json!({
            "type": "object", "required": ["lora_name"], "properties": {"lora_name": name},
        });
        for (path, summary, body) in [
            ("/v1/load_lora_adapter", "Loads an adapter", load),
            ("/v1/unload_lora_adapter", "Unloads an adapter", unload),
        ] {
            paths.insert(path.into(), json!({"post": post(summary, &body)}));
        }
    }
    for (path, summary) in [
        ("/v1/models", "Lists models and adapters"),
        ("/health", "Whether requests are taken"),
        ("/version", "Which version runs"),
        ("/metrics", "Counters for Prometheus"),
        ("/openapi.json", "This document"),
    ] {
        paths.insert(path.into(), json!({"get": get(summary)}));
    }
    let mut model = get("One model or adapter");
    model["parameters"] = json!([{
        "name": "id", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1},
    }]);
    paths.insert("/v1/models/{id}".into(), json!({"get": model}));
    Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "Updraft", "version": env!("CARGO_PKG_VERSION")},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Message": {
                    "type": "object", "required": ["role", "content"],
                    "properties": {
                        "role": {"enum": ["developer", "system", "user", "assistant"]},
                        "content": string(),
                    },
                },
                "Error": {
                    "type": "object", "required": ["error"],
                    "properties": {"error": {
                        "type": "object", "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": string(), "type": string(),
                            "param": nullable("string"), "code": nullable("string"),
                        },
                    }},
                },
            },
        },
    }))
}

/// The fields that both completion APIs have.
fn common(own: Value) -> Value {
    let mut properties = json!({
        "model": nullable("string"), "stream": boolean(), "n": integer(1, 128),
        "max_tokens": integer(0, u32::MAX), "stop": {"anyOf": [
            {"type": "null"}, {"type": "string", "minLength": 1},
            {"type": "array", "maxItems": 4, "items": {"type": "string", "minLength": 1}},
        ]},
        "seed": {"type": ["integer", "null"], "minimum": i64::MIN, "maximum": i64::MAX},
        "temperature": number(0.0, 2.0), "top_p": number(0.01, 1.0), "min_p": number(0.0, 1.0),
        "top_k": integer(0, u32::MAX), "frequency_penalty": number(-2.0, 2.0),
        "presence_penalty": number(-2.0, 2.0), "repetition_penalty": number(0.01, 10.0),
        "logit_bias": {
            "type": ["object", "null"], "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "ignore_eos": boolean(), "skip_special_tokens": boolean(),
        "include_stop_str_in_output": boolean(), "cache_salt": nullable("string"),
    });
    if let (Value::Object(all), Value::Object(own)) = (&mut properties, own) {
        all.extend(own);
    }
    properties
}

fn post(summary: &str, body: &Value) -> Value {
    let mut operation = get(summary);
    operation["requestBody"] = json!({
        "required": true, "content": {"application/json": {"schema": body}},
    });
    operation
}

fn get(summary: &str) -> Value {
    let error = |description: &str| {
        let schema = json!({"$ref": "#/components/schemas/Error"});
        json!({"description": description, "content": {"application/json": {"schema": schema}}})
    };
    json!({
        "summary": summary,
        "responses": {
            "200": {"description": "the answer"},
            "400": error("a field is wrong; `param` names it"),
            "401": error("a key is needed"),
            "404": error("there is no such model or path"),
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

fn string() -> Value {
    json!({"type": "string"})
}

fn boolean() -> Value {
    nullable("boolean")
}

fn nullable(kind: &str) -> Value {
    json!({"type": [kind, "null"]})
}

fn integer(least: u32, most: u32) -> Value {
    json!({"type": ["integer", "null"], "minimum": least, "maximum": most})
}

fn token_id() -> Value {
    json!({"type": "integer", "minimum": 0, "maximum": u32::MAX})
}

fn number(least: f64, most: f64) -> Value {
    json!({"type": ["number", "null"], "minimum": least, "maximum": most})
}

fn texts() -> Value {
    let text = json!({"type": "string", "minLength": 1});
    let ids = json!({"type": "array", "minItems": 1, "items": token_id()});
    json!({"anyOf": [
        text, ids, {"type": "array", "minItems": 1, "items": text},
        {"type": "array", "minItems": 1, "items": ids},
    ]})
}
