//! Byte-level tokenizers, and what all kinds have: special tokens, chat template, refusals.

use std::fs;

use qlora::Error;
use qlora::export::GgufReport;
use serde_json::{Value, json};

use super::files::*;

/// The file of the byte-level fixture, changed.
fn byte_level(change: impl FnOnce(&mut Value)) -> Value {
    let mut file = json(tokenizer_dir().join("tokenizer.json"));
    change(&mut file);
    file
}

fn tokenizer_config() -> Value {
    json!({ "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>" })
}

fn written_of(file: &Value) -> qlora::Result<(Gguf, GgufReport)> {
    let dir = tokenizer(file, &tokenizer_config());
    written_with(dir.path(), &config_with_vocabulary("llama_mha"))
}

/// The field that is refused, and its value.
fn refused(file: &Value) -> (String, String) {
    match written_of(file).err().expect("a refusal") {
        Error::UnsupportedModel {
            field, value, hint, ..
        } => {
            assert!(hint.contains("convert_hf_to_gguf.py"), "{hint}");
            (field, value)
        }
        error => panic!("{error}"),
    }
}

#[test]
fn a_byte_level_tokenizer_has_its_tokens_types_merges_and_ids() {
    let file = byte_level(|file| {
        file["added_tokens"][15]["special"] = false.into();
        file["added_tokens"][15]["content"] = "<tool▁call>".into();
    });
    let (gguf, report) = written_of(&file).unwrap();
    assert_eq!(report.notes, [] as [&str; 0]);
    assert_eq!(gguf.text("tokenizer.ggml.model"), "gpt2");
    assert_eq!(gguf.text("tokenizer.ggml.pre"), "gpt-2");
    let tokens = gguf.texts("tokenizer.ggml.tokens");
    let types = gguf.i32s("tokenizer.ggml.token_type");
    assert_eq!((tokens.len(), types.len()), (448, 448));
    for (token, id) in file["model"]["vocab"].as_object().unwrap() {
        let id = id.as_u64().unwrap() as usize;
        let is_added = file["added_tokens"]
            .as_array()
            .unwrap()
            .iter()
            .any(|t| t["id"] == id);
        if !is_added {
            assert_eq!((tokens[id], types[id]), (token.as_str(), NORMAL));
        }
    }
    assert_eq!((tokens[1], types[1]), ("<s>", CONTROL));
    let user_defined = file["added_tokens"][15]["id"].as_u64().unwrap() as usize;
    assert_eq!(
        (tokens[user_defined], types[user_defined]),
        ("<tool call>", USER_DEFINED)
    );
    assert_eq!((tokens[447], types[447]), ("[PAD447]", UNUSED));
    let merges = file["model"]["merges"].as_array().unwrap();
    let expected: Vec<String> = merges
        .iter()
        .map(|pair| {
            format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(gguf.texts("tokenizer.ggml.merges"), expected);
    assert_eq!(gguf.u32("tokenizer.ggml.bos_token_id"), 1);
    assert_eq!(gguf.u32("tokenizer.ggml.eos_token_id"), 2);
    assert_eq!(gguf.u32("tokenizer.ggml.padding_token_id"), 0);
    assert!(!gguf.bool("tokenizer.ggml.add_bos_token"));
    assert!(!gguf.bool("tokenizer.ggml.add_eos_token"));
    assert!(!gguf.has("tokenizer.chat_template"));
}

#[test]
fn merges_written_as_one_text_are_the_same() {
    let texts = byte_level(|file| {
        for merge in file["model"]["merges"].as_array_mut().unwrap() {
            let text = format!(
                "{} {}",
                merge[0].as_str().unwrap(),
                merge[1].as_str().unwrap()
            );
            *merge = text.into();
        }
    });
    let (of_texts, _) = written_of(&texts).unwrap();
    let (of_pairs, _) = written_of(&byte_level(|_| ())).unwrap();
    let merges = |gguf: &Gguf| gguf.texts("tokenizer.ggml.merges").join("\n");
    assert!(merges(&of_pairs).len() > 100);
    assert_eq!(merges(&of_texts), merges(&of_pairs));
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn bytes(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split(regex: &str) -> Value {
    let split = json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    json!({ "type": "Sequence", "pretokenizers": [split, bytes(false)] })
}

fn with_pre_tokenizer(pre_tokenizer: Value, ignore_merges: bool) -> Value {
    byte_level(|file| {
        file["pre_tokenizer"] = pre_tokenizer;
        file["model"]["ignore_merges"] = ignore_merges.into();
    })
}

#[test]
fn a_way_to_split_is_known_by_its_expression() {
    let digits = json!({ "type": "Digits", "individual_digits": true });
    let smollm = json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] });
    for (pre_tokenizer, ignore_merges, expected) in [
        (bytes(true), false, "gpt-2"),
        (smollm, false, "smollm"),
        (split(LLAMA3), true, "llama-bpe"),
        (split(LLAMA3), false, "dbrx"),
        (split(QWEN2), false, "qwen2"),
        (split(SEED_CODER), false, "seed-coder"),
        (split(TEKKEN), true, "tekken"),
    ] {
        let file = with_pre_tokenizer(pre_tokenizer, ignore_merges);
        let (gguf, report) = written_of(&file).unwrap();
        assert_eq!(gguf.text("tokenizer.ggml.pre"), expected);
        assert_eq!(report.notes.len(), usize::from(expected == "tekken"));
    }
}

#[test]
fn an_unknown_way_to_split_is_refused_by_its_name() {
    let mut with_space = bytes(true);
    with_space["add_prefix_space"] = true.into();
    let unknown = split(r"\p{N}{1,2}|\s+");
    for (pre_tokenizer, ignore_merges, named) in [
        (unknown, false, r"\\p{N}{1,2}"),
        (split(QWEN2), true, "ignore_merges"),
        (bytes(true), true, "ignore_merges"),
        (with_space, false, "add_prefix_space"),
        (json!({ "type": "Whitespace" }), false, "Whitespace"),
    ] {
        let (field, value) = refused(&with_pre_tokenizer(pre_tokenizer, ignore_merges));
        assert_eq!(field, "pre_tokenizer");
        assert!(value.contains(named), "{value}");
    }
}

#[test]
fn what_llama_cpp_does_not_do_to_a_text_is_refused() {
    let (field, _) = refused(&byte_level(|file| {
        file["normalizer"] = json!({ "type": "Lowercase" })
    }));
    assert_eq!(field, "normalizer");
    written_of(&byte_level(|file| {
        file["normalizer"] = json!({ "type": "NFC" })
    }))
    .unwrap();
    let (field, _) = refused(&byte_level(|file| file["model"]["dropout"] = 0.1.into()));
    assert_eq!(field, "model.dropout");
    let suffixed = byte_level(|file| file["model"]["end_of_word_suffix"] = "</w>".into());
    assert_eq!(refused(&suffixed).0, "model.end_of_word_suffix");
}

#[test]
fn another_kind_of_model_is_refused_by_its_name() {
    let unigram = json!({ "type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["</s>", -1.0], ["<pad>", -2.0]] });
    let vocab = json!({ "<s>": 0, "</s>": 1, "<pad>": 2 });
    let word_piece = json!({
        "type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": vocab
    });
    for (model, name) in [(unigram, "Unigram"), (word_piece, "WordPiece")] {
        let file = byte_level(|file| file["model"] = model);
        assert_eq!(refused(&file), ("model.type".into(), format!("{name:?}")));
    }
}

#[test]
fn a_token_that_takes_the_spaces_beside_it_is_noted() {
    let file = byte_level(|file| file["added_tokens"][4]["rstrip"] = true.into());
    let (_, report) = written_of(&file).unwrap();
    let name = file["added_tokens"][4]["content"].to_string();
    assert_eq!(report.notes.len(), 1);
    assert!(report.notes[0].contains(&name), "{:?}", report.notes);
}

#[test]
fn a_token_without_a_row_in_the_embedding_is_refused() {
    let mut config = config_with_vocabulary("llama_mha");
    config["vocab_size"] = 400.into();
    let error = written_with(&tokenizer_dir(), &config)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("has 400 rows"), "{error}");
}

#[test]
fn bos_and_eos_are_added_where_the_tokenizer_adds_them() {
    let with_bos = |file: &mut Value| {
        let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        file["post_processor"]["single"] = json!([bos, text]);
        let special = json!({ "id": "<s>", "ids": [1], "tokens": ["<s>"] });
        file["post_processor"]["special_tokens"] = json!({ "<s>": special });
    };
    let (gguf, _) = written_of(&byte_level(with_bos)).unwrap();
    assert!(gguf.bool("tokenizer.ggml.add_bos_token"));
    assert!(!gguf.bool("tokenizer.ggml.add_eos_token"));
    let mut config = tokenizer_config();
    config["add_eos_token"] = true.into();
    let dir = tokenizer(&byte_level(with_bos), &config);
    let (gguf, _) = written_with(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
    assert!(gguf.bool("tokenizer.ggml.add_bos_token"));
    assert!(gguf.bool("tokenizer.ggml.add_eos_token"));
    // Something else than bos stands before the text.
    let dir = tokenizer(
        &byte_level(with_bos),
        &json!({ "bos_token": "<pad>", "eos_token": "</s>" }),
    );
    let error = written_with(dir.path(), &config_with_vocabulary("llama_mha"))
        .err()
        .unwrap();
    assert!(error.to_string().contains("`post_processor`"), "{error}");
}

#[test]
fn a_token_that_the_tokenizer_does_not_name_comes_from_the_config() {
    let dir = tokenizer(&byte_level(|_| ()), &json!({}));
    let mut config = config_with_vocabulary("qwen2");
    config["bos_token_id"] = 7.into();
    config["eos_token_id"] = json!([5, 6]);
    let (gguf, report) = written_with(dir.path(), &config).unwrap();
    assert_eq!(gguf.u32("tokenizer.ggml.bos_token_id"), 7);
    assert_eq!(gguf.u32("tokenizer.ggml.eos_token_id"), 5);
    assert!(!gguf.has("tokenizer.ggml.padding_token_id"));
    assert_eq!(report.notes, [] as [&str; 0]);
    config["eos_token_id"] = Value::Null;
    let (gguf, report) = written_with(dir.path(), &config).unwrap();
    assert!(!gguf.has("tokenizer.ggml.eos_token_id"));
    assert!(report.notes[0].contains("no eos token"));
}

#[test]
fn the_chat_template_is_that_of_the_tokenizer() {
    let mut config = tokenizer_config();
    config["chat_template"] = json!([
        { "name": "tools", "template": "{{ tools }}" },
        { "name": "default", "template": "{{ messages }}" },
    ]);
    let dir = tokenizer(&byte_level(|_| ()), &config);
    let template = || {
        let (gguf, _) = written_with(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
        gguf.text("tokenizer.chat_template").to_string()
    };
    assert_eq!(template(), "{{ messages }}");
    let of_json = json!({ "chat_template": "{{ messages[0] }}" });
    fs::write(dir.path().join("chat_template.json"), of_json.to_string()).unwrap();
    assert_eq!(template(), "{{ messages[0] }}");
    fs::write(dir.path().join("chat_template.jinja"), "{{ messages[1] }}").unwrap();
    assert_eq!(template(), "{{ messages[1] }}");
}
