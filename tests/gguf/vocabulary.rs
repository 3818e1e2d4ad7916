use std::collections::HashMap;
use std::fs;
use std::path::Path;

use qlora::Error;
use qlora::data::{SplitMix64, Tokenizer};
use qlora::export::{GgufBase, GgufReport, GgufType, write_gguf_model};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::files::*;

// The types of tokens in llama.cpp.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A directory with this tokenizer.
fn tokenizer(tokenizer: &Value, config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

/// A model with the tokenizer of `dir`, written and read.
fn written(dir: &Path, config: &Value) -> qlora::Result<(Gguf, GgufReport)> {
    let base = GgufBase {
        config,
        dir,
        name: "",
    };
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.gguf");
    let report = write_gguf_model(&Model::random(config), base, GgufType::F16, &path, |_| ())?;
    Ok((Gguf::read(&path), report))
}

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
    written(dir.path(), &config_with_vocabulary("llama_mha"))
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
fn a_token_without_a_row_in_the_embedding_is_refused() {
    let mut config = config_with_vocabulary("llama_mha");
    config["vocab_size"] = 400.into();
    let error = written(&tokenizer_dir(), &config)
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
    let (gguf, _) = written(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
    assert!(gguf.bool("tokenizer.ggml.add_bos_token"));
    assert!(gguf.bool("tokenizer.ggml.add_eos_token"));
    // Something else than bos stands before the text.
    let dir = tokenizer(
        &byte_level(with_bos),
        &json!({ "bos_token": "<pad>", "eos_token": "</s>" }),
    );
    let error = written(dir.path(), &config_with_vocabulary("llama_mha"))
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
    let (gguf, report) = written(dir.path(), &config).unwrap();
    assert_eq!(gguf.u32("tokenizer.ggml.bos_token_id"), 7);
    assert_eq!(gguf.u32("tokenizer.ggml.eos_token_id"), 5);
    assert!(!gguf.has("tokenizer.ggml.padding_token_id"));
    assert_eq!(report.notes, [] as [&str; 0]);
    config["eos_token_id"] = Value::Null;
    let (gguf, report) = written(dir.path(), &config).unwrap();
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
        let (gguf, _) = written(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
        gguf.text("tokenizer.chat_template").to_string()
    };
    assert_eq!(template(), "{{ messages }}");
    let of_json = json!({ "chat_template": "{{ messages[0] }}" });
    fs::write(dir.path().join("chat_template.json"), of_json.to_string()).unwrap();
    assert_eq!(template(), "{{ messages[0] }}");
    fs::write(dir.path().join("chat_template.jinja"), "{{ messages[1] }}").unwrap();
    assert_eq!(template(), "{{ messages[1] }}");
}

/// Tokens of several characters, by falling score; those of one entry have the same.
const PIECES: [&[&str]; 9] = [
    &["▁t"],
    &["he"],
    &["in"],
    &["▁in"],
    &["▁the"],
    &["the"],
    &["ine"],
    &["ee"],
    &["▁▁", "▁▁▁", "▁▁▁▁", "▁▁▁▁▁"],
];

/// A SentencePiece model with [`PIECES`] as `tokenizer.json` has it: merges for all ways to make a token of two.
fn sentencepiece() -> Value {
    let mut vocab = vec!["<unk>".to_string(), "<s>".into(), "</s>".into()];
    vocab.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    let pieces = PIECES.iter().flat_map(|pieces| pieces.iter());
    vocab.extend(pieces.map(|piece| piece.to_string()));
    vocab.extend("▁thein".chars().map(String::from));
    let mut merges = Vec::new();
    for pieces in PIECES {
        let ways = pieces.iter().flat_map(|piece| {
            piece
                .char_indices()
                .skip(1)
                .map(|(at, _)| piece.split_at(at))
        });
        let mut ways: Vec<_> = ways
            .filter(|(left, right)| {
                [left, right]
                    .iter()
                    .all(|half| vocab.iter().any(|t| t == *half))
            })
            .collect();
        ways.sort_by_key(|(left, right)| {
            std::cmp::Reverse((left.chars().count(), right.chars().count()))
        });
        merges.extend(ways.into_iter().map(|(left, right)| json!([left, right])));
    }
    let ids = vocab
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, id.into()));
    let special = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false
        })
    };
    json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": ids.collect::<serde_json::Map<_, _>>(), "merges": merges,
        },
    })
}

/// Joins, of all neighbours that are a token together, those with the highest score, the leftmost first.
fn join_by_score(text: &str, scores: &HashMap<&str, f32>) -> Vec<String> {
    let mut symbols: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let pairs = symbols.windows(2).enumerate();
        let joined =
            pairs.filter_map(|(at, pair)| Some((at, *scores.get(pair.concat().as_str())?)));
        let best = joined.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((at, _)) = best else {
            return symbols;
        };
        let right = symbols.remove(at + 1);
        symbols[at].push_str(&right);
    }
}

