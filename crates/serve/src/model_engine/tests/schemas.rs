//! Answers that follow a schema.

use serde_json::{Value, json};
use updraft_chat::{EncodePolicy, Tokenizer, TokenizerExt, Vocabulary};

use super::*;
use crate::Constraint;

fn asking(constraint: Constraint, seed: u64) -> GenerateRequest {
    GenerateRequest {
        sampling: SamplingParams::seeded(seed),
        stop_token_ids: Arc::from([256]),
        constraint: Some(constraint),
        ..GenerateRequest::greedy("tiny", (0..20).collect(), 200)
    }
}

async fn answer(engine: &dyn Engine, request: GenerateRequest) -> (String, bool) {
    let events = run(engine, request).await;
    let ids: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            TokenEvent::Token { id, .. } => Some(*id),
            _ => None,
        })
        .collect();
    let reason = crate::FinishReason::Stop;
    let ended =
        matches!(events.last(), Some(TokenEvent::Finished { reason: r, .. }) if *r == reason);
    (chat().tokenizer().decode(&ids), ended)
}

/// A random model, which alone writes noise, writes what the schema says.
#[tokio::test]
async fn answers_follow_their_schema() {
    let engine = engine(&small());
    let schema = json!({
        "type": "object", "required": ["n", "ok"], "additionalProperties": false,
        "properties": {"n": {"$ref": "#/$defs/n"}, "ok": {"enum": ["yes", "no"]}},
        "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    });
    for seed in 0..5 {
        let constraint = Constraint::json_schema(schema.clone()).expect("small");
        let (text, ended) = answer(&*engine, asking(constraint, seed)).await;
        let value: Value = serde_json::from_str(&text).expect(&text);
        assert!(ended, "{text}");
        assert!(value["n"].as_u64().is_some_and(|n| n < 100), "{text}");
        assert!(
            ["yes", "no"].map(Value::from).contains(&value["ok"]),
            "{text}"
        );
        assert_eq!(value.as_object().map(serde_json::Map::len), Some(2));
    }
    let (text, ended) = answer(&*engine, asking(Constraint::JsonObject, 1)).await;
    assert!(text.starts_with('{'));
    assert!(
        !ended || serde_json::from_str::<Value>(&text).is_ok(),
        "{text}"
    );
}

/// A client may stop at a token that is text: where the form allows it, it ends the answer.
#[tokio::test]
async fn a_stop_within_the_form_is_chosen_where_it_may_be() {
    let engine = engine(&small());
    let schema = json!({"type": "object", "required": ["a"], "additionalProperties": false,
        "properties": {"a": {"enum": [1]}}});
    let constraint = Constraint::json_schema(schema).expect("small");
    let request = GenerateRequest {
        stop_token_ids: Arc::from([u32::from(b'}'), 256]),
        ..asking(constraint, 1)
    };
    let (text, ended) = answer(&*engine, request).await;
    assert_eq!((text.as_str(), ended), ("{\"a\": 1", true));
}

#[tokio::test]
async fn schemas_that_cannot_be_used_are_refused() {
    let engine = engine(&small());
    for schema in [
        json!({"type": "nonsense"}),
        json!({"type": "string", "pattern": "("}),
        json!({"$ref": "http://169.254.169.254/"}),
        json!({"type": 5}),
    ] {
        let constraint = Constraint::json_schema(schema.clone()).expect("small");
        let refused = engine.generate(asking(constraint, 0)).await;
        assert!(
            matches!(refused, Err(Error::InvalidRequest { .. })),
            "{schema}"
        );
    }
    // A billion repetitions cost no more than the tokens that were asked for.
    let huge = json!({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"});
    let constraint = Constraint::json_schema(huge).expect("small");
    let request = GenerateRequest {
        max_tokens: 20,
        ..asking(constraint, 0)
    };
    let (text, ended) = answer(&*engine, request).await;
    assert_eq!((text.as_str(), ended), ("\"aaaaaaaaaaaaaaaaaaa", false));
    crate::conformance::until_idle(&engine).await;
}

/// Bytes, the end, and words of many letters, as real vocabularies have them.
#[derive(Debug)]
struct Words(Vocabulary);

impl Words {
    fn new() -> Self {
        let letter = |word: u64, at: u64| match crate::rng::uniform(word, at) < 0.5 {
            true => b'a',
            false => b'b',
        };
        let words = (0..30).map(|word| (0..400).map(|at| letter(word, at)).collect());
        let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
        let all: Vec<Vec<u8>> = bytes.chain(words).collect();
        Self(Vocabulary::new(all.iter().map(Vec::as_slice), ["<|end|>"]))
    }
}

impl Tokenizer for Words {
    fn encode_into(
        &self,
        text: &str,
        _: EncodePolicy,
        ids: &mut Vec<u32>,
    ) -> updraft_chat::Result<()> {
        ids.extend(text.bytes().map(u32::from));
        Ok(())
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.0
    }
}

/// A pattern may be small, compile within its fuel, and be too much work all the same: twice as
/// much with each of its letters. That is the request's fault, not the server's.
#[tokio::test]
async fn a_form_that_turns_out_too_complex_is_refused() {
    let special_tokens = SpecialTokens::new([("eos_token", "<|end|>")]);
    let template = ChatTemplate::new("{{ messages[-1].content }}", special_tokens);
    let model = ServedModel {
        chat: Chat::new(template.expect("valid Jinja"), Arc::new(Words::new())),
        ..served(&weights(), &[])
    };
    let engine: Arc<dyn Engine> = Arc::new(ModelEngine::new(model, &small()).expect("sound"));
    let exponential = json!({"type": "string", "pattern": "^(a|b)*a(a|b){25}$"});
    let constraint = Constraint::json_schema(exponential).expect("small");
    let asked = GenerateRequest {
        stop_token_ids: Arc::from([286]),
        ..asking(constraint, 3)
    };
    let ended: Result<Vec<TokenEvent>> = match engine.generate(asked).await {
        Ok(events) => events.try_collect().await,
        Err(refused) => Err(refused),
    };
    match ended {
        Err(Error::InvalidRequest { param, .. }) => {
            assert_eq!(param.as_deref(), Some("response_format"));
        }
        other => panic!("{other:?}"),
    }
    crate::conformance::until_idle(&engine).await;
    let next = run(&*engine, GenerateRequest::greedy("tiny", vec![1], 3)).await;
    assert_eq!(next.len(), 5, "it serves the next one: {next:?}");
}
