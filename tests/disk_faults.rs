//! A disk that fails, tears, lies or ends at its n-th operation, for every n: never a checkpoint that loads and is wrong, and
//! the run that goes on from what is left ends as if nothing had happened.

mod tiny_run;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use qlora::store::{AtomicDir, Disk, Existing, ManifestWriter, SystemDisk, remove_leftovers};
use qlora::train::checkpoint::{self, Checkpoint};
use qlora::train::{Outcome, TrainConfig};
use std::sync::atomic::AtomicBool;
use tiny_run::{assert_same_end, bytes, names, resumed, trainer};

/// What happens at one operation of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It alone fails.
    Fails,
    /// A half of it is done where it writes; it and all later ones fail, as on a full disk or one that became read-only.
    FailsForGood,
    /// As if the power went: a half of it is done where it writes, nothing after it, and of each file that was not synced
    /// a half is left.
    PowerLoss,
    /// A half of it is done where it writes, and it says that all went well.
    Lies,
}

#[derive(Debug, Default)]
struct State {
    operations: usize,
    unsynced: Vec<PathBuf>,
    is_broken: bool,
}

/// The system's disk with a fault at the operation `at`, counted from 0.
#[derive(Debug, Clone)]
struct FaultyDisk {
    fault: Option<(usize, Fault)>,
    has_exchange: bool,
    state: Arc<Mutex<State>>,
}

/// What an operation is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    All,
    HalfWell,
    HalfBadly,
    Nothing,
}

impl FaultyDisk {
    fn new(fault: Option<(usize, Fault)>) -> Self {
        Self {
            fault,
            has_exchange: true,
            state: Arc::default(),
        }
    }

    fn operations(&self) -> usize {
        self.state.lock().unwrap().operations
    }

    fn next(&self) -> Verdict {
        let mut state = self.state.lock().unwrap();
        let operation = state.operations;
        state.operations += 1;
        if state.is_broken {
            return Verdict::Nothing;
        }
        let Some((_, fault)) = self.fault.filter(|(at, _)| *at == operation) else {
            return Verdict::All;
        };
        match fault {
            Fault::Fails => Verdict::Nothing,
            Fault::Lies => Verdict::HalfWell,
            Fault::FailsForGood => {
                state.is_broken = true;
                Verdict::HalfBadly
            }
            Fault::PowerLoss => {
                state.is_broken = true;
                for path in state.unsynced.drain(..) {
                    if let Ok(content) = fs::read(&path) {
                        fs::write(&path, &content[..content.len() / 2]).unwrap();
                    }
                }
                Verdict::HalfBadly
            }
        }
    }

    /// An operation that cannot be half done.
    fn whole(&self, operation: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match self.next() {
            Verdict::All => operation(),
            Verdict::HalfWell => Ok(()),
            Verdict::HalfBadly | Verdict::Nothing => Err(failure()),
        }
    }
}

fn failure() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

