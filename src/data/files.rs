//! The files that a path stands for: itself, or what a directory holds of training data.

use std::path::{Path, PathBuf};

use super::reader::is_data_file;
use crate::{Error, Result};

/// Names of the other splits, as data sets on the Hugging Face hub have them.
const OTHER_SPLITS: [&str; 5] = ["test", "validation", "valid", "eval", "dev"];

/// What describes a data set instead of being part of it.
const DESCRIPTIONS: [&str; 4] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];

/// The data files that `path` stands for: itself, or for a directory the [`training_files`] in and below it.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be read, [`Error::Malformed`] if it has no data file.
pub fn data_files(path: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let path = path.as_ref();
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut names = Vec::new();
    collect(path, Path::new(""), &mut names)?;
    let files = training_files(&names);
    if files.is_empty() {
        return Err(Error::malformed(
            path,
            "the directory has no data files (.jsonl, .json, .csv, .tsv or .parquet)",
        ));
    }
    Ok(files.into_iter().map(|name| path.join(name)).collect())
}

fn collect(root: &Path, below: &Path, names: &mut Vec<PathBuf>) -> Result<()> {
    let dir = root.join(below);
    for entry in std::fs::read_dir(&dir).map_err(Error::io(&dir))? {
        let entry = entry.map_err(Error::io(&dir))?;
        let name = below.join(entry.file_name());
        // Follows links: the hub's cache keeps its files elsewhere.
        if entry.path().is_dir() {
            collect(root, &name, names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

/// Of the files of a data set, by their paths within it, those with training rows, in the order of their names: the ones
/// that are called `train` where there are any, else all but the other splits. Of the same rows in several kinds of file,
/// as the hub keeps them, the Parquet files are taken.
pub fn training_files(names: &[PathBuf]) -> Vec<PathBuf> {
    let words = |name: &Path| -> Vec<String> {
        let text = name.to_string_lossy().to_ascii_lowercase();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric());
        words.map(str::to_string).collect()
    };
    let is_hidden = |name: &Path| {
        let mut parts = name.components();
        parts.any(|part| part.as_os_str().to_string_lossy().starts_with('.'))
    };
    let is_description = |name: &Path| {
        let file = name.file_name().unwrap_or_default().to_string_lossy();
        DESCRIPTIONS.contains(&file.as_ref())
    };
    let mut files: Vec<PathBuf> = names
        .iter()
        .filter(|name| is_data_file(name) && !is_hidden(name) && !is_description(name))
        .cloned()
        .collect();
    let is_train = |name: &PathBuf| words(name).iter().any(|word| word == "train");
    if files.iter().any(is_train) {
        files.retain(is_train);
    } else {
        files.retain(|name| {
            !words(name)
                .iter()
                .any(|word| OTHER_SPLITS.contains(&word.as_str()))
        });
    }
    let is_parquet = |name: &PathBuf| {
        name.extension()
            .is_some_and(|extension| extension == "parquet")
    };
    if files.iter().any(is_parquet) {
        files.retain(is_parquet);
    }
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str]) -> Vec<String> {
        let names: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
        let files = training_files(&names);
        files
            .iter()
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn the_training_split_is_taken_where_names_say_what_it_is() {
        assert_eq!(
            chosen(&[
                "README.md",
                "data/test-0.parquet",
                "data/train-1.parquet",
                "data/train-0.parquet"
            ]),
            ["data/train-0.parquet", "data/train-1.parquet"]
        );
        assert_eq!(
            chosen(&["a_best_replies_train.jsonl", "a_best_replies_eval.jsonl"]),
            ["a_best_replies_train.jsonl"]
        );
        assert_eq!(
            chosen(&["helpful/train.jsonl.gz", "helpful/test.jsonl.gz"]),
            ["helpful/train.jsonl.gz"]
        );
    }

    #[test]
    fn other_splits_and_descriptions_are_left_out() {
        assert_eq!(
            chosen(&[
                "rows.json",
                "validation.json",
                "dataset_infos.json",
                ".cache/rows.json",
                "trained.json"
            ]),
            ["rows.json", "trained.json"]
        );
        assert_eq!(chosen(&["rows.jsonl", "rows.parquet"]), ["rows.parquet"]);
        assert_eq!(chosen(&["README.md"]), [""; 0]);
    }
}
