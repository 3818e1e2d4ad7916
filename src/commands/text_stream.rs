//! Text on the terminal while a model writes it.

use std::io::Write;

use qlora::data::{SpecialTokens, Tokenizer};

/// Writes to stdout at once.
pub fn print_now(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Tokens to text as they come: a character whose bytes lie in several tokens appears with its last one.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// What it has given so far.
    pub text: String,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            text: String::new(),
        }
    }

    /// Takes the next token and gives the text that is new and final.
    pub fn push(&mut self, token: u32) -> anyhow::Result<&str> {
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
