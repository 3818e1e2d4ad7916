//! What is named on the Hugging Face hub is downloaded into the hub's cache, and found there without a network: data sets,
//! models and adapters.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const TRAIN: &str = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 4]}\n";

/// What a hub answers, by the path that is asked for.
type Answers = BTreeMap<String, Vec<u8>>;

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// What a hub answers for a repository, `datasets/org/name` or `models/org/name`, at a revision that is `main` too: that it has
/// the files `told` besides, and what is in `files`.
fn repository(name: &str, revision: &str, told: &[&str], files: &[(&str, Vec<u8>)]) -> Answers {
    let file = |(name, bytes): &(&str, Vec<u8>)| {
        let (hash, size) = (sha256(bytes), bytes.len());
        // Weights are large files.
        let lfs = name
            .ends_with(".safetensors")
            .then(|| json!({"sha256": hash, "size": size}));
        json!({"rfilename": name, "size": size, "blobId": hash, "lfs": lfs})
    };
    let others = told
        .iter()
        .map(|name| json!({"rfilename": name, "size": 1, "blobId": "0"}));
    let siblings: Vec<_> = files.iter().map(file).chain(others).collect();
    let info = json!({"siblings": siblings, "sha": revision}).to_string();
    let page = name.trim_start_matches("models/");
    let file = |(name, bytes): &(&str, Vec<u8>)| {
        (format!("/{page}/resolve/{revision}/{name}"), bytes.clone())
    };
    let info = ["main", revision].map(|of| {
        let path = format!("/api/{name}/revision/{of}?blobs=true");
        (path, info.clone().into_bytes())
    });
    files.iter().map(file).chain(info).collect()
}

/// A hub with two data sets, of one of which a file cannot be had.
fn hub_of_rows() -> Hub {
    let rows = repository(
        "datasets/org/rows",
        REVISION,
        &["README.md", "data/test.jsonl"],
        &[("data/train.jsonl", TRAIN.into())],
    );
    let parts = repository(
        "datasets/org/parts",
        REVISION,
        &["train-2.jsonl"],
        &[("train-1.jsonl", TRAIN.into())],
    );
    Hub::of(rows.into_iter().chain(parts).collect())
}

struct Hub {
    endpoint: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

#[derive(Clone, Debug, PartialEq)]
struct Asked {
    path: String,
    headers: String,
}

impl Hub {
    fn of(answers: Answers) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let of_thread = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &answers, &of_thread);
            }
        });
        Self { endpoint, asked }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// The files that it was asked for, in their order.
    fn files(&self) -> Vec<String> {
        let asked = self.asked().into_iter();
        let names = asked.filter_map(|asked| {
            let (_, file) = asked.path.split_once("/resolve/")?;
            Some(file.split_once('/')?.1.to_string())
        });
        names.collect()
    }
}

fn answer(mut stream: TcpStream, answers: &Answers, all_asked: &Mutex<Vec<Asked>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let request = lines.next().unwrap().unwrap();
    let path = request.split(' ').nth(1).unwrap().to_string();
    let headers: Vec<String> = lines
        .map(|line| line.unwrap().to_ascii_lowercase())
        .take_while(|line| !line.is_empty())
        .collect();
    let asked = Asked {
        path: path.clone(),
        headers: headers.join("\n"),
    };
    let is_first = !all_asked
        .lock()
        .unwrap()
        .iter()
        .any(|before| before.path == path);
    all_asked.lock().unwrap().push(asked);
    let range = headers
        .iter()
        .find_map(|header| header.strip_prefix("range: bytes="));
    let start: usize = range.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
    let is_weights = path.ends_with(SHARD);
    let (status, body) = match answers.get(&path) {
        Some(_) if is_weights && path.contains("org/busy") && is_first => {
            ("503 Service Unavailable", [].as_slice())
        }
        Some(whole) if start > 0 => ("206 Partial Content", &whole[start..]),
        Some(whole) => ("200 OK", whole.as_slice()),
        None if path.contains("org/gated") => ("401 Unauthorized", [].as_slice()),
        None => ("404 Not Found", [].as_slice()),
    };
    let breaks_off = is_weights && path.contains("org/breaking") && is_first;
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len(),
    );
    stream.write_all(head.as_bytes()).unwrap();
    let sent = if breaks_off {
        body.len() / 2
    } else {
        body.len()
    };
    stream.write_all(&body[..sent]).unwrap();
}

