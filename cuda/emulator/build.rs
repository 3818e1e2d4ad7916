//! Compiles the machine (`host/*.cpp`) and every kernel file, and writes the table of kernels that `src/kernels.rs` includes.
//!
//! Each kernel file becomes two objects: as it is, and watched (the compiler puts a call before every access; see
//! `host/compiler_calls.cpp`). An object is compiled again only if its text after the preprocessor or its flags have changed.
//!
//! With `QLORA_EMULATOR_SANITIZE` set (see `sanitize.sh`) everything is compiled with those sanitizers, and nothing is watched.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-g1",
    // A GPU rounds the product and the sum apart wherever a kernel says so; the host must not fuse them.
    "-ffp-contract=off",
    // Kernels look at memory as vectors of 16 bytes, which nvcc allows.
    "-fno-strict-aliasing",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// One C++ file to compile.
struct Unit {
    name: String,
    source: PathBuf,
    flags: Vec<String>,
}

/// A kernel file: `stem.cu` with the names of its kernels.
struct KernelFile {
    stem: String,
    kernels: Vec<String>,
}

fn main() {
    let crate_dir = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let cuda_dir = crate_dir
        .parent()
        .expect("the crate lies in cuda/")
        .to_path_buf();
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
    let compiler = Compiler::new(&cuda_dir, &out_dir);
    println!("cargo::rerun-if-changed={}", cuda_dir.display());
    println!(
        "cargo::rerun-if-changed={}",
        crate_dir.join("host").display()
    );

    let mut units: Vec<Unit> = files_with_extension(&crate_dir.join("host"), "cpp")
        .into_iter()
        .map(|source| Unit {
            name: format!("host_{}", stem(&source)),
            source,
            flags: compiler.sanitizer_flags(),
        })
        .collect();
    let mut tables = String::new();
    for (table, directory) in [
        ("KERNELS", &cuda_dir),
        ("SELF_TEST_KERNELS", &crate_dir.join("tests/kernels")),
    ] {
        let mut files = Vec::new();
        for path in files_with_extension(directory, "cu") {
            let file = KernelFile {
                stem: stem(&path),
                kernels: compiler.kernels_of(&path),
            };
            units.extend(compiler.units_of(&file, &path));
            files.push(file);
        }
        tables += &rust_table(table, &files, compiler.watches());
    }
    fs::write(out_dir.join("tables.rs"), tables).expect("OUT_DIR can be written");

    let objects = compiler.compile_all(units);
    let mut archive = cc::Build::new();
    archive
        .cpp(true)
        .cargo_warnings(false)
        .objects(objects)
        .compile("qlora_emulator");
    compiler.link_sanitizers();
}

fn files_with_extension(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a directory entry can be read").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .expect("a file")
        .to_str()
        .expect("file names of this repository are ASCII")
        .to_owned()
}

/// The part of `tables.rs` for the kernel files of one directory.
fn rust_table(table: &str, files: &[KernelFile], with_watched: bool) -> String {
    let mut declarations = String::new();
    let mut rows = String::new();
    for KernelFile { stem, kernels } in files.iter().filter(|file| !file.kernels.is_empty()) {
        let count = kernels.len();
        writeln!(
            declarations,
            "    static kernels_of_{stem}: [Entry; {count}];"
        )
        .expect("a String can be written");
        let watched = if with_watched {
            writeln!(
                declarations,
                "    static watched_kernels_of_{stem}: [Entry; {count}];"
            )
            .expect("a String can be written");
            format!("Some(unsafe {{ &watched_kernels_of_{stem} }})")
        } else {
            "None".to_owned()
        };
        writeln!(rows, "    File {{ stem: {stem:?}, entries: unsafe {{ &kernels_of_{stem} }}, watched: {watched} }},")
            .expect("a String can be written");
    }
    format!("unsafe extern \"C\" {{\n{declarations}}}\nstatic {table}: &[File] = &[\n{rows}];\n")
}

struct Compiler {
    tool: cc::Tool,
    out_dir: PathBuf,
    sanitizers: Option<String>,
}

impl Compiler {
    fn new(cuda_dir: &Path, out_dir: &Path) -> Self {
        println!("cargo::rerun-if-env-changed=QLORA_EMULATOR_SANITIZE");
        let mut build = cc::Build::new();
        build.cpp(true).no_default_flags(true).warnings(false);
        for flag in FLAGS {
            build.flag(flag);
        }
        build.include(cuda_dir);
        Self {
            tool: build.get_compiler(),
            out_dir: out_dir.to_owned(),
            sanitizers: std::env::var("QLORA_EMULATOR_SANITIZE")
                .ok()
                .filter(|list| !list.is_empty()),
        }
    }

    fn watches(&self) -> bool {
        self.sanitizers.is_none()
    }

    fn sanitizer_flags(&self) -> Vec<String> {
        self.sanitizers
            .iter()
            .flat_map(|list| {
                [
                    format!("-fsanitize={list}"),
                    "-DEMULATOR_SANITIZED".to_owned(),
                    "-O1".to_owned(),
                ]
            })
            .collect()
    }

