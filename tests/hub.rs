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

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const TRAIN: &str = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 4]}\n";

/// What a hub answers, by the path that is asked for.
type Answers = BTreeMap<String, Vec<u8>>;

/// What a hub answers for a repository, `datasets/org/name` or `models/org/name`: that it has the files `told`, and what is in
/// some of them.
fn repository(repository: &str, told: &[&str], files: &[(&str, Vec<u8>)]) -> Answers {
    let siblings: Vec<_> = told.iter().map(|name| json!({"rfilename": name})).collect();
    let info = json!({"siblings": siblings, "sha": REVISION}).to_string();
    let page = repository.trim_start_matches("models/");
    let file =
        |(name, bytes): &(&str, Vec<u8>)| (format!("/{page}/resolve/main/{name}"), bytes.clone());
    let info = (
        format!("/api/{repository}/revision/main"),
        info.into_bytes(),
    );
    files.iter().map(file).chain([info]).collect()
}

/// A hub with two data sets, of one of which a file is missing.
fn hub_of_rows() -> (String, Arc<Mutex<Vec<String>>>) {
    let rows = repository(
        "datasets/org/rows",
        &["README.md", "data/train.jsonl", "data/test.jsonl"],
        &[("data/train.jsonl", TRAIN.into())],
    );
    let parts = repository(
        "datasets/org/parts",
        &["train-1.jsonl", "train-2.jsonl"],
        &[("train-1.jsonl", TRAIN.into())],
    );
    hub(rows.into_iter().chain(parts).collect())
}

/// A hub, and what it was asked for.
fn hub(answers: Answers) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let paths = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &answers, &paths);
        }
    });
    (endpoint, asked)
}

fn answer(mut stream: TcpStream, answers: &Answers, asked: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let request = lines.next().unwrap().unwrap();
    let path = request.split(' ').nth(1).unwrap().to_string();
    let headers: Vec<String> = lines
        .map(|line| line.unwrap())
        .take_while(|line| !line.is_empty())
        .collect();
    let is_probe = headers.iter().any(|header| header.ends_with("bytes=0-0"));
    let (status, whole) = match answers.get(&path) {
        Some(whole) if path.starts_with("/api/") => ("200 OK", whole.as_slice()),
        Some(whole) => ("206 Partial Content", whole.as_slice()),
        None if path.contains("org/gated") => ("401 Unauthorized", [].as_slice()),
        None => ("404 Not Found", [].as_slice()),
    };
    let range = headers
        .iter()
        .find_map(|header| header.split_once("bytes="));
    let start = range.and_then(|(_, range)| range.split_once('-')?.0.parse().ok());
    let rest = &whole[start.unwrap_or(0).min(whole.len())..];
    let body = if is_probe {
        &rest[..rest.len().min(1)]
    } else {
        rest
    };
    let etag = path.replace('/', "-");
    let breaks_off = path.contains("org/breaking/resolve/main/model-") && body.len() == whole.len();
    asked.lock().unwrap().push(path);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes 0-{}/{}\r\nETag: \"{etag}\"\r\n\
         X-Repo-Commit: {REVISION}\r\nConnection: close\r\n\r\n",
        body.len(),
        body.len().saturating_sub(1),
        whole.len()
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
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "http_proxy",
        "HTTP_PROXY",
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

fn rows(mut command: Command) -> Value {
    let output = command.assert().success();
    let found: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    found["rows"].clone()
}

#[test]
fn a_data_set_is_downloaded_once_and_then_taken_from_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub_of_rows();
    let expected =
        json!([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]);
    let online = || {
        let mut command = inspect(home.path(), "org/rows");
        command.env("HF_ENDPOINT", &endpoint);
        rows(command)
    };
    assert_eq!(online(), expected);
    let downloads = || {
        asked
            .lock()
            .unwrap()
            .iter()
            .filter(|path| path.contains("/resolve/"))
            .count()
    };
    let first = downloads();
    assert!(first > 0);
    assert!(
        !asked
            .lock()
            .unwrap()
            .iter()
            .any(|path| path.contains("test.jsonl") || path.contains("README"))
    );
    assert_eq!(online(), expected);
    assert_eq!(
        downloads(),
        first,
        "what is in the cache is not fetched again"
    );

    let mut offline = inspect(home.path(), "org/rows");
    offline.env("HF_HUB_OFFLINE", "1");
    assert_eq!(rows(offline), expected);
    let mut without_network = inspect(home.path(), "org/rows");
    without_network.env("HF_ENDPOINT", "http://127.0.0.1:9");
    assert_eq!(rows(without_network), expected);
}

