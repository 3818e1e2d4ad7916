//! Compiles the machine (`host/*.cpp`) and every kernel file, and writes the tables of kernels that `src/kernels.rs` includes.
//!
//! Each kernel file becomes two objects: as it is, and watched (the compiler puts a call before every access; see
//! `host/compiler_calls.cpp`). The mutants are watched only.
//!
//! With `QLORA_EMULATOR_SANITIZE` set (see `sanitize.sh`) everything is compiled with those sanitizers, and nothing is watched.

mod compiler;
mod mutants;

use std::fs;
use std::path::{Path, PathBuf};

use compiler::{Compiler, Unit};
use mutants::{MUTANTS, Mutant};

fn main() {
    let crate_dir = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let cuda_dir = crate_dir.parent().expect("the crate lies in cuda/");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
    println!("cargo::rerun-if-changed={}", cuda_dir.display());

    let mut build = Build {
        compiler: Compiler::new(cuda_dir, &out_dir),
        out_dir,
        units: Vec::new(),
        declarations: String::new(),
    };
    build.add_machine(&crate_dir.join("host"));
    let kernels = build.add_kernel_files(cuda_dir);
    let self_test_kernels = build.add_kernel_files(&crate_dir.join("tests/kernels"));
    let mutants = build.add_mutants(cuda_dir);
    let tables = format!(
        "unsafe extern \"C\" {{\n{}}}\n\
         static KERNELS: &[File] = &[\n{kernels}];\n\
         static SELF_TEST_KERNELS: &[File] = &[\n{self_test_kernels}];\n\
         static MUTANTS: &[MutantFile] = &[\n{mutants}];\n",
        build.declarations
    );
    fs::write(build.out_dir.join("tables.rs"), tables).expect("OUT_DIR can be written");
    build.compiler.build_library("qlora_emulator", build.units);
}

/// What has been collected so far.
struct Build {
    compiler: Compiler,
    out_dir: PathBuf,
    units: Vec<Unit>,
    /// The C++ tables, as Rust declares them.
    declarations: String,
}

impl Build {
    fn add_machine(&mut self, directory: &Path) {
        for source in files_with_extension(directory, "cpp") {
            let flags = self.compiler.sanitizer_flags();
            self.units.push(Unit {
                name: format!("host_{}", stem(&source)),
                source,
                flags,
            });
        }
    }

    /// Adds the kernel files of a directory and returns the rows of their table in Rust.
    fn add_kernel_files(&mut self, directory: &Path) -> String {
        let mut rows = String::new();
        for path in files_with_extension(directory, "cu") {
            let kernels = self.compiler.kernels_of(&path);
            if kernels.is_empty() {
                continue;
            }
            let stem = stem(&path);
            let plain = self.add_table(
                &format!("kernels_of_{stem}"),
                &path,
                &kernels,
                self.compiler.sanitizer_flags(),
            );
            let watched = if self.compiler.is_sanitizing() {
                "None".to_owned()
            } else {
                let table = format!("watched_kernels_of_{stem}");
                format!(
                    "Some({})",
                    self.add_table(&table, &path, &kernels, watch_flags())
                )
            };
            rows +=
                &format!("    File {{ stem: {stem:?}, entries: {plain}, watched: {watched} }},\n");
        }
        rows
    }

    /// Adds the mutants and returns the rows of their table in Rust.
    fn add_mutants(&mut self, cuda_dir: &Path) -> String {
        let mut rows = String::new();
        if self.compiler.is_sanitizing() {
            return rows;
        }
        for (number, mutant) in MUTANTS.iter().enumerate() {
            let path = self.write_mutant(number, mutant, cuda_dir);
            let kernels = self.compiler.kernels_of(&path);
            let entries = self.add_table(
                &format!("kernels_of_mutant_{number}"),
                &path,
                &kernels,
                watch_flags(),
            );
            let (name, file) = (mutant.name, stem(&path));
            rows += &format!(
                "    MutantFile {{ name: {name:?}, file: {file:?}, entries: {entries} }},\n"
            );
        }
        rows
    }

    /// Writes the mutant's kernel file to a folder of its own with all headers, which it finds there first.
    fn write_mutant(&self, number: usize, mutant: &Mutant, cuda_dir: &Path) -> PathBuf {
        let folder = self.out_dir.join(format!("mutant_{number}"));
        fs::create_dir_all(&folder).expect("OUT_DIR can be written");
        let mut is_planted = false;
        let headers = files_with_extension(cuda_dir, "cuh");
        for path in headers
            .into_iter()
            .chain([cuda_dir.join(mutant.kernel_file)])
        {
            let name = path.file_name().expect("a file");
            let mut text = fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            if name == mutant.source {
                is_planted = text.matches(mutant.text).count() == 1;
                text = text.replace(mutant.text, mutant.replacement);
            }
            fs::write(folder.join(name), text).expect("OUT_DIR can be written");
        }
        assert!(
            is_planted,
            "{:?} does not occur exactly once in {}: plant the fault {:?} anew in build/mutants.rs",
            mutant.text, mutant.source, mutant.name
        );
        folder.join(mutant.kernel_file)
    }

    /// Adds a C++ file with the table of a kernel file's kernels and returns the table as a Rust expression.
    ///
    /// The anonymous namespace keeps the functions of a kernel file and its headers apart from those of other files, and from the
    /// same functions compiled with other flags, which the linker would take for the same.
    fn add_table(
        &mut self,
        table: &str,
        kernel_file: &Path,
        kernels: &[String],
        flags: Vec<String>,
    ) -> String {
        let entries: Vec<String> = kernels
            .iter()
            .map(|kernel| format!("    ENTRY({kernel}),\n"))
            .collect();
        let text = format!(
            "#include \"emulator/host/tensor_core_on_host.h\"\n#include \"emulator/host/warpgroup_on_host.h\"\n#include \"emulator/host/kernel_table.h\"\n\
             namespace {{\n#include \"{}\"\n}}\n\
             extern \"C\" {{\n\
             extern const emulator::Entry {table}[];\n\
             const emulator::Entry {table}[] = {{\n{}}};\n\
             }}\n",
            kernel_file.display(),
            entries.concat(),
        );
        let source = self.out_dir.join(format!("{table}.cpp"));
        fs::write(&source, text).expect("OUT_DIR can be written");
        self.units.push(Unit {
            name: table.to_owned(),
            source,
            flags,
        });
        self.declarations += &format!("    static {table}: [Entry; {}];\n", kernels.len());
        format!("unsafe {{ &{table} }}")
    }
}

fn watch_flags() -> Vec<String> {
    ["-fsanitize=thread,undefined", "-O1"]
        .map(str::to_owned)
        .to_vec()
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