    /// The names that a file declares with `KERNEL`, also by way of macros of its own.
    fn kernels_of(&self, path: &Path) -> Vec<String> {
        const MARK: &str = "constexpr unsigned threads_of_";
        let text = self.preprocess(path, &[]);
        text.match_indices(MARK)
            .map(|(at, _)| {
                text[at + MARK.len()..]
                    .split_whitespace()
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect()
    }

    fn preprocess(&self, source: &Path, flags: &[String]) -> String {
        let output = self
            .tool
            .to_command()
            .args(flags)
            .args(["-E", "-x", "c++"])
            .arg(source)
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", self.tool.path().display()));
        if !output.status.success() {
            panic!(
                "{}:\n{}",
                source.display(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Writes the translation units of a kernel file. The anonymous namespace keeps the files' helpers apart from each other.
    fn units_of(&self, file: &KernelFile, path: &Path) -> Vec<Unit> {
        let entries: Vec<String> = file
            .kernels
            .iter()
            .map(|kernel| format!("    ENTRY({kernel}),\n"))
            .collect();
        let variants = [
            ("", self.sanitizer_flags()),
            (
                "watched_",
                vec!["-fsanitize=thread,undefined".to_owned(), "-O1".to_owned()],
            ),
        ];
        let mut units = Vec::new();
        for (prefix, flags) in variants
            .into_iter()
            .take(if self.watches() { 2 } else { 1 })
        {
            let table = format!("{prefix}kernels_of_{}", file.stem);
            let text = format!(
                "#include \"tensor_core.cuh\"\n#include \"emulator/host/kernel_table.h\"\n\
                 namespace {{\n#include \"{}\"\n}}\n\
                 extern \"C\" {{\nextern const emulator::Entry {table}[];\nconst emulator::Entry {table}[] = {{\n{}}};\n}}\n",
                path.display(),
                entries.concat(),
            );
            let source = self.out_dir.join(format!("{table}.cpp"));
            fs::write(&source, text).expect("OUT_DIR can be written");
            if !entries.is_empty() {
                units.push(Unit {
                    name: table,
                    source,
                    flags,
                });
            }
        }
        units
    }

    /// Compiles what has changed, on as many processors as cargo allows, and returns all objects.
    fn compile_all(&self, units: Vec<Unit>) -> Vec<PathBuf> {
        let jobs = std::env::var("NUM_JOBS")
            .ok()
            .and_then(|jobs| jobs.parse().ok())
            .unwrap_or(1);
        let queue = Mutex::new(units.into_iter());
        let objects = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    loop {
                        let next = queue.lock().expect("no thread panics with the lock").next();
                        let Some(unit) = next else { break };
                        let object = self.compile(&unit);
                        objects
                            .lock()
                            .expect("no thread panics with the lock")
                            .push(object);
                    }
                });
            }
        });
        let mut objects = objects
            .into_inner()
            .expect("no thread panics with the lock");
        objects.sort();
        objects
    }

    fn compile(&self, unit: &Unit) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        (
            self.preprocess(&unit.source, &unit.flags),
            &unit.flags,
            FLAGS,
            self.tool.path(),
        )
            .hash(&mut hasher);
        // Sanitized objects lie beside the usual ones, so that neither drives out the other.
        let prefix = if self.sanitizers.is_some() {
            "sanitized_"
        } else {
            ""
        };
        let object = self.out_dir.join(format!("{prefix}{}.o", unit.name));
        let key_file = object.with_extension("key");
        let key = format!("{:016x}", hasher.finish());
        if object.exists() && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
            return object;
        }
        let mut command: Command = self.tool.to_command();
        command
            .args(&unit.flags)
            .arg("-c")
            .arg(&unit.source)
            .arg("-o")
            .arg(&object);
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", self.tool.path().display()));
        let messages = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            panic!("{} does not compile as C++:\n{messages}", unit.name);
        }
        for line in messages.lines() {
            println!("cargo::warning={line}");
        }
        fs::write(&key_file, key).expect("OUT_DIR can be written");
        object
    }

    /// The sanitizers' libraries come with the compiler, in a folder that the linker does not know by itself.
    fn link_sanitizers(&self) {
        for sanitizer in self.sanitizers.iter().flat_map(|list| list.split(',')) {
            let library = match sanitizer {
                "address" => "asan",
                "undefined" => "ubsan",
                other => panic!(
                    "QLORA_EMULATOR_SANITIZE: {other} is unknown; address and undefined are there"
                ),
            };
            let mut command = self.tool.to_command();
            let output = command
                .arg(format!("-print-file-name=lib{library}.so"))
                .output()
                .expect("the compiler has run before");
            let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            if let Some(folder) = path.parent() {
                println!("cargo::rustc-link-search=native={}", folder.display());
            }
            println!("cargo::rustc-link-lib=dylib={library}");
        }
    }
}
