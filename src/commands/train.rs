//! `qlora train`: a config file and flags to a run directory with an adapter.

use std::io::Write;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use qlora::train::{Event, Outcome, Requests, TrainConfig, Trainer, checkpoint};

use super::interrupt::Signals;
use super::{ConfigFlags, Interrupted};

/// The arguments of `qlora train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Config file: TOML, YAML or JSON with the keys below; flags win over it
    config: Option<PathBuf>,
    /// Print the configuration that all of it comes to, as TOML, and do nothing else
    #[arg(long)]
    print_config: bool,

    #[command(flatten)]
    flags: ConfigFlags,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let config = TrainConfig::load(args.config.as_deref(), &args.flags.overrides)?;
    if args.print_config {
        out!("{}", config.resolved_toml()?);
        return Ok(());
    }
    super::outlive_closed_pipe();
    super::on_threads(config.threads, || fine_tune(config))
}

fn fine_tune(mut config: TrainConfig) -> anyhow::Result<()> {
    let placement = super::open(config.device, config.compute_dtype)?;
    super::data_sources::prepare(&mut config)?;
    super::models::find(&mut config.model_name_or_path, &mut config.adapter)?;
    let mut trainer = Trainer::new(config, &placement)?;
    let outcome = train(&mut trainer)?;
    let output_dir = &trainer.config().output_dir;
    match outcome {
        Outcome::Finished => {
            let _ = writeln!(std::io::stdout(), "{}", output_dir.display());
            Ok(())
        }
        Outcome::Stopped(checkpoint) => {
            let hint = format!(
                "; saved {}, continue with --resume_from_checkpoint true",
                checkpoint.display()
            );
            Err(Interrupted(hint).into())
        }
    }
}

/// Runs `trainer` to its end with a progress bar and log lines on stderr.
pub fn train(trainer: &mut Trainer) -> anyhow::Result<Outcome> {
    describe(trainer);
    let bar = ProgressBar::new(trainer.total_steps() as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} step {pos}/{len}  {msg}  {eta} left",
    )?);
    bar.set_position(trainer.steps_done() as u64);
    let logging_steps = trainer.config().logging_steps;
    let signals = Signals::watch()?;
    let requests = Requests {
        stop: &signals.stop,
        save: Some(&signals.save),
    };
    let outcome = trainer.run(requests, |event| match event {
        Event::Step(record) => {
            bar.set_position(record.step as u64);
            bar.set_message(format!(
                "loss {:.4}  {:.0} tokens/s",
                record.loss, record.tokens_per_second
            ));
            if !record.skipped_rows.is_empty() {
                super::log(
                    &bar,
                    format!(
                        "step {:>6}  skipped: loss {}, gradient norm {}, rows {}",
                        record.step,
                        record.loss,
                        record.grad_norm,
                        record.skipped_rows.join(", ")
                    ),
                );
            } else if record.step.is_multiple_of(logging_steps) {
                super::log(
                    &bar,
                    format!(
                        "step {:>6}  loss {:.4}  grad norm {:.3}  learning rate {:.2e}  {:.0} tokens/s",
                        record.step,
                        record.loss,
                        record.grad_norm,
                        record.learning_rate,
                        record.tokens_per_second
                    ),
                );
            }
        }
        Event::Evaluation(record) => super::log(
            &bar,
            format!(
                "step {:>6}  eval loss {:.4}  perplexity {:.3}  token accuracy {:.1} %",
                record.step,
                record.eval_loss,
                record.eval_perplexity,
                100.0 * record.eval_token_accuracy
            ),
        ),
        Event::Checkpoint(path) => super::log(&bar, format!("saved {}", path.display())),
        Event::Notice(text) => super::log(&bar, text.to_string()),
    });
    bar.finish_and_clear();
    let newest = checkpoint::list(&trainer.config().output_dir);
    if let (Err(_), Some(newest)) = (&outcome, newest.unwrap_or_default().pop()) {
        super::note(&format!(
            "the newest checkpoint is {}; --resume_from_checkpoint true continues from it",
            newest.display()
        ));
    }
    Ok(outcome?)
}

fn describe(trainer: &Trainer) {
    if let Some(resumed) = trainer.resumed() {
        let damaged = resumed.damaged.iter().map(|d| format!("passed over: {d}"));
        let changes = resumed.changes.iter().map(|c| format!("changed: {c}"));
        damaged.chain(changes).for_each(|line| super::note(&line));
        super::note(&format!("continuing from {}", resumed.checkpoint.display()));
    }
    let data = trainer.data();
    for source in data.sources.iter().chain(&data.eval_source) {
        let (path, dataset) = (source.path.display(), &source.dataset);
        let stats = &dataset.stats;
        super::note(&format!("{path}: {}", dataset.detected));
        super::note(&format!(
            "{path}: {} rows with {} tokens, {} of them with loss; {} dropped, {} truncated",
            dataset.len(),
            stats.tokens,
            stats.target_tokens,
            stats.dropped,
            stats.truncated,
        ));
        for sentence in dataset.sentences() {
            super::note(&format!("{path}: {sentence}"));
        }
    }
    let unused = match data.unused {
        0 => String::new(),
        rows => format!(", {rows} unused (max_train_samples, max_eval_samples)"),
    };
    super::note(&format!(
        "{} training rows, {} evaluation rows{unused}",
        data.train_len(),
        data.eval_len().unwrap_or(0),
    ));
    let longest = data.longest_train_row().max(data.longest_eval_row());
    let positions = trainer.decoder().config().max_position_embeddings;
    if longest > positions {
        super::note(&format!(
            "rows have up to {longest} tokens, and the model was made for {positions} (max_position_embeddings); max_seq_len cuts them"
        ));
    }
    let trained: usize = trainer
        .decoder()
        .trainables()
        .map(|(_, trainable)| trainable.value.elem_count())
        .sum();
    let activations = super::activations(trainer.plan());
    super::note(&format!(
        "{trained} trained parameters, {} optimizer steps, activations: {activations}",
        trainer.total_steps()
    ));
}
