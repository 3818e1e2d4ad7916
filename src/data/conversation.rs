//! Rows that hold a conversation: OpenAI's `messages` and ShareGPT's `conversations`, made one for the chat template.
//!
//! Fields that a template may use (`tool_calls`, `tool_call_id`, `name`, `reasoning_content`, ...) are handed to it as they
//! are, with changes that the hub's templates expect: a null field is left out (but the content beside tool calls is null,
//! as templates test it), a list of text parts is one text, the arguments of a tool call are an object where they were
//! JSON in a string, and reasoning has the names of all templates.

use serde_json::{Map, Value, json};

use super::Turns;
use super::columns::{Columns, kind, objects, optional, optional_text};

/// A conversation and which of its messages carry loss.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
    /// For each message whether its tokens are trained.
    pub trained: Vec<bool>,
}

impl Conversation {
    /// Reads `messages` with `role` and `content`. A message's own `train` (or `weight`, 0 or 1) wins over `turns`.
    pub fn from_messages(row: &Columns, turns: Turns) -> Result<Self, String> {
        let mut messages = Vec::new();
        let mut flags = Vec::new();
        for (i, message) in objects(row, "messages")?.enumerate() {
            let at = |reason: String| in_message("messages", i, &reason);
            let mut message = without_nulls(message?);
            flags.push(train_flag(&mut message).map_err(at)?);
            messages.push(openai_message(message).map_err(at)?);
        }
        Self::new("messages", messages, flags, tools(row)?, turns)
    }

    /// Reads `conversations` with `from` and `value`, and a `system` text beside them.
    pub fn from_sharegpt(row: &Columns, turns: Turns) -> Result<Self, String> {
        let mut messages = Vec::new();
        let mut flags = Vec::new();
        let system = optional_text(row, "system")?;
        if !system.is_empty() {
            messages.push(json!({"role": "system", "content": system}));
            flags.push(None);
        }
        for (i, turn) in objects(row, "conversations")?.enumerate() {
            let at = |reason: String| in_message("conversations", i, &reason);
            let mut turn = without_nulls(turn?);
            flags.push(train_flag(&mut turn).map_err(at)?);
            messages.push(sharegpt_message(&turn).map_err(at)?);
        }
        Self::new("conversations", messages, flags, tools(row)?, turns)
    }

    fn new(
        column: &str,
        messages: Vec<Value>,
        flags: Vec<Option<bool>>,
        tools: Option<Value>,
        turns: Turns,
    ) -> Result<Self, String> {
        if messages.is_empty() {
            return Err(format!("`{column}` is empty"));
        }
        let is_assistant = |message: &Value| message["role"] == "assistant";
        let last = messages.iter().rposition(is_assistant);
        let by_role =
            |i: usize| is_assistant(&messages[i]) && (turns == Turns::Every || Some(i) == last);
        let trained = flags.iter().enumerate();
        let trained = trained
            .map(|(i, flag)| flag.unwrap_or_else(|| by_role(i)))
            .collect();
        Ok(Self {
            messages,
            tools,
            trained,
        })
    }

    /// Its messages with an empty text for content that is null, if there is any: templates that join texts by `+` need it.
    pub fn without_null_content(&self) -> Option<Vec<Value>> {
        let mut messages = self.messages.clone();
        let null = messages.iter_mut().filter(|m| m["content"].is_null());
        let count = null.map(|message| message["content"] = "".into()).count();
        (count > 0).then_some(messages)
    }

