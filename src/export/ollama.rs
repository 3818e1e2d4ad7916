//! Ollama's Modelfile for a GGUF file: its chat template in Go's language, and where the model stops.
//!
//! Ollama does not read a model's Jinja template; with another one the model answers badly or never stops. Here the
//! template is taken apart: it is rendered for short conversations, and what stands around their messages becomes a Go
//! template. That is written only if it gives the text of the Jinja template for longer conversations too.
//!
//! Source: Ollama's docs, `modelfile.md` and `template.md`.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::data::{ChatTemplate, GenerationPrompt, Tokenizer, chat_message};
use crate::{Error, Result};

/// What stands around the messages of a conversation.
#[derive(Debug, PartialEq, Eq)]
struct Pieces {
    /// Before the first question, without a system message.
    start: String,
    /// Around a system message, the opening of the first question included; `None` where the model knows none.
    system: Option<(String, String)>,
    /// Before any other question, and after each.
    user: (String, String),
    assistant: (String, String),
    /// After the last question, where the model writes.
    prompt: String,
}

/// The Modelfile of the GGUF file `gguf`, a path relative to its own.
///
/// # Errors
/// [`Error::Malformed`] if the chat template cannot be said in Go's language, or no token ends a text.
pub fn modelfile(tokenizer: &Tokenizer, gguf: &str) -> Result<String> {
    let template = match tokenizer.chat_template() {
        // A model that goes on with what it is given.
        None => "{{ .Prompt }}".to_string(),
        Some(template) => Pieces::of(template)?.go_template(template, added_bos(tokenizer)?)?,
    };
    let stops = tokenizer.answer_end_ids()?;
    if stops.is_empty() {
        return Err(Error::malformed(
            tokenizer.path(),
            "has no token that ends a text",
        ));
    }
    let mut text = format!("FROM {gguf}\n\nTEMPLATE \"\"\"{template}\"\"\"\n\n");
    for id in stops {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "PARAMETER stop {}", json!(tokenizer.token_text(id)));
    }
    Ok(text)
}

/// The bos where the runner, told so by the GGUF file, puts it in front of every text.
fn added_bos(tokenizer: &Tokenizer) -> Result<Option<&str>> {
    let first = tokenizer.encode_with_specials("a")?.first().copied();
    let is_added = first.is_some() && first == tokenizer.bos_token_id();
    Ok(tokenizer.bos_token().filter(|_| is_added))
}

impl Pieces {
    fn of(template: &ChatTemplate) -> Result<Self> {
        let render = |messages: &[Value], prompt| template.render(messages, None, prompt);
        let refuse = |reason| Error::malformed(template.path(), reason);
        let [system, first, answer, second] = [
            "system message",
            "first question",
            "an answer",
            "another one",
        ];
        let (ask, reply) = (
            chat_message("user", first),
            chat_message("assistant", answer),
        );
        let asked = [ask.clone()];

        let one = render(&asked, GenerationPrompt::No)?;
        let [start, after_user] = around(&one, [first]).map_err(refuse)?;
        let with_prompt = render(&asked, GenerationPrompt::Yes)?;
        let prompt = rest_of(&with_prompt, &one).map_err(refuse)?;
        let next = chat_message("user", second);
        let three = [ask.clone(), reply, next];
        let three = render(&three, GenerationPrompt::No)?;
        let [_, between, after_answer, _] =
            around(&three, [first, answer, second]).map_err(refuse)?;
        let before_assistant = rest_of(&between, &after_user).map_err(refuse)?;
        // Where the answer ends and the question begins is told by a conversation that ends with an answer. It matters to the
        // reader alone: in front of the model's turn a question follows every answer.
        let end = template.answer_end()?;
        let (after_assistant, before_user) = match after_answer.strip_prefix(&end) {
            Some(before_user) => (end, before_user.to_string()),
            None => (String::new(), after_answer),
        };
        let with_system = [chat_message("system", system), ask];
        // Some templates know no system message.
        let system = match render(&with_system, GenerationPrompt::No) {
            Err(_) => None,
            Ok(with_system) => {
                let [before, after, _] = around(&with_system, [system, first]).map_err(refuse)?;
                Some((before, after))
            }
        };
        Ok(Self {
            start,
            system,
            user: (before_user, after_user),
            assistant: (before_assistant, after_assistant),
            prompt,
        })
    }

