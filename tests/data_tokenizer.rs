//! A tokenizer has all tokens that its config says, as in transformers, and its offsets leave nothing of an answer out.

mod data_files;

use std::path::Path;

use data_files::{fixture, jsonl, load_bytes, model_dir, trained_text};
use qlora::data::{LoadOptions, Tokenizer};
use serde_json::{Value, json};

/// Writes the tokenizer fixture with a change to its `tokenizer.json`.
fn write_tokenizer(dir: &Path, change: impl FnOnce(&mut Value)) {
    let mut tokenizer = fixture("tokenizer/tokenizer.json");
    change(&mut tokenizer);
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// A model whose `tokenizer.json` has `<s>`, `<|im_start|>` and `<|im_end|>` in its vocabulary alone.
fn model(changes: Value) -> qlora::Result<Tokenizer> {
    let dir = model_dir("tokenizer", changes);
    write_tokenizer(dir.path(), |tokenizer| {
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        added.retain(|token| ![1, 3, 4].contains(&token["id"].as_u64().unwrap()));
    });
    Tokenizer::from_dir(dir.path())
}

#[test]
fn tokens_that_the_config_alone_knows_are_not_split() {
    let entry = json!({"content": "<|im_end|>", "lstrip": true, "rstrip": false, "normalized": false,
                       "single_word": false, "special": true});
    let tokenizer = model(json!({"added_tokens_decoder": {"4": entry}})).unwrap();
    assert_eq!(tokenizer.encode("<s><|im_start|>").unwrap(), [1, 3]);
    assert_eq!(tokenizer.encode("  <|im_end|>").unwrap(), [4], "lstrip");
    assert!([1, 3, 4].iter().all(|&id| tokenizer.is_special(id)));

    let plain = json!({"content": "<|im_end|>", "special": false});
    let changes = json!({"added_tokens_decoder": {"4": plain}, "extra_special_tokens": []});
    let tokenizer = model(changes).unwrap();
    assert_eq!(tokenizer.encode("<|im_end|>").unwrap(), [4]);
    assert!(!tokenizer.is_special(4));
    assert!(tokenizer.encode("<|im_start|>").unwrap().len() > 1);
}

#[test]
fn flags_in_the_config_win_over_those_in_the_tokenizer() {
    let entry = json!({"content": "</s>", "lstrip": true, "special": true});
    let dir = model_dir("tokenizer", json!({"added_tokens_decoder": {"2": entry}}));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode(" </s>").unwrap(), [2]);
}

#[test]
fn an_added_token_with_another_id_is_an_error() {
    for (entries, expected) in [
        (
            json!({"9": {"content": "<|im_end|>"}}),
            "\"<|im_end|>\" as token 9",
        ),
        (
            json!({"9000": {"content": "<new>"}}),
            "\"<new>\" as token 9000",
        ),
        (
            json!({"x": {"content": "<new>"}}),
            "\"x\", which is not a token id",
        ),
        (json!({"3": 3}), "`added_tokens_decoder.3` is 3"),
    ] {
        let error = model(json!({"added_tokens_decoder": entries})).err();
        let error = error.unwrap().to_string();
        assert!(
            error.contains("tokenizer_config.json") && error.contains(expected),
            "{error}"
        );
    }
}

#[test]
fn an_empty_special_token_is_none() {
    let tokenizer = model(json!({"bos_token": "", "pad_token": {"content": ""}})).unwrap();
    assert_eq!(tokenizer.bos_token(), None);
    assert_eq!(tokenizer.pad_token_id(), None);
}

#[test]
fn white_space_at_the_start_of_an_answer_is_trained_whatever_the_tokenizer_trims() {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let roberta = json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true,
                         "add_prefix_space": false});
    let sequence = json!({"type": "Sequence", "processors": [byte_level]});
    let template =
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    for processor in [byte_level, roberta, sequence] {
        let dir = model_dir("tokenizer", json!({"chat_template": template}));
        write_tokenizer(dir.path(), |tokenizer| {
            tokenizer["post_processor"] = processor.clone()
        });
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let answer = json!({"role": "assistant", "content": "   b c"});
        let bytes = jsonl(&[json!({"messages": [answer]})]);
        let options = LoadOptions::default();
        let dataset = load_bytes("a.jsonl", &bytes, &options, Some(&tokenizer)).unwrap();
        let trained = trained_text(&dataset, 0, &tokenizer);
        assert_eq!(trained, "   b c", "{processor}");
    }
}
