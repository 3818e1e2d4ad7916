//! How fast chat JSONL becomes token ids and masks, against what the tokenizers crate alone does with the same text; and
//! how fast a run starts from the cache.
//!
//! `cargo bench --bench data` prints both rates and their ratio for each kind of mask. `cargo bench --bench data -- million` writes a
//! file of a million rows below the directory for temporary files (1 GB, and 1.2 GB of cache) and loads it three times.
//!
//! The text is made of words whose frequency falls with their rank, and the tokenizer is a byte-level BPE of 16,000 tokens
//! trained on it. Before anything is timed, the ids of both ways are compared.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use qlora::data::{GenerationPrompt, LoadOptions, SplitMix64, Tokenizer, load};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

const WORDS: u64 = 20_000;
const VOCAB_SIZE: usize = 16_000;
const ROWS: usize = 4_000;
const ROUNDS: usize = 5;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content + '<|im_end|>' }}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const CHATML_WITH_BLOCKS: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A word of one to four syllables, always the same for the same number.
fn word(number: u64) -> String {
    let mut letters = SplitMix64::new(number);
    let syllables = 1 + letters.below(4);
    let pick = |letters: &mut SplitMix64, from: &str| {
        let i = letters.below(from.len() as u64) as usize;
        from[i..=i].to_string()
    };
    let syllable = |_| pick(&mut letters, "bcdfghjklmnprstvwz") + &pick(&mut letters, "aeiou");
    (0..syllables).map(syllable).collect()
}

/// Sentences of `words` words. Their ranks have a logarithm that is uniform, which is Zipf's law.
fn text(generator: &mut SplitMix64, words: u64) -> String {
    let mut text = String::new();
    for i in 0..words {
        let rank = (WORDS as f64).powf(generator.uniform()) as u64;
        text += &word(rank);
        text += match i % 12 {
            11 => ". ",
            5 => ", ",
            _ => " ",
        };
    }
    text
}

fn chat(generator: &mut SplitMix64) -> Value {
    let turns = 1 + generator.below(2);
    let mut messages = Vec::new();
    for _ in 0..turns {
        let (question, answer) = (5 + generator.below(30), 20 + generator.below(100));
        messages.push(json!({"role": "user", "content": text(generator, question)}));
        messages.push(json!({"role": "assistant", "content": text(generator, answer)}));
    }
    json!({"messages": messages})
}

/// A model directory with a tokenizer that was trained on the same kind of text.
fn write_tokenizer(dir: &Path) {
    let mut generator = SplitMix64::new(1);
    let corpus: Vec<String> = (0..4000).map(|_| text(&mut generator, 100)).collect();
    let special =
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>"].map(|token| AddedToken::from(token, true));
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCAB_SIZE)
        .show_progress(false)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .unwrap();
    tokenizer.train(&mut trainer, corpus.iter()).unwrap();
    tokenizer.save(dir.join("tokenizer.json"), false).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn seconds(f: impl FnOnce()) -> f64 {
    let started = Instant::now();
    f();
    started.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn throughput(dir: &Path, name: &str, template: &str) {
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
    let tokenizer = Tokenizer::from_dir(dir).unwrap();
    let path = dir.join("chat.jsonl");
    let lines = std::fs::read_to_string(&path).unwrap();
    let render = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let messages = row["messages"].as_array().unwrap();
        tokenizer
            .chat_template()
            .unwrap()
            .render(messages, None, GenerationPrompt::No)
            .unwrap()
    };
    let texts: Vec<String> = lines.lines().map(render).collect();
    let alone = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let encode = || {
        alone
            .encode_batch_fast(texts.iter().map(String::as_str).collect(), false)
            .unwrap()
    };
    let options = LoadOptions::default();

    let dataset = load(&path, &options, Some(&tokenizer)).unwrap();
    for (encoding, example) in encode().iter().zip(dataset.examples()) {
        assert_eq!(encoding.get_ids(), example.input_ids);
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        theirs.push(seconds(|| drop(encode())));
        ours.push(seconds(|| {
            drop(load(&path, &options, Some(&tokenizer)).unwrap())
        }));
    }
    let megabytes = texts.iter().map(String::len).sum::<usize>() as f64 / 1e6;
    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "{name}: {:.1} MB/s of text, tokenizers alone {:.1} MB/s: {:.0} %",
        megabytes / ours,
        megabytes / theirs,
        100.0 * theirs / ours
    );
}

/// Rows of 100 to 200 token ids, so that what is timed is not the tokenizer.
fn million(dir: &Path) {
    let path = dir.join("million.jsonl");
    let mut file = BufWriter::new(std::fs::File::create(&path).unwrap());
    let mut generator = SplitMix64::new(3);
    for _ in 0..1_000_000 {
        let count = 100 + generator.below(101);
        let ids: Vec<String> = (0..count)
            .map(|_| generator.below(32_000).to_string())
            .collect();
        writeln!(file, "{{\"input_ids\": [{}]}}", ids.join(", ")).unwrap();
    }
    drop(file.into_inner().unwrap());
    let gigabytes = path.metadata().unwrap().len() as f64 / 1e9;
    println!("a million rows in a file of {gigabytes:.2} GB");
    let options = LoadOptions {
        cache_dir: Some(dir.join("cache")),
        ..LoadOptions::default()
    };
    for start in ["cold", "warm", "warm"] {
        let mut tokens = 0;
        let time = seconds(|| tokens = load(&path, &options, None).unwrap().stats.tokens);
        println!(
            "{start} start: {time:.2} s, {tokens} tokens{}",
            anonymous_memory()
        );
    }
}

/// Memory of the program without a file behind it, as Linux tells it.
fn anonymous_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    size.map_or(String::new(), |size| format!(", {} anonymous", size.trim()))
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    if std::env::args().any(|argument| argument == "million") {
        return million(dir.path());
    }
    let mut generator = SplitMix64::new(2);
    let rows: Vec<String> = (0..ROWS)
        .map(|_| format!("{}\n", chat(&mut generator)))
        .collect();
    std::fs::write(dir.path().join("chat.jsonl"), rows.concat()).unwrap();
    write_tokenizer(dir.path());
    throughput(
        dir.path(),
        "masks from generation blocks",
        CHATML_WITH_BLOCKS,
    );
    throughput(dir.path(), "masks from prefixes", CHATML);
}
