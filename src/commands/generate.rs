//! `qlora generate`: text from a prompt, with or without an adapter.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use qlora::data::{GenerationPrompt, Tokenizer, chat_message};
use qlora::infer::{GenerateOptions, Session};
use serde_json::json;

use super::text_stream::stream_text;
use super::{EnsembleArgs, ModelArgs, SamplingArgs};

/// The arguments of `qlora generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    prompt: Prompt,

    /// Put the prompt into the model's chat template as the user's turn (the default if the model has one)
    #[arg(long, conflicts_with = "raw")]
    chat: bool,

    /// Continue the prompt as it is
    #[arg(long)]
    raw: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// Choose each token by the mean of the probabilities of N models with masked adapters (LoRA Dropout)
    #[arg(long, value_name = "N")]
    ensemble: Option<usize>,

    #[command(flatten)]
    masks: EnsembleArgs,

    /// Print one JSON object at the end instead of the text as it is written
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// The text to continue or to answer
    #[arg(long = "prompt", value_name = "TEXT")]
    text: Option<String>,

    /// A file with that text
    #[arg(long = "prompt-file", alias = "prompt_file", value_name = "FILE")]
    file: Option<PathBuf>,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    let mut sampler = args.sampling.sampler()?;
    args.model.find()?;
    let ensemble = args.ensemble.map(|models| {
        let adapter = args.model.adapter.as_deref();
        args.masks.ensemble(adapter, models)
    });
    let ensemble = ensemble.transpose()?;
    let tokenizer = Tokenizer::from_dir(&args.model.model)?;
    let prompt = prompt_ids(&args, &tokenizer)?;
    let model = args.model.load()?;
    let options = GenerateOptions {
        max_new_tokens: args.sampling.max_new_tokens,
        stop_ids: match args.raw {
            true => tokenizer.eos_token_ids().to_vec(),
            false => tokenizer.answer_end_ids()?,
        },
    };

    let started = Instant::now();
    let never = || false;
    let capacity = prompt.len() + options.max_new_tokens;
    let mut session = Session::new(&model, capacity, ensemble.as_ref())?;
    let (generated, text) = stream_text(&tokenizer, !args.json, never, |on_token| {
        session.write(&prompt, &options, &mut sampler, on_token)
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let result = json!({
            "text": text,
            "ids": generated.ids,
            "finish": generated.finish,
            "prompt_tokens": prompt.len(),
            "new_tokens": generated.ids.len(),
            "seconds": seconds,
        });
        outln!("{result}");
    } else {
        let new = generated.ids.len();
        eprintln!(
            "{} prompt tokens, {new} new in {seconds:.1} s",
            prompt.len()
        );
    }
    Ok(())
}

fn prompt_ids(args: &Args, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
    let text = match (&args.prompt.text, &args.prompt.file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            // The end of the file's last line is not of the prompt.
            let text = text.strip_suffix('\n').unwrap_or(&text);
            text.strip_suffix('\r').unwrap_or(text).to_string()
        }
        (None, None) => unreachable!("clap requires one of the two"),
    };
    match tokenizer.chat_template().filter(|_| !args.raw) {
        Some(template) => {
            let messages = [chat_message("user", &text)];
            Ok(tokenizer.encode(&template.render(&messages, None, GenerationPrompt::Yes)?)?)
        }
        None if args.chat => anyhow::bail!(
            "{}: the model has no chat template; use --raw",
            args.model.model.display()
        ),
        None => Ok(tokenizer.encode_with_specials(&text)?),
    }
}
