//! Every key of the training configuration as a flag: `--lora_r 64`, `--lora-r 64`, `--lora_r=64`.

use std::path::Path;

use clap::builder::{NonEmptyStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Command};

use qlora::data::{Dataset, LoadOptions, Tokenizer, Unlabelled, data_files, load_files};
use qlora::train::config::{FOREIGN_KEYS, KEYS, Key, SYNONYMS, ValueKind};
use qlora::train::{TrainConfig, load_options};

/// The keys that were given as flags, as text.
#[derive(Debug, Clone, Default)]
pub struct ConfigFlags {
    pub overrides: Vec<(String, String)>,
}

/// `--threads` is a flag of the whole program, and a key of a run.
const THREADS: &str = "threads";

impl clap::Args for ConfigFlags {
    fn augment_args(command: Command) -> Command {
        let own = KEYS.iter().filter(|key| key.name != THREADS).map(flag);
        // Taken as flags too, for an error that says more than that they are unknown.
        let foreign = FOREIGN_KEYS.iter().map(|key| hidden_flag(key.name));
        let taken: Vec<String> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long().map(str::to_string))
            .collect();
        let is_free = |(name, _): &&(&'static str, _)| !taken.iter().any(|taken| taken == name);
        let misnamed = SYNONYMS
            .iter()
            .filter(is_free)
            .map(|(name, _)| hidden_flag(name));
        command.args(own).args(foreign).args(misnamed)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for ConfigFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        // A command may have an option of that name.
        let is_given = |name| matches.try_contains_id(name).unwrap_or(false);
        if let Some((name, key)) = SYNONYMS.iter().find(|(name, _)| is_given(name)) {
            return Err(clap::Error::raw(
                ErrorKind::UnknownArgument,
                format!("unexpected argument '--{name}' found, did you mean '--{key}'?"),
            ));
        }
        let own = KEYS.iter().map(|key| key.name);
        let mut overrides = Vec::new();
        for name in own.chain(FOREIGN_KEYS.iter().map(|key| key.name)) {
            let text = match name {
                THREADS => matches.get_one::<usize>(name).map(usize::to_string),
                name => matches.get_one::<String>(name).cloned(),
            };
            overrides.extend(text.map(|text| (name.to_string(), text)));
        }
        Ok(Self { overrides })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The keys that decide which rows are seen and how they are laid together.
const DATA_KEYS: [&str; 19] = [
    "dataset_format",
    "dataset_columns",
    "source_max_len",
    "target_max_len",
    "max_seq_len",
    "excess_length_strategy",
    "train_on_source",
    "mask_history",
    "shuffle",
    "group_by_length",
    "packing",
    "max_train_samples",
    "eval_dataset_size",
    "chat_template_date",
    "dataset_cache_dir",
    "per_device_train_batch_size",
    "per_device_train_batch_tokens",
    "gradient_accumulation_steps",
    "data_seed",
];

/// Of these, the keys that decide what a row becomes.
const ROW_KEYS: [&str; 8] = [
    "dataset_format",
    "dataset_columns",
    "source_max_len",
    "target_max_len",
    "max_seq_len",
    "train_on_source",
    "mask_history",
    "chat_template_date",
];

/// The keys that decide what an adapter is.
const LORA_KEYS: [&str; 8] = [
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
];

/// Some of the configuration's keys as flags.
macro_rules! flags_of_keys {
    ($(#[doc = $doc:literal] $name:ident: $keys:ident, $change:expr;)*) => {$(
        #[doc = $doc]
        #[derive(Debug, Clone, Default)]
        pub struct $name {
            pub overrides: Vec<(String, String)>,
        }

        impl clap::Args for $name {
            fn augment_args(command: Command) -> Command {
                command.args(keys(&$keys).map(flag).map($change))
            }

            fn augment_args_for_update(command: Command) -> Command {
                Self::augment_args(command)
            }
        }

        impl clap::FromArgMatches for $name {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
                let overrides = given(matches, &$keys);
                Ok(Self { overrides })
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
                *self = Self::from_arg_matches(matches)?;
                Ok(())
            }
        }
    )*};
}

flags_of_keys! {
    /// Those of the configuration's keys that concern data, as flags.
    DataFlags: DATA_KEYS, |arg| arg;
    /// Those that concern single rows, as flags that `--data` makes sense of.
    RowFlags: ROW_KEYS, |arg: Arg| arg.requires("data");
    /// Those that say what an adapter is, as flags that `--init_lora_weights` makes sense of.
    LoraFlags: LORA_KEYS, |arg: Arg| arg.requires("init_lora_weights").help_heading("Initialization");
}

impl RowFlags {
    /// The rows of the data set that is called `name`, or the first `max_rows` of them: row i of the files is example i.
    pub fn load(
        &self,
        name: &Path,
        max_rows: Option<usize>,
        mut tokenizer: Option<Tokenizer>,
        vocab_size: usize,
    ) -> anyhow::Result<Dataset> {
        let mut config = TrainConfig::load_partial(None, &self.overrides)?;
        if let Some(tokenizer) = &mut tokenizer {
            config.settle_date(tokenizer);
        }
        let options = LoadOptions {
            max_samples: max_rows,
            unlabelled: Unlabelled::Keep,
            ..load_options(&config, Some(vocab_size))
        };
        let files = data_files(super::data_sources::resolve(name)?)?;
        Ok(load_files(&files, &options, tokenizer.as_ref())?)
    }
}

fn keys(names: &[&str]) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(|key| names.contains(&key.name))
}

fn given(matches: &ArgMatches, names: &[&str]) -> Vec<(String, String)> {
    let given = keys(names).filter_map(|key| {
        let text = matches.get_one::<String>(key.name)?;
        Some((key.name.to_string(), text.clone()))
    });
    given.collect()
}

fn flag(key: &Key) -> Arg {
    let help = match key.default_text() {
        Some(default) => format!("{} [default: {default}]", key.help),
        None => key.help.to_string(),
    };
    let (key, kind) = (*key, key.kind);
    let typed = move |text: String| key.check(&text).map(|()| text);
    let arg = spelled_both_ways(Arg::new(key.name), key.name)
        .value_name(kind.placeholder())
        .value_parser(NonEmptyStringValueParser::new().try_map(typed))
        .help_heading(key.heading)
        .help(help);
    if kind.is_flag() {
        arg.num_args(0..=1).default_missing_value("true")
    } else {
        arg.allow_negative_numbers(matches!(
            kind,
            ValueKind::Integer | ValueKind::Count | ValueKind::Number
        ))
    }
}

fn hidden_flag(name: &'static str) -> Arg {
    spelled_both_ways(Arg::new(name), name)
        .num_args(0..=1)
        .default_missing_value("true")
        .hide(true)
}

/// qlora.py spells its flags with underscores, most programs with hyphens.
fn spelled_both_ways(arg: Arg, name: &'static str) -> Arg {
    arg.long(name).alias(name.replace('_', "-"))
}
