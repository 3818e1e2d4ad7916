//! The turns of a conversation told apart without generation blocks: by what the template adds from one prefix of it to the
//! next, or an error that says why that cannot be.

use std::borrow::Cow;
use std::ops::Range;

use super::{ChatTemplate, Conversation, GenerationPrompt};
use crate::{Error, Result};

impl ChatTemplate {
    /// Derives the trained turns from the texts up to and through each of them, all prefixes of `text`.
    pub(super) fn turns(
        &self,
        conversation: &Conversation,
        trained: &[bool],
        text: &str,
    ) -> Result<Vec<Range<usize>>> {
        let count = conversation.messages.len();
        let mut turns = Vec::new();
        for i in (0..count).filter(|&i| trained[i]) {
            let prompt = match conversation.roles[i] == "assistant" {
                true => GenerationPrompt::Yes,
                false => GenerationPrompt::No,
            };
            let before = match conversation.try_render(i, prompt) {
                Err(e) if i == 0 => return Err(self.needs_a_message_before(conversation, &e)),
                before => before.map_err(|e| self.error(&e))?,
            };
            if prompt == GenerationPrompt::Yes && !conversation.opens_turn(i, &before)? {
                return Err(Error::malformed(
                    &self.path,
                    format!(
                        "the chat template does not open the assistant's turn before `messages[{i}]` as it does after a \
                         question, so what the assistant wrote cannot be told apart; put `{{% generation %}}` blocks around \
                         it in the template"
                    ),
                ));
            }
            let through = match i + 1 == count {
                true => Cow::Borrowed(text),
                false => Cow::Owned(conversation.render(i + 1, GenerationPrompt::No)?),
            };
            if !through.starts_with(&before) {
                return Err(self.begins_otherwise(conversation, i, (&before, &through)));
            }
            if !text.starts_with(through.as_ref()) {
                return Err(Error::malformed(
                    &self.path,
                    format!(
                        "the chat template does not render `messages[{i}]` in the same way with and without what \
                         follows it, so what the assistant wrote cannot be told apart; put `{{% generation %}}` blocks \
                         around it in the template, split the conversation, or train its last answer alone (mask_history)"
                    ),
                ));
            }
            turns.push(before.len()..self.end_of_turn(&through, before.len()));
        }
        Ok(turns)
    }

    /// The error for a first message that is trained, where the template refuses to render nothing.
    fn needs_a_message_before(
        &self,
        conversation: &Conversation,
        error: &minijinja::Error,
    ) -> Error {
        let role = conversation.roles[0].as_str().unwrap_or_default();
        Error::malformed(
            &self.path,
            format!(
                "`messages[0]` is the {role}'s and is to be trained, but the chat template cannot be rendered without a \
                 message before it; give it `train: false`, or leave it out ({error})"
            ),
        )
    }

    /// The error for message `i` where the text up to it and the opening of its turn, `before`, does not begin the text
    /// `through` it.
    fn begins_otherwise(
        &self,
        conversation: &Conversation,
        i: usize,
        (before, through): (&str, &str),
    ) -> Error {
        let closed = match conversation.render(i, GenerationPrompt::No) {
            Ok(closed) => closed,
            Err(error) => return error,
        };
        let opening = before.strip_prefix(closed.as_str());
        let how = match opening.filter(|_| through.starts_with(&closed)) {
            Some(opening) => format!(
                "opens the assistant's turn with text that the answer in `messages[{i}]` does not begin with ({opening:?})"
            ),
            None => format!("renders what stands before `messages[{i}]` otherwise once it follows"),
        };
        Error::malformed(
            &self.path,
            format!(
                "the chat template {how}, so what the assistant wrote cannot be told apart; put `{{% generation %}}` blocks \
                 around it in the template"
            ),
        )
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
}

impl Conversation<'_> {
    /// Whether the opening of a turn at the end of `before`, the text of the first `count` messages, is the one that
    /// stands after the first question. Templates that open a turn only there would have it trained elsewhere.
    fn opens_turn(&self, count: usize, before: &str) -> Result<bool> {
        let is_question = |i: &usize| self.roles[*i] == "user";
        let question = (0..self.roles.len()).find(is_question);
        let (Some(question), Some(last)) = (question, count.checked_sub(1)) else {
            return Ok(true);
        };
        if is_question(&last) {
            return Ok(true);
        }
        let opening = |count: usize, before: &str| -> Result<Option<String>> {
            let closed = self.render(count, GenerationPrompt::No)?;
            Ok(before.strip_prefix(closed.as_str()).map(String::from))
        };
        let after_question = self.render(question + 1, GenerationPrompt::Yes)?;
        Ok(opening(count, before)? == opening(question + 1, &after_question)?)
    }
}
