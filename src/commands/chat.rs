//! `qlora chat`: a conversation with a model, with or without an adapter, through the model's own chat template.

use std::io::{BufRead, IsTerminal};
use std::sync::atomic::Ordering;

use anyhow::{Context, bail};
use qlora::data::{ChatTemplate, GenerationPrompt, Tokenizer, chat_message};
use qlora::infer::{Finish, GenerateOptions, Sampler, Session};
use serde_json::Value;

use super::interrupt::Signals;
use super::text_stream::{print_now, stream_text};
use super::{ModelArgs, SamplingArgs, note};

/// Tokens of a conversation, where neither the model nor the user says less.
const DEFAULT_CONTEXT: usize = 4096;

const HELP: &str = "a line is a message; /clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer and twice ends";

/// The arguments of `qlora chat`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The system message that the conversation begins with
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Tokens that a conversation may have; unset: what the model was made for, up to 4096
    #[arg(long = "max_seq_len", alias = "max-seq-len", value_name = "N")]
    max_seq_len: Option<usize>,

    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    let sampler = args.sampling.sampler()?;
    args.model.find()?;
    let tokenizer = Tokenizer::from_dir(&args.model.model)?;
    let Some(template) = tokenizer.chat_template() else {
        bail!(
            "{}: the model has no chat template; qlora generate --raw continues a text",
            args.model.model.display()
        );
    };
    let model = args.model.load()?;
    let context = args.max_seq_len.unwrap_or_else(|| {
        let made_for = model.config().max_position_embeddings;
        made_for.min(DEFAULT_CONTEXT)
    });
    let system = args.system.map(|text| chat_message("system", &text));
    let mut chat = Chat {
        tokenizer: &tokenizer,
        template,
        session: Session::new(&model, context, None)?,
        context,
        options: GenerateOptions {
            max_new_tokens: args.sampling.max_new_tokens,
            stop_ids: tokenizer.answer_end_ids()?,
        },
        sampler,
        signals: Signals::watch()?,
        messages: system.clone().into_iter().collect(),
    };
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal {
        note(HELP);
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if is_terminal {
            print_now("> ")?;
        }
        let Some(line) = lines.next() else {
            return Ok(());
        };
        match line.context("stdin")?.trim() {
            "" => (),
            "/exit" => return Ok(()),
            "/clear" => chat.messages = system.clone().into_iter().collect(),
            "/help" => note(HELP),
            text => chat.answer(text)?,
        }
    }
}

struct Chat<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    session: Session<'a>,
    /// Tokens that there is room for.
    context: usize,
    options: GenerateOptions,
    sampler: Sampler,
    signals: Signals,
    messages: Vec<Value>,
}

impl Chat<'_> {
    /// Prints the model's answer to `text`; both become part of the conversation.
    fn answer(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(chat_message("user", text));
        let rendered = self
            .template
            .render(&self.messages, None, GenerationPrompt::Yes)?;
        let prompt = self.tokenizer.encode(&rendered)?;
        let room = self.context.saturating_sub(prompt.len());
        if room == 0 {
            self.messages.pop();
            note(&format!(
                "the conversation has {} tokens, and there is room for {}: /clear begins anew, --max_seq_len gives more",
                prompt.len(),
                self.context
            ));
            return Ok(());
        }
        let options = GenerateOptions {
            max_new_tokens: self.options.max_new_tokens.min(room),
            ..self.options.clone()
        };
        let stop = &self.signals.stop;
        // A signal before this answer was not for it.
        stop.store(false, Ordering::Relaxed);
        let is_stopped = || stop.swap(false, Ordering::Relaxed);
        let (session, sampler) = (&mut self.session, &mut self.sampler);
        let (written, answer) = stream_text(self.tokenizer, true, is_stopped, |on_token| {
            session.write(&prompt, &options, sampler, on_token)
        })?;
        if written.finish == Finish::Length {
            note(&format!("cut after {} tokens", written.ids.len()));
        }
        self.messages.push(chat_message("assistant", &answer));
        Ok(())
    }
}
