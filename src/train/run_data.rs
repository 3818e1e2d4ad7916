//! The rows of a run: those that are trained on, in the order in which they are used, and those that it is evaluated on.

use std::path::{Path, PathBuf};

use super::config::{MAX_COUNT, Resume, TrainConfig};
use super::run::CONFIG_FILE;
use crate::data::{
    Arrangement, ChatTemplate, Dataset, Example, LoadOptions, RowOrder, SequenceOrder, Share,
    Shuffle, Tokenizer, data_files, load_files,
};
use crate::{Error, Result};

/// A data set and the path that it was read from.
#[derive(Debug)]
pub struct Source {
    pub path: PathBuf,
    pub dataset: Dataset,
}

/// What a run trains on and is evaluated on.
#[derive(Debug)]
pub struct RunData {
    /// The training data sets, in the order of the config.
    pub sources: Vec<Source>,
    /// The evaluation data, where it is not split off.
    pub eval_source: Option<Source>,
    /// Rows that `max_train_samples` or `max_eval_samples` leaves out after a split.
    pub unused: usize,
    train: Vec<Place>,
    shares: Vec<Share>,
    eval: Option<Vec<Place>>,
}

/// A row of a data set.
#[derive(Debug, Clone, Copy)]
struct Place {
    source: u32,
    row: u32,
}

impl TrainConfig {
    /// Has a chat template that prints the date print the same one all through a run, on whichever day a part of it is done:
    /// what the config says, or that of the run that is taken up, or else today's.
    pub fn settle_date(&mut self, tokenizer: &mut Tokenizer) {
        let Some(today) = tokenizer.chat_template().and_then(ChatTemplate::date) else {
            return;
        };
        let run = match &self.resume_from_checkpoint {
            Resume::Never => None,
            Resume::Latest => Some(self.output_dir.as_path()),
            Resume::From(checkpoint) => checkpoint.parent(),
        };
        // Without it the rows are found to be others.
        let earlier = run.and_then(|run| Self::load(Some(&run.join(CONFIG_FILE)), &[]).ok());
        let earlier = earlier.and_then(|config| config.chat_template_date);
        let date = self.chat_template_date.or(earlier).unwrap_or(today);
        self.chat_template_date = Some(date);
        tokenizer.set_date(date);
    }
}

impl RunData {
    /// Reads what the config names. Every format but `tokenized` needs the `tokenizer`; ids from `vocab_size` on are refused.
    ///
    /// # Errors
    /// Those of [`load_files`] and [`data_files`]; [`Error::Config`] if a split would leave nothing to train on, or
    /// weights would make an epoch of more rows than can be.
    pub fn load(
        config: &TrainConfig,
        tokenizer: Option<&Tokenizer>,
        vocab_size: Option<usize>,
    ) -> Result<Self> {
        let read = |path: &Path, max_samples: Option<usize>| -> Result<Source> {
            let options = LoadOptions {
                max_samples,
                ..load_options(config, vocab_size)
            };
            Ok(Source {
                dataset: load_files(&data_files(path)?, &options, tokenizer)?,
                path: path.to_path_buf(),
            })
        };
        // A split takes its rows from the whole file.
        let max_rows_read = match config.eval_dataset_size {
            Some(_) => None,
            None => config.max_train_samples,
        };
        let paths = config.dataset.0.iter();
        let sources = paths
            .map(|path| read(path, max_rows_read))
            .collect::<Result<Vec<_>>>()?;
        let eval_path = config.eval_dataset.as_ref();
        let eval_source = eval_path
            .map(|path| read(path, config.max_eval_samples))
            .transpose()?;
        let mut data = Self {
            train: places(&sources)?,
            eval: eval_source
                .as_ref()
                .map(|source| places([source]))
                .transpose()?,
            sources,
            eval_source,
            unused: 0,
            shares: Vec::new(),
        };
        if let Some(size) = config.eval_dataset_size {
            data.split_off(size, config)?;
        }
        data.share_out(config)?;
        Ok(data)
    }

    /// Training rows, each counted once.
    pub fn train_len(&self) -> usize {
        self.train.len()
    }

    /// Training row `i`.
    pub fn train_example(&self, i: usize) -> Example {
        let place = self.train[i];
        self.sources[place.source as usize]
            .dataset
            .example(place.row as usize)
    }

    /// The training rows, in the order of their files.
    pub fn train_examples(&self) -> impl Iterator<Item = Example> {
        (0..self.train.len()).map(|row| self.train_example(row))
    }

    /// Where training row `i` is: its line, with the file in front if there are several.
    pub fn row_name(&self, i: usize) -> String {
        let line = self.train_example(i).line;
        let Place { source, row } = self.train[i];
        let source = &self.sources[source as usize];
        let file = source.dataset.file(row as usize);
        match file.or((self.sources.len() > 1).then_some(&source.path)) {
            None => line.to_string(),
            Some(path) => format!("{}:{line}", path.display()),
        }
    }

    /// Evaluation rows, or `None` if the run has none.
    pub fn eval_len(&self) -> Option<usize> {
        self.eval.as_ref().map(Vec::len)
    }

