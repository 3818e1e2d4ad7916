//! Rows are rendered by the chat template that transformers would take, with the fields that it would give, and a row that
//! cannot be masked says what helps.

mod data_files;

use chrono::NaiveDate;
use data_files::{expect_row_error, jsonl, load_bytes, model_dir, trained_text, with_template};
use qlora::data::{ChatTemplate, GenerationPrompt, LoadOptions, Tokenizer, TrainOnSource};
use serde_json::{Map, Value, json};

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn question() -> Value {
    message("user", "a")
}

fn call() -> Value {
    json!({"type": "function", "function": {"name": "count", "arguments": {}}})
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "count"}}])
}

/// What is trained of a row.
fn trained(template: &str, row: Value) -> String {
    let tokenizer = with_template(template);
    let options = LoadOptions::default();
    let dataset = load_bytes("a.jsonl", &jsonl(&[row]), &options, Some(&tokenizer)).unwrap();
    trained_text(&dataset, 0, &tokenizer)
}

fn expect_error(template: &str, row: Value, expected: &str) {
    let tokenizer = with_template(template);
    let options = LoadOptions::default();
    expect_row_error(&jsonl(&[row]), &options, Some(&tokenizer), 1, expected);
}

fn error(template: &str, row: Value) -> String {
    let tokenizer = with_template(template);
    let options = LoadOptions::default();
    let result = load_bytes("a.jsonl", &jsonl(&[row]), &options, Some(&tokenizer));
    result.unwrap_err().to_string()
}

fn rendered(source: &str, messages: &[Value]) -> String {
    let template = ChatTemplate::new("t.jinja", source.into(), Map::new(), Vec::new()).unwrap();
    template
        .render(messages, None, GenerationPrompt::No)
        .unwrap()
}

#[test]
fn rows_with_tools_take_the_template_for_tools() {
    let dated = "tools {{ strftime_now('%Y-%m-%d') }}";
    let in_config =
        json!([{"name": "tool_use", "template": dated}, {"name": "default", "template": "plain"}]);
    let named = model_dir("tokenizer", json!({"chat_template": in_config}));
    let files = model_dir("tokenizer", json!({}));
    std::fs::write(files.path().join("chat_template.jinja"), "plain").unwrap();
    let additional = files.path().join("additional_chat_templates");
    std::fs::create_dir(&additional).unwrap();
    std::fs::write(additional.join("tool_use.jinja"), dated).unwrap();
    for dir in [named, files] {
        let mut tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert!(tokenizer.chat_template().unwrap().date().is_some());
        tokenizer.set_date(NaiveDate::from_ymd_opt(2024, 5, 6).unwrap());
        let template = tokenizer.chat_template().unwrap();
        let render = |tools: Option<&Value>| {
            let whole = template.render_for_training(&[question()], tools);
            let text = template.render(&[question()], tools, GenerationPrompt::No);
            assert_eq!(whole.unwrap().text, *text.as_ref().unwrap());
            text.unwrap()
        };
        assert_eq!(render(None), "plain");
        assert_eq!(render(Some(&tools())), "tools 2024-05-06");
    }
}

#[test]
fn content_beside_tool_calls_is_null() {
    let template = "{% for m in messages %}{% generation %}{% if m.content is none %}CALL {{ m.tool_calls[0].function.name }}\
                    {% else %}{{ m.content }}{% endif %}{% endgeneration %}{% endfor %}";
    let without = json!({"role": "assistant", "tool_calls": [call()]});
    let mut null = without.clone();
    null["content"] = Value::Null;
    for answer in [without, null] {
        let row = json!({"messages": [answer]});
        assert_eq!(trained(template, row), "CALL count");
    }
    let value = json!({"name": "count", "arguments": {}}).to_string();
    let sharegpt = json!({"conversations": [{"from": "function_call", "value": value}]});
    assert_eq!(trained(template, sharegpt), "CALL count");

    let joins = "{% for m in messages %}{% generation %}{{ '<' + m.content }}{% for call in m.tool_calls %}\
                 {{ call.function.name }}{% endfor %}{% endgeneration %}{% endfor %}";
    let row = json!({"messages": [{"role": "assistant", "tool_calls": [call()]}]});
    assert_eq!(trained(joins, row), "<count");
}

#[test]
fn a_template_that_leaves_tool_calls_out_is_refused() {
    let answer = json!({"role": "assistant", "content": null, "tool_calls": [call()]});
    let row = json!({"messages": [question(), answer]});
    for content in [
        "m.content",
        "'>' + m.content",
        "m.content if m.content else ''",
    ] {
        let template = format!(
            "{{% for m in messages %}}{{% generation %}}{{{{ {content} }}}}{{% endgeneration %}}{{% endfor %}}"
        );
        let expected = "the chat template leaves out the tool calls of `messages[1]` (`count`)";
        expect_error(&template, row.clone(), expected);
    }
}