#[test]
fn a_data_set_of_which_a_part_is_missing_is_not_taken_from_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, _) = hub_of_rows();
    let mut online = inspect(home.path(), "org/parts");
    online.env("HF_ENDPOINT", &endpoint);
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
    rows(part("org/parts/train-1.jsonl", Some(&endpoint)));
    rows(part("org/parts/train-1.jsonl", None));
    let whole = part("org/parts", None).assert().failure();
    whole.stderr(contains("or not whole"));
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

/// A repository that tells of all that it has.
fn whole(name: &str, files: &[(&str, Vec<u8>)]) -> Answers {
    let told: Vec<_> = files.iter().map(|(name, _)| *name).collect();
    repository(&format!("models/org/{name}"), &told, files)
}

/// A model in one shard, also as one that comes in two parts; an adapter for it; and models that cannot be had.
fn models() -> Answers {
    let read = |path: &str| fs::read(fixture(path)).unwrap();
    let weights = read("engine/llama_mha/model.safetensors");
    let tensors = SafeTensors::deserialize(&weights).unwrap();
    let shards = tensors.names().into_iter().map(|name| (name, SHARD));
    let index =
        |shards: BTreeMap<&str, &str>| json!({"weight_map": shards}).to_string().into_bytes();
    let config = read("engine/llama_mha/config.json");
    let mut of_another_kind: Value = serde_json::from_slice(&config).unwrap();
    of_another_kind["model_type"] = "gpt2".into();
    let files = [
        ("config.json", config.clone()),
        ("tokenizer.json", read("data/tokenizer/tokenizer.json")),
        (
            "tokenizer_config.json",
            read("data/tokenizer/tokenizer_config.json"),
        ),
        (INDEX, index(shards.collect())),
        (SHARD, weights.clone()),
    ];
    let told = files.iter().map(|(name, _)| *name).chain(UNWANTED);
    let told: Vec<_> = told.collect();
    let of_adapter = ["adapter_config.json", "adapter_model.safetensors"]
        .map(|name| (name, read(&format!("engine/llama_mha/adapter/{name}"))));
    let outside = BTreeMap::from([("a", "../../../../../outside.safetensors")]);
    let outside = [("config.json", config), (INDEX, index(outside))];
    let gpt2 = [
        ("config.json", of_another_kind.to_string().into_bytes()),
        (SHARD, Vec::new()),
    ];
    let answers = [
        repository("models/org/model", &told, &files),
        repository("models/org/breaking", &told, &files),
        whole("adapter", &of_adapter),
        whole("outside", &outside),
        whole("gpt2", &gpt2),
    ];
    answers.into_iter().flatten().collect()
}