    /// The template, without the `added_bos` that it begins with.
    fn go_template(mut self, template: &ChatTemplate, added_bos: Option<&str>) -> Result<String> {
        if let Some(conversation) = self.differs_from(template)? {
            let reason = format!(
                "lays out a conversation of {conversation} in another way than its parts, which Ollama cannot be told"
            );
            return Err(Error::malformed(template.path(), reason));
        }
        if let Some(bos) = added_bos {
            let with_system = self.system.iter_mut().map(|(before, _)| before);
            for start in with_system.chain([&mut self.start]) {
                if let Some(rest) = start.strip_prefix(bos) {
                    *start = rest.to_string();
                }
            }
        }
        let around = self.system.iter().chain([&self.user, &self.assistant]);
        let around = around.flat_map(|(before, after)| [before, after]);
        let mut all = around.chain([&self.start, &self.prompt]);
        match all.find(|piece| piece.contains("{{") || piece.contains("\"\"\"")) {
            None => Ok(self.to_go()),
            Some(piece) => {
                let reason =
                    format!("has {piece:?}, with marks of Go's templates or of Modelfiles");
                Err(Error::malformed(template.path(), reason))
            }
        }
    }

    /// The roles of a conversation that the pieces do not give the template's text for.
    fn differs_from(&self, template: &ChatTemplate) -> Result<Option<String>> {
        let turn = |i: usize| match i % 2 {
            0 => chat_message("user", &format!("Question {i}?\nIn two lines.")),
            _ => chat_message("assistant", &format!("Answer {i}: <b>a & b</b>.")),
        };
        for turns in [1, 3, 5] {
            for has_system in [false, true] {
                if has_system && self.system.is_none() {
                    continue;
                }
                let system = has_system.then(|| chat_message("system", "Be brief.\nBe right."));
                let messages: Vec<Value> = system.into_iter().chain((0..turns).map(turn)).collect();
                let expected = template.render(&messages, None, GenerationPrompt::Yes)?;
                if self.text(&messages) != expected {
                    let roles = messages
                        .iter()
                        .filter_map(|message| message["role"].as_str());
                    return Ok(Some(roles.collect::<Vec<_>>().join(", ")));
                }
            }
        }
        Ok(None)
    }

    /// What the Go template makes of a conversation.
    fn text(&self, messages: &[Value]) -> String {
        let content = |message: &Value| message["content"].as_str().unwrap_or_default().to_string();
        let mut text = match (messages.first(), &self.system) {
            (Some(first), Some((before, after))) if first["role"] == "system" => {
                [before, &content(first), after]
                    .map(String::as_str)
                    .concat()
            }
            _ => self.start.clone(),
        };
        let mut is_first = true;
        for message in messages {
            if message["role"] == "user" {
                text += if is_first { "" } else { &self.user.0 };
                is_first = false;
                text += &(content(message) + &self.user.1);
            } else if message["role"] == "assistant" {
                text += &(self.assistant.0.clone() + &content(message) + &self.assistant.1);
            }
        }
        text + &self.prompt
    }

    /// Without trim marks: white space around the actions is the template's own.
    fn to_go(&self) -> String {
        let (before_user, after_user) = &self.user;
        let (before_assistant, after_assistant) = &self.assistant;
        let mut go = match &self.system {
            None => self.start.clone(),
            Some((before, after)) => format!(
                "{IF_SYSTEM}{before}{SYSTEM}{after}{ELSE}{}{END}",
                self.start
            ),
        };
        go += &format!(
            "{EACH_MESSAGE}{IF_USER}{IF_FIRST}{ELSE}{before_user}{END}{CONTENT}{after_user}\
             {IF_ASSISTANT}{before_assistant}{CONTENT}{after_assistant}{END}{END}{}",
            self.prompt
        );
        go
    }
}

const IF_SYSTEM: &str = "{{ if .System }}";
const SYSTEM: &str = "{{ .System }}";
const ELSE: &str = "{{ else }}";
const END: &str = "{{ end }}";
const EACH_MESSAGE: &str = "{{ $first := true }}{{ range .Messages }}";
const IF_USER: &str = "{{ if eq .Role \"user\" }}";
/// For the first question, whose opening stands in what comes before the messages.
const IF_FIRST: &str = "{{ if $first }}{{ $first = false }}";
const IF_ASSISTANT: &str = "{{ else if eq .Role \"assistant\" }}";
const CONTENT: &str = "{{ .Content }}";

/// The text before, between and after `contents`, which follow one another in it.
fn around<const N: usize, const M: usize>(
    text: &str,
    contents: [&str; N],
) -> Result<[String; M], &'static str> {
    let mut pieces = Vec::with_capacity(M);
    let mut rest = text;
    for content in contents {
        let parts = rest.split_once(content);
        let (before, after) = parts.ok_or("does not write a message as it is")?;
        pieces.push(before.to_string());
        rest = after;
    }
    pieces.push(rest.to_string());
    Ok(pieces
        .try_into()
        .unwrap_or_else(|_| unreachable!("there is one piece more than contents")))
}

/// What follows `start` in `text`.
fn rest_of(text: &str, start: &str) -> Result<String, &'static str> {
    let rest = text.strip_prefix(start);
    let rest = rest.ok_or("changes earlier messages when others follow")?;
    Ok(rest.to_string())
}