impl Disk for FaultyDisk {
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn Write + Send>> {
        self.whole(|| Ok(()))?;
        let inner = SystemDisk.create_file(path)?;
        let (disk, path) = (self.clone(), path.to_path_buf());
        Ok(Box::new(FaultyFile { inner, disk, path }))
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.whole(|| {
            let mut state = self.state.lock().unwrap();
            state.unsynced.retain(|unsynced| unsynced != path);
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.whole(|| {
            fs::rename(from, to)?;
            for unsynced in &mut self.state.lock().unwrap().unsynced {
                if let Ok(rest) = unsynced.strip_prefix(from) {
                    *unsynced = to.join(rest);
                }
            }
            Ok(())
        })
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        match self.has_exchange {
            true => self.whole(|| SystemDisk.exchange(one, other)),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match self.next() {
            Verdict::All => fs::remove_dir_all(path),
            Verdict::HalfWell => Ok(()),
            Verdict::HalfBadly => {
                // One of its files is gone.
                let first = fs::read_dir(path)?.next();
                if let Some(Ok(entry)) = first
                    && entry.path().is_file()
                {
                    fs::remove_file(entry.path())?;
                }
                Err(failure())
            }
            Verdict::Nothing => Err(failure()),
        }
    }
}

struct FaultyFile {
    inner: Box<dyn Write + Send>,
    disk: FaultyDisk,
    path: PathBuf,
}

impl Write for FaultyFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        // Before the verdict: it may be that the power goes now.
        let state = Arc::clone(&self.disk.state);
        let verdict = self.disk.next();
        let half = &buffer[..buffer.len() / 2];
        match verdict {
            Verdict::All => self.inner.write_all(buffer)?,
            Verdict::HalfWell => self.inner.write_all(half)?,
            Verdict::HalfBadly => {
                self.inner.write_all(half)?;
                return Err(failure());
            }
            Verdict::Nothing => return Err(failure()),
        }
        state.lock().unwrap().unsynced.push(self.path.clone());
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Four steps, each with a checkpoint, of which one is kept.
fn config(output_dir: &Path) -> TrainConfig {
    TrainConfig {
        eval_dataset_size: None,
        eval_steps: None,
        max_steps: 4,
        save_steps: 1,
        save_total_limit: 1,
        ..tiny_run::config(output_dir)
    }
}

fn run_on(disk: &FaultyDisk, config: TrainConfig) -> qlora::Result<Outcome> {
    let mut trainer = trainer(config)?.on_disk(Arc::new(disk.clone()));
    trainer.run(&AtomicBool::new(false), |_| ())
}

type Tensors = Vec<(String, Vec<u8>)>;

fn tensors(checkpoint: &Checkpoint) -> Tensors {
    let all = checkpoint.adapter.tensors.iter().chain(&checkpoint.moments);
    all.map(|(name, tensor)| (name.clone(), tensor.data.to_vec()))
        .collect()
}

/// Every checkpoint of an uninterrupted run by its name.
fn right_checkpoints() -> BTreeMap<String, (checkpoint::TrainerState, Tensors)> {
    let dir = tempfile::tempdir().unwrap();
    let keeps_all = TrainConfig {
        save_total_limit: 0,
        ..config(dir.path())
    };
    run_on(&FaultyDisk::new(None), keeps_all).unwrap();
    let paths = checkpoint::list(dir.path()).unwrap();
    assert_eq!(paths.len(), 4);
    paths
        .into_iter()
        .map(|path| {
            let read = checkpoint::read(&path).unwrap();
            (
                read.state.checkpoint_name(),
                (read.state.clone(), tensors(&read)),
            )
        })
        .collect()
}

#[test]
fn no_failure_of_the_disk_makes_a_wrong_checkpoint_or_loses_the_run() {
    let right = right_checkpoints();
    let whole = tempfile::tempdir().unwrap();
    let counting = FaultyDisk::new(None);
    run_on(&counting, config(whole.path())).unwrap();
    let operations = counting.operations();
    assert!(operations > 60, "{operations}");

    let mut found_out = 0;
    for at in 0..operations {
        for fault in [
            Fault::Fails,
            Fault::FailsForGood,
            Fault::PowerLoss,
            Fault::Lies,
        ] {
            let what = format!("{fault:?} at operation {at}");
            let dir = tempfile::tempdir().unwrap();
            let disk = FaultyDisk::new(Some((at, fault)));
            let outcome = run_on(&disk, config(dir.path()));
            assert!(disk.operations() > at, "{what}: it did not come to it");
            if fault == Fault::Lies {
                assert_eq!(outcome.unwrap(), Outcome::Finished, "{what}");
            } else if let Err(error) = outcome {
                let run_dir = tiny_run::text(dir.path());
                assert!(error.to_string().contains(run_dir), "{what}: {error}");
            }
            for path in checkpoint::list(dir.path()).unwrap() {
                match checkpoint::read(&path) {
                    Ok(read) => {
                        let (state, expected) = &right[&read.state.checkpoint_name()];
                        assert_eq!(&read.state, state, "{what}");
                        assert!(&tensors(&read) == expected, "{what}: {}", path.display());
                    }
                    // Only a disk that says that all went well leaves something damaged under a final name.
                    Err(error) if fault == Fault::Lies => {
                        found_out += 1;
                        drop(error);
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
            go_on(dir.path(), &what);
            assert_same_end(dir.path(), whole.path());
        }
    }
    // The adapter, its config, the moments, the state and the manifest of the last checkpoint, which is the one that is left.
    assert_eq!(found_out, 5, "torn files that a disk lied about");
}

/// Continues from what is left, or begins anew where nothing is.
fn go_on(dir: &Path, what: &str) {
    let checkpoints = checkpoint::list(dir).unwrap();
    let is_whole = |path: &PathBuf| checkpoint::read(path).is_ok();
    let config = match checkpoints.iter().any(is_whole) {
        true => resumed(config(dir)),
        false => {
            checkpoints
                .iter()
                .for_each(|path| fs::remove_dir_all(path).unwrap());
            config(dir)
        }
    };
    let outcome = run_on(&FaultyDisk::new(None), config);
    assert_eq!(outcome.unwrap(), Outcome::Finished, "{what}");
    let left = names(dir);
    assert!(
        !left.iter().any(|name| name.ends_with(".partial")),
        "{what}: {left:?}"
    );
}

#[test]
fn a_directory_that_is_replaced_is_the_old_or_the_new_one_whenever_the_power_goes() {
    let write = |disk: &FaultyDisk, path: &Path, text: &str| -> qlora::Result<()> {
        let dir = AtomicDir::create_on(Arc::new(disk.clone()), path, Existing::Replace)?;
        let mut dir = ManifestWriter::new(dir);
        dir.write("text", |out| out.write_all(text.as_bytes()))?;
        dir.commit()
    };
    for has_exchange in [true, false] {
        let new_disk = |fault| FaultyDisk {
            has_exchange,
            ..FaultyDisk::new(fault)
        };
        let mut seen = [0, 0];
        for at in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("it");
            write(&new_disk(None), &path, "old").unwrap();
            let disk = new_disk(Some((at, Fault::PowerLoss)));
            let outcome = write(&disk, &path, "new");
            if disk.operations() <= at {
                outcome.unwrap();
                break;
            }
            remove_leftovers(dir.path()).unwrap();
            assert_eq!(names(dir.path()), ["it"], "operation {at}");
            let text = bytes(&path, "text");
            assert!(text == b"old" || text == b"new", "operation {at}");
            seen[usize::from(text == b"new")] += 1;
        }
        assert!(seen[0] > 5 && seen[1] > 0, "{seen:?}");
    }
}
