//! Model directories made of a few tensors, for the tests of what is read from them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qlora::store::{SafetensorsWriter, TensorSpec};
use safetensors::Dtype;
use tempfile::TempDir;

/// Name, type, shape and bytes.
pub type Tensor<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

pub fn write_file(path: &Path, tensors: &[Tensor]) {
    let spec = |(name, dtype, shape, _): &Tensor| TensorSpec::new(*name, *dtype, shape.clone());
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let mut file = SafetensorsWriter::create(path, &specs, BTreeMap::new()).unwrap();
    for (spec, (.., data)) in specs.iter().zip(tensors) {
        file.append(spec, data).unwrap();
    }
    file.finish().unwrap();
}

pub fn f32s(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A model directory without weights.
pub fn model_dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    dir
}

pub fn model_with(tensors: &[Tensor]) -> TempDir {
    let dir = model_dir();
    write_file(&dir.path().join("model.safetensors"), tensors);
    dir
}

pub fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}
