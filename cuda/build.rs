//! Builds the CUDA side under the feature `cuda`, and does nothing without it.
//!
//! Each `cuda/*.cu` becomes a fat binary with code for every architecture, embedded through `fatbins.rs` in OUT_DIR. The
//! libraries of CUDA are not linked but loaded when they are asked for (`cuda/loader.c`), so that the program starts without
//! them: candle links them by name, and what the loader defines takes the place of those names.

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// Compute capabilities with machine code, as nvcc numbers them; files `*_hopper.cu` are for 9.0 alone, with its own instructions.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// The one whose PTX is kept, from which a driver makes code for what comes later; 120 would leave 11.0 without any.
const PTX_ARCHITECTURE: u32 = 100;

/// A library that is loaded at run time: its file, the header and prefix of its functions, and what a function returns
/// before the library is loaded (an error in the library's own numbering).
const LIBRARIES: [(&str, &str, &str, u32); 5] = [
    ("libcuda.so.1", "cuda.h", "cu", 34),
    ("libcublas.so.13", "cublas_api.h", "cublas", 1),
    ("libcublasLt.so.13", "cublasLt.h", "cublasLt", 1),
    ("libcurand.so.10", "curand.h", "curand", 101),
    ("libnvrtc.so.13", "nvrtc.h", "nvrtc", 7),
];

fn main() {
    println!("cargo::rerun-if-changed=cuda/build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    for variable in ["CUDA_PATH", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let toolkit = find_toolkit();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    compile_kernels(&toolkit, &out);
    compile_loader(&toolkit, &out);
}

/// The directory of the toolkit, which has `bin/nvcc`.
fn find_toolkit() -> PathBuf {
    let named = ["CUDA_PATH", "CUDA_HOME"]
        .into_iter()
        .filter_map(env::var_os);
    let named = named.map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).filter_map(|bin| Some(bin.parent()?.to_path_buf()));
    let usual = [
        PathBuf::from("/usr/local/cuda"),
        PathBuf::from("target/cuda-toolkit/nvidia/cu13"),
    ];
    let found = named
        .chain(on_path)
        .chain(usual)
        .find(|root| root.join("bin/nvcc").is_file());
    found.unwrap_or_else(|| {
        fail("no nvcc: set CUDA_PATH, or run `cuda/toolkit.sh cargo build --features cuda`")
    })
}

fn fail(message: &str) -> ! {
    println!("cargo::error={}", message.replace('\n', " | "));
    std::process::exit(1)
}

fn compile_kernels(toolkit: &Path, out: &Path) {
    let mut files: Vec<PathBuf> = fs::read_dir("cuda")
        .expect("cuda/ is there")
        .map(|entry| entry.expect("cuda/ is readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    files.sort();
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|scope| {
        for worker in 0..workers {
            let mine: Vec<_> = files.iter().skip(worker).step_by(workers).collect();
            scope.spawn(move || {
                mine.iter()
                    .for_each(|file| compile_kernel(toolkit, file, out))
            });
        }
    });
    let mut table = String::from("pub(super) const FATBINS: &[(&str, &[u8])] = &[\n");
    for file in &files {
        let stem = stem(file);
        writeln!(
            table,
            "    ({stem:?}, include_bytes!({:?})),",
            out.join(format!("{stem}.fatbin"))
        )
        .expect("a String takes any text");
    }
    fs::write(out.join("fatbins.rs"), table + "];\n").expect("OUT_DIR is writable");
    println!("cargo::rustc-env=QLORA_FATBIN_DIR={}", out.display());
}

fn stem(file: &Path) -> &str {
    let stem = file.file_stem().and_then(|stem| stem.to_str());
    stem.expect("kernel files have plain names")
}

/// Compiles a file unless what is there was made of the same sources.
fn compile_kernel(toolkit: &Path, file: &Path, out: &Path) {
    let stem = stem(file);
    let (fatbin, report) = (
        out.join(format!("{stem}.fatbin")),
        out.join(format!("{stem}.ptxas.txt")),
    );
    let sources = sources_of(file);
    let stamp = out.join(format!("{stem}.sources"));
    if fatbin.is_file() && fs::read_to_string(&stamp).is_ok_and(|made_of| made_of == sources) {
        return;
    }
    let mut nvcc = Command::new(toolkit.join("bin/nvcc"));
    nvcc.args(["-std=c++17", "-O3", "-fatbin", "-Xptxas=-v", "-o"])
        .arg(&fatbin)
        .arg(file);
    if stem.ends_with("_hopper") {
        nvcc.arg("-gencode=arch=compute_90a,code=sm_90a");
    } else {
        for architecture in ARCHITECTURES {
            nvcc.arg(format!(
                "-gencode=arch=compute_{architecture},code=sm_{architecture}"
            ));
        }
        nvcc.arg(format!(
            "-gencode=arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}"
        ));
    }
    let output = match nvcc.output() {
        Ok(output) => output,
        Err(error) => fail(&format!("{}: {error}", nvcc.get_program().display())),
    };
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        fail(&format!("{}: {text}", file.display()));
    }
    fs::write(report, &*text).expect("OUT_DIR is writable");
    fs::write(stamp, sources).expect("OUT_DIR is writable");
}