/// The program with the cache in `home` and no network but what is said.
fn qlora(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.current_dir(home).args(args).env("HF_HOME", home);
    for variable in [
        "HF_ENDPOINT",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(variable);
    }
    command
}

fn inspect(home: &Path, name: &str) -> Command {
    qlora(home, &["inspect", name, "--json"])
}

fn rows(command: &mut Command) -> Value {
    let output = command.assert().success();
    let found: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    found["rows"].clone()
}

#[test]
fn a_data_set_is_downloaded_once_and_then_taken_from_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub_of_rows();
    let expected =
        json!([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]);
    let online = || {
        let mut command = inspect(home.path(), "org/rows");
        command.env("HF_ENDPOINT", &hub.endpoint);
        rows(&mut command)
    };
    assert_eq!(online(), expected);
    assert_eq!(hub.files(), ["data/train.jsonl"]);
    assert_eq!(online(), expected);
    assert_eq!(
        hub.files().len(),
        1,
        "what is in the cache is not fetched again"
    );

    let mut offline = inspect(home.path(), "org/rows");
    offline.env("HF_HUB_OFFLINE", "1");
    assert_eq!(rows(&mut offline), expected);
    let mut without_network = inspect(home.path(), "org/rows");
    without_network.env("HF_ENDPOINT", "http://127.0.0.1:9");
    assert_eq!(rows(&mut without_network), expected);
}

#[test]
fn a_data_set_of_which_a_part_is_missing_is_not_taken_from_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub_of_rows();
    let mut online = inspect(home.path(), "org/parts");
    online.env("HF_ENDPOINT", &hub.endpoint);
    online
        .assert()
        .failure()
        .stderr(contains("cannot be fetched"));
    let snapshot = format!("hub/datasets--org--parts/snapshots/{REVISION}/train-1.jsonl");
    assert!(home.path().join(snapshot).exists(), "the first part came");
    let mut offline = inspect(home.path(), "org/parts");
    offline.env("HF_HUB_OFFLINE", "1");
    offline.assert().failure().stderr(contains("or not whole"));

    // One file of it that was asked for alone is whole, but not the data set.
    let part = |name: &str, endpoint: Option<&str>| {
        let mut command = inspect(home.path(), name);
        match endpoint {
            Some(endpoint) => command.env("HF_ENDPOINT", endpoint),
            None => command.env("HF_HUB_OFFLINE", "1"),
        };
        command
    };
    rows(&mut part("org/parts/train-1.jsonl", Some(&hub.endpoint)));
    rows(&mut part("org/parts/train-1.jsonl", None));
    let whole = part("org/parts", None).assert().failure();
    whole.stderr(contains("or not whole"));
}

#[test]
fn a_data_set_that_cannot_be_brought_up_to_date_is_taken_as_it_is() {
    let home = tempfile::tempdir().unwrap();
    let of = |revision: &str, told: &[&str]| {
        let files = [("train-1.jsonl", TRAIN.into())];
        Hub::of(repository("datasets/org/rows", revision, told, &files))
    };
    let before = of(REVISION, &[]);
    let after = of(&REVISION.replace('0', "f"), &["train-2.jsonl"]);
    let mut expected = None;
    for endpoint in [Some(&before.endpoint), Some(&after.endpoint), None] {
        let mut command = inspect(home.path(), "org/rows");
        match endpoint {
            Some(endpoint) => command.env("HF_ENDPOINT", endpoint),
            None => command.env("HF_HUB_OFFLINE", "1"),
        };
        let found = rows(&mut command);
        assert_eq!(*expected.get_or_insert(found.clone()), found);
    }
}

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(path)
}

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00001-of-00001.safetensors";
/// What the hub's page of the model has and nobody needs.
const UNWANTED: [&str; 3] = [
    "consolidated.safetensors",
    "original/params.json",
    "pytorch_model.bin",
];

