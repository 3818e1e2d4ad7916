//! Text on the terminal while a model writes it.

use std::io::Write;
use std::ops::ControlFlow;

use qlora::data::{SpecialTokens, Tokenizer};
use qlora::infer::Generated;

/// Writes to stdout at once.
pub fn print_now(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// The text that `write` writes, which gives each token to its argument. It is printed as it comes, with a line feed at the end,
/// if `is_shown`; where `is_stopped` says so it ends.
pub fn stream_text(
    tokenizer: &Tokenizer,
    is_shown: bool,
    is_stopped: impl Fn() -> bool,
    write: impl FnOnce(&mut dyn FnMut(u32) -> ControlFlow<()>) -> qlora::Result<Generated>,
) -> anyhow::Result<(Generated, String)> {
    let mut stream = TextStream::new(tokenizer);
    let mut failed = None;
    let generated = write(&mut |token| {
        let new = stream.push(token);
        match new.and_then(|new| if is_shown { print_now(new) } else { Ok(()) }) {
            Ok(()) if is_stopped() => ControlFlow::Break(()),
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    let text = tokenizer.decode(&generated.ids, SpecialTokens::Skip)?;
    if is_shown {
        outln!("{}", text.strip_prefix(&stream.text).unwrap_or_default());
    }
    Ok((generated, text))
}

/// Tokens to text as they come: a character whose bytes lie in several tokens appears with its last one.
struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// What it has given so far.
    text: String,
}

impl<'a> TextStream<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            text: String::new(),
        }
    }

    /// Takes the next token and gives the text that is new and final.
    fn push(&mut self, token: u32) -> anyhow::Result<&str> {
        self.ids.push(token);
        let text = self.tokenizer.decode(&self.ids, SpecialTokens::Skip)?;
        // An incomplete character decodes to U+FFFD, which its next token replaces.
        let is_whole = !text.ends_with(char::REPLACEMENT_CHARACTER) && text.starts_with(&self.text);
        let printed = self.text.len();
        if is_whole {
            self.text = text;
        }
        Ok(&self.text[printed..])
    }
}
