//! A model's Jinja chat template, rendered as transformers' `apply_chat_template` does, and which bytes of the text the
//! assistant wrote.
//!
//! The assistant's text is what stands in the template's `{% generation %}` blocks. A template without them is rendered
//! for each assistant turn up to it and through it; where these texts are not prefixes of each other the turn
//! cannot be told apart, and that is an error.

mod prefixes;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use chrono::{Local, NaiveDate};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, context};
use regex::Regex;
use serde_json::{Map, Value, json};

use super::python_compat;
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

/// A message of a conversation, as templates take it.
pub fn chat_message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// A compiled chat template with the special tokens it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    source: String,
    special_tokens: Map<String, Value>,
    added_tokens: Vec<String>,
    has_generation_blocks: bool,
    /// Stands in for this one where there are tools.
    for_tools: Option<Box<ChatTemplate>>,
    /// What a template that prints the date is given; `None` for today's.
    date: Option<NaiveDate>,
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
            source,
            special_tokens,
            added_tokens,
            has_generation_blocks,
            for_tools: None,
            date: None,
        };
        let marked = mark_generation_blocks(&with_line_feeds(&template.source));
        template
            .environment
            .add_template_owned(TEMPLATE_NAME, marked)
            .map_err(|e| template.error(&e))?;
        Ok(template)
    }

    /// This template, with `for_tools` in its place where there are tools (transformers' `tool_use`).
    pub(super) fn with_template_for_tools(mut self, for_tools: Self) -> Self {
        self.for_tools = Some(Box::new(for_tools));
        self
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
        let template = self.with(tools);
        let marked = template
            .conversation(messages, tools)?
            .render(messages.len(), prompt)?;
        Ok(template.take_markers(marked)?.text)
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
        let is_assistant = messages
            .iter()
            .map(|message| message["role"] == "assistant");
        self.render_turns(messages, tools, &is_assistant.collect::<Vec<_>>())
    }

    /// The text of a whole conversation with the parts that the messages marked in `trained` (one for each message) make
    /// up.
    ///
    /// # Errors
    /// As [`render_for_training`](Self::render_for_training), but only turns that are marked have to be told apart; and
    /// if a turn is marked that no generation block holds.
    pub fn render_turns(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        trained: &[bool],
    ) -> Result<RenderedChat> {
        let template = self.with(tools);
        let conversation = template.conversation(messages, tools)?;
        let marked = conversation.render(messages.len(), GenerationPrompt::No)?;
        if !template.has_generation_blocks {
            let assistant = template.turns(&conversation, trained, &marked)?;
            return Ok(RenderedChat {
                text: marked,
                assistant,
            });
        }
        let chat = template.take_markers(marked)?;
        template.keep_trained(chat, messages, trained)
    }

    /// What it writes behind an answer that ends a conversation.
    ///
    /// # Errors
    /// As [`render`](Self::render); [`Error::Malformed`] if the answer does not stand in the text.
    pub fn answer_end(&self) -> Result<String> {
        const ANSWER: &str = "an answer";
        let messages = [
            chat_message("user", "a question"),
            chat_message("assistant", ANSWER),
        ];
        let text = self.render(&messages, None, GenerationPrompt::No)?;
        match text.rsplit_once(ANSWER) {
            Some((_, end)) => Ok(end.to_string()),
            None => Err(Error::malformed(
                &self.path,
                "does not write an answer as it is",
            )),
        }
    }

    /// The file that it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The templates that a conversation may be rendered by: this one, and the one for tools.
    pub(super) fn sources(&self) -> impl Iterator<Item = &str> {
        let for_tools = self.for_tools.iter().map(|template| template.source());
        std::iter::once(self.source()).chain(for_tools)
    }

    /// The date that the template prints, if it prints one.
    pub fn date(&self) -> Option<NaiveDate> {
        let is_dated = self
            .sources()
            .any(|source| source.contains(python_compat::STRFTIME_NOW));
        is_dated.then(|| self.date.unwrap_or_else(|| Local::now().date_naive()))
    }

    /// Has it print this date from now on.
    pub(super) fn set_date(&mut self, date: NaiveDate) {
        self.date = Some(date);
        python_compat::set_date(&mut self.environment, date);
        if let Some(for_tools) = &mut self.for_tools {
            for_tools.set_date(date);
        }
    }

    /// The template that renders conversations with these tools, or without.
    fn with(&self, tools: Option<&Value>) -> &Self {
        let for_tools = self.for_tools.as_deref().filter(|_| tools.is_some());
        for_tools.unwrap_or(self)
    }

    fn conversation<'a>(
        &'a self,
        messages: &'a [Value],
        tools: Option<&'a Value>,
    ) -> Result<Conversation<'a>> {
        if messages.iter().chain(tools).any(has_marker) {
            return Err(Error::malformed(
                &self.path,
                "a message has U+FDD0 or U+FDD1, which mark generated text; take it out",
            ));
        }
        Ok(Conversation {
            template: self,
            roles: messages.iter().map(|message| &message["role"]).collect(),
            messages: messages
                .iter()
                .map(|message| minijinja::Value::from(Serde(message)))
                .collect(),
            tools: minijinja::Value::from(Serde(tools)),
        })
    }

    /// Removes the markers and returns what stood between them.
    fn take_markers(&self, marked: String) -> Result<RenderedChat> {
        if !self.has_generation_blocks {
            return Ok(RenderedChat {
                text: marked,
                assistant: Vec::new(),
            });
        }
        let mut text = String::with_capacity(marked.len());
        let mut assistant = Vec::new();
        let mut begin = None;
        let mut rest = marked.as_str();
        while let Some(at) = rest.find([GENERATION_BEGIN, GENERATION_END]) {
            text.push_str(&rest[..at]);
            let is_begin = rest[at..].starts_with(GENERATION_BEGIN);
            match (is_begin, begin) {
                (true, None) => begin = Some(text.len()),
                (false, Some(start)) => {
                    assistant.push(start..text.len());
                    begin = None;
                }
                _ => {
                    return Err(Error::malformed(
                        &self.path,
                        "the chat template nests generation blocks",
                    ));
                }
            }
            rest = &rest[at + GENERATION_BEGIN.len_utf8()..];
        }
        text.push_str(rest);
        Ok(RenderedChat { text, assistant })
    }

    /// Leaves of the generation blocks those whose messages are trained.
    fn keep_trained(
        &self,
        mut chat: RenderedChat,
        messages: &[Value],
        trained: &[bool],
    ) -> Result<RenderedChat> {
        if !trained.contains(&true) {
            chat.assistant.clear();
            return Ok(chat);
        }
        let assistants: Vec<usize> = (0..messages.len())
            .filter(|&i| messages[i]["role"] == "assistant")
            .collect();
        if let Some(i) = (0..messages.len()).find(|i| trained[*i] && !assistants.contains(i)) {
            return Err(Error::malformed(
                &self.path,
                format!(
                    "`messages[{i}]` is to be trained, but only the assistant's messages stand in generation blocks"
                ),
            ));
        }
        if assistants.iter().all(|&i| trained[i]) {
            return Ok(chat);
        }
        if assistants.len() != chat.assistant.len() {
            return Err(Error::malformed(
                &self.path,
                format!(
                    "the chat template has {} generation blocks for {} messages of the assistant, so they cannot be \
                     trained one by one",
                    chat.assistant.len(),
                    assistants.len()
                ),
            ));
        }
        let mut is_trained = assistants.iter().map(|&i| trained[i]);
        chat.assistant
            .retain(|_| is_trained.next().unwrap_or(false));
        Ok(chat)
    }

    fn error(&self, error: &minijinja::Error) -> Error {
        Error::malformed(&self.path, error.to_string())
    }
}