/// A small model in one shard, with its tokenizer, as files of a repository.
fn model_files() -> Vec<(&'static str, Vec<u8>)> {
    let read = |path: &str| fs::read(fixture(path)).unwrap();
    let weights = read("engine/llama_mha/model.safetensors");
    let tensors = SafeTensors::deserialize(&weights).unwrap();
    let shards: BTreeMap<_, _> = tensors
        .names()
        .into_iter()
        .map(|name| (name, SHARD))
        .collect();
    let index = json!({"weight_map": shards}).to_string();
    vec![
        ("config.json", read("engine/llama_mha/config.json")),
        ("tokenizer.json", read("data/tokenizer/tokenizer.json")),
        (
            "tokenizer_config.json",
            read("data/tokenizer/tokenizer_config.json"),
        ),
        (INDEX, index.into()),
        (SHARD, weights),
    ]
}

fn adapter_files() -> Vec<(&'static str, Vec<u8>)> {
    let read = |name| {
        let path = format!("engine/llama_mha/adapter/{name}");
        (name, fs::read(fixture(&path)).unwrap())
    };
    vec![
        read("adapter_config.json"),
        read("adapter_model.safetensors"),
    ]
}

/// That model under three names: as it is, on a hub that breaks off, and on one that is busy at first. An adapter for it; the
/// same in one file; and models that cannot be had.
fn models() -> Hub {
    let files = model_files();
    let of = |name: &str, files: &[(&str, Vec<u8>)]| {
        repository(&format!("models/org/{name}"), REVISION, &UNWANTED, files)
    };
    let with = |name: &str, bytes: Vec<u8>| {
        let mut files = files.clone();
        files.retain(|(other, _)| *other != name);
        files.push((name_of(name), bytes));
        files
    };
    let config: Value = serde_json::from_slice(&files[0].1).unwrap();
    let mut of_another_kind = config;
    of_another_kind["model_type"] = "gpt2".into();
    let outside = json!({"weight_map": {"a": "../../../../../outside.safetensors"}});
    let mut in_one_file = files.clone();
    in_one_file.retain(|(name, _)| *name != INDEX);
    in_one_file[3].0 = "model.safetensors";
    let mut damaged = of("damaged", &files);
    let weights = format!("/org/damaged/resolve/{REVISION}/{SHARD}");
    damaged.get_mut(&weights).unwrap()[1000] ^= 1;
    let answers = [
        of("model", &files),
        of("breaking", &files),
        of("busy", &files),
        of("single", &in_one_file),
        of("adapter", &adapter_files()),
        of("outside", &with(INDEX, outside.to_string().into())),
        of(
            "gpt2",
            &with("config.json", of_another_kind.to_string().into()),
        ),
        of("pickled", &files[..3]),
        damaged,
    ];
    Hub::of(answers.into_iter().flatten().collect())
}

fn name_of(name: &str) -> &'static str {
    match name {
        INDEX => INDEX,
        _ => "config.json",
    }
}

fn eval(home: &Path, model: &str) -> Command {
    fs::write(home.join("rows.jsonl"), TRAIN).unwrap();
    qlora(
        home,
        &["eval", "--model", model, "--data", "rows.jsonl", "--json"],
    )
}

fn loss(command: &mut Command) -> f64 {
    let output = command.assert().success();
    let found: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    found["loss"].as_f64().unwrap_or_else(|| panic!("{found}"))
}

fn snapshot(home: &Path, name: &str, revision: &str) -> PathBuf {
    home.join(format!("hub/models--org--{name}/snapshots/{revision}"))
}