    /// Tokens of the longest evaluation row; 0 if the run has none.
    pub fn longest_eval_row(&self) -> usize {
        let tokens = self.eval.iter().flatten().map(|place| {
            let dataset = &self.source_of_eval(*place).dataset;
            dataset.token_count(place.row as usize)
        });
        tokens.max().unwrap_or(0)
    }

    /// The evaluation rows in their order.
    pub fn eval_examples(&self) -> Option<impl Iterator<Item = Example>> {
        let places = self.eval.as_ref()?.iter();
        Some(places.map(|place| {
            let dataset = &self.source_of_eval(*place).dataset;
            dataset.example(place.row as usize)
        }))
    }

    /// The data set that an evaluation row is from.
    fn source_of_eval(&self, place: Place) -> &Source {
        let own = self.eval_source.as_ref();
        own.unwrap_or(&self.sources[place.source as usize])
    }

    /// Tokens of each training row.
    fn train_tokens(&self) -> impl Iterator<Item = usize> {
        self.train.iter().map(|place| {
            let dataset = &self.sources[place.source as usize].dataset;
            dataset.token_count(place.row as usize)
        })
    }

    /// Tokens of the longest training row.
    pub fn longest_train_row(&self) -> usize {
        self.train_tokens().max().unwrap_or(0)
    }

    /// The order in which the training rows are used.
    pub fn order(&self, config: &TrainConfig) -> SequenceOrder {
        let tokens = self.train_tokens().map(|tokens| tokens as u32);
        let shuffle = Shuffle::from(config.shuffle);
        let arrangement = match config.packed_tokens() {
            Some(capacity) => Arrangement::Packed { capacity, shuffle },
            None if config.group_by_length => Arrangement::GroupedByLength {
                batch: config.per_device_train_batch_size * config.gradient_accumulation_steps,
            },
            None => Arrangement::InTurn(shuffle),
        };
        SequenceOrder::new(
            tokens.collect(),
            self.shares.clone(),
            config.data_seed,
            arrangement,
        )
    }

    /// Takes `size` rows, chosen by `data_seed`, out of the training rows; both keep the order of the files.
    fn split_off(&mut self, size: usize, config: &TrainConfig) -> Result<()> {
        let rows = self.train.len();
        if size >= rows {
            let reason = format!("{size} of {rows} rows would leave none to train on");
            return Err(Error::config("eval_dataset_size", reason));
        }
        let mut order = RowOrder::new(rows, config.data_seed, Shuffle::Yes);
        let mut chosen = vec![false; rows];
        (0..size as u64).for_each(|position| chosen[order.row(position)] = true);
        let mut is_chosen = chosen.into_iter();
        let (mut eval, mut train): (Vec<Place>, Vec<Place>) = std::mem::take(&mut self.train)
            .into_iter()
            .partition(|_| is_chosen.next().unwrap_or(false));
        eval.truncate(config.max_eval_samples.unwrap_or(usize::MAX));
        let mut left = vec![config.max_train_samples.unwrap_or(usize::MAX); self.sources.len()];
        train.retain(|place| {
            let left = &mut left[place.source as usize];
            let is_kept = *left > 0;
            *left = left.saturating_sub(1);
            is_kept
        });
        self.unused = rows - train.len() - eval.len();
        (self.train, self.eval) = (train, Some(eval));
        Ok(())
    }

    /// Says which rows are of which data set.
    fn share_out(&mut self, config: &TrainConfig) -> Result<()> {
        let mut start = 0;
        for source in 0..self.sources.len() {
            let end = self
                .train
                .partition_point(|place| place.source as usize <= source);
            let weights = config.dataset_weights.as_ref();
            self.shares.push(Share {
                rows: start..end,
                weight: weights.map_or(1.0, |weights| weights.0[source]),
            });
            start = end;
        }
        let shares = self.shares.iter();
        let rows: f64 = shares
            .map(|share| share.rows.len() as f64 * share.weight)
            .sum();
        if rows > MAX_COUNT.max(self.train.len()) as f64 {
            let reason = format!(
                "would make an epoch of {rows:.1e} rows; give smaller weights, so that it has at most {MAX_COUNT}"
            );
            return Err(Error::config("dataset_weights", reason));
        }
        Ok(())
    }
}

/// How the config says that rows are read.
pub fn load_options(config: &TrainConfig, vocab_size: Option<usize>) -> LoadOptions {
    LoadOptions {
        format: config.dataset_format,
        columns: config.dataset_columns.0.clone(),
        source_max_len: config.source_max_len,
        target_max_len: config.target_max_len,
        max_seq_len: config.max_seq_len,
        excess_length: config.excess_length_strategy,
        train_on_source: config.train_on_source.into(),
        turns: config.mask_history.into(),
        vocab_size,
        cache_dir: config.dataset_cache_dir.clone(),
        ..LoadOptions::default()
    }
}

/// All rows of all sources, in their order.
fn places<'a>(sources: impl IntoIterator<Item = &'a Source>) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for (i, source) in sources.into_iter().enumerate() {
        let rows = u32::try_from(source.dataset.len()).map_err(|_| {
            Error::malformed(
                &source.path,
                "has more than 2^32 rows; split it into several runs",
            )
        })?;
        places.extend((0..rows).map(|row| Place {
            source: i as u32,
            row,
        }));
    }
    Ok(places)
}
