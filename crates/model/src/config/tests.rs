use super::*;

/// Qwen2.5-0.5B as its hub file has it (transformers 4).
const QWEN2_V4: &str = r#"{"architectures":["Qwen2ForCausalLM"],"attention_dropout":0.0,"bos_token_id":151643,
  "eos_token_id":151643,"hidden_act":"silu","hidden_size":896,"initializer_range":0.02,"intermediate_size":4864,
  "max_position_embeddings":32768,"max_window_layers":24,"model_type":"qwen2","num_attention_heads":14,
  "num_hidden_layers":24,"num_key_value_heads":2,"rms_norm_eps":1e-06,"rope_theta":1000000.0,"sliding_window":32768,
  "tie_word_embeddings":true,"torch_dtype":"bfloat16","transformers_version":"4.40.1","use_cache":true,
  "use_mrope":false,"use_sliding_window":false,"vocab_size":151936}"#;

/// The same, rewritten by transformers 5.
const QWEN2_V5: &str = r#"{"architectures":["Qwen2ForCausalLM"],"dtype":"bfloat16","hidden_act":"silu","hidden_size":896,
  "intermediate_size":4864,"layer_types":["full_attention"],"max_position_embeddings":32768,"max_window_layers":24,
  "model_type":"qwen2","num_attention_heads":14,"num_hidden_layers":24,"num_key_value_heads":2,"rms_norm_eps":1e-06,
  "rope_parameters":{"rope_theta":1000000.0,"rope_type":"default"},"sliding_window":null,"tie_word_embeddings":true,
  "use_sliding_window":false,"vocab_size":151936}"#;

const LLAMA_32: &str = r#"{"attention_bias":false,"head_dim":64,"hidden_act":"silu","hidden_size":2048,
  "intermediate_size":8192,"max_position_embeddings":131072,"mlp_bias":false,"model_type":"llama",
  "num_attention_heads":32,"num_hidden_layers":16,"num_key_value_heads":8,"rms_norm_eps":1e-05,
  "rope_scaling":{"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,"original_max_position_embeddings":8192,
  "rope_type":"llama3"},"rope_theta":500000.0,"tie_word_embeddings":true,"vocab_size":128256}"#;

fn edited(
    json: &str,
    edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
) -> Result<ModelConfig> {
    let mut map = serde_json::from_str(json).expect("a test's own JSON");
    edit(&mut map);
    ModelConfig::from_json(&serde_json::to_vec(&map).expect("a map serializes"))
}

#[test]
fn both_generations_of_a_file_say_the_same() {
    let old = ModelConfig::from_json(QWEN2_V4.as_bytes()).expect("v4");
    assert_eq!(
        old,
        ModelConfig::from_json(QWEN2_V5.as_bytes()).expect("v5")
    );
    assert_eq!((old.head_dim, old.q_dim(), old.kv_dim()), (64, 896, 128));
    assert_eq!(
        (old.qkv_bias, old.o_bias, old.qk_norm, old.sliding_window),
        (true, false, false, None)
    );
    assert_eq!(old.num_parameters(), 494_032_768); // as the model card says
}

#[test]
fn llama3_scaling_stretches_slow_frequencies_only() {
    let config = ModelConfig::from_json(LLAMA_32.as_bytes()).expect("llama 3.2");
    let plain = RopeConfig {
        scaling: RopeScaling::None,
        ..config.rope
    }
    .inverse_frequencies(64);
    let scaled = config.rope.inverse_frequencies(64);
    assert_eq!(plain[0], scaled[0]);
    assert_eq!(plain[31] / 32.0, scaled[31]);
    assert!(scaled.windows(2).all(|pair| pair[1] < pair[0]));
}

#[test]
fn mistral_window_bounds_the_length() {
    let config = edited(LLAMA_32, |map| {
        map.insert("model_type".into(), "mistral".into());
        map.insert("sliding_window".into(), 4096.into());
        map.remove("rope_scaling");
    })
    .expect("mistral");
    assert_eq!(
        (config.max_position_embeddings, config.max_len()),
        (131_072, 4096)
    );
}

#[test]
fn qwen3_has_head_norms_and_its_own_head_dim() {
    let config = edited(QWEN2_V5, |map| {
        map.insert("model_type".into(), "qwen3".into());
    })
    .expect("qwen3");
    assert_eq!(
        (config.head_dim, config.qk_norm, config.qkv_bias),
        (128, true, false)
    );
}

#[test]
fn what_is_not_understood_is_an_error_that_names_it() {
    let message = |json: &str, field: &str, value: serde_json::Value| {
        let field = field.to_owned();
        edited(json, |map| {
            map.insert(field, value);
        })
        .expect_err("must be refused")
        .to_string()
    };
    for (field, value, expected) in [
        (
            "model_type",
            "gpt2".into(),
            "model_type \"gpt2\" is not supported",
        ),
        (
            "hidden_act",
            "gelu".into(),
            "hidden_act \"gelu\" is not supported",
        ),
        (
            "num_key_value_heads",
            3.into(),
            "num_key_value_heads: 3 does not divide",
        ),
        (
            "vocab_size",
            0.into(),
            "vocab_size: 0 is not a plausible size",
        ),
        (
            "hidden_size",
            (1_u64 << 40).into(),
            "hidden_size: 1099511627776 is not a plausible size",
        ),
        (
            "num_attention_heads",
            0.into(),
            "num_attention_heads: 0 is not a plausible size",
        ),
        (
            "rope_scaling",
            serde_json::json!({"type": "yarn", "factor": 4.0}),
            "rope_type \"yarn\" is not supported",
        ),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "linear"}),
            "rope_scaling.factor: missing",
        ),
        (
            "quantization_config",
            serde_json::json!({"bits": 4}),
            "quantization_config is not supported",
        ),
        ("vocab_size", "many".into(), "invalid type: string \"many\""),
    ] {
        let actual = message(QWEN2_V4, field, value);
        assert!(actual.contains(expected), "{field}: {actual}");
    }
    let missing = edited(QWEN2_V4, |map| {
        map.remove("vocab_size");
    });
    assert!(
        missing
            .expect_err("refused")
            .to_string()
            .contains("missing field `vocab_size`")
    );
    assert!(ModelConfig::from_json(b"[").is_err());
}