#[test]
fn joining_by_score_makes_the_tokens_of_a_sentencepiece_tokenizer() {
    let file = sentencepiece();
    let dir = tokenizer(&file, &json!({ "bos_token": "<s>", "eos_token": "</s>" }));
    let (gguf, report) = written(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
    assert_eq!(report.notes, [] as [&str; 0]);
    let tokens = gguf.texts("tokenizer.ggml.tokens");
    let scores = gguf.f32s("tokenizer.ggml.scores");
    assert_eq!((tokens.len(), scores.len()), (448, 448));
    let score_of: HashMap<&str, f32> = tokens.iter().copied().zip(scores).collect();
    let by_score = PIECES.map(|pieces| score_of[pieces[0]]);
    assert!(by_score.is_sorted_by(|a, b| a > b), "{by_score:?}");
    // The merge of two spaces stands behind those of all longer runs, which lie among one another.
    let runs = &PIECES[8][1..];
    assert!(runs.iter().all(|run| score_of[run] == by_score[8] + 1.0));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let mut random = SplitMix64::new(1);
    let mut longest = 0;
    for _ in 0..2000 {
        let len = random.below(30);
        let text: String = (0..len)
            .map(|_| b"  thein"[random.below(7) as usize] as char)
            .collect();
        let expected = tokenizer.encode(&text).unwrap();
        let joined = join_by_score(&format!("▁{}", text.replace(' ', "▁")), &score_of);
        let ids: Vec<u32> = joined
            .iter()
            .map(|token| tokens.iter().position(|t| t == token).unwrap() as u32)
            .collect();
        if !text.is_empty() {
            assert_eq!(ids, expected, "{text:?}");
        }
        longest = longest.max(
            joined
                .iter()
                .map(|token| token.chars().count())
                .max()
                .unwrap(),
        );
    }
    assert_eq!(longest, 5);
}

#[test]
fn a_sentencepiece_tokenizer_has_its_types_and_keys() {
    let dir = tokenizer(
        &sentencepiece(),
        &json!({ "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true }),
    );
    let (gguf, _) = written(dir.path(), &config_with_vocabulary("mistral")).unwrap();
    assert_eq!(gguf.text("tokenizer.ggml.model"), "llama");
    assert_eq!(gguf.text("tokenizer.ggml.pre"), "default");
    assert!(gguf.bool("tokenizer.ggml.add_space_prefix"));
    assert!(gguf.bool("tokenizer.ggml.add_bos_token"));
    assert_eq!(gguf.u32("tokenizer.ggml.unknown_token_id"), 0);
    let types = gguf.i32s("tokenizer.ggml.token_type");
    assert_eq!(types[..3], [UNKNOWN, CONTROL, CONTROL]);
    assert!(types[3..259].iter().all(|kind| *kind == BYTE));
    assert_eq!(gguf.texts("tokenizer.ggml.tokens")[3 + 10], "<0x0A>");
    let normal = types[259..]
        .iter()
        .take_while(|kind| **kind == NORMAL)
        .count();
    assert_eq!(normal, 12 + 6);
    assert!(types[259 + normal..].iter().all(|kind| *kind == UNUSED));
    assert!(!gguf.has("tokenizer.ggml.merges"));
}

#[test]
fn spaces_are_put_where_the_tokenizer_puts_them_or_that_is_noted() {
    let metaspace = |scheme: &str| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let chat = || json!({ "chat_template": "{{ messages }}" });
    for (normalizer, pre_tokenizer, config, adds, note) in [
        (replace, Value::Null, json!({}), false, None),
        (Value::Null, metaspace("never"), json!({}), false, None),
        (
            Value::Null,
            metaspace("always"),
            chat(),
            true,
            Some("even where there is one"),
        ),
        (
            Value::Null,
            metaspace("first"),
            json!({}),
            true,
            Some("even where there is one"),
        ),
        (
            Value::Null,
            metaspace("first"),
            chat(),
            false,
            Some("text outside of a chat"),
        ),
    ] {
        let mut file = sentencepiece();
        file["normalizer"] = normalizer;
        file["pre_tokenizer"] = pre_tokenizer;
        let dir = tokenizer(&file, &config);
        let (gguf, report) = written(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
        assert_eq!(gguf.bool("tokenizer.ggml.add_space_prefix"), adds);
        // The config names an eos token.
        assert_eq!(report.notes.len(), usize::from(note.is_some()));
        let found = report.notes.first().map_or("", String::as_str);
        assert!(found.contains(note.unwrap_or_default()), "{found}");
    }
}

#[test]
fn a_bpe_that_sentencepiece_would_not_join_so_is_refused() {
    // One merge a token, as the trainer of tokenizers makes them.
    let trained = fixture("data/tokenizer_metaspace");
    let mut config = config_with_vocabulary("llama_mha");
    config["vocab_size"] = 512.into();
    let error = written(&trained, &config).err().unwrap().to_string();
    assert!(
        error.contains("`model.merges`") && error.contains("SentencePiece"),
        "{error}"
    );

    let changed = |change: fn(&mut Value)| {
        let mut file = sentencepiece();
        change(&mut file);
        let dir = tokenizer(&file, &json!({}));
        let error = written(dir.path(), &config_with_vocabulary("llama_mha"))
            .err()
            .unwrap();
        error.to_string()
    };
    let error = changed(|file| {
        file["model"]["merges"].as_array_mut().unwrap().remove(0);
    });
    assert!(
        error.contains("leave out ways to make 1 of 18 tokens"),
        "{error}"
    );
    let error = changed(|file| {
        let vocab = file["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.remove("<0x7F>").unwrap();
        vocab.insert("~~".into(), id);
    });
    assert!(
        error.contains("`model.byte_fallback`") && error.contains("<0x7F>"),
        "{error}"
    );
    let error = changed(|file| file["model"]["ignore_merges"] = true.into());
    assert!(error.contains("`model.ignore_merges`"), "{error}");
    let error = changed(|file| {
        file["pre_tokenizer"] = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true });
        file["normalizer"] = Value::Null;
    });
    assert!(error.contains("`pre_tokenizer`"), "{error}");
}
