//! Tokens that stand for themselves in a text by what `tokenizer_config.json` says, beside those of `tokenizer.json`.
//!
//! As in transformers: all of `added_tokens_decoder`, whose flags win over the ones in `tokenizer.json`, and the special
//! tokens by name (`bos_token`, ..., `extra_special_tokens`), which would be split in a text otherwise.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::tokenizer::{token_content, without_panic};
use crate::{Error, Result};

/// Adds to `inner` the tokens of `config`, which was read from `path`. `special_tokens` are its special tokens by name.
///
/// # Errors
/// [`Error::Malformed`] if a token is not one, has another id in `inner`, or is special and not in the vocabulary.
pub(super) fn add_tokens(
    inner: &mut Tokenizer,
    special_tokens: &Map<String, Value>,
    (path, config): (&Path, &Map<String, Value>),
) -> Result<()> {
    let listed = listed_tokens(special_tokens, (path, config))?;
    let known = inner.get_added_tokens_decoder();
    let unknown = listed
        .iter()
        .filter(|(id, token)| known.get(id) != Some(token));
    add(
        inner,
        path,
        unknown.map(|(_, token)| token.clone()).collect(),
    )?;
    for (id, AddedToken { content, .. }) in &listed {
        if let Some(found) = inner.token_to_id(content).filter(|found| found != id) {
            return Err(Error::malformed(
                path,
                format!(
                    "`added_tokens_decoder` has {content:?} as token {id}, but after tokenizer.json it is token {found}"
                ),
            ));
        }
    }
    let special = unlisted_special_tokens(inner, special_tokens, (path, config))?;
    add(inner, path, special)
}

fn add(inner: &mut Tokenizer, path: &Path, tokens: Vec<AddedToken>) -> Result<()> {
    if tokens.is_empty() {
        return Ok(());
    }
    match without_panic(|| inner.add_tokens(tokens)) {
        Ok(_) => Ok(()),
        Err(e) => Err(Error::malformed(
            path,
            format!("cannot add its tokens: {e}"),
        )),
    }
}

/// The tokens of `added_tokens_decoder`, in the order of their ids.
fn listed_tokens(
    special_tokens: &Map<String, Value>,
    (path, config): (&Path, &Map<String, Value>),
) -> Result<BTreeMap<u32, AddedToken>> {
    const LIST: &str = "added_tokens_decoder";
    let entries = config.get(LIST).and_then(Value::as_object);
    let tokens = entries.into_iter().flatten().map(|(id, entry)| {
        let mut token = added_token(path, &format!("{LIST}.{id}"), entry)?;
        token.special |= special_tokens.values().any(|name| *name == token.content);
        let id = id.parse().map_err(|_| {
            Error::malformed(
                path,
                format!("`{LIST}` has {id:?}, which is not a token id"),
            )
        })?;
        Ok((id, token))
    });
    tokens.collect()
}

/// The special tokens that are in the vocabulary of `inner`, but not yet among its added ones.
fn unlisted_special_tokens(
    inner: &Tokenizer,
    special_tokens: &Map<String, Value>,
    (path, config): (&Path, &Map<String, Value>),
) -> Result<Vec<AddedToken>> {
    let known = inner.get_added_tokens_decoder();
    let is_unlisted = |id: u32| !known.contains_key(&id);
    let special = |name: &str, entry: &Value| -> Result<AddedToken> {
        let token = added_token(path, name, entry)?;
        Ok(AddedToken {
            special: true,
            ..token
        })
    };
    let mut unlisted = Vec::new();
    for (name, token) in special_tokens {
        let content = token.as_str().unwrap_or_default();
        let id = inner.token_to_id(content).ok_or_else(|| {
            Error::malformed(
                path,
                format!("`{name}` is {content:?}, which is not in tokenizer.json"),
            )
        })?;
        if is_unlisted(id) {
            let entry = config.get(name).filter(|entry| entry.is_object());
            unlisted.push(special(name, entry.unwrap_or(token))?);
        }
    }
    for name in ["extra_special_tokens", "additional_special_tokens"] {
        let extra = config.get(name).and_then(Value::as_array);
        for entry in extra.into_iter().flatten() {
            let token = special(name, entry)?;
            if inner.token_to_id(&token.content).is_some_and(is_unlisted) {
                unlisted.push(token);
            }
        }
    }
    Ok(unlisted)
}

/// A token as the config writes it: as an object with flags, or as a string, which is special.
fn added_token(path: &Path, name: &str, entry: &Value) -> Result<AddedToken> {
    let content = token_content(path, name, Some(entry))?.unwrap_or_default();
    let flag = |name: &str| entry.get(name).and_then(Value::as_bool);
    let is_special = flag("special").unwrap_or(entry.is_string());
    let token = AddedToken::from(content, is_special);
    Ok(AddedToken {
        single_word: flag("single_word").unwrap_or(token.single_word),
        lstrip: flag("lstrip").unwrap_or(token.lstrip),
        rstrip: flag("rstrip").unwrap_or(token.rstrip),
        normalized: flag("normalized").unwrap_or(token.normalized),
        ..token
    })
}