/// The text of a kernel file and of all headers, any of which it may include.
fn sources_of(file: &Path) -> String {
    let mut headers: Vec<PathBuf> = fs::read_dir("cuda")
        .expect("cuda/ is there")
        .map(|entry| entry.expect("cuda/ is readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cuh"))
        .collect();
    headers.sort();
    headers.insert(0, file.to_path_buf());
    let read = |path: &PathBuf| fs::read_to_string(path).expect("kernel files are text");
    headers.iter().map(read).collect()
}

/// Builds `cuda/loader.c` with a list of every function of the libraries.
fn compile_loader(toolkit: &Path, out: &Path) {
    let mut list = String::new();
    let mut seen = BTreeSet::new();
    for (index, (library, header, prefix, error)) in LIBRARIES.into_iter().enumerate() {
        writeln!(list, "LIBRARY({index}, \"{library}\", {error})")
            .expect("a String takes any text");
        let path = toolkit.join("include").join(header);
        let Ok(text) = fs::read_to_string(&path) else {
            fail(&format!("{} is missing from the toolkit", path.display()));
        };
        for name in function_names(&text, prefix) {
            if seen.insert(name.clone()) {
                writeln!(list, "FUNCTION({index}, {name})").expect("a String takes any text");
            }
        }
    }
    fs::write(out.join("cuda_functions.inc"), list).expect("OUT_DIR is writable");
    let libraries = toolkit.join("lib64");
    let libraries = libraries.canonicalize().unwrap_or(libraries);
    let libraries = format!("{:?}", libraries.display().to_string());
    cc::Build::new()
        .file("cuda/loader.c")
        .include(out)
        .define("TOOLKIT_LIBRARIES", libraries.as_str())
        .flag("-fno-builtin")
        .cargo_metadata(false)
        .compile("qlora_cuda_loader");
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static:+whole-archive=qlora_cuda_loader");
    // candle's kernels use the runtime library, which can be part of the program.
    for lib in ["lib64", "lib"] {
        println!(
            "cargo::rustc-link-search=native={}",
            toolkit.join(lib).display()
        );
    }
    println!("cargo::rustc-link-lib=static:+whole-archive=cudart_static");
    // The names that candle links are looked for even though nothing is left to take from them.
    println!(
        "cargo::rustc-link-search=native={}",
        toolkit.join("lib64/stubs").display()
    );
}

/// The words of a header that are the prefix and then a capital letter, but for types, which end in `_t`.
fn function_names<'a>(header: &'a str, prefix: &'a str) -> impl Iterator<Item = String> + 'a {
    let words = header.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let is_function = move |word: &&str| {
        let rest = word.strip_prefix(prefix);
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
            && !word.ends_with("_t")
    };
    words.filter(is_function).map(str::to_string)
}
