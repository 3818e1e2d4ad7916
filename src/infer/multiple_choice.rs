//! How often a model answers a question with the right letter.
//!
//! A prompt is answered by the likeliest of four tokens after it, those of the letters A to D. Accuracy is the share of right
//! letters within a subject, and the plain mean of that over the subjects, however many questions each has. The loss of a
//! question is `-ln p(right letter | prompt)`, in which p is over the whole vocabulary, and the mean of it is over the
//! questions. (qlora.py's `mmlu_loss` takes the eos after the letter into the mean, as a second token of each question.)
//!
//! Source: arXiv:2009.03300 for the questions; the callback of qlora.py for how they are answered.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rayon::prelude::*;

use super::ensemble::{Ensemble, expect_sizes, log_add_exp, log_sum_exp};
use super::evaluate::{EVALUATION_TOKENS, next_group, rows_of_logits, sequences};
use super::sampling::argmax;
use crate::data::{Batch, Example, LETTERS, Question};
use crate::model::{Decoder, MatrixDropout};
use crate::{Error, IGNORE_INDEX, Result};

/// The tokens of [`LETTERS`].
pub type LetterIds = [u32; LETTERS.len()];

/// What a model says to a question.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// The index in [`LETTERS`]; of equally likely ones the first.
    pub letter: usize,
    /// -ln p(right letter) over the whole vocabulary, in nats.
    pub loss: f64,
}

/// The measures of all questions.
#[derive(Debug, Clone, PartialEq)]
pub struct MultipleChoice {
    /// Mean over the subjects, in 0..=1.
    pub accuracy: f64,
    /// In 0..=1, by subject.
    pub subjects: BTreeMap<String, f64>,
    /// Mean over the questions, in nats.
    pub loss: f64,
    pub questions: usize,
}

impl MultipleChoice {
    /// The measures of `answers` to `questions`, as many and in the same order; NaN where there are none.
    pub fn new(questions: &[Question], answers: &[Answer]) -> Self {
        let mut totals: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for (question, answer) in questions.iter().zip(answers) {
            let (right, all) = totals.entry(&question.subject).or_default();
            *right += usize::from(answer.letter == question.answer);
            *all += 1;
        }
        let accuracy = |(subject, (right, all)): (&str, (usize, usize))| {
            (subject.to_string(), right as f64 / all as f64)
        };
        let subjects: BTreeMap<String, f64> = totals.into_iter().map(accuracy).collect();
        let loss: f64 = answers.iter().map(|answer| answer.loss).sum();
        Self {
            accuracy: subjects.values().sum::<f64>() / subjects.len() as f64,
            subjects,
            loss: loss / answers.len() as f64,
            questions: answers.len(),
        }
    }
}

/// Answers `questions` in their order; `on_answers` gets how many have been answered together.
///
/// # Errors
/// [`Error::Shape`] for a token beyond the vocabulary, and for a prompt without tokens.
pub fn multiple_choice(
    decoder: &Decoder,
    letters: LetterIds,
    questions: &[Question],
    on_answers: impl FnMut(usize),
) -> Result<Vec<Answer>> {
    let mut of_sizes = answers(decoder, (&[None], &[1]), letters, questions, on_answers)?;
    Ok(of_sizes.remove(0))
}

/// Answers `questions` by the mean of the probabilities of an ensemble's first models: all answers for each of `sizes`,
/// which ascend to the whole ensemble.
///
/// # Errors
/// As [`multiple_choice`]; [`Error::Config`] for other sizes.
pub fn multiple_choice_ensemble(
    decoder: &Decoder,
    (ensemble, sizes): (&Ensemble, &[usize]),
    letters: LetterIds,
    questions: &[Question],
    on_answers: impl FnMut(usize),
) -> Result<Vec<Vec<Answer>>> {
    expect_sizes(ensemble, sizes)?;
    let masks = (0..ensemble.models()).map(|model| Some(ensemble.masks(model)));
    let masks: Vec<_> = masks.collect();
    answers(decoder, (&masks, sizes), letters, questions, on_answers)
}

