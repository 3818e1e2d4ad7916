//! Multiple-choice questions: read as qlora.py has them, answered as the logits say, and measured under qlora.py's names.

mod emulated;
mod mmlu_command;
mod reference_case;

use std::path::{Path, PathBuf};

use emulated::placement_test;
use qlora::data::{Mmlu, MmluOptions, Question, Tokenizer, letter_ids, mmlu_files, read_mmlu};
use qlora::device::Placement;
use qlora::infer::{Answer, Ensemble, MultipleChoice, multiple_choice, multiple_choice_ensemble};
use qlora::model::{Decoder, MatrixDropout, Sequences};
use reference_case::{ReferenceCase, values};
use serde_json::{Map, Value, json};

const BOS: u32 = 1;
/// Tokens of A to D in the tokenizer of [`model_with_tokenizer`].
const LETTER_IDS: [u32; 4] = [40, 90, 140, 200];

/// The case's checkpoint with a tokenizer in which `<s>` is bos, a letter has its id of [`LETTER_IDS`], and the word `w7` is
/// token 7.
fn model_with_tokenizer(case: &ReferenceCase, dir: &Path, letters: &str) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(case.dir.join(file), model.join(file)).unwrap();
    }
    let mut vocab: Map<String, Value> = (0..256)
        .filter(|id| *id != BOS && !LETTER_IDS.contains(id))
        .map(|id| (format!("w{id}"), json!(id)))
        .collect();
    vocab.insert("<s>".into(), json!(BOS));
    let letters = letters.chars().zip(LETTER_IDS);
    vocab.extend(letters.map(|(letter, id)| (letter.to_string(), json!(id))));
    let bos = json!({
        "id": BOS, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [bos],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = r#"{"bos_token": "<s>"}"#;
    std::fs::write(model.join("tokenizer_config.json"), config).unwrap();
    model
}

/// A tokenizer of the fixtures: bytes and some words, with bos.
fn fixture_tokenizer(name: &str) -> Tokenizer {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data");
    Tokenizer::from_dir(data.join(name)).unwrap()
}

fn read(dir: &Path, name: &str, rows: &str, options: &MmluOptions) -> Result<Mmlu, String> {
    let path = dir.join(name);
    std::fs::write(&path, rows).unwrap();
    let mmlu = read_mmlu(&path, options, &fixture_tokenizer("tokenizer"));
    mmlu.map_err(|e| e.to_string())
}

/// Questions of every length up to that of the case's examples, more than go through the model together.
fn questions(case: &ReferenceCase) -> Vec<Question> {
    let mut questions = Vec::new();
    let mut tokens = 0;
    for start in 0.. {
        for example in &case.examples {
            let ids = &example.input_ids[start.min(example.input_ids.len() - 1)..];
            for end in 1..=ids.len() {
                questions.push(Question {
                    subject: format!("s{start}"),
                    prompt: ids[..end].to_vec(),
                    answer: questions.len() % 4,
                });
                tokens += end;
            }
        }
        if tokens > 3000 {
            break;
        }
    }
    questions
}

/// The probability of each letter after the prompt, alone in the batch.
fn by_hand(decoder: &Decoder, masks: Option<MatrixDropout>, prompt: &[u32]) -> [f64; 4] {
    let positions: Vec<u32> = (0..prompt.len() as u32).collect();
    let sequences = Sequences {
        input_ids: prompt,
        positions: &positions,
        cu_seqlens: &[0, prompt.len()],
    };
    let logits = match masks {
        None => decoder.logits(sequences).unwrap(),
        masks => {
            let hidden = decoder.hidden_states(sequences, masks).unwrap();
            decoder.head_logits(&hidden).unwrap()
        }
    };
    let vocab = logits.dim(1).unwrap();
    let logits = values(&logits);
    let last = &logits[logits.len() - vocab..];
    let total: f64 = last.iter().map(|z| f64::from(*z).exp()).sum();
    LETTER_IDS.map(|id| f64::from(last[id as usize]).exp() / total)
}

fn expect_answer(found: &Answer, probabilities: [f64; 4], question: &Question) {
    let likeliest = (0..4).max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]));
    assert_eq!(Some(found.letter), likeliest, "{probabilities:?}");
    let loss = -probabilities[question.answer].ln();
    assert!((found.loss - loss).abs() < 1e-4, "{found:?} and {loss}");
}

#[test]
fn an_answer_is_the_likeliest_letter_after_the_whole_prompt() {
    let case = ReferenceCase::read("llama_gqa");
    let decoder = case.decoder();
    let questions = questions(&case);
    let mut groups = Vec::new();
    let on_answers = |answered| groups.push(answered);
    let found = multiple_choice(&decoder, LETTER_IDS, &questions, on_answers).unwrap();
    assert_eq!(found.len(), questions.len());
    assert!(groups.len() > 1, "{groups:?}");
    assert_eq!(groups.iter().sum::<usize>(), questions.len());
    for (found, question) in found.iter().zip(&questions) {
        expect_answer(found, by_hand(&decoder, None, &question.prompt), question);
    }
    // Not always the same one, or the test would see no mistake.
    assert!(found.iter().any(|answer| answer.letter != found[0].letter));
}

