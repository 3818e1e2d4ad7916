//! A module names only the layers below it, and only the commands print.

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer with the layers it may name. Everything may name the error type and what else stands in `lib.rs`.
const LAYERS: &[(&str, &[&str])] = &[
    ("device", &[]),
    ("quant", &["device"]),
    ("ops", &["device", "quant"]),
    ("store", &["quant"]),
    // `device` for the placement that a model is loaded to and hands on; what that means, operations decide.
    ("model", &["ops", "quant", "store", "device"]),
    ("data", &[]),
    // `quant` for the code that the configuration asks for; `infer` because evaluation between steps is that of `qlora eval`.
    (
        "train",
        &["model", "ops", "data", "store", "device", "quant", "infer"],
    ),
    ("infer", &["model", "data"]),
    ("export", &["model", "data", "quant", "store"]),
];

/// What only the binary may use.
const ONLY_IN_COMMANDS: &[&str] = &["anyhow", "println!", "eprintln!", "print!", "eprint!"];

#[test]
fn a_module_names_only_the_layers_below_it() {
    let offences = offences_of_all(layer_offences);
    assert!(offences.is_empty(), "{offences}");
}

#[test]
fn only_the_commands_print_and_use_anyhow() {
    let offences = offences_of_all(|_, source| print_offences(source));
    assert!(offences.is_empty(), "{offences}");
}

#[test]
fn a_planted_layer_violation_is_found() {
    let planted =
        "use crate::Error;\nuse crate::quant::NF4_CODE;\nuse crate::{Result, model::Decoder};\n";
    let found = |layer| layer_offences(layer, planted);
    assert_eq!(found("model"), [] as [&str; 0]);
    assert_eq!(found("store"), ["3: store names model"]);
    assert_eq!(
        found("data"),
        ["2: data names quant", "3: data names model"]
    );
}

#[test]
fn a_planted_print_is_found() {
    let planted = "// println! is only spoken of\nfn f() -> anyhow::Result<()> {\n    eprintln!(\"x\");\n    my_print!();\n}\n";
    assert_eq!(print_offences(planted), ["2: anyhow", "3: eprintln!"]);
}

#[test]
fn every_layer_of_the_library_has_a_rule() {
    let library = fs::read_to_string(source_dir().join("lib.rs")).unwrap();
    let modules = library.lines().filter_map(|line| {
        let line = line
            .strip_prefix("pub mod ")
            .or_else(|| line.strip_prefix("mod "));
        line?.strip_suffix(';')
    });
    let without: Vec<_> = modules
        .filter(|name| *name != "error" && !LAYERS.iter().any(|(layer, _)| layer == name))
        .collect();
    assert!(without.is_empty(), "no rule for {without:?}");
}

#[test]
fn names_are_found_in_every_form_of_a_path() {
    let source = "use crate::quant::QuantType;\n\
        use crate::{Error, data::{Batch, Example}, model};\n\
        // crate::infer is only spoken of here\n\
        fn f(x: &crate::store::Checkpoint) -> crate::Result<()> {}\n\
        use crate::{\n    Result,\n    train::TrainConfig,\n};\n\
        use other_crate::device::X;\n\
        macro_rules! m { () => { $crate::ops::f() } }\n";
    let found = named_layers(source);
    let expected = [
        (1, "quant"),
        (2, "data"),
        (2, "model"),
        (4, "store"),
        (5, "train"),
        (10, "ops"),
    ];
    let expected: Vec<_> = expected.map(|(line, name)| (line, name.to_string())).into();
    assert_eq!(found, expected);
}

fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The sources of the layers: neither the roots, nor the binary, nor the error type.
fn library_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for (layer, _) in LAYERS {
        collect(&source_dir().join(layer), &mut files);
    }
    assert!(files.len() >= LAYERS.len() - 1, "only {files:?}");
    files
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// What `offences` finds in each file of the library, a line each with the file's name in front.
fn offences_of_all(offences: impl Fn(&str, &str) -> Vec<String>) -> String {
    let mut lines = Vec::new();
    for file in library_files() {
        let source = fs::read_to_string(&file).unwrap();
        let found = offences(&layer_of(&file), &source);
        lines.extend(
            found
                .iter()
                .map(|found| format!("{}:{found}", file.display())),
        );
    }
    lines.join("\n")
}

/// The layers that a source of `layer` names without leave, each with its line.
fn layer_offences(layer: &str, source: &str) -> Vec<String> {
    let allowed = LAYERS.iter().find(|(name, _)| *name == layer).unwrap().1;
    let named = named_layers(source).into_iter();
    named
        .filter(|(_, named)| named != layer && !allowed.contains(&named.as_str()))
        .map(|(line, named)| format!("{line}: {layer} names {named}"))
        .collect()
}

fn print_offences(source: &str) -> Vec<String> {
    let mut offences = Vec::new();
    for (number, line) in without_comments(source).lines().enumerate() {
        let words = ONLY_IN_COMMANDS.iter().filter(|word| has_word(line, word));
        offences.extend(words.map(|word| format!("{}: {word}", number + 1)));
    }
    offences
}

fn layer_of(file: &Path) -> String {
    let inside = file.strip_prefix(source_dir()).unwrap();
    let layer = inside.components().next().unwrap();
    layer.as_os_str().to_str().unwrap().to_string()
}

/// The layers named by `crate::...` paths, each with its line, counted from 1.
fn named_layers(source: &str) -> Vec<(usize, String)> {
    let code = without_comments(source);
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let line = 1 + code[..at].matches('\n').count();
        for segment in first_segments(&code[at + "crate::".len()..]) {
            if LAYERS.iter().any(|(layer, _)| *layer == segment) {
                found.push((line, segment));
            }
        }
    }
    found
}

/// The first segment of a path, or of each path of a `{...}` group.
fn first_segments(path: &str) -> Vec<String> {
    let Some(group) = path.strip_prefix('{') else {
        return vec![leading_identifier(path)];
    };
    let mut depth = 0;
    let mut segments = vec![leading_identifier(group)];
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => segments.push(leading_identifier(&group[at + 1..])),
            _ => {}
        }
    }
    segments
}

fn leading_identifier(text: &str) -> String {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
    text[..end.unwrap_or(text.len())].to_string()
}

/// The source with its line comments emptied; lines keep their numbers.
fn without_comments(source: &str) -> String {
    let code = source.lines().map(|line| match line.find("//") {
        // `://` is an address inside a text.
        Some(at) if !line[..at].ends_with(':') => &line[..at],
        _ => line,
    });
    code.collect::<Vec<_>>().join("\n")
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}
