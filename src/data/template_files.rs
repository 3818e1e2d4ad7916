//! The chat templates of a Hugging Face model directory: where they stand, and which of several are taken.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ChatTemplate;
use super::tokenizer::read_object;
use crate::{Error, Result};

const TEMPLATE_FILE: &str = "chat_template.jinja";
const TOOL_TEMPLATE_FILE: &str = "additional_chat_templates/tool_use.jinja";

/// A chat template as it was written, and the file it stands in.
pub(super) struct TemplateSource {
    pub path: PathBuf,
    pub source: String,
}

impl TemplateSource {
    fn read(path: PathBuf) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let source = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        Ok(Some(Self { path, source }))
    }
}

/// The chat template of the model, with its `tool_use` template where it has one. Files of their own go before the config's
/// key.
pub(super) fn chat_template(
    dir: &Path,
    config: &Map<String, Value>,
    compile: impl Fn(TemplateSource) -> Result<ChatTemplate>,
) -> Result<Option<ChatTemplate>> {
    let for_tools = TemplateSource::read(dir.join(TOOL_TEMPLATE_FILE))?;
    let (default, for_tools) = match TemplateSource::read(dir.join(TEMPLATE_FILE))? {
        Some(default) => (Some(default), for_tools),
        None => {
            let (default, named) = templates_in_json(dir, config)?;
            (default, for_tools.or(named))
        }
    };
    let Some(default) = default.map(&compile).transpose()? else {
        return Ok(None);
    };
    Ok(Some(match for_tools.map(compile).transpose()? {
        Some(for_tools) => default.with_template_for_tools(for_tools),
        None => default,
    }))
}

/// The chat template of `chat_template.json` or of the config, and the one for tools: of several named ones those that
/// transformers takes, called `default` and `tool_use`.
fn templates_in_json(
    dir: &Path,
    config: &Map<String, Value>,
) -> Result<(Option<TemplateSource>, Option<TemplateSource>)> {
    let json = dir.join("chat_template.json");
    let (path, value) = match read_object(&json)? {
        Some(mut object) => (json, object.remove("chat_template")),
        None => (
            dir.join("tokenizer_config.json"),
            config.get("chat_template").cloned(),
        ),
    };
    let template = |source: &str| TemplateSource {
        path: path.clone(),
        source: source.into(),
    };
    match value {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::String(source)) => Ok((Some(template(&source)), None)),
        Some(Value::Array(named)) => {
            let named = |name: &str| {
                let entry = named.iter().find(|entry| entry["name"] == name)?;
                entry["template"].as_str().map(template)
            };
            match named("default") {
                Some(default) => Ok((Some(default), named("tool_use"))),
                None => Err(Error::malformed(
                    &path,
                    "none of the named chat templates is called `default`",
                )),
            }
        }
        Some(_) => Err(Error::malformed(
            &path,
            "`chat_template` is neither a string nor a list of named templates",
        )),
    }
}