placement_test!(answers_on_a_device_are_those_of_the_cpu, |placement| {
    let case = ReferenceCase::read("llama_gqa");
    let questions = &questions(&case)[..30];
    let answers = |decoder: &Decoder| {
        let answers = multiple_choice(decoder, LETTER_IDS, questions, |_| {}).unwrap();
        MultipleChoice::new(questions, &answers)
    };
    let (expected, found) = (
        answers(&case.decoder()),
        answers(&case.decoder_at(placement)),
    );
    let off = (found.loss - expected.loss).abs();
    assert!(off < 0.01 * expected.loss, "{found:?} and {expected:?}");
    assert_eq!(found.questions, 30);
});

#[test]
fn an_ensemble_answers_by_the_mean_of_its_probabilities() {
    let case = ReferenceCase::read("qwen3");
    let decoder = case.decoder();
    let questions = &questions(&case)[..12];
    let (p, seed, sizes) = (0.4, 5, [1, 3]);
    let ensemble = Ensemble::new(p, seed, 3).unwrap();
    let masks = MatrixDropout::ensemble(p, seed, 3).unwrap();
    let of = (&ensemble, &sizes[..]);
    let found = multiple_choice_ensemble(&decoder, of, LETTER_IDS, questions, |_| {}).unwrap();
    for (found, models) in found.iter().zip(sizes) {
        assert_eq!(found.len(), questions.len());
        for (found, question) in found.iter().zip(questions) {
            let mut mean = [0.0; 4];
            for model in 0..models {
                let of_model = by_hand(&decoder, Some(masks.instance(model)), &question.prompt);
                for (mean, probability) in mean.iter_mut().zip(of_model) {
                    *mean += probability / models as f64;
                }
            }
            expect_answer(found, mean, question);
        }
    }
    assert_ne!(found[0], found[1]);
    let wrong = (&ensemble, &[3, 1][..]);
    let refused = multiple_choice_ensemble(&decoder, wrong, LETTER_IDS, questions, |_| {});
    assert!(refused.unwrap_err().to_string().contains("ensemble"));
}

#[test]
fn what_cannot_be_answered_is_refused() {
    let case = ReferenceCase::read("qwen3");
    let decoder = case.decoder();
    let answer = |letters, prompt: &[u32]| {
        let question = Question {
            subject: "s".into(),
            prompt: prompt.to_vec(),
            answer: 0,
        };
        let answers = multiple_choice(&decoder, letters, &[question], |_| {});
        answers.unwrap_err().to_string()
    };
    let beyond = answer([1, 2, 3, 256], &[1]);
    assert!(
        beyond.contains("below 256") && beyond.contains("found 256"),
        "{beyond}"
    );
    assert!(answer(LETTER_IDS, &[]).contains("an empty one"));
}

#[test]
fn rows_of_qlora_py_and_of_the_hub_make_the_same_questions() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = "The following are multiple choice questions (with answers) about  high school geography.\n\n\
        What is {a} valley?\nA. One\nB. Two\nC. {question}\nD. 4\nAnswer:";
    let of_qlora_py = json!([{"subject": "high_school_geography", "input": prompt, "output": "C"}]);
    let of_the_hub = json!({
        "subject": "high_school_geography",
        "question": "What is {a} valley?",
        "choices": ["One", "Two", "{question}", "4"],
        "answer": 2,
    });
    let options = MmluOptions::default();
    let found = read(dir.path(), "a.json", &of_qlora_py.to_string(), &options).unwrap();
    let same = read(dir.path(), "b.jsonl", &of_the_hub.to_string(), &options).unwrap();
    assert_eq!(found, same);
    let tokenizer = fixture_tokenizer("tokenizer");
    let ids = tokenizer.encode(&format!("<s>{prompt}")).unwrap();
    assert_eq!(Some(ids[0]), tokenizer.bos_token_id());
    let question = Question {
        subject: "high_school_geography".into(),
        prompt: ids,
        answer: 2,
    };
    assert_eq!((&found.questions[..], found.cut), (&[question][..], 0));
}

#[test]
fn a_long_prompt_loses_its_beginning_and_keeps_bos_and_the_question() {
    let dir = tempfile::tempdir().unwrap();
    let row = |input: &str| json!({"subject": "s", "input": input, "output": "A"});
    let (long, short) = (
        "Many words of earlier questions. What is it?\nAnswer:",
        "It?",
    );
    let rows = json!([row(long), row(short)]).to_string();
    let read = |source_max_len| {
        let options = MmluOptions {
            source_max_len,
            ..MmluOptions::default()
        };
        read(dir.path(), "a.json", &rows, &options)
    };
    let whole = read(2048).unwrap();
    let [long, short] = &whole.questions[..] else {
        panic!("two questions");
    };
    let (bos, len) = (long.prompt[0], long.prompt.len());
    assert!(short.prompt.len() < 8 && len > 12);
    assert_eq!(read(len).unwrap(), whole);
    for max in [8, len - 1] {
        let found = read(max).unwrap();
        assert_eq!(found.cut, 1);
        let kept = [&[bos], &long.prompt[len - (max - 1)..]].concat();
        assert_eq!(found.questions[0].prompt, kept);
        assert_eq!(&found.questions[1], short);
    }
    let refused = read(1).unwrap_err();
    assert!(
        refused.contains("`mmlu_source_max_len`: must be at least 2"),
        "{refused}"
    );
}

