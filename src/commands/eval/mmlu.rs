//! `qlora eval --mmlu`: the files of questions, and their measures under the names of qlora.py.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Context;
use clap::builder::RangedU64ValueParser;
use qlora::data::{
    Mmlu, MmluFile, MmluOptions, Question, Tokenizer, letter_ids, mmlu_files, read_mmlu,
};
use qlora::infer::{
    Answer, Ensemble, LetterIds, MultipleChoice, multiple_choice, multiple_choice_ensemble,
};
use qlora::model::Decoder;
use serde_json::{Map, Value};

#[derive(Debug, clap::Args)]
pub struct MmluArgs {
    /// Answer the questions of MMLU: qlora.py's {zero,five}_shot_mmlu_{val,test}.json in a directory, all that are there, or
    /// one file of them or of cais/mmlu. Measures are named as in qlora.py, which calls val eval: mmlu_eval_accuracy is the
    /// mean over subjects. With both kinds of shots they are in the names (mmlu_five_shot_eval_accuracy), with both splits the
    /// split is in the names of the loss and the number of questions (mmlu_test_loss)
    #[arg(long, value_name = "DIR|FILE")]
    pub mmlu: Option<PathBuf>,

    /// Cut longer questions of MMLU to so many tokens, at the beginning
    #[arg(
        long = "mmlu_source_max_len",
        alias = "mmlu-source-max-len",
        value_name = "N",
        requires = "mmlu",
        default_value_t = MmluOptions::default().source_max_len,
        value_parser = RangedU64ValueParser::<usize>::new().range(2..)
    )]
    mmlu_source_max_len: usize,
}

/// The questions of `--mmlu`.
pub struct Questions {
    files: Vec<(MmluFile, Vec<Question>)>,
    letters: LetterIds,
}

impl MmluArgs {
    /// Reads the questions, if there are to be any; `max_samples` of each file.
    pub fn read(
        &self,
        max_samples: Option<usize>,
        tokenizer: impl FnOnce() -> anyhow::Result<Option<Tokenizer>>,
    ) -> anyhow::Result<Option<Questions>> {
        let Some(path) = &self.mmlu else {
            return Ok(None);
        };
        let options = MmluOptions {
            source_max_len: self.mmlu_source_max_len,
            max_samples,
        };
        let files = mmlu_files(path)?;
        let tokenizer = tokenizer()?.context("--mmlu: the model has no tokenizer.json")?;
        let letters = letter_ids(&tokenizer)?;
        let files = files.into_iter().map(|file| {
            let Mmlu { questions, cut } = read_mmlu(&file.path, &options, &tokenizer)?;
            let name = file.path.display();
            let cut = match cut {
                0 => String::new(),
                cut => format!(
                    ", {cut} of them cut at the beginning to {} tokens (mmlu_source_max_len)",
                    self.mmlu_source_max_len
                ),
            };
            eprintln!("{name}: {} questions{cut}", questions.len());
            Ok((file, questions))
        });
        Ok(Some(Questions {
            files: files.collect::<anyhow::Result<_>>()?,
            letters,
        }))
    }
}

impl Questions {
    pub fn len(&self) -> usize {
        self.files
            .iter()
            .map(|(_, questions)| questions.len())
            .sum()
    }

    /// The measures of a model by name.
    pub fn measure(
        &self,
        model: &Decoder,
        mut on_answers: impl FnMut(usize),
    ) -> anyhow::Result<Map<String, Value>> {
        let mut measures = self.measures(1, |questions| {
            let answers = multiple_choice(model, self.letters, questions, &mut on_answers)?;
            Ok(vec![answers])
        })?;
        Ok(measures.remove(0))
    }

    /// The measures of ensembles of each size.
    pub fn measure_ensemble(
        &self,
        model: &Decoder,
        (ensemble, sizes): (&Ensemble, &[usize]),
        mut on_answers: impl FnMut(usize),
    ) -> anyhow::Result<Vec<Map<String, Value>>> {
        self.measures(sizes.len(), |questions| {
            let of = (ensemble, sizes);
            multiple_choice_ensemble(model, of, self.letters, questions, &mut on_answers)
        })
    }

    /// The measures of each of `models` models, all of whose answers to the questions of a file `answer` gives.
    fn measures(
        &self,
        models: usize,
        mut answer: impl FnMut(&[Question]) -> qlora::Result<Vec<Vec<Answer>>>,
    ) -> anyhow::Result<Vec<Map<String, Value>>> {
        let mut measures = vec![Map::new(); models];
        for (file, questions) in &self.files {
            let answers = answer(questions).with_context(|| file.path.display().to_string())?;
            for (measures, answers) in measures.iter_mut().zip(answers) {
                self.name(file, MultipleChoice::new(questions, &answers), measures);
            }
        }
        Ok(measures)
    }

    /// Puts the measures of a file under names that those of no other file have.
    fn name(&self, file: &MmluFile, of_file: MultipleChoice, measures: &mut Map<String, Value>) {
        let part = |part: Option<&str>| part.map(|part| format!("_{part}")).unwrap_or_default();
        let files = || self.files.iter().map(|(file, _)| file);
        let has_both_shots = files()
            .map(|file| file.shots)
            .collect::<BTreeSet<_>>()
            .len()
            > 1;
        let has_both_splits = files()
            .map(|file| file.split)
            .collect::<BTreeSet<_>>()
            .len()
            > 1;
        let mmlu = format!("mmlu{}", part(file.shots.filter(|_| has_both_shots)));
        let whole = format!("{mmlu}{}", part(file.split.filter(|_| has_both_splits)));
        let accuracy = format!("{mmlu}{}_accuracy", part(file.split));
        measures.insert(accuracy.clone(), of_file.accuracy.into());
        measures.insert(format!("{whole}_loss"), of_file.loss.into());
        measures.insert(format!("{whole}_questions"), of_file.questions.into());
        for (subject, of_subject) in of_file.subjects {
            measures.insert(format!("{accuracy}_{subject}"), of_subject.into());
        }
    }
}

/// A measure a line, with a column for each model; the models have names where there are several.
pub fn print_table(models: &[(String, Map<String, Value>)]) {
    let Some((_, first)) = models.first() else {
        return;
    };
    let width = first.keys().map(String::len).max().unwrap_or(0);
    if models.len() > 1 && width > 0 {
        let names: String = models
            .iter()
            .map(|(name, _)| format!("{name:>16}"))
            .collect();
        outln!("{:width$}{names}", "");
    }
    for name in first.keys() {
        let value = |(_, measures): &(String, Map<String, Value>)| match &measures[name] {
            Value::Number(count) if count.is_u64() => format!("{:>16}", count.to_string()),
            // A NaN is null.
            other => format!("{:>16.4}", other.as_f64().unwrap_or(f64::NAN)),
        };
        let values: String = models.iter().map(value).collect();
        outln!("{name:width$}{values}");
    }
}
