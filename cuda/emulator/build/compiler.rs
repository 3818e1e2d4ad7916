//! The C++ compiler: which names a kernel file declares, and objects that are compiled again only when they have to be.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
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

/// The names of the sanitizers to compile with, separated by commas.
const SANITIZE_VARIABLE: &str = "QLORA_EMULATOR_SANITIZE";

/// One C++ file to compile.
pub struct Unit {
    /// Of the object.
    pub name: String,
    pub source: PathBuf,
    /// Beyond [`FLAGS`].
    pub flags: Vec<String>,
}

pub struct Compiler {
    tool: cc::Tool,
    out_dir: PathBuf,
    sanitizers: Vec<String>,
}

impl Compiler {
    pub fn new(include: &Path, out_dir: &Path) -> Self {
        println!("cargo::rerun-if-env-changed={SANITIZE_VARIABLE}");
        let sanitizers = std::env::var(SANITIZE_VARIABLE).unwrap_or_default();
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .no_default_flags(true)
            .warnings(false)
            .include(include);
        for flag in FLAGS {
            build.flag(flag);
        }
        Self {
            tool: build.get_compiler(),
            out_dir: out_dir.to_owned(),
            sanitizers: sanitizers
                .split(',')
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect(),
        }
    }

    pub fn is_sanitizing(&self) -> bool {
        !self.sanitizers.is_empty()
    }

    pub fn sanitizer_flags(&self) -> Vec<String> {
        if self.sanitizers.is_empty() {
            return Vec::new();
        }
        vec![
            format!("-fsanitize={}", self.sanitizers.join(",")),
            "-DEMULATOR_SANITIZED".to_owned(),
            "-O1".to_owned(),
        ]
    }

    /// The names that a file declares with `KERNEL`, also by way of macros of its own.
    pub fn kernels_of(&self, path: &Path) -> Vec<String> {
        const MARK: &str = "constexpr unsigned threads_of_";
        let text = self.preprocess(path, &[]);
        let names = text.split(MARK).skip(1);
        names
            .map(|rest| {
                rest.split_whitespace()
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect()
    }

    fn preprocess(&self, source: &Path, flags: &[String]) -> String {
        let mut command = self.tool.to_command();
        command.args(flags).args(["-E", "-x", "c++"]).arg(source);
        let output = command
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

    /// Compiles what has changed and tells cargo to link all of it.
    pub fn build_library(&self, name: &str, units: Vec<Unit>) {
        let objects = self.compile_all(units);
        cc::Build::new()
            .cpp(true)
            .cargo_warnings(false)
            .objects(objects)
            .compile(name);
        self.link_sanitizers();
    }

    /// Compiles on as many processors as cargo allows.
    fn compile_all(&self, units: Vec<Unit>) -> Vec<PathBuf> {
        let jobs = std::env::var("NUM_JOBS")
            .ok()
            .and_then(|jobs| jobs.parse().ok())
            .unwrap_or(1);
        let queue = Mutex::new(units.into_iter());
        let next = || queue.lock().expect("no thread panics with the lock").next();
        let mut objects: Vec<PathBuf> = std::thread::scope(|scope| {
            let compile_some = || {
                std::iter::from_fn(next)
                    .map(|unit| self.compile(&unit))
                    .collect::<Vec<_>>()
            };
            let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(compile_some)).collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().expect("the messages above say why"))
                .collect()
        });
        objects.sort();
        objects
    }

    /// The object of a unit. It is kept while the unit's flags and its text after the preprocessor stay the same.
    fn compile(&self, unit: &Unit) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        let text = self.preprocess(&unit.source, &unit.flags);
        (text, &unit.flags, FLAGS, self.tool.path()).hash(&mut hasher);
        let key = format!("{:016x}", hasher.finish());
        // Sanitized objects lie beside the usual ones, so that neither drives out the other.
        let prefix = if self.is_sanitizing() {
            "sanitized_"
        } else {
            ""
        };
        let object = self.out_dir.join(format!("{prefix}{}.o", unit.name));
        let key_file = object.with_extension("key");
        if object.exists() && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
            return object;
        }
        let mut command = self.tool.to_command();
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
        for sanitizer in &self.sanitizers {
            let library = match sanitizer.as_str() {
                "address" => "asan",
                "undefined" => "ubsan",
                other => panic!(
                    "{SANITIZE_VARIABLE}: {other} is unknown; address and undefined are there"
                ),
            };
            let mut command = self.tool.to_command();
            command.arg(format!("-print-file-name=lib{library}.so"));
            let output = command.output().expect("the compiler has run before");
            let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            if let Some(folder) = path.parent() {
                println!("cargo::rustc-link-search=native={}", folder.display());
            }
            println!("cargo::rustc-link-lib=dylib={library}");
        }
    }
}
