//! What the demo found: for the terminal, as Markdown and as JSON.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use qlora::store::{AtomicFile, WriteReport};
use qlora::train::metrics::{EvalRecord, StepRecord};
use serde_json::{Value, json};

use super::answers::Question;
use super::files::DemoFiles;

/// Questions that are shown with both answers.
const EXAMPLES: usize = 4;

/// A training run in numbers.
#[derive(Debug, Default)]
pub struct Training {
    /// Step, counted from 1, and mean loss of its labels.
    pub losses: Vec<(usize, f64)>,
    /// The same over all held-out rows, where they were evaluated.
    pub eval_losses: Vec<(usize, f64)>,
    pub tokens: usize,
    pub seconds: f64,
}

impl Training {
    /// Reads the metrics of a run that took `seconds`.
    pub fn read(metrics: &Path, seconds: f64) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(metrics).with_context(|| metrics.display().to_string())?;
        let mut training = Self {
            seconds,
            ..Self::default()
        };
        for line in text.lines() {
            match serde_json::from_str(line).with_context(|| metrics.display().to_string())? {
                Record::Step(record) => {
                    training.tokens += record.tokens;
                    training.losses.push((record.step, record.loss));
                }
                Record::Eval(record) => training.eval_losses.push((record.step, record.eval_loss)),
            }
        }
        Ok(training)
    }
}

/// A line of `metrics.jsonl`.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Record {
    Step(StepRecord),
    Eval(EvalRecord),
}

pub struct Report<'a> {
    pub questions: &'a [Question],
    /// Answers of the base model, in the order of the questions.
    pub before: &'a [String],
    /// Answers with the adapter.
    pub after: &'a [String],
    /// Answers of the model that the adapter was merged into.
    pub exported: &'a [String],
    pub quantized: WriteReport,
    pub training: &'a Training,
    pub files: &'a DemoFiles,
    pub loss_curve: &'a Path,
    pub seconds: f64,
}

/// A question with its answers.
struct Shown<'a> {
    prompt: &'a str,
    expected: &'a str,
    before: &'a str,
    after: &'a str,
}

impl Report<'_> {
    /// For the terminal; the adapter's path comes last.
    pub fn text(&self, report: &Path) -> String {
        let mut text = String::new();
        for shown in self.examples() {
            let Shown {
                prompt,
                before,
                after,
                ..
            } = shown;
            text += &format!("{prompt}\n  before  {before}\n  after   {after}\n\n");
        }
        text += &format!("{}\n{}\n\n", self.quantized_line(), self.training_line());
        text += &format!("held-out exact match  {}\n", self.exact_match_line());
        text += &format!("wall time             {:.1} s\n", self.seconds);
        text += &format!("loss curve            {}\n", self.loss_curve.display());
        text += &format!("report                {}\n", report.display());
        text += &format!("merged model          {}\n", self.files.merged.display());
        text += &format!("adapter               {}\n", self.files.adapter.display());
        text
    }

    pub fn write_markdown(&self, path: &Path) -> qlora::Result<()> {
        let mut text = format!(
            "# qlora demo\n\n{}\n\n{}\n\nHeld-out exact match: {}.\n\n",
            self.quantized_line(),
            self.training_line(),
            self.exact_match_line()
        );
        text += "![Loss by optimizer step](loss.svg)\n";
        for shown in self.examples() {
            let Shown {
                prompt,
                expected,
                before,
                after,
            } = shown;
            text += &format!(
                "\n## {prompt}\n\n| | |\n|---|---|\n| wanted | `{expected}` |\n| before | `{before}` |\n| after | `{after}` |\n"
            );
        }
        text += "\n## Ask it yourself\n\n";
        text += &format!(
            "    qlora generate --model {} --adapter {} --prompt \"{}\"\n",
            self.files.quantized.display(),
            self.files.adapter.display(),
            self.questions.first().map_or("", Question::text)
        );
        AtomicFile::write(path, text)
    }

    pub fn json(&self, report: &Path) -> Value {
        let examples = self.examples().map(|shown| {
            json!({
                "prompt": shown.prompt,
                "expected": shown.expected,
                "before": shown.before,
                "after": shown.after,
            })
        });
        json!({
            "exact_match_before": self.exact_matches(self.before) as f64 / self.questions.len() as f64,
            "exact_match_after": self.exact_matches(self.after) as f64 / self.questions.len() as f64,
            "exact_match_exported": self.exact_matches(self.exported) as f64 / self.questions.len() as f64,
            "heldout_rows": self.questions.len(),
            "examples": examples.collect::<Vec<_>>(),
            "quantize": self.quantized,
            "steps": self.training.losses.len(),
            "tokens": self.training.tokens,
            "loss": self.training.losses.last().map(|(_, loss)| loss),
            "eval_loss": self.training.eval_losses.last().map(|(_, loss)| loss),
            "train_seconds": self.training.seconds,
            "seconds": self.seconds,
            "loss_curve": self.loss_curve,
            "report": report,
            "model": self.files.quantized,
            "adapter": self.files.adapter,
            "merged": self.files.merged,
        })
    }

    fn quantized_line(&self) -> String {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        format!(
            "{} of {} weights to NF4 with double quantization: {:.2} MB to {:.2} MB.",
            self.quantized.quantized_tensors,
            self.quantized.quantized_tensors + self.quantized.copied_tensors,
            megabytes(self.quantized.source_bytes),
            megabytes(self.quantized.written_bytes)
        )
    }

    fn training_line(&self) -> String {
        let Training {
            losses,
            tokens,
            seconds,
            ..
        } = self.training;
        let mut line = format!(
            "{} optimizer steps over {tokens} tokens in {seconds:.1} s",
            losses.len()
        );
        if let (Some((_, first)), Some((_, last))) = (losses.first(), losses.last()) {
            // Writing to a String cannot fail.
            let _ = write!(line, ": loss {first:.3} to {last:.3}");
        }
        line + "."
    }

    fn exact_match_line(&self) -> String {
        let rows = self.questions.len();
        let share = |answers| {
            let matches = self.exact_matches(answers);
            format!(
                "{matches} of {rows} ({:.1} %)",
                100.0 * matches as f64 / rows as f64
            )
        };
        format!(
            "{} before, {} after, {} merged into the model",
            share(self.before),
            share(self.after),
            share(self.exported)
        )
    }

    fn exact_matches(&self, answers: &[String]) -> usize {
        let expected = self.questions.iter().map(|question| &question.expected);
        expected
            .zip(answers)
            .filter(|(expected, answer)| expected == answer)
            .count()
    }

    /// Some rows, spread evenly.
    fn examples(&self) -> impl Iterator<Item = Shown<'_>> {
        let rows = self.questions.len();
        (0..EXAMPLES.min(rows))
            .map(move |i| i * rows / EXAMPLES.min(rows))
            .map(|row| Shown {
                prompt: self.questions[row].text(),
                expected: &self.questions[row].expected,
                before: &self.before[row],
                after: &self.after[row],
            })
    }
}
