//! The schemas of what is answered, and the words the document is made of.

use serde_json::{Value, json};

/// Every named schema.
pub(super) fn answers() -> Value {
    let logprob = |more: Value| {
        let mut fields = json!({
            "token": string(), "logprob": {"type": "number"}, "bytes": array(json!({"type": "integer"}), 0, 4096),
        });
        extend(&mut fields, more);
        closed(&["token", "logprob", "bytes"], &fields)
    };
    let chat_logprobs = or_null(closed(
        &["content", "refusal"],
        &json!({
            "content": list(logprob(json!({"top_logprobs": list(logprob(json!({})))}))),
            "refusal": {"type": "null"},
        }),
    ));
    let text_logprobs = or_null(closed(
        &["text_offset", "token_logprobs", "tokens", "top_logprobs"],
        &json!({
            "text_offset": list(count()), "token_logprobs": list(json!({"type": "number"})),
            "tokens": list(string()), "top_logprobs": list(json!({"type": "object"})),
        }),
    ));
    let reason = json!({"enum": ["stop", "length"]});
    let ids = token_ids(0);
    let envelope = |object: &str, choice: Value, usage: Value| {
        closed(
            &["id", "object", "created", "model", "choices"],
            &json!({
                "id": string(), "object": {"const": object}, "created": count(), "model": string(),
                "choices": list(choice), "usage": usage,
                "prompt_logprobs": prompt_logprobs(), "prompt_token_ids": ids,
            }),
        )
    };
    let chat_choice = closed(
        &["index", "message", "logprobs", "finish_reason"],
        &json!({
            "index": count(), "logprobs": chat_logprobs, "finish_reason": reason, "token_ids": ids,
            "message": closed(&["role", "content", "refusal"], &json!({
                "role": {"const": "assistant"}, "content": string(), "refusal": {"type": "null"},
            })),
        }),
    );
    let chunk_choice = closed(
        &["index", "delta", "logprobs", "finish_reason"],
        &json!({
            "index": count(), "logprobs": chat_logprobs, "finish_reason": or_null(reason.clone()),
            "token_ids": ids,
            "delta": closed(&[], &json!({"role": {"const": "assistant"}, "content": string()})),
        }),
    );
    let text_choice = |reason: Value| {
        closed(
            &["index", "text", "logprobs", "finish_reason"],
            &json!({
                "index": count(), "text": string(), "logprobs": text_logprobs,
                "finish_reason": reason, "token_ids": ids, "prompt_token_ids": ids,
                "prompt_logprobs": prompt_logprobs(),
            }),
        )
    };
    let mut all = json!({
        "ChatCompletion": envelope("chat.completion", chat_choice, node("Usage")),
        "ChatChunk": envelope("chat.completion.chunk", chunk_choice, or_null(node("Usage"))),
        "Completion": envelope("text_completion", text_choice(reason.clone()), node("Usage")),
        "CompletionChunk": envelope("text_completion", text_choice(or_null(reason)), or_null(node("Usage"))),
    });
    extend(&mut all, of_requests());
    extend(&mut all, of_responses());
    extend(&mut all, of_llama_cpp());
    extend(&mut all, of_operation());
    all
}

fn of_requests() -> Value {
    json!({
        "Message": object(&["role", "content"], &json!({
            "role": {"enum": ["developer", "system", "user", "assistant"]}, "content": string(),
        })),
        "Error": object(&["error"], &json!({"error": object(
            &["message", "type", "param", "code"],
            &json!({
                "message": string(), "type": string(), "param": nullable("string"),
                "code": nullable("string"), "n_prompt_tokens": count(), "n_ctx": count(),
            }),
        )})),
        "Usage": closed(
            &["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"],
            &json!({
                "prompt_tokens": count(), "completion_tokens": count(), "total_tokens": count(),
                "prompt_tokens_details": closed(&["cached_tokens"], &json!({"cached_tokens": count()})),
            }),
        ),
        "Embeddings": closed(&["object", "data", "model", "usage"], &json!({
            "object": {"const": "list"}, "model": string(),
            "data": list(closed(&["object", "index", "embedding"], &json!({
                "object": {"const": "embedding"}, "index": count(),
                "embedding": {"anyOf": [string(), list(json!({"type": "number"}))]},
            }))),
            "usage": closed(&["prompt_tokens", "total_tokens"], &json!({
                "prompt_tokens": count(), "total_tokens": count(),
            })),
        })),
        "Tokenized": closed(&["count", "max_model_len", "tokens", "token_strs"], &json!({
            "count": count(), "max_model_len": count(),
            "tokens": {"anyOf": [token_ids(0), list(closed(&["id", "piece"], &json!({
                "id": count(), "piece": {"anyOf": [string(), list(count())]},
            })))]},
            "token_strs": or_null(list(string())),
        })),
        "Detokenized": closed(&["prompt", "content"], &json!({
            "prompt": string(), "content": string(),
        })),
        "InputTokens": closed(&["object", "input_tokens"], &json!({
            "object": {"const": "response.input_tokens"}, "input_tokens": count(),
        })),
    })
}