#[test]
fn a_model_is_downloaded_once_and_trained_under_its_name() {
    let home = tempfile::tempdir().unwrap();
    let hub = models();
    fs::write(home.path().join("rows.jsonl"), TRAIN).unwrap();
    let train = |output_dir: &str| {
        let args = "train --model_name_or_path org/model --dataset rows.jsonl --max_steps 1 --lora_r 2 --output_dir";
        let mut command = qlora(home.path(), &args.split(' ').collect::<Vec<_>>());
        command.arg(output_dir);
        command
    };
    let mut online = train("online");
    online
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_TOKEN", "secret");
    online.assert().success();
    let first = hub.asked();
    let mut files = hub.files();
    files.sort_unstable();
    let mut wanted: Vec<_> = model_files().iter().map(|(name, _)| *name).collect();
    wanted.sort_unstable();
    assert_eq!(files, wanted);
    for asked in &first {
        let headers = &asked.headers;
        assert!(
            headers.contains("authorization: bearer secret"),
            "{asked:?}"
        );
        // The hub's servers do not keep to ranges of what they compress.
        assert!(headers.contains("accept-encoding: identity"), "{asked:?}");
    }
    // What is in the cache is not asked for, so that a run that goes on has the model that it began with.
    train("again")
        .env("HF_ENDPOINT", &hub.endpoint)
        .assert()
        .success();
    assert_eq!(hub.asked(), first);
    train("offline")
        .env("HF_HUB_OFFLINE", "1")
        .assert()
        .success();
    for run in ["online", "again", "offline"] {
        let config = fs::read(home.path().join(run).join("adapter_config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["base_model_name_or_path"], "org/model");
        assert_eq!(config["revision"], REVISION);
    }
    // The adapter names the model, which is in the cache.
    let export = "export --adapter online --to merged --out merged";
    let mut export = qlora(home.path(), &export.split(' ').collect::<Vec<_>>());
    export.env("HF_HUB_OFFLINE", "1").assert().success();
    assert!(home.path().join("merged/tokenizer.json").exists());
    // A run knows its model by the place in the cache, and what it was where that has gone.
    fs::remove_dir_all(home.path().join("hub")).unwrap();
    let mut verify = qlora(home.path(), &["verify", "run", "online"]);
    verify.env("HF_ENDPOINT", &hub.endpoint).assert().success();
    assert!(
        snapshot(home.path(), "model", REVISION)
            .join(SHARD)
            .exists()
    );
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let expected = fs::read(fixture("engine/llama_mha/model.safetensors")).unwrap();
    for (name, requests) in [("breaking", 2), ("busy", 2), ("model", 1)] {
        let home = tempfile::tempdir().unwrap();
        let hub = models();
        if name != "breaking" {
            // What an earlier run has left.
            let blobs = home.path().join(format!("hub/models--org--{name}/blobs"));
            fs::create_dir_all(&blobs).unwrap();
            let part = blobs.join(format!("{}.qlora-part", sha256(&expected)));
            fs::write(part, &expected[..4321]).unwrap();
        }
        let mut eval = eval(home.path(), &format!("org/{name}"));
        eval.env("HF_ENDPOINT", &hub.endpoint).assert().success();
        let asked = hub.asked().into_iter();
        let asked: Vec<_> = asked.filter(|asked| asked.path.ends_with(SHARD)).collect();
        assert_eq!(asked.len(), requests, "{name}: {asked:?}");
        let last = &asked[requests - 1].headers;
        let left = if name == "breaking" {
            expected.len() / 2
        } else {
            4321
        };
        assert!(
            last.contains(&format!("range: bytes={left}-")),
            "{name}: {last}"
        );
        let path = snapshot(home.path(), name, REVISION).join(SHARD);
        assert!(fs::read(path).unwrap() == expected, "{name}");
    }
}

#[test]
fn what_came_otherwise_than_the_hub_says_is_not_kept() {
    let home = tempfile::tempdir().unwrap();
    let hub = models();
    let mut eval = eval(home.path(), "org/damaged");
    let failure = eval.env("HF_ENDPOINT", &hub.endpoint).assert().failure();
    failure.stderr(contains(SHARD).and(contains("came otherwise than the hub says")));
    let blob = sha256(&fs::read(fixture("engine/llama_mha/model.safetensors")).unwrap());
    let blobs = home.path().join("hub/models--org--damaged/blobs");
    assert!(!blobs.join(&blob).exists());
    let part = blobs.join(format!("{blob}.qlora-part"));
    assert_eq!(part.metadata().unwrap().len(), 0);
}

/// `main` may be another commit by the time that more of a model is asked for.
#[test]
fn all_of_a_model_is_of_one_revision_and_nothing_is_fetched_twice() {
    let home = tempfile::tempdir().unwrap();
    let files = model_files();
    let other = REVISION.replace('0', "f");
    let of = |revision: &str, files: &[(&str, Vec<u8>)]| {
        Hub::of(repository("models/org/model", revision, &[], files))
    };
    let before = of(REVISION, &files);
    fs::write(home.path().join("rows.jsonl"), TRAIN).unwrap();
    let mut inspect = qlora(
        home.path(),
        &["inspect", "rows.jsonl", "--model", "org/model"],
    );
    inspect
        .env("HF_ENDPOINT", &before.endpoint)
        .assert()
        .success();
    let mut tokenizer = before.files();
    tokenizer.sort_unstable();
    assert_eq!(
        tokenizer,
        ["config.json", "tokenizer.json", "tokenizer_config.json"]
    );
    let mut changed = files.clone();
    changed[2].1.push(b'\n');
    let after = of(&other, &changed);
    eval(home.path(), "org/model")
        .env("HF_ENDPOINT", &after.endpoint)
        .assert()
        .success();
    assert_eq!(after.files(), ["tokenizer_config.json", INDEX, SHARD]);
    for (name, bytes) in &changed {
        let found = fs::read(snapshot(home.path(), "model", &other).join(name)).unwrap();
        assert!(found == *bytes, "{name}");
    }
    eval(home.path(), "org/model")
        .env("HF_HUB_OFFLINE", "1")
        .assert()
        .success();
}

#[test]
fn another_revision_than_main_is_asked_for_by_its_name() {
    let other = REVISION.replace('0', "f");
    let at = |name: &str, revision: &str, files: &[(&str, Vec<u8>)]| {
        let of_main = format!("/api/{name}/revision/main?blobs=true");
        let mut answers = repository(name, &other, &[], files);
        let info = answers.remove(&of_main).unwrap();
        answers.insert(of_main.replace("main", revision), info);
        answers
    };
    let train = [("data/train.jsonl", TRAIN.into())];
    let hub = Hub::of(
        at("models/org/model", "refs%2Fpr%2F3", &model_files())
            .into_iter()
            .chain(at("datasets/org/rows", "v1.0", &train))
            .collect(),
    );
    let home = tempfile::tempdir().unwrap();
    for (variable, value) in [
        ("HF_ENDPOINT", hub.endpoint.as_str()),
        ("HF_HUB_OFFLINE", "1"),
    ] {
        let mut model = eval(home.path(), "org/model@refs/pr/3");
        model.env(variable, value).assert().success();
        let mut data = inspect(home.path(), "org/rows@v1.0/data");
        assert_eq!(rows(data.env(variable, value)).as_array().unwrap().len(), 2);
        // `main` is another.
        let mut main = eval(home.path(), "org/model");
        main.env(variable, value).assert().failure();
        let mut main = inspect(home.path(), "org/rows");
        main.env(variable, value).assert().failure();
    }
    let mut unknown = eval(home.path(), "org/model@v2");
    let unknown = unknown.env("HF_ENDPOINT", &hub.endpoint).assert();
    let told = contains("org/model@v2 cannot be fetched").and(contains("or revision"));
    unknown.failure().stderr(told);
    let outside = eval(home.path(), "org/model@..").assert().failure();
    outside.stderr(contains("\"..\" is no revision"));
    for name in [
        "models--org--model/refs/refs/pr/3",
        "datasets--org--rows/refs/v1.0",
    ] {
        let commit = fs::read_to_string(home.path().join("hub").join(name)).unwrap();
        assert_eq!(commit, other, "{name}");
    }
}

/// Others fetch what they read of it.
#[test]
fn a_model_that_another_program_has_fetched_is_completed_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = models();
    let model = snapshot(home.path(), "model", REVISION);
    fs::create_dir_all(&model).unwrap();
    for (name, bytes) in model_files() {
        if name != "tokenizer_config.json" {
            fs::write(model.join(name), bytes).unwrap();
        }
    }
    let refs = home.path().join("hub/models--org--model/refs");
    fs::create_dir_all(&refs).unwrap();
    fs::write(refs.join("main"), REVISION).unwrap();
    eval(home.path(), "org/model")
        .env("HF_HUB_OFFLINE", "1")
        .assert()
        .success();
    let unreachable = &"http://127.0.0.1:9";
    let noted = eval(home.path(), "org/model")
        .env("HF_ENDPOINT", unreachable)
        .assert()
        .success();
    noted.stderr(contains("the copy in"));
    for _ in 0..2 {
        eval(home.path(), "org/model")
            .env("HF_ENDPOINT", &hub.endpoint)
            .assert()
            .success();
        assert_eq!(hub.files(), ["tokenizer_config.json"]);
        assert_eq!(hub.asked().len(), 2);
    }
    // A part of the weights is no model.
    fs::remove_file(model.join(SHARD)).unwrap();
    let lacking = eval(home.path(), "org/model")
        .env("HF_HUB_OFFLINE", "1")
        .assert()
        .failure();
    lacking.stderr(contains("or not whole"));
}

#[test]
fn an_adapter_is_downloaded_too_and_so_are_weights_in_one_file() {
    let home = tempfile::tempdir().unwrap();
    let hub = models();
    let of = |model: &str| {
        let mut command = eval(home.path(), model);
        command.env("HF_ENDPOINT", &hub.endpoint);
        command
    };
    let base = loss(&mut of("org/model"));
    let adapted = loss(of("org/model").args(["--adapter", "org/adapter"]));
    let asked_once = hub.asked().len();
    assert_eq!(
        loss(of("org/model").args(["--adapter", "org/adapter"])),
        adapted
    );
    assert_eq!(hub.asked().len(), asked_once);
    assert_ne!(base, adapted);
    assert_eq!(loss(&mut of("org/single")), base);
}

#[test]
fn a_plan_needs_the_config_alone() {
    let home = tempfile::tempdir().unwrap();
    let mut files = model_files();
    let mut config: Value = serde_json::from_slice(&files[0].1).unwrap();
    let plan = |model: &str, endpoint: &str| {
        let mut plan = qlora(
            home.path(),
            &["plan", "--model", model, "--max_seq_len", "64", "--json"],
        );
        let output = plan.env("HF_ENDPOINT", endpoint).assert().success();
        let plan: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
        plan
    };
    let hub = models();
    let of_config = plan("org/model", &hub.endpoint);
    assert_eq!(hub.files(), ["config.json"]);
    let dir = fixture("engine/llama_mha");
    assert_eq!(of_config, plan(dir.to_str().unwrap(), "http://127.0.0.1:9"));
    // What a 4-bit model has in 16 bits is told by its config.
    let skipped = [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.0.self_attn.q_proj",
    ];
    config["quantization_config"]["llm_int8_skip_modules"] = json!(skipped);
    files[0].1 = config.to_string().into();
    let mixed = Hub::of(repository("models/org/mixed", REVISION, &[], &files[..1]));
    assert_ne!(plan("org/mixed", &mixed.endpoint), of_config);
}

#[test]
fn what_cannot_be_had_is_told_before_weights_are_downloaded() {
    let home = tempfile::tempdir().unwrap();
    let hub = models();
    let stderr = |name: &str| {
        let mut quantize = qlora(home.path(), &["quantize", name, "out"]);
        let failure = quantize
            .env("HF_ENDPOINT", &hub.endpoint)
            .assert()
            .failure();
        String::from_utf8(failure.get_output().stderr.clone()).unwrap()
    };
    let of_another_kind = stderr("org/gpt2");
    assert!(
        of_another_kind.contains("`model_type` = \"gpt2\""),
        "{of_another_kind}"
    );
    assert!(
        !of_another_kind.contains("cannot be fetched"),
        "{of_another_kind}"
    );
    for (name, part) in [
        ("org/pickled", "has no weights in safetensors"),
        ("org/outside", "is no name of a file"),
        (
            "org/unknown",
            "there is none of that name or revision, or it is private",
        ),
        ("org/gated", "its terms have to be accepted"),
    ] {
        let said = stderr(name);
        assert!(said.contains(part), "{name}: {said}");
    }
    assert!(!hub.files().iter().any(|file| file == SHARD));
    let mut offline = qlora(home.path(), &["quantize", "org/model", "out"]);
    let offline = offline.env("HF_HUB_OFFLINE", "1").assert().failure();
    offline.stderr(contains("HF_HUB_OFFLINE is set"));
    // A path that begins here is one that is missing.
    fs::create_dir(home.path().join("models")).unwrap();
    assert!(stderr("models/llama").contains("there is no such directory"));
    assert!(stderr("models/llama/7b").contains("there is no such directory"));
}
