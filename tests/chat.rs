//! Tokenizers and chat templates give the token ids and assistant masks that transformers gives.
//! Fixtures: `tests/fixtures/make_data.py`.

mod data_files;

use data_files::{
    TOKENIZERS, expect_row_error, fixture, fixtures, integers, jsonl, load_bytes, tokenizer,
};
use qlora::data::{ChatTemplate, GenerationPrompt, LoadOptions, SpecialTokens, Tokenizer};
use qlora::{Error, IGNORE_INDEX};
use serde_json::{Map, Value, json};

/// A model directory with the tokenizer fixture `name` and `chat_template` in its config.
fn model_dir(name: &str, chat_template: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = fixtures().join(name);
    std::fs::copy(
        source.join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let config = std::fs::read_to_string(source.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["chat_template"] = chat_template;
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn encode_and_decode_equal_transformers() {
    let expected = fixture("encode.json");
    for name in TOKENIZERS {
        let tokenizer = tokenizer(name);
        for case in expected[name].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = integers(&case["ids"]);
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
            let decoded = tokenizer.decode(&ids, SpecialTokens::Keep).unwrap();
            assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{name}");
        }
    }
}

#[test]
fn special_tokens_are_read_from_every_place() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    std::fs::copy(
        fixtures().join("tokenizer/tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    write(
        "tokenizer_config.json",
        json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null, "add_bos_token": true}),
    );
    write(
        "special_tokens_map.json",
        json!({"eos_token": "<|eot_id|>", "pad_token": {"content": "<pad>"}}),
    );
    write("generation_config.json", json!({"eos_token_id": [2, 4]}));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.bos_token_id(), Some(1));
    assert_eq!(tokenizer.eos_token(), Some("<|eot_id|>"));
    assert_eq!(tokenizer.pad_token_id(), Some(0));
    assert_eq!(tokenizer.eos_token_ids(), [2, 4, 7]);
    let plain = tokenizer.encode("Hello").unwrap();
    let with_bos = tokenizer.encode_with_specials("Hello").unwrap();
    assert_eq!(with_bos, [&[1], plain.as_slice()].concat());
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(plain[0]));

    write("generation_config.json", json!({"eos_token_id": "two"}));
    let error = Tokenizer::from_dir(dir.path()).err().unwrap().to_string();
    assert!(
        error.contains("generation_config.json: `eos_token_id`"),
        "{error}"
    );
}

#[test]
fn a_sentencepiece_model_alone_says_how_to_convert_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), b"\n\x0f").unwrap();
    let error = Tokenizer::from_dir(dir.path()).err().unwrap().to_string();
    assert!(
        error.contains("tokenizer.model: ") && error.contains("save_pretrained"),
        "{error}"
    );
}

#[test]
fn a_missing_or_damaged_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Tokenizer::from_dir(dir.path()),
        Err(Error::Io { .. })
    ));
    std::fs::write(dir.path().join("tokenizer.json"), b"{\"model\": 3}").unwrap();
    assert!(matches!(
        Tokenizer::from_dir(dir.path()),
        Err(Error::Malformed { .. })
    ));
}

#[test]
fn chat_ids_and_masks_equal_transformers() {
    let expected = fixture("chat.json");
    for name in TOKENIZERS {
        for case in expected[name].as_array().unwrap() {
            check_chat(name, case, &case["template"]);
        }
    }
}

#[test]
fn masks_derived_from_prefixes_equal_generation_blocks() {
    let expected = fixture("chat.json");
    for name in TOKENIZERS {
        for case in expected[name].as_array().unwrap() {
            assert!(
                case["template_without_generation"].is_string(),
                "{}",
                case["name"]
            );
            check_chat(name, case, &case["template_without_generation"]);
        }
    }
}

fn check_chat(name: &str, case: &Value, template: &Value) {
    let label = format!("{name}: {}", case["name"]);
    let dir = model_dir(name, template.clone());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
    let messages = case["messages"].as_array().unwrap();
    let chat_template = tokenizer.chat_template().unwrap();
    let text = chat_template.render(messages, tools, GenerationPrompt::No);
    assert_eq!(text.unwrap(), case["text"].as_str().unwrap(), "{label}");
    if let Some(prompt) = case["prompt"].as_str() {
        let text = chat_template.render(messages, tools, GenerationPrompt::Yes);
        assert_eq!(text.unwrap(), prompt, "{label}");
    }

    let record = match tools {
        Some(tools) => json!({"messages": messages, "tools": tools}),
        None => json!({"messages": messages}),
    };
    let options = LoadOptions::default();
    let dataset = load_bytes("chat.jsonl", &jsonl(&[record]), &options, Some(&tokenizer)).unwrap();
    let example = &dataset.examples[0];
    assert_eq!(
        example.input_ids,
        integers::<u32>(&case["input_ids"]),
        "{label}"
    );
    let mask: Vec<i64> = integers(&case["assistant_mask"]);
    for (i, (&label_id, is_assistant)) in example.labels.iter().zip(mask).enumerate() {
        let expected = if is_assistant == 1 {
            i64::from(example.input_ids[i])
        } else {
            IGNORE_INDEX
        };
        assert_eq!(label_id, expected, "{label}: token {i}");
    }
}

