//! A model's Jinja chat template, rendered as transformers' `apply_chat_template` does, and which bytes of the text the
//! assistant wrote.
//!
//! The assistant's text is what stands in the template's `{% generation %}` blocks. A template without them is rendered
//! for each assistant turn up to it and through it; where these texts are not prefixes of each other the turn
//! cannot be told apart, and that is an error.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, context};
use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Unicode noncharacters, printed around a generation block and taken out again; text that has them is refused.
const GENERATION_BEGIN: char = '\u{FDD0}';
const GENERATION_END: char = '\u{FDD1}';
const TEMPLATE_NAME: &str = "chat_template";

/// minijinja has no custom tags. An `include` prints the marker from a block tag, so that whitespace control stays as it
/// was written, and `with` gives the block its own scope, as jinja's call block has.
static GENERATION_TAG: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is valid")
});

/// Whether the text ends with the opening of an assistant turn (`add_generation_prompt`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationPrompt {
    Yes,
    No,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedChat {
    pub text: String,
    /// The byte ranges that the assistant wrote, its end-of-turn token included.
    pub assistant: Vec<Range<usize>>,
}

/// A compiled chat template with the special tokens it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    special_tokens: Map<String, Value>,
    added_tokens: Vec<String>,
    has_generation_blocks: bool,
}

impl ChatTemplate {
    /// Compiles `source`, which was read from `path`. `special_tokens` are handed to the template by name
    /// (`bos_token`, ...); `added_tokens` are all tokens that stand for themselves in a text.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the line if the template is not valid.
    pub fn new(
        path: impl AsRef<Path>,
        source: String,
        special_tokens: Map<String, Value>,
        added_tokens: Vec<String>,
    ) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        if source.contains([GENERATION_BEGIN, GENERATION_END]) {
            return Err(Error::malformed(
                path,
                "the chat template has U+FDD0 or U+FDD1, which mark generated text",
            ));
        }
        let has_generation_blocks = GENERATION_TAG.is_match(&source);
        let mut template = Self {
            environment: environment(),
            path,
            special_tokens,
            added_tokens,
            has_generation_blocks,
        };
        template
            .environment
            .add_template_owned(TEMPLATE_NAME, mark_generation_blocks(&source))
            .map_err(|e| template.error(&e))?;
        Ok(template)
    }

    /// The text of `messages` (objects with `role` and `content`), as it is put before a model.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the template's own message if it refuses the conversation.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        prompt: GenerationPrompt,
    ) -> Result<String> {
        let marked = self.render_marked(messages, tools, prompt)?;
        Ok(self.take_markers(&marked)?.text)
    }

    /// The text of a whole conversation with the parts that the assistant wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`] as [`render`](Self::render) does, and if the template has no `{% generation %}` blocks and
    /// renders a turn differently once another follows.
    pub fn render_for_training(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
    ) -> Result<RenderedChat> {
        let marked = self.render_marked(messages, tools, GenerationPrompt::No)?;
        let mut chat = self.take_markers(&marked)?;
        if !self.has_generation_blocks {
            chat.assistant = self.assistant_turns(messages, tools, &chat.text)?;
        }
        Ok(chat)
    }

    fn render_marked(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        prompt: GenerationPrompt,
    ) -> Result<String> {
        if messages.iter().chain(tools).any(has_marker) {
            return Err(Error::malformed(
                &self.path,
                "a message has U+FDD0 or U+FDD1, which mark generated text; take it out",
            ));
        }
        let template = self
            .environment
            .get_template(TEMPLATE_NAME)
            .map_err(|e| self.error(&e))?;
        let special_tokens = minijinja::Value::from(Serde(&self.special_tokens));
        let variables = context! {
            messages => Serde(messages),
            tools => Serde(tools),
            documents => (),
            add_generation_prompt => prompt == GenerationPrompt::Yes,
            ..special_tokens
        };
        template.render(variables).map_err(|e| self.error(&e))
    }

    /// Removes the markers and returns what stood between them.
    fn take_markers(&self, marked: &str) -> Result<RenderedChat> {
        let mut text = String::with_capacity(marked.len());
        let mut assistant = Vec::new();
        let mut begin = None;
        for c in marked.chars() {
            match (c, begin) {
                (GENERATION_BEGIN, None) => begin = Some(text.len()),
                (GENERATION_END, Some(start)) => {
                    assistant.push(start..text.len());
                    begin = None;
                }
                (GENERATION_BEGIN | GENERATION_END, _) => {
                    return Err(Error::malformed(
                        &self.path,
                        "the chat template nests generation blocks",
                    ));
                }
                _ => text.push(c),
            }
        }
        Ok(RenderedChat { text, assistant })
    }

    /// Derives the assistant's turns from the texts up to and through each of them, all prefixes of `text`.
    fn assistant_turns(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        text: &str,
    ) -> Result<Vec<Range<usize>>> {
        let mut turns = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = self.render(&messages[..i], tools, GenerationPrompt::Yes)?;
            let through = self.render(&messages[..=i], tools, GenerationPrompt::No)?;
            if !through.starts_with(&before) || !text.starts_with(&through) {
                return Err(Error::malformed(
                    &self.path,
                    format!(
                        "the chat template does not render `messages[{i}]` in the same way with and without what \
                         follows it, so what the assistant wrote cannot be told apart; put `{{% generation %}}` blocks \
                         around it in the template, or split the conversation"
                    ),
                ));
            }
            turns.push(before.len()..self.end_of_turn(&through, before.len()));
        }
        Ok(turns)
    }

    /// Where a turn that starts at `start` ends: white space after its last token, such as the line feed of
    /// ChatML, belongs to the template and is never generated.
    fn end_of_turn(&self, through: &str, start: usize) -> usize {
        let trimmed = through.trim_end();
        let ends_with_token = self
            .added_tokens
            .iter()
            .any(|token| !token.trim().is_empty() && trimmed.ends_with(token.as_str()));
        if ends_with_token && trimmed.len() > start {
            trimmed.len()
        } else {
            through.len()
        }
    }

    fn error(&self, error: &minijinja::Error) -> Error {
        Error::malformed(&self.path, error.to_string())
    }
}

