//! Questions with the one right answer each, and what a model answers.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use qlora::data::{GenerationPrompt, SpecialTokens, Tokenizer};
use qlora::infer::{GenerateOptions, Sampler, SamplingOptions, generate};
use qlora::model::Decoder;
use rayon::prelude::*;
use serde_json::Value;

/// More than the longest right answer has, in tokens.
const MAX_NEW_TOKENS: usize = 40;

/// A held-out row: a user's turn and the answer that is wanted.
#[derive(Debug, serde::Deserialize)]
#[serde(try_from = "Row")]
pub struct Question {
    pub prompt: Value,
    pub expected: String,
}

#[derive(serde::Deserialize)]
struct Row {
    messages: [Value; 2],
}

impl TryFrom<Row> for Question {
    type Error = &'static str;

    fn try_from(Row { messages }: Row) -> Result<Self, Self::Error> {
        let [prompt, answer] = messages;
        match (prompt["content"].is_string(), answer["content"].as_str()) {
            (true, Some(expected)) => Ok(Self {
                expected: expected.to_string(),
                prompt,
            }),
            _ => Err("a message has no content"),
        }
    }
}

impl Question {
    /// Reads a JSONL file in the `messages` format.
    pub fn read_all(path: &Path) -> anyhow::Result<Vec<Self>> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let rows = text.lines().map(serde_json::from_str);
        rows.collect::<Result<_, _>>()
            .with_context(|| path.display().to_string())
    }

    /// What the user says.
    pub fn text(&self) -> &str {
        self.prompt["content"].as_str().unwrap_or_default()
    }
}

/// The likeliest answer to each question, through the model's chat template.
pub fn answer_all(
    model: &Decoder,
    tokenizer: &Tokenizer,
    questions: &[Question],
    what: &'static str,
) -> anyhow::Result<Vec<String>> {
    let progress = super::progress_bar(questions.len(), what)?;
    let answer = |question| {
        let answer = answer(model, tokenizer, question)?;
        progress.inc(1);
        Ok(answer)
    };
    let answers = match model.placement().uses_kernels() {
        // A device computes for one thread at a time.
        true => questions.iter().map(answer).collect(),
        false => questions.par_iter().map(answer).collect(),
    };
    progress.finish_and_clear();
    answers
}

fn answer(model: &Decoder, tokenizer: &Tokenizer, question: &Question) -> anyhow::Result<String> {
    let template = tokenizer
        .chat_template()
        .context("the model has no chat template")?;
    let prompt = template.render(
        std::slice::from_ref(&question.prompt),
        None,
        GenerationPrompt::Yes,
    )?;
    let options = GenerateOptions {
        max_new_tokens: MAX_NEW_TOKENS,
        stop_ids: tokenizer.eos_token_ids().to_vec(),
    };
    let mut greedy = Sampler::new(SamplingOptions::default())?;
    let ids = tokenizer.encode(&prompt)?;
    let generated = generate(model, &ids, &options, &mut greedy, |_| {
        ControlFlow::Continue(())
    })?;
    Ok(tokenizer.decode(&generated.ids, SpecialTokens::Skip)?)
}