#[test]
fn a_model_is_downloaded_once_and_trained_under_its_name() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub(models());
    fs::write(home.path().join("rows.jsonl"), TRAIN).unwrap();
    let train = |output_dir: &str| {
        let args = [
            "train",
            "--model_name_or_path",
            "org/model",
            "--dataset",
            "rows.jsonl",
            "--max_steps",
            "1",
        ];
        let mut command = qlora(home.path(), &args);
        command.args(["--output_dir", output_dir, "--lora_r", "2"]);
        command
    };
    train("online")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .success();
    let first = asked.lock().unwrap().clone();
    assert!(first.iter().any(|path| path.ends_with(SHARD)), "{first:?}");
    for name in UNWANTED {
        assert!(!first.iter().any(|path| path.ends_with(name)), "{name}");
    }
    // What is in the cache is not asked for, so that a run that goes on has the model that it began with.
    train("again")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .success();
    assert_eq!(*asked.lock().unwrap(), first);
    train("offline")
        .env("HF_HUB_OFFLINE", "1")
        .assert()
        .success();
    for run in ["online", "again", "offline"] {
        let config = fs::read(home.path().join(run).join("adapter_config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["base_model_name_or_path"], "org/model");
    }
    let mut verify = qlora(home.path(), &["verify", "run", "online"]);
    verify.env("HF_HUB_OFFLINE", "1").assert().success();
    // The adapter names the model, which is in the cache.
    let mut export = qlora(
        home.path(),
        &[
            "export",
            "--adapter",
            "online",
            "--to",
            "merged",
            "--out",
            "merged",
        ],
    );
    export.env("HF_HUB_OFFLINE", "1").assert().success();
    assert!(home.path().join("merged/tokenizer.json").exists());
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub(models());
    fs::write(home.path().join("rows.jsonl"), TRAIN).unwrap();
    let mut eval = qlora(
        home.path(),
        &["eval", "--model", "org/breaking", "--data", "rows.jsonl"],
    );
    eval.env("HF_ENDPOINT", &endpoint).assert().success();
    let asked = asked.lock().unwrap();
    // To hear of it, and for each part of it.
    let requests = asked.iter().filter(|path| path.ends_with(SHARD));
    assert_eq!(requests.count(), 3, "{asked:?}");
    let snapshot = home
        .path()
        .join(format!("hub/models--org--breaking/snapshots/{REVISION}"));
    let expected = fs::read(fixture("engine/llama_mha/model.safetensors")).unwrap();
    assert!(fs::read(snapshot.join(SHARD)).unwrap() == expected);
}

#[test]
fn an_adapter_is_downloaded_too() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub(models());
    fs::write(home.path().join("rows.jsonl"), TRAIN).unwrap();
    let eval = || {
        let args = [
            "eval",
            "--model",
            "org/model",
            "--adapter",
            "org/adapter",
            "--data",
            "rows.jsonl",
        ];
        qlora(home.path(), &args)
    };
    eval().env("HF_ENDPOINT", &endpoint).assert().success();
    let asked_once = asked.lock().unwrap().len();
    eval().env("HF_ENDPOINT", &endpoint).assert().success();
    assert_eq!(asked.lock().unwrap().len(), asked_once);
    eval().env("HF_HUB_OFFLINE", "1").assert().success();
}

#[test]
fn a_plan_needs_the_config_alone() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub(models());
    let mut plan = qlora(
        home.path(),
        &[
            "plan",
            "--model",
            "org/model",
            "--max_seq_len",
            "64",
            "--json",
        ],
    );
    let output = plan.env("HF_ENDPOINT", &endpoint).assert().success();
    let of_config: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let downloads = |asked: &[String]| {
        asked
            .iter()
            .filter(|path| path.contains("/resolve/"))
            .cloned()
            .collect::<Vec<_>>()
    };
    let downloaded = downloads(&asked.lock().unwrap());
    assert!(
        downloaded.iter().all(|path| path.ends_with("config.json")),
        "{downloaded:?}"
    );
    let dir = fixture("engine/llama_mha");
    let mut plan = qlora(
        home.path(),
        &[
            "plan",
            "--model",
            dir.to_str().unwrap(),
            "--max_seq_len",
            "64",
            "--json",
        ],
    );
    let output = plan.assert().success();
    let of_weights: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(of_config, of_weights);
}

#[test]
fn what_cannot_be_had_is_told_before_anything_is_downloaded() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub(models());
    let quantize = |name: &str| qlora(home.path(), &["quantize", name, "out"]);
    let of_another_kind = quantize("org/gpt2")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .failure();
    of_another_kind
        .stderr(contains("`model_type` = \"gpt2\"").and(contains("cannot be fetched").not()));
    assert!(
        !asked
            .lock()
            .unwrap()
            .iter()
            .any(|path| path.ends_with(SHARD))
    );
    let unknown = quantize("org/unknown")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .failure();
    unknown.stderr(contains(
        "not a directory here, and org/unknown cannot be fetched",
    ));
    let offline = quantize("org/model")
        .env("HF_HUB_OFFLINE", "1")
        .assert()
        .failure();
    offline.stderr(contains("HF_HUB_OFFLINE is set"));
    let outside = quantize("org/outside")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .failure();
    outside.stderr(contains("is no name of a file"));
    let gated = quantize("org/gated")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .failure();
    gated.stderr(contains("its terms have to be accepted"));
    // A path that begins here is one that is missing.
    fs::create_dir(home.path().join("models")).unwrap();
    let missing = quantize("models/llama")
        .env("HF_ENDPOINT", &endpoint)
        .assert()
        .failure();
    missing.stderr(contains("there is no such directory"));
}