/// Whether text in `value` could pass for a marker.
fn has_marker(value: &Value) -> bool {
    let is_marker = |text: &str| text.contains([GENERATION_BEGIN, GENERATION_END]);
    match value {
        Value::String(text) => is_marker(text),
        Value::Array(items) => items.iter().any(has_marker),
        Value::Object(object) => object.iter().any(|(k, v)| is_marker(k) || has_marker(v)),
        _ => false,
    }
}

fn mark_generation_blocks(source: &str) -> String {
    GENERATION_TAG
        .replace_all(source, |tag: &regex::Captures| {
            let (open, close) = (&tag[1], &tag[3]);
            match tag.get(2) {
                None => format!("{{%{open} with %}}{{% include 'generation' {close}%}}"),
                Some(_) => format!("{{%{open} include 'endgeneration' %}}{{% endwith {close}%}}"),
            }
        })
        .into_owned()
}

/// The environment of transformers' `apply_chat_template`: its whitespace rules, functions and filters.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the default delimiters are valid");
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    for (name, marker) in [
        ("generation", GENERATION_BEGIN),
        ("endgeneration", GENERATION_END),
    ] {
        environment
            .add_template_owned(name, marker.to_string())
            .expect("a marker is a valid template");
    }
    environment
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(&format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: {format:?} is not a date format"),
        )),
    }
}

/// `json.dumps` with the defaults of transformers: nothing escaped for HTML, `ensure_ascii=False`.
fn to_json(value: minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii = options
        .get::<Option<bool>>("ensure_ascii")?
        .unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;

    let failed = |e: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {e}"))
    };
    let mut value = serde_json::to_value(&value).map_err(failed)?;
    if sort_keys {
        value.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators are two strings",
            ));
        }
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut json = Vec::new();
    let formatter = PythonJson {
        item,
        key,
        indent,
        depth: 0,
        has_value: false,
    };
    value
        .serialize(&mut serde_json::Serializer::with_formatter(
            &mut json, formatter,
        ))
        .map_err(failed)?;
    let json = String::from_utf8(json).expect("serde_json writes UTF-8");
    Ok(if ensure_ascii {
        escape_non_ascii(&json)
    } else {
        json
    })
}

fn escape_non_ascii(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    escaped
}

/// The separators and line breaks of Python's `json.dumps`.
struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl PythonJson {
    fn open(&mut self) {
        self.depth += 1;
        self.has_value = false;
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.line_break(writer)?;
        }
        Ok(())
    }

    fn next<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        if !is_first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line_break(writer)
    }

    fn line_break<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open();
        writer.write_all(b"[")
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer)?;
        writer.write_all(b"]")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, is_first)
    }

    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open();
        writer.write_all(b"{")
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer)?;
        writer.write_all(b"}")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        self.next(writer, is_first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}