#[test]
fn reasoning_has_the_names_that_templates_read() {
    let template = "{% for m in messages %}{% generation %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}\
                    {% endgeneration %}{% endfor %}";
    for (fields, expected) in [
        (json!({"reasoning": "r"}), "r|r|b"),
        (json!({"thinking": "t"}), "t|t|b"),
        (json!({"reasoning_content": "c", "reasoning": "r"}), "c|c|b"),
        (json!({"reasoning_content": "c", "thinking": "t"}), "c|t|b"),
        (json!({"reasoning_content": null, "thinking": "t"}), "t|t|b"),
        (json!({}), "||b"),
    ] {
        let mut answer = message("assistant", "b");
        let fields = fields.as_object().unwrap().clone();
        answer.as_object_mut().unwrap().extend(fields);
        assert_eq!(trained(template, json!({"messages": [answer]})), expected);
    }
}

#[test]
fn line_ends_of_a_template_are_line_feeds() {
    let source = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n\n{% endfor %}\nend\n";
    let expected = rendered(source, &[question()]);
    assert_eq!(expected, "a\n\nend");
    for line_end in ["\r\n", "\r"] {
        let source = source.replace('\n', line_end);
        assert_eq!(rendered(&source, &[question()]), expected, "{line_end:?}");
    }
}

/// What Jinja2 3.1 says.
#[test]
fn what_is_iterable_and_a_sequence_is_as_in_jinja2() {
    for (value, expected) in [
        ("none", "False False"),
        ("unknown", "True True"),
        ("'text'", "True True"),
        ("{}", "True True"),
        ("range(3)", "True True"),
        ("[]", "True True"),
        ("3", "False False"),
        ("true", "False False"),
        ("tools", "False False"),
    ] {
        let word = |test: &str| format!("{{{{ 'True' if {value} is {test} else 'False' }}}}");
        let source = format!("{} {}", word("iterable"), word("sequence"));
        assert_eq!(rendered(&source, &[]), expected, "{value}");
    }
    let listed = "{% if tools is iterable and tools | length > 0 %}tools{% endif %}{{ none }}";
    assert_eq!(rendered(listed, &[]), "None");
}

#[test]
fn a_row_that_is_trained_whole_needs_no_generation_block_for_each_message() {
    let template = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% generation %}{{ m.content }}\
                    {% endgeneration %}{% endfor %}";
    let tokenizer = with_template(template);
    let mut answer = message("assistant", "b");
    answer["train"] = false.into();
    let row = json!({"messages": [question(), answer, question(), message("assistant", "c")]});
    let options = LoadOptions {
        train_on_source: TrainOnSource::Yes,
        ..LoadOptions::default()
    };
    let bytes = jsonl(std::slice::from_ref(&row));
    let dataset = load_bytes("a.jsonl", &bytes, &options, Some(&tokenizer)).unwrap();
    let whole = trained_text(&dataset, 0, &tokenizer);
    assert_eq!(whole, "useraassistantbuseraassistantc");
    expect_error(template, row, "8 generation blocks for 2 messages");
}

#[test]
fn an_answer_that_does_not_begin_as_the_template_opens_it_says_what_helps() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<assistant><think>\n{% endif %}";
    let row = json!({"messages": [question(), message("assistant", "b")]});
    let error = error(template, row);
    let expected = "opens the assistant's turn with text that the answer in `messages[1]` does not begin with \
                    (\"<assistant><think>\\n\")";
    assert!(error.contains(expected), "{error}");
    assert!(error.contains("{% generation %}"), "{error}");
    assert!(
        !error.contains("mask_history") && !error.contains("split"),
        "{error}"
    );
}

#[test]
fn a_conversation_that_begins_with_the_assistant_says_what_helps() {
    let template = "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}\
                    {% endif %}{% for m in rest %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
    let mut greeting = message("assistant", "hello");
    let rest = [question(), message("assistant", "b")];
    let row = |greeting: &Value| json!({"messages": [greeting.clone(), rest[0], rest[1]]});
    let error = error(template, row(&greeting));
    for expected in [
        "`messages[0]` is the assistant's",
        "`train: false`",
        "undefined value",
    ] {
        assert!(error.contains(expected), "{error}");
    }
    greeting["train"] = false.into();
    assert_eq!(trained(template, row(&greeting)), "b");
}
