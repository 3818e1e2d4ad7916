//! Tokenizers that came from SentencePiece: scores, types, spaces, refusals.

use std::collections::HashMap;

use qlora::data::{SplitMix64, Tokenizer};
use serde_json::{Value, json};

use super::files::*;

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
    let (gguf, report) = written_with(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
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
    let (gguf, _) = written_with(dir.path(), &config_with_vocabulary("mistral")).unwrap();
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
        let (gguf, report) =
            written_with(dir.path(), &config_with_vocabulary("llama_mha")).unwrap();
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
    let error = written_with(&trained, &config).err().unwrap().to_string();
    assert!(
        error.contains("`model.merges`") && error.contains("SentencePiece"),
        "{error}"
    );

    let changed = |change: fn(&mut Value)| {
        let mut file = sentencepiece();
        change(&mut file);
        let dir = tokenizer(&file, &json!({}));
        let error = written_with(dir.path(), &config_with_vocabulary("llama_mha"))
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
