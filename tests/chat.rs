//! Tokenizers and chat templates give the token ids and assistant masks that transformers gives.
//! Fixtures: `tests/fixtures/make_data.py`.

mod data_files;

use data_files::{
    TOKENIZERS, expect_row_error, fixture, fixtures, integers, jsonl, load_bytes, tokenizer,
};
use qlora::data::{
    ChatTemplate, GenerationPrompt, LoadOptions, SpecialTokens, Tokenizer, Turns, Unlabelled,
};
use qlora::{Error, IGNORE_INDEX};
use serde_json::{Map, Value, json};

/// A model directory with the tokenizer fixture `name` and `chat_template` in its config.
fn model_dir(name: &str, chat_template: Value) -> tempfile::TempDir {
    data_files::model_dir(name, json!({ "chat_template": chat_template }))
}

#[test]
fn encode_and_decode_equal_transformers() {
    let expected = fixture("encode.json");
    for name in TOKENIZERS {
        let tokenizer = tokenizer(name);
        for case in expected[name].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = integers(&case["ids"]);
            assert_eq!(tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
            let decoded = tokenizer.decode(&ids, SpecialTokens::Keep).unwrap();
            assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{name}");
        }
    }
}

#[test]
fn special_tokens_are_read_from_every_place() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    std::fs::copy(
        fixtures().join("tokenizer/tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    write(
        "tokenizer_config.json",
        json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null, "add_bos_token": true}),
    );
    write(
        "special_tokens_map.json",
        json!({"eos_token": "<|eot_id|>", "pad_token": {"content": "<pad>"}}),
    );
    write("generation_config.json", json!({"eos_token_id": [2, 4]}));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.bos_token_id(), Some(1));
    assert_eq!(tokenizer.eos_token(), Some("<|eot_id|>"));
    assert_eq!(tokenizer.pad_token_id(), Some(0));
    assert_eq!(tokenizer.eos_token_ids(), [2, 4, 7]);
    let plain = tokenizer.encode("Hello").unwrap();
    let with_bos = tokenizer.encode_with_specials("Hello").unwrap();
    assert_eq!(with_bos, [&[1], plain.as_slice()].concat());
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(plain[0]));

    write("generation_config.json", json!({"eos_token_id": "two"}));
    let error = Tokenizer::from_dir(dir.path()).err().unwrap().to_string();
    assert!(
        error.contains("generation_config.json: `eos_token_id`"),
        "{error}"
    );
}

#[test]
fn a_sentencepiece_model_alone_says_how_to_convert_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.model"), b"\n\x0f").unwrap();
    let error = Tokenizer::from_dir(dir.path()).err().unwrap().to_string();
    assert!(
        error.contains("tokenizer.model: ") && error.contains("save_pretrained"),
        "{error}"
    );
}

#[test]
fn a_missing_or_damaged_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Tokenizer::from_dir(dir.path()),
        Err(Error::Io { .. })
    ));
    std::fs::write(dir.path().join("tokenizer.json"), b"{\"model\": 3}").unwrap();
    assert!(matches!(
        Tokenizer::from_dir(dir.path()),
        Err(Error::Malformed { .. })
    ));
}

/// The cases of a tokenizer, each with the source of its template.
fn chat_cases(tokenizer: &str) -> Vec<(Value, String)> {
    let expected = fixture("chat.json");
    let cases = expected[tokenizer].as_array().unwrap().iter();
    let with_template = cases.map(|case| {
        let path = fixtures()
            .join("templates")
            .join(case["template"].as_str().unwrap());
        (case.clone(), std::fs::read_to_string(path).unwrap())
    });
    with_template.collect()
}

fn without_generation_tags(template: &str) -> String {
    let tag = regex::Regex::new(r"\{%-?\s*(end)?generation\s*-?%\}").unwrap();
    tag.replace_all(template, "").into_owned()
}

#[test]
fn chat_ids_and_masks_equal_transformers() {
    let mut refused = 0;
    for name in TOKENIZERS {
        for (case, template) in chat_cases(name) {
            refused += usize::from(check_chat(name, &case, &template) == Outcome::Refused);
        }
    }
    assert!(
        refused > 0,
        "no template of the fixtures refuses a conversation"
    );
}

