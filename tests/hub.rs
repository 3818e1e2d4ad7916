//! A data set on the Hugging Face hub is downloaded into the hub's cache, and found there without a network.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use assert_cmd::Command;
use predicates::str::contains;
use serde_json::{Value, json};

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const TRAIN: &str = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [3, 4]}\n";

/// A hub with one data set, which writes down what it was asked for.
fn hub() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let paths = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &paths);
        }
    });
    (endpoint, asked)
}

fn answer(mut stream: TcpStream, asked: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let request = lines.next().unwrap().unwrap();
    let path = request.split(' ').nth(1).unwrap().to_string();
    let headers: Vec<String> = lines
        .map(|line| line.unwrap())
        .take_while(|line| !line.is_empty())
        .collect();
    let is_probe = headers.iter().any(|header| header.ends_with("bytes=0-0"));
    let (status, body) = match path.as_str() {
        "/api/datasets/org/rows/revision/main" => {
            let files = ["README.md", "data/train.jsonl", "data/test.jsonl"]
                .map(|name| json!({"rfilename": name}));
            (
                "200 OK",
                json!({"siblings": files, "sha": REVISION}).to_string(),
            )
        }
        "/api/datasets/org/parts/revision/main" => {
            let files = ["train-1.jsonl", "train-2.jsonl"].map(|name| json!({"rfilename": name}));
            (
                "200 OK",
                json!({"siblings": files, "sha": REVISION}).to_string(),
            )
        }
        "/datasets/org/rows/resolve/main/data/train.jsonl"
        | "/datasets/org/parts/resolve/main/train-1.jsonl"
            if is_probe =>
        {
            ("206 Partial Content", TRAIN[..1].to_string())
        }
        "/datasets/org/rows/resolve/main/data/train.jsonl"
        | "/datasets/org/parts/resolve/main/train-1.jsonl" => {
            ("206 Partial Content", TRAIN.to_string())
        }
        _ => ("404 Not Found", String::new()),
    };
    asked.lock().unwrap().push(path);
    let response = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes 0-{}/{}\r\nETag: \"abc\"\r\n\
         X-Repo-Commit: {REVISION}\r\nConnection: close\r\n\r\n{body}",
        body.len(),
        body.len().saturating_sub(1),
        TRAIN.len()
    );
    stream.write_all(response.as_bytes()).unwrap();
}

fn inspect(home: &Path, name: &str) -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command
        .current_dir(home)
        .args(["inspect", name, "--json"])
        .env("HF_HOME", home);
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

fn rows(mut command: Command) -> Value {
    let output = command.assert().success();
    let found: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    found["rows"].clone()
}

#[test]
fn a_data_set_is_downloaded_once_and_then_taken_from_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let (endpoint, asked) = hub();
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
    let (endpoint, _) = hub();
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