    /// Refuses `text`, this conversation as the template wrote it, if a function that is called is not named in it: what
    /// would be trained there is an empty answer.
    pub fn expect_calls_in(&self, text: &str) -> Result<(), String> {
        for (i, message) in self.messages.iter().enumerate() {
            let calls = message["tool_calls"].as_array();
            let names = calls.into_iter().flatten().filter_map(called_function);
            for name in names {
                if !text.contains(name) {
                    return Err(format!(
                        "the chat template leaves out the tool calls of `messages[{i}]` (`{name}`); it needs one that writes \
                         them"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The name in a tool call.
fn called_function(call: &Value) -> Option<&str> {
    call.get("function").unwrap_or(call)["name"].as_str()
}

/// A reason that starts with the name of a field (`.content is ...`) or with a space, for message `i`.
fn in_message(column: &str, i: usize, reason: &str) -> String {
    let (field, rest) = reason.split_at(reason.find(' ').unwrap_or(reason.len()));
    format!("`{column}[{i}]{field}`{rest}")
}

fn without_nulls(message: &Columns) -> Map<String, Value> {
    let fields = message.iter().filter(|(_, value)| !value.is_null());
    fields
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// Takes `train` and OpenAI's `weight` out of a message.
fn train_flag(message: &mut Map<String, Value>) -> Result<Option<bool>, String> {
    let weight = message.remove("weight");
    match (message.remove("train"), weight) {
        (Some(Value::Bool(train)), _) => Ok(Some(train)),
        (Some(other), _) => Err(format!(".train is {other}, expected true or false")),
        (None, None) => Ok(None),
        (None, Some(weight)) => match weight.as_f64() {
            Some(1.0) => Ok(Some(true)),
            Some(0.0) => Ok(Some(false)),
            _ => Err(format!(".weight is {weight}, expected 0 or 1")),
        },
    }
}

fn openai_message(mut message: Map<String, Value>) -> Result<Value, String> {
    match message.get("role") {
        Some(Value::String(_)) => {}
        Some(other) => return Err(format!(".role is {}, expected a string", kind(other))),
        None => return Err(" has no `role`".into()),
    }
    let content = match message.get("content") {
        Some(Value::String(text)) => text.as_str().into(),
        Some(Value::Array(parts)) => joined_text(parts)?.into(),
        Some(other) => return Err(format!(".content is {}, expected a string", kind(other))),
        None if message.contains_key("tool_calls") => Value::Null,
        None => return Err(" has no `content`".into()),
    };
    message.insert("content".into(), content);
    name_reasoning(&mut message);
    if let Some(calls) = message.get_mut("tool_calls") {
        parse_arguments(calls)?;
    }
    Ok(Value::Object(message))
}

/// Gives the reasoning of a message the names by which templates read it, as transformers 5.24 does.
fn name_reasoning(message: &mut Map<String, Value>) {
    let names = ["reasoning_content", "thinking", "reasoning"];
    if let Some(reasoning) = names.iter().find_map(|name| message.get(*name)).cloned() {
        message
            .entry("thinking")
            .or_insert_with(|| reasoning.clone());
        message.insert("reasoning_content".into(), reasoning);
    }
}

/// The text of a list of `{"type": "text", "text": ...}`.
fn joined_text(parts: &[Value]) -> Result<String, String> {
    let texts = parts
        .iter()
        .enumerate()
        .map(|(i, part)| match (&part["type"], &part["text"]) {
            (Value::String(kind), Value::String(text)) if kind == "text" => Ok(text.as_str()),
            (kind, _) => Err(format!(
                ".content[{i}] is of type {kind}, only text can be trained on"
            )),
        });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.concat())
}

/// OpenAI writes the arguments of a call as JSON in a string; templates print them with `tojson`, which would quote them
/// once more.
fn parse_arguments(calls: &mut Value) -> Result<(), String> {
    let calls = match calls {
        Value::Array(calls) => calls,
        other => return Err(format!(".tool_calls is {}, expected an array", kind(other))),
    };
    for call in calls {
        let function = match call.get_mut("function") {
            Some(function) => function,
            None => call,
        };
        if let Some(Value::String(text)) = function.get("arguments")
            && let Ok(arguments @ Value::Object(_)) = serde_json::from_str(text)
        {
            function["arguments"] = arguments;
        }
    }
    Ok(())
}

fn sharegpt_message(turn: &Map<String, Value>) -> Result<Value, String> {
    let field = |name: &str| match turn.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(format!(".{name} is {}, expected a string", kind(other))),
        None => Err(format!(" has no `{name}`")),
    };
    let (from, value) = (field("from")?, field("value")?);
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        "function_call" => return function_call(value),
        other => {
            return Err(format!(
                ".from is `{other}`, expected human, gpt, system, tool, observation or function_call"
            ));
        }
    };
    Ok(json!({"role": role, "content": value}))
}

fn function_call(value: &str) -> Result<Value, String> {
    let call: Value = serde_json::from_str(value)
        .map_err(|e| format!(".value of a function_call is not JSON: {e}"))?;
    if !call["name"].is_string() {
        return Err(".value of a function_call has no `name`".into());
    }
    let call = json!({"type": "function", "function": call});
    Ok(json!({"role": "assistant", "content": null, "tool_calls": [call]}))
}

/// The tools of a row: an array, or one written as JSON in a string.
fn tools(row: &Columns) -> Result<Option<Value>, String> {
    let Some(tools) = optional(row, "tools").filter(|tools| *tools != "") else {
        return Ok(None);
    };
    let tools = match tools {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|e| format!("`tools` is a string that is not JSON: {e}"))?,
        tools => tools.clone(),
    };
    match tools {
        Value::Array(tools) if tools.is_empty() => Ok(None),
        Value::Array(_) => Ok(Some(tools)),
        other => Err(format!("`tools` is {}, expected an array", kind(&other))),
    }
}
