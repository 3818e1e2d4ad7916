//! The fat binaries that the build made of `cuda/*.cu`, looked into without a GPU: code for every architecture, registers that
//! suffice, products on the tensor cores.

#![cfg(feature = "cuda")]

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The architectures with machine code of their own.
const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

/// The one architecture of the files `*_hopper.cu`, whose instructions no other has.
const HOPPER: &str = "sm_90a";

fn architectures(file: &str) -> &'static [&'static str] {
    match file.ends_with("_hopper") {
        true => &[HOPPER],
        false => &ARCHITECTURES,
    }
}

/// The oldest one that a driver can make code for anything newer from, 11.0 and 12.1 included.
const PTX_ARCHITECTURE: &str = "sm_100";

/// Kernels that multiply matrices, by the start of their names.
const MATRIX_PRODUCTS: [&str; 6] = [
    "attention_forward_bf16_",
    "attention_backward_q_bf16_",
    "attention_backward_kv_bf16_",
    "lora_down_bf16",
    "lora_grad_a_bf16",
    "lora_up_bf16",
];

/// A kernel's name and an architecture.
type Compiled = (String, String);

#[test]
fn every_kernel_has_code_for_every_architecture() {
    for (file, kernels) in kernels_by_file() {
        let in_fatbin = symbols(&file);
        let compiled: BTreeSet<_> = spill_bytes(&file).into_keys().collect();
        for kernel in kernels {
            for architecture in architectures(&file) {
                let wanted = (kernel.clone(), architecture.to_string());
                assert!(
                    in_fatbin.contains(&wanted),
                    "{file}.fatbin has no {kernel} for {architecture}"
                );
                assert!(
                    compiled.contains(&wanted),
                    "{file}.ptxas.txt says nothing of {kernel} for {architecture}"
                );
            }
        }
    }
}

#[test]
fn ptx_is_there_for_architectures_to_come() {
    let kept = format!(".{PTX_ARCHITECTURE}.ptx");
    for file in kernels_by_file().into_keys() {
        if architectures(&file) == [HOPPER] {
            continue;
        }
        let list = cuobjdump("--list-ptx", &file);
        let names: Vec<_> = list.lines().filter(|line| line.ends_with(".ptx")).collect();
        assert!(
            names.len() == 1 && names[0].ends_with(&kept),
            "{file}.fatbin: {list}"
        );
    }
}

#[test]
fn no_kernel_spills_registers() {
    let mut spilled = Vec::new();
    for file in kernels_by_file().into_keys() {
        for ((kernel, architecture), bytes) in spill_bytes(&file) {
            if bytes > 0 {
                spilled.push(format!("{kernel} on {architecture}: {bytes} bytes"));
            }
        }
    }
    assert!(spilled.is_empty(), "spilled: {spilled:#?}");
}

/// Where the compiler cannot follow what is under way, it waits for every product before the next one starts.
#[test]
fn products_of_warpgroups_run_beside_what_follows() {
    for file in kernels_by_file().into_keys() {
        let text = fs::read_to_string(built(&file, "ptxas.txt")).unwrap();
        let serialized = text.lines().find(|line| line.contains("are serialized"));
        assert_eq!(serialized, None, "{file}");
    }
}

#[test]
fn matrix_products_run_on_tensor_cores() {
    for (file, kernels) in kernels_by_file() {
        let products = kernels.iter().filter(|kernel| {
            MATRIX_PRODUCTS
                .iter()
                .any(|start| kernel.starts_with(start))
        });
        let mut products = products.peekable();
        if products.peek().is_none() {
            continue;
        }
        let uses = tensor_core_instructions(&file);
        for kernel in products {
            for architecture in architectures(&file) {
                let count = uses.get(&(kernel.clone(), architecture.to_string()));
                assert!(
                    count.is_some_and(|&count| count > 0),
                    "{kernel} multiplies no bf16 on the tensor cores of {architecture}"
                );
            }
        }
    }
}

