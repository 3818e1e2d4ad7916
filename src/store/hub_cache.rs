//! How huggingface_hub lays out what it downloads: `models--ORGANIZATION--NAME/snapshots/REVISION`.

use std::path::Path;

/// What others call the model in `dir`: its name on the Hugging Face hub where `dir` is a snapshot in the hub's cache, else
/// the path.
pub fn model_name(dir: &Path) -> String {
    hub_name(dir).unwrap_or_else(|| dir.display().to_string())
}

fn hub_name(dir: &Path) -> Option<String> {
    let mut parts = dir.components().rev().skip(1);
    let mut part = || parts.next()?.as_os_str().to_str();
    if part()? != "snapshots" {
        return None;
    }
    let (organization, name) = part()?.strip_prefix("models--")?.split_once("--")?;
    Some(format!("{organization}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_known_by_the_name_on_the_hub() {
        for (dir, name) in [
            (
                "/home/me/.cache/huggingface/hub/models--org--Some-Model.1/snapshots/0123abc",
                "org/Some-Model.1",
            ),
            (
                "hub/datasets--org--rows/snapshots/0123",
                "hub/datasets--org--rows/snapshots/0123",
            ),
            ("models--org--name", "models--org--name"),
            ("snapshots/0123", "snapshots/0123"),
            ("models/llama", "models/llama"),
        ] {
            assert_eq!(model_name(Path::new(dir)), name);
        }
    }
}
