//! The rows of a run: training rows, and evaluation rows of their own file or split off.

use super::config::TrainConfig;
use crate::data::{Dataset, Example, LoadOptions, RowOrder, Shuffle, Tokenizer, load};
use crate::{Error, Result};

/// What a run trains on and is evaluated on.
#[derive(Debug)]
pub struct RunData {
    pub train: Dataset,
    pub eval: Option<Vec<Example>>,
}

/// Reads what the config names, with the model's tokenizer if there is one.
pub(super) fn load_data(config: &TrainConfig, vocab_size: usize) -> Result<RunData> {
    let options = LoadOptions {
        format: config.dataset_format,
        source_max_len: config.source_max_len,
        target_max_len: config.target_max_len,
        max_seq_len: config.max_seq_len,
        train_on_source: config.train_on_source.into(),
        max_samples: config.max_train_samples,
        vocab_size: Some(vocab_size),
        ..LoadOptions::default()
    };
    let tokenizer = Tokenizer::find(&config.model_name_or_path)?;
    let mut train = load(&config.dataset, &options, tokenizer.as_ref())?;
    let eval = match (&config.eval_dataset, config.eval_dataset_size) {
        (Some(path), _) => {
            let options = LoadOptions {
                max_samples: config.max_eval_samples,
                ..options
            };
            Some(load(path, &options, tokenizer.as_ref())?.examples)
        }
        (None, Some(size)) => {
            let mut rows = split_off(&mut train.examples, size, config.data_seed)?;
            rows.truncate(config.max_eval_samples.unwrap_or(usize::MAX));
            Some(rows)
        }
        (None, None) => None,
    };
    Ok(RunData { train, eval })
}

/// Takes `size` rows, chosen by `data_seed`, out of `examples`; both keep the order of the file.
fn split_off(examples: &mut Vec<Example>, size: usize, data_seed: u64) -> Result<Vec<Example>> {
    if size >= examples.len() {
        let reason = format!(
            "{size} of {} rows would leave none to train on",
            examples.len()
        );
        return Err(Error::config("eval_dataset_size", reason));
    }
    let mut order = RowOrder::new(examples.len(), data_seed, Shuffle::Yes);
    let mut chosen = vec![false; examples.len()];
    (0..size as u64).for_each(|position| chosen[order.row(position)] = true);
    let mut is_chosen = chosen.into_iter();
    let (eval, train) = std::mem::take(examples)
        .into_iter()
        .partition(|_| is_chosen.next().unwrap_or(false));
    *examples = train;
    Ok(eval)
}
