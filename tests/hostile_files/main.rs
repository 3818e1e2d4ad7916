//! Every reader of foreign files, fed with damaged ones: no panic, no hang, no memory out of proportion to the file.
//!
//! `cargo test --test hostile_files -- --ignored` does a minute for each reader. The same readers are targets of cargo-fuzz
//! (`fuzz/`), with the same corpus.

mod limits;
mod mutator;
mod readers;

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use limits::{CountingAllocator, peak_bytes};
use mutator::Mutator;
use readers::{READERS, Scratch, reader};

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// What a reader may hold at once: so much, and so many times the size of the file.
const PEAK_BYTES: usize = 16 << 20;
const PEAK_PER_BYTE: usize = 256;
/// What one file may take, on a machine that does other things too.
const LONGEST: Duration = Duration::from_secs(20);

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/corpus")
        .join(name);
    let mut paths: Vec<_> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(paths.len() > 1, "a corpus of one file: {}", dir.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Ends the program if a file takes too long: a reader that hangs does not return by itself.
struct Watchdog {
    current: Arc<Mutex<Vec<u8>>>,
    started: Arc<AtomicU64>,
    epoch: Instant,
}

impl Watchdog {
    const IDLE: u64 = u64::MAX;

    fn new(name: &'static str) -> Self {
        let watchdog = Self {
            current: Arc::default(),
            started: Arc::new(AtomicU64::new(Self::IDLE)),
            epoch: Instant::now(),
        };
        let (current, started, epoch) = (
            Arc::downgrade(&watchdog.current),
            watchdog.started.clone(),
            watchdog.epoch,
        );
        std::thread::spawn(move || {
            while let Some(current) = current.upgrade() {
                let since = started.load(Ordering::Acquire);
                let now = epoch.elapsed().as_millis() as u64;
                if since != Self::IDLE && now.saturating_sub(since) > LONGEST.as_millis() as u64 {
                    let path = keep(name, &current.lock().unwrap());
                    eprintln!("{name}: {path} takes more than {LONGEST:?}");
                    std::process::abort();
                }
                drop(current);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        watchdog
    }

    fn watch(&self, bytes: &[u8], read: impl FnOnce()) {
        self.current.lock().unwrap().clone_from(&bytes.to_vec());
        let now = self.epoch.elapsed().as_millis() as u64;
        self.started.store(now, Ordering::Release);
        read();
        self.started.store(Self::IDLE, Ordering::Release);
    }
}

/// Writes a file that broke a reader where it can be looked at, and gives its path.
fn keep(name: &str, bytes: &[u8]) -> String {
    let path = std::env::temp_dir().join(format!("hostile_{name}_{}", std::process::id()));
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

thread_local! {
    /// Of a thread that reads hostile files: what its last panic said.
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps what panics of this thread say: one that a reader catches is not told, and no memory goes into its backtrace.
fn keep_panics_quiet() {
    static HOOK: Once = Once::new();
    LAST_PANIC.set(Some(String::new()));
    HOOK.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let is_quiet = LAST_PANIC.with_borrow_mut(|last| match last {
                Some(last) => {
                    *last = panic.to_string();
                    true
                }
                None => false,
            });
            if !is_quiet {
                told(panic);
            }
        }));
    });
}

/// Feeds a reader its corpus and then damaged files of it, until `enough` says so, and gives their number.
fn feed(name: &'static str, enough: impl Fn(usize) -> bool + Send + Sync) -> usize {
    // All work of the reader on one thread, whose memory is counted.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    pool.unwrap().install(|| {
        let corpus = corpus(name);
        let scratch = Scratch::new(reader(name));
        let watchdog = Watchdog::new(name);
        keep_panics_quiet();
        let mut mutator = Mutator::new(name.bytes().map(u64::from).sum());
        let mut largest = 0;
        for number in 0.. {
            if number >= corpus.len() && enough(number) {
                println!("{name}: {number} files, at most {largest} bytes held");
                return number;
            }
            let bytes = match corpus.get(number) {
                Some(seed) => seed.clone(),
                None => mutator.next(&corpus),
            };
            let read = || watchdog.watch(&bytes, || scratch.read(&bytes));
            let read = std::panic::AssertUnwindSafe(|| peak_bytes(read));
            let Ok(peak) = std::panic::catch_unwind(read) else {
                let panic = LAST_PANIC.take().unwrap_or_default();
                fail(format!(
                    "{name}: {} makes it panic: {panic}",
                    keep(name, &bytes)
                ));
            };
            largest = largest.max(peak);
            let allowed = PEAK_BYTES + PEAK_PER_BYTE * bytes.len();
            if peak > allowed {
                let (path, size) = (keep(name, &bytes), bytes.len());
                fail(format!(
                    "{name}: {path} of {size} bytes made it hold {peak}"
                ));
            }
        }
        unreachable!("the numbers do not end")
    })
}

/// Ends a test in spite of the quiet hook.
fn fail(message: String) -> ! {
    eprintln!("{message}");
    std::panic::resume_unwind(Box::new(message))
}

macro_rules! each_reader {
    ($($name:ident),*) => {
        /// Some thousand files: always the same ones.
        mod a_few_thousand_damaged_files {
            $( #[test] fn $name() { super::feed(stringify!($name), |files| files >= 2_000); } )*
        }

        mod a_minute_of_damaged_files {
            $(
                #[test]
                #[ignore = "takes a minute for each reader"]
                fn $name() {
                    let started = std::time::Instant::now();
                    let minute = std::time::Duration::from_secs(60);
                    let files = super::feed(stringify!($name), |_| started.elapsed() >= minute);
                    assert!(files > 5_000, "{files} files in a minute");
                }
            )*
        }

        const FED: &[&str] = &[$( stringify!($name) ),*];
    };
}

each_reader!(
    safetensors,
    shard_index,
    model_config,
    tokenizer,
    chat_template,
    adapter_config,
    adapter_weights,
    gguf,
    checkpoint,
    data_jsonl,
    data_json,
    data_csv,
    data_parquet,
    data_gzip,
    data_zstd,
    run_config
);

#[test]
fn every_reader_is_fed_and_has_a_fuzz_target() {
    let names: Vec<&str> = READERS.iter().map(|reader| reader.name).collect();
    assert_eq!(names, FED);
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/Cargo.toml");
    let manifest = fs::read_to_string(manifest).unwrap();
    for name in names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}

#[test]
fn memory_is_counted() {
    let peak = peak_bytes(|| drop(vec![1u8; 5 << 20]));
    assert!((5 << 20..6 << 20).contains(&peak), "{peak}");
}

#[test]
fn pickled_weights_are_refused_with_how_to_convert_them() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02.").unwrap();
    let error = qlora::store::Checkpoint::open(dir.path()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("pytorch_model.bin") && error.contains("save_pretrained"),
        "{error}"
    );
    let seed = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/corpus/adapter_config/r_1.json"
    );
    fs::copy(seed, dir.path().join("adapter_config.json")).unwrap();
    fs::write(dir.path().join("adapter_model.bin"), b"\x80\x02.").unwrap();
    let error = qlora::store::Adapter::read(dir.path()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("adapter_model.bin") && error.contains("safetensors"),
        "{error}"
    );
}