#[test]
fn masks_derived_from_prefixes_equal_generation_blocks_or_are_an_error() {
    let mut not_nested = 0;
    for name in TOKENIZERS {
        for (case, template) in chat_cases(name) {
            if case["refused"] == true {
                continue;
            }
            assert_eq!(case["plain_is_same"], true, "{}", label(name, &case));
            let outcome = check_chat(name, &case, &without_generation_tags(&template));
            let expected = match case["plain_nests"].as_bool().unwrap() {
                true => Outcome::Equal,
                false => Outcome::NotNested,
            };
            assert_eq!(outcome, expected, "{}", label(name, &case));
            not_nested += usize::from(outcome == Outcome::NotNested);
        }
    }
    assert!(not_nested > 0, "every template of the fixtures nests");
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Equal,
    Refused,
    NotNested,
}

fn label(tokenizer: &str, case: &Value) -> String {
    format!("{tokenizer}: {}: {}", case["template"], case["name"])
}

/// Asserts that text, ids and mask are those of the fixture, or that both sides refuse.
fn check_chat(name: &str, case: &Value, template: &str) -> Outcome {
    let label = label(name, case);
    let dir = model_dir(name, template.into());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let tools = Some(&case["tools"]).filter(|tools| !tools.is_null());
    let messages = case["messages"].as_array().unwrap();
    let chat_template = tokenizer.chat_template().unwrap();
    let text = chat_template.render(messages, tools, GenerationPrompt::No);
    if case["refused"] == true {
        assert!(text.is_err(), "{label}");
        return Outcome::Refused;
    }
    assert_eq!(text.unwrap(), case["text"].as_str().unwrap(), "{label}");
    if let Some(prompt) = case["prompt"].as_str() {
        let text = chat_template.render(messages, tools, GenerationPrompt::Yes);
        assert_eq!(text.unwrap(), prompt, "{label}");
    }

    let mut record = match tools {
        Some(tools) => json!({"messages": messages, "tools": tools}),
        None => json!({"messages": messages}),
    };
    if leaves_calls_out(&case["text"], messages) {
        let bytes = jsonl(std::slice::from_ref(&record));
        let options = LoadOptions::default();
        let reason = load_bytes("chat.jsonl", &bytes, &options, Some(&tokenizer));
        let reason = reason.unwrap_err().to_string();
        let told_why = ["leaves out the tool calls", "cannot be told apart"];
        assert!(
            told_why.iter().any(|why| reason.contains(why)),
            "{label}: {reason}"
        );
        // The same text, and so the same mask.
        for message in record["messages"].as_array_mut().unwrap() {
            message.as_object_mut().unwrap().remove("tool_calls");
        }
    }
    let options = LoadOptions {
        unlabelled: Unlabelled::Keep,
        ..LoadOptions::default()
    };
    let dataset = match load_bytes("chat.jsonl", &jsonl(&[record]), &options, Some(&tokenizer)) {
        Ok(dataset) => dataset,
        Err(error) => {
            let reason = error.to_string();
            assert!(reason.contains("cannot be told apart"), "{label}: {reason}");
            return Outcome::NotNested;
        }
    };
    let example = dataset.example(0);
    assert_eq!(
        example.input_ids,
        integers::<u32>(&case["input_ids"]),
        "{label}"
    );
    let mask = case["assistant_mask"].as_str().unwrap().chars();
    for (i, (&label_id, is_assistant)) in example.labels.iter().zip(mask).enumerate() {
        let expected = if is_assistant == '1' {
            i64::from(example.input_ids[i])
        } else {
            IGNORE_INDEX
        };
        assert_eq!(label_id, expected, "{label}: token {i}");
    }
    Outcome::Equal
}

/// Whether a function that is called in `messages` is not named in `text`.
fn leaves_calls_out(text: &Value, messages: &[Value]) -> bool {
    let calls = messages.iter().filter_map(|m| m["tool_calls"].as_array());
    let mut names = calls.flatten().map(|call| &call["function"]["name"]);
    let text = text.as_str().unwrap();
    names.any(|name| !text.contains(name.as_str().unwrap()))
}

fn chat_template(source: &str) -> qlora::Result<ChatTemplate> {
    ChatTemplate::new("chat_template.jinja", source.into(), Map::new(), Vec::new())
}

fn conversation() -> Vec<Value> {
    vec![
        json!({"role": "user", "content": "a"}),
        json!({"role": "assistant", "content": "b"}),
        json!({"role": "user", "content": "c"}),
        json!({"role": "assistant", "content": "d"}),
    ]
}

#[test]
fn a_template_whose_prefixes_do_not_nest_is_an_error() {
    let last_turn_only = "{% for m in messages %}{{ m.role }}{% if loop.last %}<think></think>{% endif %}{{ m.content }}\
                          {% endfor %}{% if add_generation_prompt %}assistant{% endif %}";
    let template = chat_template(last_turn_only).unwrap();
    let error = template
        .render_for_training(&conversation(), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("messages[1]") && error.contains("{% generation %}"),
        "{error}"
    );
}