fn of_responses() -> Value {
    let part = json!({
        "type": {"const": "output_text"}, "text": string(), "annotations": list(json!({})),
        "logprobs": list(json!({})),
    });
    let item = closed(
        &["id", "type", "role", "status", "content"],
        &json!({
            "id": string(), "type": {"const": "message"}, "role": {"const": "assistant"},
            "status": {"enum": ["in_progress", "completed", "incomplete"]},
            "content": list(closed(&["type", "text", "annotations", "logprobs"], &part)),
        }),
    );
    let statuses = json!({
        "enum": ["in_progress", "completed", "incomplete", "failed", "cancelled"],
    });
    json!({
        "Response": object(
            &["id", "object", "created_at", "status", "model", "output", "usage", "error",
              "incomplete_details", "previous_response_id", "store", "background"],
            &json!({
                "id": {"type": "string", "pattern": "^resp_"}, "object": {"const": "response"},
                "created_at": count(), "status": statuses, "model": string(),
                "output": list(item), "error": or_null(json!({"type": "object"})),
                "incomplete_details": or_null(json!({"type": "object"})),
                "usage": or_null(object(&["input_tokens", "output_tokens", "total_tokens"], &json!({
                    "input_tokens": count(), "output_tokens": count(), "total_tokens": count(),
                }))),
                "previous_response_id": nullable("string"), "store": {"type": "boolean"},
                "background": {"type": "boolean"},
            }),
        ),
        "ResponseEvent": object(&["type", "sequence_number"], &json!({
            "type": {"type": "string", "pattern": "^response\\."}, "sequence_number": count(),
        })),
        "Deleted": closed(&["id", "object", "deleted"], &json!({
            "id": string(), "object": {"const": "response"}, "deleted": {"const": true},
        })),
    })
}

fn of_llama_cpp() -> Value {
    let chunk = json!({
        "index": count(), "content": string(), "tokens": token_ids(0),
        "stop": {"type": "boolean"}, "id_slot": count(),
    });
    let mut whole = chunk.clone();
    extend(
        &mut whole,
        json!({
            "model": string(), "prompt": string(), "truncated": {"const": false},
            "stop_type": {"enum": ["limit", "word", "eos"]}, "stopping_word": string(),
            "has_new_line": {"type": "boolean"}, "tokens_predicted": count(),
            "tokens_evaluated": count(), "tokens_cached": count(),
            "timings": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
            "generation_settings": {"type": "object"},
        }),
    );
    let needed = [
        "index",
        "content",
        "tokens",
        "stop",
        "stop_type",
        "timings",
        "prompt",
        "model",
    ];
    // A list for a list of prompts.
    let one = object(&needed, &whole);
    json!({
        "LlamaCompletion": {"anyOf": [one, list(one.clone())]},
        "LlamaChunk": object(&["index", "content", "tokens", "stop"], &chunk),
        "Slots": list(closed(&["id", "is_processing"], &json!({
            "id": count(), "is_processing": {"type": "boolean"},
        }))),
    })
}

fn of_operation() -> Value {
    json!({
        "Model": closed(
            &["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"],
            &json!({
                "id": string(), "object": {"const": "model"}, "created": count(),
                "owned_by": string(), "root": string(), "parent": nullable("string"),
                "max_model_len": count(), "permission": list(json!({})),
            }),
        ),
        "ModelList": closed(&["object", "data"], &json!({
            "object": {"const": "list"}, "data": list(node("Model")),
        })),
        "Load": closed(&["server_load"], &json!({"server_load": count()})),
        "Version": closed(&["version"], &json!({"version": string()})),
        "Document": object(&["openapi", "info", "paths"], &json!({})),
    })
}

/// vLLM's: by token id.
fn prompt_logprobs() -> Value {
    let token = closed(
        &["logprob", "rank", "decoded_token"],
        &json!({"logprob": {"type": "number"}, "rank": count(), "decoded_token": string()}),
    );
    list(or_null(
        json!({"type": "object", "additionalProperties": token}),
    ))
}

/// With fields besides those named.
pub(super) fn object(required: &[&str], properties: &Value) -> Value {
    json!({"type": "object", "required": required, "properties": properties})
}

/// With no fields besides those named.
fn closed(required: &[&str], properties: &Value) -> Value {
    let mut object = object(required, properties);
    object["additionalProperties"] = json!(false);
    object
}

pub(super) fn node(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn or_null(schema: Value) -> Value {
    let mut either = json!({"anyOf": [null, {"type": "null"}]});
    either["anyOf"][0] = schema;
    either
}

fn list(items: Value) -> Value {
    let mut list = json!({"type": "array"});
    list["items"] = items;
    list
}

pub(super) fn array(items: Value, least: usize, most: usize) -> Value {
    let mut array = list(items);
    array["minItems"] = json!(least);
    array["maxItems"] = json!(most);
    array
}

pub(super) fn string() -> Value {
    json!({"type": "string"})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

pub(super) fn boolean() -> Value {
    nullable("boolean")
}

pub(super) fn nullable(kind: &str) -> Value {
    json!({"type": [kind, "null"]})
}

pub(super) fn integer(least: u32, most: u32) -> Value {
    json!({"type": ["integer", "null"], "minimum": least, "maximum": most})
}

pub(super) fn number(least: f64, most: f64) -> Value {
    json!({"type": ["number", "null"], "minimum": least, "maximum": most})
}

pub(super) fn token_ids(least: usize) -> Value {
    let id = json!({"type": "integer", "minimum": 0, "maximum": u32::MAX});
    json!({"type": "array", "minItems": least, "items": id})
}

pub(super) fn token_ids_up_to(most: usize) -> Value {
    let mut ids = token_ids(0);
    ids["maxItems"] = json!(most);
    ids
}

pub(super) fn text_or_texts() -> Value {
    let text = json!({"type": "string", "minLength": 1});
    json!({"anyOf": [
        text, token_ids(1), {"type": "array", "minItems": 1, "items": text},
        {"type": "array", "minItems": 1, "items": token_ids(1)},
    ]})
}

fn extend(all: &mut Value, more: Value) {
    if let (Value::Object(all), Value::Object(more)) = (all, more) {
        all.extend(more);
    }
}
