//! How huggingface_hub lays out what it downloads: `models--ORGANIZATION--NAME/snapshots/REVISION`.

use std::path::Path;

/// What others call the model in `dir`: its name on the Hugging Face hub and its revision where `dir` is a snapshot in the hub's
/// cache, else the path.
pub fn model_name(dir: &Path) -> (String, Option<String>) {
    match hub_snapshot(dir) {
        Some((name, revision)) => (name, Some(revision)),
        None => (dir.display().to_string(), None),
    }
}

/// The name on the hub and the revision of a model whose snapshot in the hub's cache is `dir`.
pub fn hub_snapshot(dir: &Path) -> Option<(String, String)> {
    let mut parts = dir.components().rev();
    let mut part = || parts.next()?.as_os_str().to_str();
    let revision = part()?;
    if part()? != "snapshots" {
        return None;
    }
    let (organization, name) = part()?.strip_prefix("models--")?.split_once("--")?;
    Some((format!("{organization}/{name}"), revision.into()))
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
            assert_eq!(model_name(Path::new(dir)).0, name);
        }
        let (_, revision) = hub_snapshot(Path::new("models--a--b/snapshots/0123")).unwrap();
        assert_eq!(revision, "0123");
    }
}
