//! The machine and the program that a result is of.

use qlora::device::{self, Placement};
use serde_json::{Value, json};

/// The processor or the GPU with its driver, threads, version and commit.
pub fn describe(placement: &Placement) -> Value {
    let device = match device::runtime(&placement.device) {
        Some(runtime) if placement.uses_kernels() => runtime.describe(),
        _ => processor().unwrap_or_else(|| "a processor without a name".into()),
    };
    json!({
        "device": device,
        "threads": rayon::current_num_threads(),
        "os": std::env::consts::OS,
        "version": env!("CARGO_PKG_VERSION"),
        "commit": commit(),
    })
}

/// The name of the processor, from `/proc/cpuinfo`.
fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let (family, model) = (field("cpu family")?, field("model\t")?);
    Some(format!(
        "{}, family {family}, model {model}",
        field("model name")?
    ))
}

/// The commit that the program was built from: as the build was told, or that of the sources where they are.
fn commit() -> Option<String> {
    if let Some(commit) = option_env!("QLORA_COMMIT") {
        return Some(commit.to_string());
    }
    let git = |arguments: &[&str]| {
        let sources = env!("CARGO_MANIFEST_DIR");
        let mut git = std::process::Command::new("git");
        let output = git.args(["-C", sources]).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_string())
    };
    let commit = git(&["rev-parse", "--short=10", "HEAD"])?;
    let is_changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(commit + if is_changed { ", with changes" } else { "" })
}