#[test]
fn every_product_named_here_is_a_kernel() {
    let kernels: Vec<_> = kernels_by_file().into_values().flatten().collect();
    for start in MATRIX_PRODUCTS {
        assert!(
            kernels.iter().any(|kernel| kernel.starts_with(start)),
            "no kernel starts with {start}"
        );
    }
}

/// The names in `KERNEL(threads, name)`, by the stem of the file.
fn kernels_by_file() -> BTreeMap<String, Vec<String>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let sources = paths.filter(|path| path.extension().is_some_and(|extension| extension == "cu"));
    let by_file: BTreeMap<_, _> = sources
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let uses = text.lines().filter_map(|line| line.strip_prefix("KERNEL("));
            let names = uses.map(|rest| {
                let inside = rest.split(')').next().unwrap();
                inside.split_once(',').unwrap().1.trim().to_string()
            });
            let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
            (stem, names.collect::<Vec<_>>())
        })
        .collect();
    for (file, kernels) in &by_file {
        assert!(!kernels.is_empty(), "no KERNEL( in {file}.cu");
    }
    assert!(!by_file.is_empty());
    by_file
}

fn built(file: &str, extension: &str) -> PathBuf {
    Path::new(env!("QLORA_FATBIN_DIR")).join(format!("{file}.{extension}"))
}

/// Bytes that each kernel stores to memory for want of registers, out of what `ptxas -v` wrote.
fn spill_bytes(file: &str) -> BTreeMap<Compiled, u64> {
    let text = fs::read_to_string(built(file, "ptxas.txt")).unwrap();
    let mut spilled = BTreeMap::new();
    let mut compiling = None;
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let (kernel, rest) = rest.split_once("' for '").unwrap();
            compiling = Some((kernel.to_string(), rest.trim_end_matches('\'').to_string()));
        } else if let Some((before, _)) = line.split_once(" bytes spill stores") {
            let bytes: u64 = before.rsplit(' ').next().unwrap().parse().unwrap();
            let compiled = compiling.clone().unwrap();
            *spilled.entry(compiled).or_insert(0) += bytes;
        }
    }
    spilled
}

/// The kernels whose code is in the fat binary.
fn symbols(file: &str) -> BTreeSet<Compiled> {
    let text = cuobjdump("-symbols", file);
    let mut found = BTreeSet::new();
    let mut architecture = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("arch = ") {
            architecture = name.to_string();
        } else if line.contains("STO_ENTRY") {
            let name = line.split_whitespace().last().unwrap();
            found.insert((name.to_string(), architecture.clone()));
        }
    }
    found
}

/// How many instructions of each kernel multiply bf16 matrices.
fn tensor_core_instructions(file: &str) -> BTreeMap<Compiled, u64> {
    let text = cuobjdump("-sass", file);
    let mut uses = BTreeMap::new();
    let mut architecture = String::new();
    let mut kernel = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("arch = ") {
            architecture = name.to_string();
        } else if let Some((_, name)) = line.split_once("Function : ") {
            kernel = name.to_string();
        } else if ["HMMA.", "HGMMA."].iter().any(|name| line.contains(name))
            && line.contains("BF16")
        {
            let compiled = (kernel.clone(), architecture.clone());
            *uses.entry(compiled).or_insert(0) += 1;
        }
    }
    uses
}

/// What the toolkit's `cuobjdump` says of a fat binary.
fn cuobjdump(option: &str, file: &str) -> String {
    let roots = ["CUDA_PATH", "CUDA_HOME"]
        .into_iter()
        .filter_map(env::var_os);
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = roots
        .map(|root| PathBuf::from(root).join("bin"))
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .collect();
    let program = folders
        .iter()
        .map(|folder| folder.join("cuobjdump"))
        .find(|program| program.is_file())
        .expect(
            "cuobjdump is part of a toolkit: set CUDA_PATH, or run the tests by cuda/toolkit.sh",
        );
    let mut search = vec![program.parent().unwrap().to_path_buf()];
    search.extend(env::split_paths(&path));
    let output = Command::new(&program)
        .arg(option)
        .arg(built(file, "fatbin"))
        // It takes nvdisasm from there.
        .env("PATH", env::join_paths(search).unwrap())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{} {option} {file}.fatbin: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