fn answers(
    decoder: &Decoder,
    (masks, sizes): (&[Option<MatrixDropout>], &[usize]),
    letters: LetterIds,
    questions: &[Question],
    mut on_answers: impl FnMut(usize),
) -> Result<Vec<Vec<Answer>>> {
    let mut of_sizes: Vec<Vec<Answer>> = vec![Vec::new(); sizes.len()];
    let mut prompts = questions.iter().map(prompt).peekable();
    let mut left = questions;
    while prompts.peek().is_some() {
        let group = next_group(&mut prompts, EVALUATION_TOKENS);
        let batch = Batch::from_examples(&group.iter().collect::<Vec<_>>());
        let questions;
        (questions, left) = left.split_at(group.len());
        // Of the probabilities summed over the models so far, the logarithms.
        let mut sums = vec![[f64::NEG_INFINITY; LETTERS.len()]; group.len()];
        for (models, masks) in (1..).zip(masks) {
            let found = log_probabilities(decoder, *masks, letters, &batch)?;
            for (sum, found) in sums.iter_mut().flatten().zip(found.iter().flatten()) {
                *sum = log_add_exp(*sum, *found);
            }
            let answer = |(sums, question): (&[f64; LETTERS.len()], &Question)| Answer {
                letter: argmax(sums),
                loss: f64::from(models).ln() - sums[question.answer],
            };
            let of_size = of_sizes.iter_mut().zip(sizes);
            for (answers, _) in of_size.filter(|(_, size)| **size == models as usize) {
                answers.extend(sums.iter().zip(questions).map(answer));
            }
        }
        on_answers(group.len());
    }
    Ok(of_sizes)
}

fn prompt(question: &Question) -> Example {
    Example {
        input_ids: question.prompt.clone(),
        labels: vec![IGNORE_INDEX; question.prompt.len()],
        line: 0,
    }
}

/// The logarithm of each letter's probability after each sequence, `[B][4]`. Only the last row of a sequence goes through
/// the head.
fn log_probabilities(
    decoder: &Decoder,
    masks: Option<MatrixDropout>,
    letters: LetterIds,
    batch: &Batch,
) -> Result<Vec<[f64; LETTERS.len()]>> {
    let vocab = decoder.config().vocab_size;
    let shape = |expected: String, found: String| Error::Shape {
        op: "multiple_choice",
        expected,
        found,
    };
    if let Some(id) = letters.iter().find(|id| **id as usize >= vocab) {
        let expected = format!("letters with token ids below {vocab}");
        return Err(shape(expected, id.to_string()));
    }
    if batch.cu_seqlens.windows(2).any(|ends| ends[0] == ends[1]) {
        return Err(shape("prompts with tokens".into(), "an empty one".into()));
    }
    let hidden = decoder.hidden_states(sequences(batch), masks)?;
    let last: Vec<u32> = batch.cu_seqlens[1..]
        .iter()
        .map(|&end| end as u32 - 1)
        .collect();
    let mut found = Vec::with_capacity(last.len());
    for rows in last.chunks(rows_of_logits(vocab)) {
        let rows = Tensor::new(rows, hidden.device())?;
        let logits = decoder.head_logits(&hidden.index_select(&rows, 0)?)?;
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        found.par_extend(logits.par_chunks_exact(vocab).map(|logits| {
            let total = log_sum_exp(logits);
            letters.map(|id| f64::from(logits[id as usize]) - total)
        }));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_is_the_mean_over_subjects_and_loss_that_over_questions() {
        let question = |subject: &str, answer| Question {
            subject: subject.into(),
            prompt: vec![1],
            answer,
        };
        // Three of four right in one subject, none of one in the other.
        let questions = [
            question("b", 0),
            question("a", 2),
            question("b", 1),
            question("b", 2),
            question("b", 3),
        ];
        let answers = [(0, 1.0), (3, 6.0), (1, 1.0), (2, 1.0), (0, 1.0)];
        let answers = answers.map(|(letter, loss)| Answer { letter, loss });
        let found = MultipleChoice::new(&questions, &answers);
        let subjects: Vec<_> = found.subjects.iter().collect();
        assert_eq!(subjects, [(&"a".into(), &0.0), (&"b".into(), &0.75)]);
        assert_eq!(found.accuracy, 0.375);
        assert_eq!((found.loss, found.questions), (2.0, 5));
    }
}