/// A conversation in the template engine's values, which are converted once however often it is rendered.
struct Conversation<'a> {
    template: &'a ChatTemplate,
    roles: Vec<&'a Value>,
    messages: Vec<minijinja::Value>,
    tools: minijinja::Value,
}

impl Conversation<'_> {
    /// The text of the first `count` messages, with markers.
    fn render(&self, count: usize, prompt: GenerationPrompt) -> Result<String> {
        self.try_render(count, prompt)
            .map_err(|e| self.template.error(&e))
    }

    /// As [`render`](Self::render), with the template's own error.
    fn try_render(
        &self,
        count: usize,
        prompt: GenerationPrompt,
    ) -> std::result::Result<String, minijinja::Error> {
        let template = self.template.environment.get_template(TEMPLATE_NAME);
        let special_tokens = minijinja::Value::from(Serde(&self.template.special_tokens));
        let variables = context! {
            messages => minijinja::Value::from(self.messages[..count].to_vec()),
            tools => &self.tools,
            documents => (),
            add_generation_prompt => prompt == GenerationPrompt::Yes,
            ..special_tokens
        };
        template.and_then(|template| template.render(variables))
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

/// Line ends as Jinja reads them, whichever system a template was written on.
fn with_line_feeds(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
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

/// The environment of transformers' `apply_chat_template`: its white space rules, functions and filters.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the default delimiters are valid");
    environment.set_syntax(syntax);
    python_compat::add_to(&mut environment);
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
