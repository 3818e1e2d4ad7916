//! Compiles every kernel file of `cuda/` as host C++, with a table of its kernels.
//!
//! With `QLORA_EMULATOR_SANITIZE=1` in the environment, under AddressSanitizer and UndefinedBehaviorSanitizer.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "src/planted_faults.rs"]
mod planted_faults;

const SANITIZE: &str = "QLORA_EMULATOR_SANITIZE";

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let cuda = here
        .parent()
        .expect("the crate lies in cuda/")
        .to_path_buf();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for watched in [
        &cuda,
        &here.join("host"),
        &here.join("src/planted_faults.rs"),
    ] {
        println!("cargo::rerun-if-changed={}", watched.display());
    }
    println!("cargo::rerun-if-env-changed={SANITIZE}");

    let mut units = Vec::new();
    for file in sources(&cuda, "cu") {
        let source = fs::read_to_string(&file).expect("a kernel file is text");
        let stem = file
            .file_stem()
            .and_then(|stem| stem.to_str())
            .expect("a plain name");
        units.push(Unit::new(stem, &file, &source, ""));
        for fault in planted_faults::FAULTS
            .iter()
            .filter(|fault| fault.file == stem)
        {
            let planted = plant(fault, &cuda, &out.join(fault.name));
            let name = format!("{stem}_{}", fault.name);
            units.push(Unit::new(
                &name,
                &planted,
                &source,
                &format!("@{}", fault.name),
            ));
        }
    }

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .include(&cuda)
        .include(here.join("host"))
        // Kernels look at the same bytes as different types, and a product rounds where they say so.
        .flag("-fno-strict-aliasing")
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas");
    if env::var(SANITIZE).is_ok_and(|value| value == "1") {
        build
            .flag("-fsanitize=address,undefined")
            .flag("-fno-sanitize-recover=undefined")
            .flag("-fno-omit-frame-pointer")
            .debug(true);
        println!("cargo::rustc-link-lib=dylib=asan");
        println!("cargo::rustc-link-lib=dylib=ubsan");
    }
    for file in ["block.cpp", "fiber.cpp", "interface.cpp"] {
        build.file(here.join("host").join(file));
    }
    for unit in &units {
        let path = out.join(format!("{}.cpp", unit.name));
        fs::write(&path, unit.source()).expect("OUT_DIR is writable");
        build.file(path);
    }
    let table = out.join("table.cpp");
    fs::write(&table, table_source(&units)).expect("OUT_DIR is writable");
    build.file(table);
    build.compile("qlora_emulator");
}

/// A kernel file, as it is or with a planted fault, in a translation unit of its own.
struct Unit {
    name: String,
    file: PathBuf,
    kernels: Vec<String>,
    /// What follows the names of its kernels in the table.
    suffix: String,
}

impl Unit {
    fn new(name: &str, file: &Path, source: &str, suffix: &str) -> Self {
        Self {
            name: name.to_string(),
            file: file.to_path_buf(),
            kernels: kernel_names(source),
            suffix: suffix.to_string(),
        }
    }

    fn source(&self) -> String {
        let Self {
            name,
            file,
            kernels,
            suffix,
        } = self;
        let mut text = format!(
            "#include \"kernel_table.h\"\n#include \"{}\"\nvoid add_{name}(emulator::KernelTable& table) {{\n",
            file.display()
        );
        for kernel in kernels {
            writeln!(
                text,
                "    table.add<{kernel}>(\"{kernel}{suffix}\", {kernel}_threads);"
            )
            .expect("a String takes any text");
        }
        text + "    (void)table;\n}\n"
    }
}

fn table_source(units: &[Unit]) -> String {
    let each = |line: &dyn Fn(&str) -> String| -> String {
        units.iter().map(|unit| line(&unit.name)).collect()
    };
    format!(
        "#include \"kernel_table.h\"\n{}namespace emulator {{\nvoid add_kernels(KernelTable& table) {{\n{}    (void)table;\n}}\n}}\n",
        each(&|name| format!("void add_{name}(emulator::KernelTable& table);\n")),
        each(&|name| format!("    add_{name}(table);\n")),
    )
}

/// The files of `cuda/` with an extension, in order.
fn sources(cuda: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(cuda).expect("cuda/ is there");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("cuda/ is readable").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

/// Copies the kernel file and every header into a directory of their own, the fault among them; returns the kernel file there.
fn plant(fault: &planted_faults::PlantedFault, cuda: &Path, directory: &Path) -> PathBuf {
    fs::create_dir_all(directory).expect("OUT_DIR is writable");
    let kernel_file = format!("{}.cu", fault.file);
    let mut is_planted = false;
    for file in sources(cuda, "cuh")
        .into_iter()
        .chain([cuda.join(&kernel_file)])
    {
        let name = file.file_name().expect("a listed file has a name");
        let mut source = fs::read_to_string(&file).expect("a kernel file is text");
        if name == fault.place {
            source = fault.plant(&source);
            is_planted = true;
        }
        fs::write(directory.join(name), source).expect("OUT_DIR is writable");
    }
    assert!(
        is_planted,
        "there is no {} for `{}`",
        fault.place, fault.name
    );
    directory.join(kernel_file)
}

/// The names in `KERNEL(threads, name)`.
fn kernel_names(source: &str) -> Vec<String> {
    let code = source
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""));
    let code: String = code.map(|line| format!("{line}\n")).collect();
    let uses = code.split("KERNEL(").skip(1);
    uses.filter_map(|rest| {
        let (_, name) = rest.split(')').next()?.split_once(',')?;
        Some(name.trim().to_string())
    })
    .collect()
}