#[test]
fn a_template_says_why_it_refuses_a_conversation() {
    let template = chat_template("{{ raise_exception('roles must alternate') }}").unwrap();
    let error = template
        .render_for_training(&conversation(), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("chat_template.jinja: ") && error.contains("roles must alternate"),
        "{error}"
    );
}

#[test]
fn a_template_that_is_not_valid_names_its_line() {
    for source in [
        "a\n{% for m in messages %}",
        "a\n{% generation %}",
        "a\n{{ x + }}",
    ] {
        let error = chat_template(source).err().unwrap().to_string();
        assert!(error.contains("chat_template:2"), "{error}");
    }
}

#[test]
fn a_message_cannot_forge_the_assistant_mask() {
    let template = chat_template(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    )
    .unwrap();
    for content in ["\u{FDD0}", "\u{FDD1}", "x\u{FDD1}y\u{FDD0}z"] {
        let messages = [json!({"role": "user", "content": content})];
        assert!(
            template.render_for_training(&messages, None).is_err(),
            "{content:?}"
        );
    }
}

#[test]
fn of_named_templates_the_default_is_used() {
    let named =
        json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    let dir = model_dir("tokenizer", named);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let render = |t: &Tokenizer| {
        let template = t.chat_template().unwrap();
        template
            .render(&conversation(), None, GenerationPrompt::No)
            .unwrap()
    };
    assert_eq!(render(&tokenizer), "d");
    std::fs::write(dir.path().join("chat_template.jinja"), "j\n").unwrap();
    assert_eq!(render(&Tokenizer::from_dir(dir.path()).unwrap()), "j");
}

#[test]
fn strftime_now_refuses_a_bad_format() {
    let year = chat_template("{{ strftime_now('%Y') }}").unwrap();
    let text = year.render(&[], None, GenerationPrompt::No).unwrap();
    assert_eq!(text.len(), 4);
    let bad = chat_template("{{ strftime_now('%Q%') }}").unwrap();
    assert!(bad.render(&[], None, GenerationPrompt::No).is_err());
}

/// The trained texts of one conversation, in a template with and in one without generation blocks.
fn trained_texts(record: &Value, turns: Turns) -> Vec<Vec<String>> {
    let chatml = std::fs::read_to_string(fixtures().join("templates/qwen2_5.jinja")).unwrap();
    let templates = [chatml.clone(), without_generation_tags(&chatml)];
    let texts = templates.iter().map(|template| {
        let dir = model_dir("tokenizer", template.as_str().into());
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let options = LoadOptions {
            turns,
            ..LoadOptions::default()
        };
        let bytes = jsonl(std::slice::from_ref(record));
        let dataset = load_bytes("chat.jsonl", &bytes, &options, Some(&tokenizer)).unwrap();
        let example = dataset.example(0);
        let runs = example.labels.split(|&label| label == IGNORE_INDEX);
        let runs = runs.filter(|run| !run.is_empty());
        let text = |run: &[i64]| {
            let ids: Vec<u32> = run.iter().map(|&id| id as u32).collect();
            tokenizer.decode(&ids, SpecialTokens::Keep).unwrap()
        };
        runs.map(text).collect()
    });
    texts.collect()
}

#[test]
fn turns_are_trained_with_their_end_token_as_the_options_and_messages_say() {
    let all = json!({"messages": conversation()});
    for found in trained_texts(&all, Turns::Every) {
        assert_eq!(found, ["b<|im_end|>", "d<|im_end|>"]);
    }
    for found in trained_texts(&all, Turns::Last) {
        assert_eq!(found, ["d<|im_end|>"]);
    }
    for flag in [json!({"train": false}), json!({"weight": 0})] {
        let mut flagged = all.clone();
        let (name, value) = flag.as_object().unwrap().iter().next().unwrap();
        flagged["messages"][3][name] = value.clone();
        for found in trained_texts(&flagged, Turns::Every) {
            assert_eq!(found, ["b<|im_end|>"]);
        }
    }
    let mut first = all.clone();
    first["messages"][1]["train"] = true.into();
    for found in trained_texts(&first, Turns::Last) {
        assert_eq!(found, ["b<|im_end|>", "d<|im_end|>"]);
    }
}

