//! A pattern for the end of a module's path, as a key of PEFT's `rank_pattern`: it is matched as the regex
//! `^(.*\\.)?(pattern)$`.
//!
//! Source: `get_pattern_key` of PEFT 0.21.

use regex::{Regex, RegexBuilder};

/// Bytes that a compiled regex may take.
const MAX_REGEX_BYTES: usize = 1 << 17;

/// A name, or a regex.
#[derive(Debug, Clone)]
pub(super) struct PathPattern {
    text: String,
    /// `None` where the text is a name.
    regex: Option<Regex>,
}

impl PathPattern {
    /// # Errors
    /// What is wrong with the text.
    pub(super) fn new(text: String) -> Result<Self, String> {
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if text.chars().all(is_of_name) {
            return Ok(Self { text, regex: None });
        }
        let regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{text})$"))
            .size_limit(MAX_REGEX_BYTES)
            .build();
        match regex {
            Ok(regex) => Ok(Self {
                text,
                regex: Some(regex),
            }),
            Err(regex::Error::CompiledTooBig(_)) => Err(format!("`{text}` is too large a regex")),
            Err(_) => Err(format!("`{text}` is neither a name nor a regex")),
        }
    }

    /// As it was written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn is_regex(&self) -> bool {
        self.regex.is_some()
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        match &self.regex {
            Some(regex) => regex.is_match(path),
            None => self.is_end_of(path),
        }
    }

    /// A dot in a name stands for any character, as it does in a regex.
    fn is_end_of(&self, path: &str) -> bool {
        let (path, name) = (path.as_bytes(), self.text.as_bytes());
        let Some(start) = path.len().checked_sub(name.len()) else {
            return false;
        };
        let fits = |(byte, wanted): (&u8, &u8)| byte == wanted || *wanted == b'.';
        let is_whole = start == 0 || path[start - 1] == b'.';
        is_whole && path[start..].iter().zip(name).all(fits)
    }
}

impl PartialEq for PathPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_matches_as_it_would_as_a_regex() {
        let paths = [
            "a.b.q_proj",
            "b.q_proj",
            "q_proj",
            "a.bxq_proj",
            "q_pro",
            "a.b.q_proj.x",
        ];
        for name in [
            "q_proj",
            "b.q_proj",
            "a.b.q_proj",
            ".",
            "x",
            "a.b",
            "b.q.proj",
        ] {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{name})$")).unwrap();
            let pattern = PathPattern::new(name.to_string()).unwrap();
            assert!(!pattern.is_regex());
            for path in paths {
                assert_eq!(pattern.matches(path), regex.is_match(path), "{name} {path}");
            }
        }
    }

    #[test]
    fn a_regex_of_any_size_is_refused() {
        let large = PathPattern::new("(a{1000}){1000}".into()).unwrap_err();
        assert!(large.contains("too large"), "{large}");
    }
}