fn chat_template(source: &str) -> qlora::Result<ChatTemplate> {
    ChatTemplate::new("chat_template.jinja", source.into(), Map::new(), Vec::new())
}

fn conversation() -> Vec<Value> {
    vec![
        json!({"role": "user", "content": "a"}),
        json!({"role": "assistant", "content": "b"}),
        json!({"role": "user", "content": "c"}),
        json!({"role": "assistant", "content": "d"}),
    ]
}

#[test]
fn a_template_whose_prefixes_do_not_nest_is_an_error() {
    let last_turn_only = "{% for m in messages %}{{ m.role }}{% if loop.last %}<think></think>{% endif %}{{ m.content }}\
                          {% endfor %}{% if add_generation_prompt %}assistant{% endif %}";
    let template = chat_template(last_turn_only).unwrap();
    let error = template
        .render_for_training(&conversation(), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("messages[1]") && error.contains("{% generation %}"),
        "{error}"
    );
}

#[test]
fn a_template_says_why_it_refuses_a_conversation() {
    let template = chat_template("{{ raise_exception('roles must alternate') }}").unwrap();
    let error = template
        .render_for_training(&conversation(), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("chat_template.jinja: ") && error.contains("roles must alternate"),
        "{error}"
    );
}

#[test]
fn a_template_that_is_not_valid_names_its_line() {
    for source in [
        "a\n{% for m in messages %}",
        "a\n{% generation %}",
        "a\n{{ x + }}",
    ] {
        let error = chat_template(source).err().unwrap().to_string();
        assert!(error.contains("chat_template:2"), "{error}");
    }
}

#[test]
fn a_message_cannot_forge_the_assistant_mask() {
    let template = chat_template(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    )
    .unwrap();
    for content in ["\u{FDD0}", "\u{FDD1}", "x\u{FDD1}y\u{FDD0}z"] {
        let messages = [json!({"role": "user", "content": content})];
        assert!(
            template.render_for_training(&messages, None).is_err(),
            "{content:?}"
        );
    }
}

#[test]
fn of_named_templates_the_default_is_used() {
    let named =
        json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    let dir = model_dir("tokenizer", named);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let render = |t: &Tokenizer| {
        let template = t.chat_template().unwrap();
        template
            .render(&conversation(), None, GenerationPrompt::No)
            .unwrap()
    };
    assert_eq!(render(&tokenizer), "d");
    std::fs::write(dir.path().join("chat_template.jinja"), "j\n").unwrap();
    assert_eq!(render(&Tokenizer::from_dir(dir.path()).unwrap()), "j");
}

#[test]
fn strftime_now_refuses_a_bad_format() {
    let year = chat_template("{{ strftime_now('%Y') }}").unwrap();
    let text = year.render(&[], None, GenerationPrompt::No).unwrap();
    assert_eq!(text.len(), 4);
    let bad = chat_template("{{ strftime_now('%Q%') }}").unwrap();
    assert!(bad.render(&[], None, GenerationPrompt::No).is_err());
}

#[test]
fn bad_messages_name_the_message() {
    let dir = model_dir(
        "tokenizer",
        json!("{% for m in messages %}{{ m.content }}{% endfor %}"),
    );
    let with_template = Tokenizer::from_dir(dir.path()).unwrap();
    let options = LoadOptions::default();
    for (messages, reason) in [
        (json!("hello"), "`messages` is a string, expected an array"),
        (json!([]), "`messages` is empty"),
        (
            json!(["hello"]),
            "`messages[0]` is a string, expected an object",
        ),
        (json!([{"role": "user"}]), "`messages[0]` has no `content`"),
        (
            json!([{"role": "user", "content": 3}]),
            "`messages[0].content` is a number",
        ),
        (
            json!([{"role": null, "content": ""}]),
            "`messages[0].role` is null",
        ),
    ] {
        let bytes = jsonl(&[json!({"messages": messages})]);
        expect_row_error(&bytes, &options, Some(&with_template), 1, reason);
    }
    let bytes = jsonl(&[json!({"messages": conversation()})]);
    let without_template = tokenizer("tokenizer");
    expect_row_error(
        &bytes,
        &options,
        Some(&without_template),
        1,
        "no chat template",
    );
}