#[test]
fn a_question_is_trained_where_its_flag_asks_for_it_and_the_template_tells_it_apart() {
    let mut record = json!({"messages": conversation()});
    record["messages"][0]["train"] = true.into();
    let chatml = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let dir = model_dir("tokenizer", chatml.into());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let options = LoadOptions::default();
    let dataset = load_bytes(
        "a.jsonl",
        &jsonl(&[record.clone()]),
        &options,
        Some(&tokenizer),
    )
    .unwrap();
    let example = dataset.example(0);
    let first_trained = example
        .labels
        .iter()
        .position(|&label| label != IGNORE_INDEX);
    assert_eq!(
        first_trained,
        Some(0),
        "the whole message, its head included"
    );

    let blocks =
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    let dir = model_dir("tokenizer", blocks.into());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    expect_row_error(
        &jsonl(&[record]),
        &options,
        Some(&tokenizer),
        1,
        "`messages[0]` is to be trained",
    );
}

#[test]
fn sharegpt_is_the_same_conversation_in_other_names() {
    let call = json!({"name": "count", "arguments": {"what": "apples"}});
    let openai = json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"type": "function", "function": {"name": "count", "arguments": "{\"what\": \"apples\"}"}}]},
        {"role": "tool", "content": "12", "name": null},
        {"role": "assistant", "content": "12 apples.", "tool_calls": null},
    ]});
    let sharegpt = json!({"system": "Be brief.", "tools": "", "conversations": [
        {"from": "human", "value": "How many?"},
        {"from": "function_call", "value": call.to_string()},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "12 apples."},
    ]});
    let template = std::fs::read_to_string(fixtures().join("templates/qwen2_5.jinja")).unwrap();
    let dir = model_dir("tokenizer", template.into());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let options = LoadOptions::default();
    let rows = [openai, sharegpt].map(|record| {
        let dataset = load_bytes("a.jsonl", &jsonl(&[record]), &options, Some(&tokenizer)).unwrap();
        dataset.example(0)
    });
    assert_eq!(rows[0], rows[1]);
    let text = tokenizer
        .decode(&rows[0].input_ids, SpecialTokens::Keep)
        .unwrap();
    assert!(
        text.contains("\"arguments\": {\"what\": \"apples\"}"),
        "{text}"
    );
}

#[test]
fn bad_messages_name_the_message() {
    let dir = model_dir(
        "tokenizer",
        json!("{% for m in messages %}{{ m.content }}{% endfor %}"),
    );
    let with_template = Tokenizer::from_dir(dir.path()).unwrap();
    let options = LoadOptions::default();
    for (messages, reason) in [
        (json!("hello"), "`messages` is a string, expected an array"),
        (json!([]), "`messages` is empty"),
        (
            json!(["hello"]),
            "`messages[0]` is a string, expected an object",
        ),
        (json!([{"role": "user"}]), "`messages[0]` has no `content`"),
        (
            json!([{"role": "user", "content": 3}]),
            "`messages[0].content` is a number",
        ),
        (
            json!([{"role": null, "content": ""}]),
            "`messages[0]` has no `role`",
        ),
        (
            json!([{"role": 1, "content": ""}]),
            "`messages[0].role` is a number",
        ),
        (
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            "`messages[0].content[0]` is of type \"image_url\", only text",
        ),
        (
            json!([{"role": "user", "content": "", "train": "no"}]),
            "`messages[0].train` is \"no\"",
        ),
        (
            json!([{"role": "assistant", "content": "", "weight": 0.5}]),
            "`messages[0].weight` is 0.5",
        ),
        (
            json!([{"role": "assistant", "tool_calls": {}}]),
            "`messages[0].tool_calls` is an object",
        ),
    ] {
        let bytes = jsonl(&[json!({"messages": messages})]);
        expect_row_error(&bytes, &options, Some(&with_template), 1, reason);
    }
    let bytes = jsonl(&[json!({"messages": conversation()})]);
    let without_template = tokenizer("tokenizer");
    expect_row_error(
        &bytes,
        &options,
        Some(&without_template),
        1,
        "no chat template",
    );
}

#[test]
fn an_answer_ends_with_the_token_that_the_template_writes_behind_it() {
    let source = |name: &str| {
        let path = fixtures().join("templates").join(format!("{name}.jinja"));
        std::fs::read_to_string(path).unwrap()
    };
    for (name, end) in [
        ("chatml", Some("<|im_end|>")),
        ("llama3", Some("<|eot_id|>")),
        // Its eos is the end.
        ("mistral", None),
    ] {
        let dir = model_dir("tokenizer", source(name).into());
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let eos = tokenizer.eos_token_ids().to_vec();
        assert!(!eos.is_empty());
        let end = end.map(|token| tokenizer.token_to_id(token).unwrap());
        let expected: Vec<u32> = eos.into_iter().chain(end).collect();
        assert_eq!(tokenizer.answer_end_ids().unwrap(), expected, "{name}");
    }
}