#[test]
fn only_the_first_questions_are_read_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let row = |output: &str| json!({"subject": "s", "input": "It?", "output": output});
    let options = MmluOptions {
        max_samples: Some(2),
        ..MmluOptions::default()
    };
    let rows = json!([row("D"), row("B"), row("?")]).to_string();
    let found = read(dir.path(), "a.json", &rows, &options).unwrap();
    let answers: Vec<usize> = found.questions.iter().map(|q| q.answer).collect();
    assert_eq!(answers, [3, 1]);
}

#[test]
fn a_row_that_is_no_question_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"subject": "s", "input": "It?", "output": "A"}"#;
    for (row, expected) in [
        (
            r#"{"input": "It?", "output": "A"}"#,
            "column `subject` is missing",
        ),
        (
            r#"{"subject": "s", "output": "A"}"#,
            "column `input` is missing",
        ),
        (
            r#"{"subject": "s", "input": "It?"}"#,
            "column `output` is missing",
        ),
        (
            r#"{"subject": "s", "input": "It?", "output": "E"}"#,
            r#"`output` is "E", expected A, B, C or D"#,
        ),
        (
            r#"{"subject": "s", "input": "It?", "output": 1}"#,
            "`output` is a number, expected a string",
        ),
        (
            r#"{"subject": "s", "input": "", "output": "A"}"#,
            "`input` is empty",
        ),
        (
            r#"{"subject": "s", "question": "It?", "choices": ["a", "b"], "answer": 1}"#,
            "`choices` has 2 entries, expected 4 strings",
        ),
        (
            r#"{"subject": "s", "question": "It?", "choices": "abcd", "answer": 1}"#,
            "`choices` is a string, expected 4 strings",
        ),
        (
            r#"{"subject": "s", "question": "It?", "choices": ["a", "b", "c", "d"], "answer": 4}"#,
            "`answer` is 4, expected 0, 1, 2 or 3",
        ),
        ("[1]", "the row is an array, expected an object"),
        (r#"{"subject": }"#, "bad JSON"),
    ] {
        let rows = format!("[\n{good},\n{row}\n]");
        let error = read(dir.path(), "questions.json", &rows, &MmluOptions::default());
        let error = error.unwrap_err();
        assert!(error.contains("questions.json:3: "), "{error}");
        assert!(error.contains(expected), "{error}");
    }
    let empty = read(dir.path(), "empty.json", "[]", &MmluOptions::default()).unwrap_err();
    assert!(
        empty.contains("empty.json: the file has no questions"),
        "{empty}"
    );
}

#[test]
fn a_letter_without_a_token_of_its_own_is_named() {
    let case = ReferenceCase::read("qwen3");
    let of = |letters| {
        let dir = tempfile::tempdir().unwrap();
        let model = model_with_tokenizer(&case, dir.path(), letters);
        let ids = letter_ids(&Tokenizer::from_dir(model).unwrap());
        ids.map_err(|e| e.to_string())
    };
    assert_eq!(of("ABCD"), Ok(LETTER_IDS));
    // D is the token of what is unknown.
    let unknown = of("ABC").unwrap_err();
    assert!(
        unknown.contains("tokenizer.json: the letter D has the tokens [0]"),
        "{unknown}"
    );
    // Alone, as qlora.py tokenizes it, A is a word and begins with a blank.
    let metaspace = fixture_tokenizer("tokenizer_metaspace");
    assert_eq!(metaspace.encode("A").unwrap(), [426]);
    let pieces = letter_ids(&metaspace).unwrap_err().to_string();
    assert!(pieces.contains("the letter B has the tokens ["), "{pieces}");
    assert_eq!(
        letter_ids(&fixture_tokenizer("tokenizer")).unwrap(),
        [48, 49, 50, 51]
    );
}

#[test]
fn a_directory_has_the_files_of_qlora_py_that_are_there() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("other.json"), "[]").unwrap();
    let none = mmlu_files(dir.path()).unwrap_err().to_string();
    assert!(
        none.contains("expected {zero,five}_shot_mmlu_{val,test}.json"),
        "{none}"
    );
    for name in ["five_shot_mmlu_test.json", "zero_shot_mmlu_val.json"] {
        std::fs::write(dir.path().join(name), "[]").unwrap();
    }
    let files = mmlu_files(dir.path()).unwrap();
    let of = |file: &qlora::data::MmluFile| (file.shots.unwrap(), file.split.unwrap());
    let found: Vec<_> = files.iter().map(of).collect();
    assert_eq!(found, [("zero_shot", "eval"), ("five_shot", "test")]);
    assert_eq!(mmlu_files(&files[1].path).unwrap(), files[1..]);
    let other = &mmlu_files(dir.path().join("other.json")).unwrap()[0];
    assert_eq!((other.shots, other.split), (None, None));
}
