use candle_core::Device;

use super::*;
use crate::config::Architecture;
use crate::tiny;

fn model() -> ModelConfig {
    tiny::config(Architecture::Llama)
}

fn files(config: &LoraConfig) -> PeftFiles {
    write_adapter(&Adapter::init(config, &model(), 1, &Device::Cpu).expect("a sound configuration"))
        .expect("writes")
}

fn edited(edit: impl FnOnce(&mut Map<String, Value>)) -> Result<Adapter> {
    let files = files(&LoraConfig::default());
    let mut config = serde_json::from_slice(&files.config_json).expect("our own JSON");
    edit(&mut config);
    read_adapter(
        &serde_json::to_vec(&config).expect("JSON"),
        &files.safetensors,
        &model(),
    )
}

#[test]
fn a_configuration_looks_as_peft_writes_it() {
    let config = LoraConfig {
        base_model_name_or_path: Some("Qwen/Qwen2.5-0.5B".to_owned()),
        target_modules: TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]),
        ..LoraConfig::default()
    };
    let text = String::from_utf8(files(&config).config_json).expect("UTF-8");
    assert!(
        text.starts_with("{\n  \"alora_invocation_tokens\": null,\n  \"alpha_pattern\": {},\n"),
        "{text}"
    );
    assert!(
        text.contains("\n  \"base_model_name_or_path\": \"Qwen/Qwen2.5-0.5B\",\n"),
        "{text}"
    );
    assert!(text.contains("\n  \"lora_alpha\": 16,\n"), "{text}"); // an integer, as PEFT declares it
    assert!(text.contains("\n  \"lora_dropout\": 0.0,\n"), "{text}");
    assert!(
        text.contains("\n  \"target_modules\": [\n    \"q_proj\",\n    \"v_proj\"\n  ],\n"),
        "{text}"
    );
    assert!(text.ends_with("\n  \"use_rslora\": false\n}"), "{text}");
}

#[test]
fn patterns_survive_writing_and_reading() {
    let config = LoraConfig {
        r: 4,
        use_rslora: true,
        rank_pattern: BTreeMap::from([("layers.1.mlp.up_proj".to_owned(), 2)]),
        alpha_pattern: BTreeMap::from([("q_proj".to_owned(), 0.5)]),
        ..LoraConfig::default()
    };
    let files = files(&config);
    let again =
        read_adapter(&files.config_json, &files.safetensors, &model()).expect("our own files");
    assert_eq!(again.config(), &config);
    assert_eq!(write_adapter(&again).expect("writes"), files);
}

#[test]
fn tensors_decide_what_is_adapted() {
    let read = |expression: &str| {
        let read = edited(|config| {
            config.insert("target_modules".to_owned(), json!(expression));
        });
        read.expect("readable").config().target_modules.clone()
    };
    let kept = ".*_proj";
    assert_eq!(read(kept), TargetModules::Pattern(kept.to_owned()));
    // What only Python's expressions know, or what names other modules, is put in names.
    let names = LoraConfig::default().target_modules;
    assert_eq!(read("(?<=_).*"), names);
    assert_eq!(read(".*q_proj"), names);

    let partial = LoraConfig {
        target_modules: TargetModules::Names(vec!["layers.1.mlp.up_proj".to_owned()]),
        ..LoraConfig::default()
    };
    let files = files(&partial);
    let json = String::from_utf8(files.config_json)
        .expect("UTF-8")
        .replace("layers.1.mlp.up_proj", "up_proj");
    let adapter = read_adapter(json.as_bytes(), &files.safetensors, &model()).expect("readable");
    let full = TargetModules::Names(vec!["model.layers.1.mlp.up_proj".to_owned()]);
    assert_eq!(adapter.config().target_modules, full);
}

#[test]
fn what_would_change_the_result_is_refused() {
    for (field, value, expected) in [
        (
            "peft_type",
            json!("IA3"),
            "peft_type \"IA3\" is not supported",
        ),
        ("use_dora", json!(true), "use_dora is not supported"),
        ("bias", json!("all"), "bias \"all\" is not supported"),
        (
            "modules_to_save",
            json!(["lm_head"]),
            "tensor base_model.model.lm_head.weight is in none",
        ),
        (
            "init_lora_weights",
            json!("pissa"),
            "init_lora_weights \"pissa\"",
        ),
        (
            "rank_pattern",
            json!({ "(?<=q)_proj": 4 }),
            "no regular expression",
        ),
        (
            "rank_pattern",
            json!({ "layers.0.*": 4 }),
            "has shape [16, 32] where the model needs [4, 32]",
        ),
        (
            "r",
            json!(8),
            "lora_A.weight has shape [16, 32] where the model needs [8, 32]",
        ),
        ("r", json!("many"), "adapter_config.json: line 1"),
    ] {
        let error = edited(|config| {
            config.insert(field.to_owned(), value);
        });
        let error = error.expect_err(field).to_string();
        assert!(error.contains(expected), "{field}: {error}");
    }
    let harmless = edited(|config| {
        config.insert("a_field_of_a_later_peft".to_owned(), json!(true));
        config.insert("lora_dropout".to_owned(), json!(0.1));
    });
    assert_eq!(
        harmless
            .expect("dropout is off when it runs")
            .config()
            .lora_dropout,
        0.1
    );
}

#[test]
fn an_adapter_for_another_base_is_refused() {
    let files = files(&LoraConfig::default());
    let mut smaller = model();
    smaller.num_hidden_layers = 1;
    let error = read_adapter(&files.config_json, &files.safetensors, &smaller)
        .expect_err("too many layers")
        .to_string();
    assert!(
        error.contains("layers.1.") && error.contains("belongs to no module of the model"),
        "{error}"
    );
    let mut wider = model();
    wider.intermediate_size = 96;
    let error = read_adapter(&files.config_json, &files.safetensors, &wider)
        .expect_err("too narrow")
        .to_string();
    assert!(error.contains("_proj.lora_"), "{error}");
    assert!(read_adapter(&files.config_json, &files.safetensors[..200], &model()).is_err());
}

/// A large adapter goes out in pieces, one in another number type from a copy: the same file.
#[test]
fn pieces_are_the_file_in_any_number_type() {
    let adapter = Adapter::init(&LoraConfig::default(), &model(), 1, &Device::Cpu).expect("sound");
    let whole = write_adapter(&adapter).expect("writes").safetensors;
    for dtype in [candle_core::DType::F32, candle_core::DType::F64] {
        let other = adapter.to_dtype(dtype).expect("converts");
        let pieces = weights_pieces(&other).expect("pieces");
        let pieces: Vec<_> = pieces.map(|piece| piece.expect("a piece")).collect();
        assert!(pieces.len() > 2);
        assert_eq!(pieces.concat(), whole);
        let read = read_adapter(&config_json(&other), &whole, &model()).expect("reads");
        assert_eq!(read.values().expect("f32"), adapter.values().expect("f32"));
    }
}
